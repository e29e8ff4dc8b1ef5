"""log.tensorboard: the same numbers under the same steps as metrics.jsonl, each once, also after a kill."""

import math
import shutil
import sys

import pytest
from conftest import tiny_values

from trainer.checkpoint.manifest import step_name
from trainer.commands.train import run as train
from trainer.core.errors import UserError
from trainer.runs.metrics import read_rows
from trainer.runs.tensorboard import TensorBoard, as_markdown
from trainer.runtime.distributed import World


def scalars(folder):
    """Tag -> [(step, value)], as TensorBoard shows them."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    events = accumulator.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    texts = {tag: events.Tensors(tag) for tag in events.Tags()["tensors"]}
    return found, {
        tag: [(event.step, event.tensor_proto.string_val[0].decode()) for event in all_] for tag, all_ in texts.items()
    }


def check(folder):
    """What TensorBoard shows is what metrics.jsonl has."""
    rows = read_rows(folder / "metrics.jsonl")
    found, texts = scalars(folder)
    keys = {key for row in rows for key, value in row.items() if type(value) in (int, float)} - {"step"}
    assert set(found) == keys
    for key in keys:
        expected = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        assert [step for step, _ in found[key]] == [step for step, _ in expected], key
        for (_, shown), (_, value) in zip(found[key], expected, strict=True):
            assert math.isclose(shown, value, rel_tol=2**-23, abs_tol=1e-30)  # fp32 in the event file
    return texts


def test_it_shows_the_rows_and_the_samples(tiny_dataset, tmp_path):
    pytest.importorskip("tensorboard")
    values = tiny_values(tiny_dataset, tmp_path / "r", max_steps=4, log__tensorboard=True, log__sample_tokens=3)
    values["evaluation"] |= {"every": 2, "patience": 0}
    values["log"]["demo_tokens"] = 4
    train(values)
    texts = check(tmp_path / "r")
    assert [step for step, _ in texts["sample/text_summary"]] == [2, 4]
    samples = (tmp_path / "r" / "samples.txt").read_text().split("\n\n===")
    shown = "\n".join(line.removeprefix("    ") for line in texts["sample/text_summary"][0][1].splitlines())
    assert shown.strip() in samples[0]


def test_a_killed_run_goes_on_without_showing_a_step_twice(tiny_dataset, tmp_path):
    """As a kill after step 8 would leave it if the newest checkpoint is that of step 4: rows of later steps are in the event file."""
    pytest.importorskip("tensorboard")
    folder = tmp_path / "r"
    values = tiny_values(tiny_dataset, folder, max_steps=12, log__tensorboard=True, evaluation__every=3)
    values["checkpoint"]["keep"] = 5
    train(values)
    for step in (8, 12):
        shutil.rmtree(folder / "checkpoints" / step_name(step))
    train(values)
    assert len(list((folder / "tensorboard").iterdir())) == 2
    check(folder)


def test_without_the_package_there_is_one_line_before_training(tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        UserError, match=r"log.tensorboard: tensorboard is not installed; `pip install 'crescendo-lm\[tensorboard\]'`"
    ):
        train(tiny_values(tiny_dataset, tmp_path / "r", max_steps=2, log__tensorboard=True))
    assert not (tmp_path / "r" / "metrics.jsonl").exists()


def test_a_failure_is_told_once_and_ends_nothing(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    board = TensorBoard(True, tmp_path, 0, World())
    board.write({"step": 1, "loss": 1.0})
    board.sample("text", 1)
    board.flush()
    board.close()
    said = capsys.readouterr().err
    assert said.count("warning: tensorboard") == 1 and "training goes on" in said


def test_off_it_writes_nothing(tmp_path):
    board = TensorBoard(False, tmp_path, 0, World())
    board.write({"step": 1, "loss": 1.0})
    board.close()
    assert list(tmp_path.iterdir()) == []


def test_texts_are_shown_as_they_are():
    assert as_markdown("# no heading\n*b*") == "    # no heading\n    *b*"
