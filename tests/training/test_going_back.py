"""`train --from_step N`: a run goes on from an older checkpoint of its own, and nothing is lost."""

import json
import shutil

import pytest
from conftest import tiny_values
from filelock import FileLock
from tiny_runs import losses, same, weights

from trainer.checkpoint import format as checkpoint
from trainer.commands.train import run as train
from trainer.core.errors import Damaged, UserError
from trainer.runs import going_back
from trainer.runs.metrics import read_rows


@pytest.fixture(scope="module")
def whole(tiny_dataset, tmp_path_factory):
    """A run of 12 steps with the checkpoints of steps 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    values = tiny_values(tiny_dataset, folder, evaluation__every=5, log__sample_tokens=3)
    values["checkpoint"]["keep"] = 5
    train(values)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "r")


def steps(folder):
    return [step for step, _ in checkpoint.found(folder / "checkpoints")]


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_it_repeats_the_run_bit_for_bit_and_keeps_what_was_there(whole, folder, capsys):
    (folder / "wandb-id").write_text("abc")
    train({"run_dir": str(folder), "from_step": 4})
    said = capsys.readouterr().err
    assert (
        "goes back to step-00000004" in said and "step-00000012.replaced" in said and "metrics.before-1.jsonl" in said
    )
    assert f"going on from {folder / 'checkpoints' / 'step-00000004'}, step 4 of 12" in said and "warning" not in said
    assert "did not name the newest" not in said
    assert losses(folder) == losses(whole) and same(weights(folder, 12), weights(whole, 12))
    assert (folder / "metrics.before-1.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert (folder / "samples.before-1.txt").read_bytes() == (whole / "samples.txt").read_bytes()
    assert (folder / "wandb-id.before-1").read_text() == "abc" and not (folder / "wandb-id").exists()
    aside = folder / "checkpoints" / "step-00000012.replaced"
    assert json.loads((aside / "manifest.json").read_text())["step"] == 12
    before = (folder / "metrics.jsonl").read_bytes()
    train({"run_dir": str(folder)})  # without the flag as always
    assert "is finished (12 steps)" in capsys.readouterr().err and (folder / "metrics.jsonl").read_bytes() == before
    assert "from_step" not in (folder / "config.yaml").read_text()


def test_back_twice_and_further(folder, whole, capsys):
    for _ in range(2):
        train({"run_dir": str(folder), "from_step": 8, "max_steps": 12})
    assert {"metrics.before-1.jsonl", "metrics.before-2.jsonl"} <= names(folder)
    assert {"step-00000012.replaced", "step-00000012.replaced-2"} <= names(folder / "checkpoints")
    assert losses(folder) == losses(whole)


def test_the_newest_one_is_gone_on_from_as_without_the_flag(folder, capsys):
    before = names(folder), names(folder / "checkpoints")
    train({"run_dir": str(folder), "from_step": 12, "max_steps": 13})
    assert "nothing comes after it" in capsys.readouterr().err
    assert names(folder) == before[0] and names(folder / "checkpoints") - before[1] == {"step-00000013"}
    assert len(read_rows(folder / "metrics.jsonl")) == 13


class Killed(BaseException):
    pass


@pytest.mark.parametrize("renames", [0, 1])
def test_a_kill_in_the_middle_leaves_the_run_as_it_was(folder, whole, monkeypatch, capsys, renames):
    """After so many of its two renames. A start without the flag goes on from the newest one; with the flag it goes back."""
    set_aside, done = going_back.set_aside, []

    def killed(path, why):
        if len(done) == renames:
            raise Killed
        done.append(path)
        return set_aside(path, why)

    monkeypatch.setattr(going_back, "set_aside", killed)
    with pytest.raises(Killed):
        train({"run_dir": str(folder), "from_step": 4})
    monkeypatch.undo()
    assert steps(folder)[-1] == 12 and losses(folder) == losses(whole)
    train({"run_dir": str(folder)})
    assert "is finished (12 steps)" in capsys.readouterr().err
    train({"run_dir": str(folder), "from_step": 4})
    assert losses(folder) == losses(whole) and same(weights(folder, 12), weights(whole, 12))


def test_a_kill_after_the_last_rename_leaves_a_run_that_has_gone_back(folder, whole, monkeypatch):
    def killed(*_):
        raise Killed

    write = going_back.write_file
    monkeypatch.setattr(
        going_back, "write_file", lambda path, text: killed() if path.name == "latest" else write(path, text)
    )
    with pytest.raises(Killed):
        train({"run_dir": str(folder), "from_step": 4})
    monkeypatch.undo()
    assert steps(folder) == [4]
    train({"run_dir": str(folder)})
    assert losses(folder) == losses(whole) and same(weights(folder, 12), weights(whole, 12))


def test_what_cannot_be_gone_back_to_changes_nothing(folder, tmp_path, tiny_dataset):
    before = names(folder), names(folder / "checkpoints")
    with pytest.raises(UserError, match=r"from_step: there is no checkpoint of step 5 in .* \(available: 4, 8, 12\)"):
        train({"run_dir": str(folder), "from_step": 5})
    with pytest.raises(UserError, match="from_step: .* holds no run that could go on; .* --branch_from RUN@STEP"):
        train(tiny_values(tiny_dataset, tmp_path / "new") | {"from_step": 4})
    with FileLock(folder / ".lock"), pytest.raises(UserError, match="another process is training in"):
        train({"run_dir": str(folder), "from_step": 4})
    (shard,) = (folder / "checkpoints" / "step-00000004").glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(Damaged, match="its hash is not the manifest's"):
        train({"run_dir": str(folder), "from_step": 4})
    assert (names(folder), names(folder / "checkpoints")) == before
