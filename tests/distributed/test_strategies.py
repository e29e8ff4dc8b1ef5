"""Whole runs through the command line: what a run writes is the same under every strategy, and goes on under another."""

import shutil

import pytest
import yaml
from cases import run
from conftest import beyond, error_line, tiny_values, trainer
from processes import forked_trainer
from test_launchers import assert_equal_losses, launch, rows, torchrun

pytestmark = pytest.mark.slow


def whole_run(dataset, folder, **engine) -> dict:
    """Growth, the batch law, both protocols of validation, samples and a demonstration."""
    values = tiny_values(dataset, folder, engine=engine, evaluation__every=5, log__sample_tokens=8, log__demo_tokens=12)
    values["evaluation"]["protocol"] = "both"
    values["checkpoint"]["keep"] = 9
    return values


@pytest.fixture(scope="module")
def single(tiny_dataset, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("single")
    done = run(whole_run(tiny_dataset, tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    return tmp_path / "run"


@pytest.mark.parametrize("strategy", beyond(["fsdp", "zero3"], ["fsdp", "zero2", "zero3"]))
def test_validation_samples_and_resumption(single, tiny_dataset, tmp_path, strategy):
    """fsdp and zero3 validate and write text together, in lockstep; then one process goes on from what they saved."""
    folder = tmp_path / "run"
    done = launch(torchrun(2), whole_run(tiny_dataset, folder, strategy=strategy), tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"engine: {strategy} on 2 x CPU" in done.stderr
    assert "Warning" not in done.stderr and "DeepSpeed" not in done.stdout + done.stderr
    assert_equal_losses(folder, single)
    windows = [[row["val_loss_hlb"] for row in rows(run) if "val_loss_hlb" in row] for run in (folder, single)]
    assert len(windows[0]) == 3 and windows[0] == pytest.approx(windows[1], rel=3e-4)
    # The logits differ in the last bits only, so the same draws give the same text.
    assert (folder / "samples.txt").read_text() == (single / "samples.txt").read_text()

    for step in (8, 12):
        shutil.rmtree(folder / "checkpoints" / f"step-{step:08d}")
    done = forked_trainer("train", folder)
    assert done.returncode == 0, done.stderr
    assert "engine: single on 1 x CPU" in done.stderr, "the strategy of two processes does not bind one"
    assert f"going on from {folder}/checkpoints/step-00000004" in done.stderr
    assert_equal_losses(folder, single)
    done = forked_trainer("generate", folder, "--prompt", "the cat", "--max_new_tokens", "5")
    assert done.returncode == 0 and done.stdout.startswith("the cat")


@pytest.mark.parametrize("strategy", ["fsdp", "zero1"])
def test_one_process_may_shard_too(single, tiny_dataset, tmp_path, strategy):
    """For offload on one device; the process group is one of its own."""
    values = whole_run(tiny_dataset, tmp_path / "run", strategy=strategy, offload=True)
    done = run(values)
    assert done.returncode == 0, done.stderr
    assert_equal_losses(tmp_path / "run", single)


def test_deepspeed_builds_nothing(tiny_dataset, tmp_path):
    """A build that was killed has left its lock, for which any other would wait for ever."""
    lock = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump(tiny_values(tiny_dataset, tmp_path / "run", max_steps=2, engine={"strategy": "zero1"}))
    )
    done = trainer("train", tmp_path / "run.yaml", env={"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")})
    assert done.returncode == 0, done.stderr
    assert [path for path in (tmp_path / "extensions").rglob("*") if path.is_file()] == [lock]


def test_what_cannot_be_is_one_line(tiny_dataset, tmp_path):
    base = ["train", "--data.path", tiny_dataset, "--run_dir", tmp_path / "r", "--device", "cpu"]
    for words, expected in (
        (["--engine.strategy", "hsdp"], "engine.strategy: hsdp"),
        (["--engine.strategy", "zero2", "--precision", "pure_bf16"], "pure_bf16"),
        (["--engine.strategy", "single", "--engine.offload", "true"], "engine.offload"),
        (["--engine.deepspeed_config", "x.json"], "engine.deepspeed_config"),
        (["--engine.activation_checkpointing", "some"], "engine.activation_checkpointing: 'some' is not known"),
    ):
        assert expected in error_line(forked_trainer(*base, *words))
    assert not (tmp_path / "r" / "config.yaml").exists()
