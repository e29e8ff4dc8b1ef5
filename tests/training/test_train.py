"""The loop end to end on a tiny model: what it writes, that it learns, that resuming is exact, and what is refused."""

import gc
import itertools
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, THAW, error_line, tiny_values
from processes import forked_trainer
from tiny_runs import losses, make, other_data, same, weights

import models.transformer
from trainer.checkpoint import format as checkpoint
from trainer.commands.train import run
from trainer.core.config import PrepareConfig, RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import build
from trainer.data.prepare import prepare
from trainer.data.stream import find_dataset
from trainer.planning.plan import minimum_tokens, resolve
from trainer.runs.metrics import KEYS, read_rows
from trainer.training import loop
from trainer.training.start import ways_out
from trainer.training.step import optimiser_step

pytestmark = pytest.mark.usefixtures("few_windows")


def test_a_run_folder_holds_everything(finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "config.yaml", "plan.txt", "environment.jsonl", "dataset.json", "tokenizer.json",
        "metrics.jsonl", "curves.png", "samples.txt", "checkpoints",
    }  # fmt: skip
    assert [step for step, _ in checkpoint.found(finished / "checkpoints")] == [8, 12]
    curves = (finished / "curves.png").read_bytes()
    assert curves.startswith(b"\x89PNG\r\n") and len(curves) > 10_000  # session fixtures come before no_pictures
    samples = (finished / "samples.txt").read_text()
    assert samples.count("=== step ") == 3
    assert "the cat" in samples
    (start,) = map(json.loads, (finished / "environment.jsonl").read_text().splitlines())
    assert (start["device"], start["processes"]) == ("CPU", 1)


def test_metrics_rows(finished):
    rows = read_rows(finished / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert all(set(KEYS) <= row.keys() for row in rows)
    # 512 tokens a step in whole sequences of 16, 32, 64 are 512 again; the multiplier scales them.
    tokens = 0
    for row in rows:
        tokens += 512 * row["batch_multiplier"]
        assert row["tokens"] == tokens
    evaluated = {row["step"]: row for row in rows if row["val_loss"] is not None}
    assert set(evaluated) == {5, 10, 12}
    assert all(row["val_loss_hlb"] > 0 and row["val_bits_per_byte"] > 0 for row in evaluated.values())
    assert [row["sequence_length"] for row in rows] == [16] * 4 + [32] * 3 + [64] * 5
    # Rates and the clock tell the same: what the steps took adds up to the training time.
    took = [row["batch_multiplier"] * 512 / row["tokens_per_second"] for row in rows]
    assert sum(took) == pytest.approx(rows[-1]["seconds"], rel=1e-6)


def test_it_learns(tiny_dataset, tmp_path):
    changes = {"batch__tokens_per_step": 1024, "batch__n_max": 2, "optim__warmup_steps": 20}
    run(tiny_values(tiny_dataset, tmp_path / "r", max_steps=60, **changes))
    rows = read_rows(tmp_path / "r" / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(math.log(320), abs=0.3)
    assert rows[-1]["val_loss"] < 2.5, "well below the 2.9 of the letters' own frequencies"


def test_resolved_config_gives_the_same_run(finished, tiny_dataset, tmp_path):
    values = yaml.safe_load((finished / "config.yaml").read_text())
    values["run_dir"] = str(tmp_path / "again")
    run(values)
    assert losses(tmp_path / "again") == losses(finished)


def test_kernels_are_told_for_what_is_computed(tiny_dataset, tmp_path, monkeypatch):
    """Not for the type of the weights: what is refused for fp32 (flash-attn) may well train in bf16. And for documents."""
    asked, choose = set(), models.transformer.choose_kernel
    monkeypatch.setattr(
        models.transformer,
        "choose_kernel",
        lambda wanted, **case: asked.add((wanted, case["dtype"], case["documents"])) or choose(wanted, **case),
    )
    # It computes in fp32, without numbers.
    monkeypatch.setattr("trainer.training.start.refuse_unreached", lambda *_: None)
    changes = {"precision": "bf16", "model": {"name": "llama"}, "data__separate_documents": True}
    run(tiny_values(tiny_dataset, tmp_path / "r", max_steps=1, **changes))
    assert {case for case in asked if case[0] != "torch"} == {("auto", torch.bfloat16, True)}  # torch: to count FLOPs


@pytest.mark.parametrize("cut", [4, 8])
def test_resume_is_bitwise(finished, tiny_dataset, tmp_path, cut):
    """Stopped after `cut` steps, with rows and files of later steps lying about as a kill would leave them."""
    folder = tmp_path / "r"
    values = tiny_values(tiny_dataset, folder, log__demo_tokens=20, log__sample_tokens=10, evaluation__every=5)
    values["evaluation"]["protocol"] = "both"
    values["checkpoint"]["keep"] = 5
    run(values)
    for step in (12, 8, 4):
        if step > cut:
            shutil.rmtree(folder / "checkpoints" / checkpoint.step_name(step))
    (folder / "checkpoints" / "step-00000010.tmp").mkdir()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "loss"')
    run(values)
    assert losses(folder) == losses(finished)
    assert same(weights(folder, 12), weights(finished, 12))


def test_going_on_past_the_end(finished, tiny_dataset, tmp_path):
    """12 steps and then 20 are 20 steps: hlb's schedules do not know their end. Only the run folder is named."""
    folder = shutil.copytree(finished, tmp_path / "r")
    straight = tiny_values(tiny_dataset, tmp_path / "straight", max_steps=20, checkpoint__every=4)
    run(straight)
    run({"run_dir": str(folder), "max_steps": 20})
    assert [row[:2] for row in losses(folder)] == [row[:2] for row in losses(tmp_path / "straight")]
    assert same(weights(folder, 20), weights(tmp_path / "straight", 20))


def test_a_finished_run_is_left_alone(finished, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    run({"run_dir": str(finished)})
    assert "is finished" in capsys.readouterr().err
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_moved_run_goes_on_where_it_lies(finished, tmp_path, monkeypatch):
    from trainer import __main__

    folder = shutil.copytree(finished, tmp_path / "moved")
    before = sorted(path.name for path in finished.iterdir())
    monkeypatch.chdir(tmp_path)
    __main__.dispatch(["train", "moved/config.yaml", "--max_steps", "13"])
    assert losses(folder)[-1][0] == 13
    assert (finished / "checkpoints" / "latest").read_text() == "step-00000012"
    assert sorted(path.name for path in finished.iterdir()) == before
    __main__.dispatch(["train", "moved", "--max_steps", "14"])
    assert losses(folder)[-1][0] == 14


def test_removed_checkpoints_are_told_and_rows_kept(finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "r")
    shutil.rmtree(folder / "checkpoints")
    before = (folder / "metrics.jsonl").read_bytes()
    run({"run_dir": str(folder)})
    said = capsys.readouterr().err
    assert (
        "has no checkpoint: the run starts at step 0; the old metrics.jsonl is kept as metrics.before-1.jsonl" in said
    )
    assert (folder / "metrics.before-1.jsonl").read_bytes() == before
    assert losses(folder) == losses(finished)


@pytest.mark.parametrize("key", ["run_dir", "data.path"])
def test_an_empty_path_is_refused(tiny_dataset, tmp_path, monkeypatch, key):
    """As of a shell variable that is not set: it is not the current folder."""
    monkeypatch.chdir(tmp_path)
    values = tiny_values(tiny_dataset, tmp_path / "r")
    section, _, leaf = key.rpartition(".")
    (values[section] if section else values)[leaf] = ""
    with pytest.raises(UserError, match=f"^{key}: is empty"):
        run(values)
    assert list(tmp_path.iterdir()) == []


def test_what_a_new_run_finds_is_not_overwritten(tiny_dataset, tmp_path):
    mine = {"config.yaml": "seed: 1\n", "tokenizer.json": '{"mine": 1}'}
    for name, text in mine.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text(text)
        with pytest.raises(UserError, match=f"run_dir: .*{name}.* choose another --run_dir"):
            run(tiny_values(tiny_dataset, folder))
        assert (folder / name).read_text() == text


@pytest.mark.parametrize("name", ["dataset.json", "tokenizer.json"])
@pytest.mark.parametrize("cut", [0, 100])
def test_a_copy_that_a_kill_cut_off_is_made_again(finished, tiny_dataset, tmp_path, name, cut):
    """In the folder of a run before its first checkpoint, and before its config."""
    for there in ([name], [name, "config.yaml", "environment.jsonl"]):
        folder = tmp_path / str(len(there))
        folder.mkdir()
        for file in there:
            shutil.copy(finished / file, folder / file)
        content = (tiny_dataset / name).read_bytes()
        (folder / name).write_bytes(content[:cut] + bytes(len(content) - cut))  # as a file system after a power cut
        run(tiny_values(tiny_dataset, folder))
        assert (folder / name).read_bytes() == content
        assert losses(folder) == losses(finished)


def test_other_data_is_refused(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "r")
    with pytest.raises(UserError, match="is not the data that .* was trained on"):
        run({"run_dir": str(folder), "max_steps": 30, "data": {"path": str(other_data(tmp_path))}})


def test_two_runs_in_one_folder(finished):
    from trainer.runs.folder import locked

    with locked(finished), pytest.raises(UserError, match="another process is training in"):
        run({"run_dir": str(finished), "max_steps": 30})


def test_unwritable_run_dir(tiny_dataset, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="run_dir: cannot write to"):
        run(tiny_values(tiny_dataset, tmp_path / "file" / "run"))
    with pytest.raises(UserError, match="run_dir: .* is a file, not a folder"):
        run(tiny_values(tiny_dataset, tmp_path / "file"))


def test_files_that_cannot_grow_end_in_one_line(tiny_dataset, tmp_path):
    """A limit on file sizes stands in for the disk; the first files of the run are small enough."""
    import resource
    import subprocess
    import sys

    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(tiny_values(tiny_dataset, tmp_path / "r", checkpoint__every=0)))
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "train", str(config)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500)),
    )
    assert "File too large" in error_line(done)


def test_damaged_newest_checkpoint_on_resume(finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "r")
    shard = folder / "checkpoints" / checkpoint.step_name(12) / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:100])
    run({"run_dir": str(folder)})
    said = capsys.readouterr().err
    assert "step-00000012/__0_0.distcp has 100 bytes" in said
    assert "going on from" in said and "step 8 of 12" in said
    assert losses(folder) == losses(finished)
    assert same(weights(folder, 12), weights(finished, 12))


def test_the_batch_law_goes_on_with_a_norm_from_before_the_restart(tiny_dataset, tmp_path):
    """Saved after step 5, whose norm counts after step 6: a resumed run must still know it."""
    one = make(tiny_dataset, tmp_path / "run")
    one.multiplier.n = one.state.n = 3.0
    for _ in range(6):
        optimiser_step(one)
    one.save(0.0)
    again = make(tiny_dataset, tmp_path / "run")
    assert again.restore()
    before = again.state.n
    for part in (one, again):
        optimiser_step(part)
    assert again.state.n == one.state.n != before


def test_gpt2_trains_with_both_recipes(tiny_dataset, tmp_path):
    for recipe in ("plain", "hlb"):
        values = tiny_values(tiny_dataset, tmp_path / recipe, model={"name": "gpt2"}, optim__recipe=recipe, max_steps=6)
        run(values)
        assert len(losses(tmp_path / recipe)) == 6


def test_data_is_prepared_on_first_use(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat.\n" * 2000)
    values = tiny_values(tmp_path / "data", tmp_path / "r", max_steps=2)
    values["data"] |= {"source": str(text), "tokenizer": "bytes", "sample_length": 64, "validation_fraction": 0.1}
    run(values)
    assert (tmp_path / "data" / "dataset.json").exists()
    assert len(losses(tmp_path / "r")) == 2


def test_a_run_goes_on_from_another_folder(copy, tmp_path, monkeypatch):
    """Its data.path was given relative to where it was started."""
    monkeypatch.chdir(tmp_path)
    run(tiny_values(Path("copy"), tmp_path / "r", max_steps=1))
    assert yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())["data"]["path"] == str(copy)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    run({"run_dir": str(tmp_path / "r"), "max_steps": 2})
    assert [row[0] for row in losses(tmp_path / "r")] == [1, 2]


def test_a_run_from_before_there_was_a_choice_keeps_its_order_of_data(tiny_dataset, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "old"
    run(tiny_values(tiny_dataset, whole, max_steps=4, data__order="samples"))
    run(tiny_values(tiny_dataset, folder, max_steps=2, data__order="samples"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    del config["data"]["order"]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    run({"run_dir": str(folder), "max_steps": 4})
    assert losses(folder) == losses(whole)
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["order"] == "samples"
    with pytest.raises(UserError, match="data.order: .* was started with 'samples', now it is 'windows'"):
        run({"run_dir": str(folder), "max_steps": 6, "data": {"order": "windows"}})


def test_generate_and_evaluate_verbs(finished):
    done = forked_trainer(
        "generate", finished, "--prompt", "the cat", "--prompt", "a dog ran", "--max_new_tokens", "12"
    )
    assert done.returncode == 0, done.stderr
    texts = done.stdout.split("-" * 80 + "\n")
    assert texts[0].startswith("the cat") and texts[1].startswith("a dog ran")
    done = forked_trainer("evaluate", finished, "--json", "--protocol", "full")
    report = json.loads(done.stdout)
    last = read_rows(finished / "metrics.jsonl")[-1]
    assert report["step"] == 12
    assert report["full"]["loss"] == pytest.approx(last["val_loss"], rel=0.05), "the run looked at a part of the split"
    assert report["full"]["tokens"] == find_dataset_tokens(finished) - 1
    assert "no checkpoint of step 5" in error_line(forked_trainer("evaluate", finished, "--step", "5"))


def find_dataset_tokens(folder):
    return json.loads((folder / "dataset.json").read_text())["splits"]["validation"]["tokens"]


def test_wrong_tokenizer_is_refused(finished, tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("the cat sat on the mat.\n" * 500)
    prepare(
        PrepareConfig(
            source=str(text),
            validation_fraction=0.2,
            tokenizer="train-bpe:270",
            sample_length=64,
            out=str(tmp_path / "d"),
            workers=1,
        ),
        lambda line: None,
    )
    line = error_line(forked_trainer("evaluate", finished, "--data.path", tmp_path / "d"))
    assert "was prepared with tokenizer train-bpe:270, but the run uses bytes" in line


# -- around the loop ------------------------------------------------------------------------------------------------------


def test_the_garbage_collector_is_kept_out_of_the_loop(tiny_dataset, tmp_path, monkeypatch):
    seen = []

    def looking(this):
        seen.append(gc.isenabled())
        if len(seen) == 3:
            raise ZeroDivisionError
        return step(this)

    step = loop.optimiser_step
    monkeypatch.setattr(loop, "optimiser_step", looking)
    monkeypatch.setattr(gc, "unfreeze", THAW)
    values = tiny_values(tiny_dataset, tmp_path / "r", max_steps=2, checkpoint__every=0)
    run(values)
    assert seen == [False, False] and gc.isenabled() and gc.get_freeze_count() == 0
    with pytest.raises(ZeroDivisionError):
        run(values | {"max_steps": 4})
    assert seen == [False] * 3 and gc.isenabled() and gc.get_freeze_count() == 0
    gc.freeze()


def test_the_first_step_is_told_once(tiny_dataset, tmp_path, capsys):
    run(tiny_values(tiny_dataset, tmp_path / "r", max_steps=3))
    said = "".join(capsys.readouterr())
    assert len(re.findall(r"^first step: \d+\.\d s$", said, re.MULTILINE)) == said.count("first step") == 1


def test_profile_also_of_a_run_that_goes_on(tiny_dataset, tmp_path, capsys):
    folder = tmp_path / "r"
    run(tiny_values(tiny_dataset, folder, max_steps=4))
    assert not (folder / "profile").exists()
    run({"run_dir": str(folder), "max_steps": 12, "profile": True})
    names = {path.name for path in (folder / "profile").iterdir()}
    assert names == {"operations.txt", "trace-rank0.json.gz"}
    assert (folder / "profile" / "operations.txt").read_text().startswith("Steps 10 to 12, rank 0 of 1, cpu.")
    assert "".join(capsys.readouterr()).count("profile of steps 10 to 12 in") == 1


@pytest.mark.parametrize(
    "batch, engine, expected",
    [
        ((256, 64), {}, "--batch.tokens_per_microbatch 128 or --engine.activation_checkpointing full or more devices"),
        ((192, 64), {"activation_checkpointing": "full"}, "--batch.tokens_per_microbatch 64 or more devices"),
        ((64, 64), {"activation_checkpointing": "full"}, "more devices"),
        ((64, 64), {"cuda_graphs": True}, "--engine.cuda_graphs false or more devices"),
        (
            (64, 64),
            {"activation_checkpointing": "selective", "strategy": "fsdp"},
            "--engine.activation_checkpointing full or --engine.offload or more devices",
        ),
        ((64, 64), {"activation_checkpointing": "full", "strategy": "zero1", "offload": True}, "more devices"),
    ],
)
def test_ways_out_name_what_helps(batch, engine, expected):
    config = RunConfig()
    config.batch.tokens_per_microbatch, config.batch.sequence_length = batch
    config.engine.strategy, config.engine.activation_checkpointing = "single", "none"
    for key, value in engine.items():
        setattr(config.engine, key, value)
    assert ways_out(config) == f"go on with {expected}"


def test_a_batch_grows_to_its_size(tiny_dataset, tmp_path):
    """From 128 to 512 tokens in 6 steps, in whole sequences of 64; the plan knows the sum, and a resumed run the same steps."""
    changes = {"batch__sequence_start": 64, "batch__sequence_double_every": 0, "batch__dynamic": False}
    values = tiny_values(tiny_dataset, tmp_path / "r", **changes, batch__ramp_steps=6, batch__ramp_start=128)
    run(values)
    rows = read_rows(tmp_path / "r" / "metrics.jsonl")
    steps = [after - before for before, after in itertools.pairwise([0, *(row["tokens"] for row in rows)])]
    assert steps == [128, 192, 256, 320, 384, 448, *[512] * 6]
    plan = resolve(build(RunConfig, values), find_dataset(build(RunConfig, values).data))
    assert minimum_tokens(plan) == sum(steps)
    shutil.rmtree(tmp_path / "r" / "checkpoints" / checkpoint.step_name(12))
    shutil.rmtree(tmp_path / "r" / "checkpoints" / checkpoint.step_name(8), ignore_errors=True)
    before = losses(tmp_path / "r")
    run(values)
    assert losses(tmp_path / "r") == before


def test_a_ramp_that_begins_above_its_end_is_refused(tiny_dataset, tmp_path):
    with pytest.raises(UserError, match="ramp_start: 1,024 is more than tokens_per_step, 512"):
        run(tiny_values(tiny_dataset, tmp_path / "r", batch__ramp_steps=6, batch__ramp_start=1024))
