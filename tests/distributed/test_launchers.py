"""Real processes over gloo: torchrun and accelerate launch train what one process trains."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, tiny_values

from trainer.metrics.record import read_rows

pytestmark = pytest.mark.slow

STEPS = 12


def launch(words, values, tmp_path: Path, timeout=300) -> subprocess.CompletedProcess:
    config = tmp_path / f"{Path(values['run_dir']).name}.yaml"
    config.write_text(yaml.safe_dump(values))
    return subprocess.run(
        [sys.executable, "-m", *words, "-m", "trainer", "train", str(config)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
    )


def torchrun(processes: int) -> list[str]:
    return ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]


def rows(folder) -> list[dict]:
    return read_rows(Path(folder) / "metrics.jsonl")


@pytest.fixture(scope="module")
def single(tiny_dataset, tmp_path_factory) -> Path:
    tmp_path = tmp_path_factory.mktemp("single")
    values = tiny_values(tiny_dataset, tmp_path / "run", max_steps=STEPS, evaluation__every=5)
    values["checkpoint"]["every"] = 4
    values["checkpoint"]["keep"] = 9
    done = launch(torchrun(1), values, tmp_path)
    assert done.returncode == 0, done.stderr
    return tmp_path / "run"


def assert_equal_losses(folder, single):
    """fp32 sums over ranks in another order: about 512 * 2^-24 relative per step, carried on for 12 steps of large
    learning rates (a factor of ten); a real difference (a wrong mean, a lost share) is of order one."""
    mine, reference = rows(folder), rows(single)
    assert [row["step"] for row in mine] == [row["step"] for row in reference]
    assert [row["tokens"] for row in mine] == [row["tokens"] for row in reference]
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in mine] == pytest.approx([row[key] for row in reference], rel=3e-4), key
    validated = [(row["val_loss"], row["val_bits_per_byte"]) for row in mine if row["val_loss"] is not None]
    expected = [(row["val_loss"], row["val_bits_per_byte"]) for row in reference if row["val_loss"] is not None]
    assert len(validated) == 3
    for got, want in zip(validated, expected, strict=True):
        assert got == pytest.approx(want, rel=3e-4)


@pytest.mark.parametrize("processes", [2, 3])
def test_ddp_equals_one_process(single, tiny_dataset, tmp_path, processes):
    """Three ranks share 8 sequences unevenly."""
    values = tiny_values(tiny_dataset, tmp_path / "run", max_steps=STEPS, evaluation__every=5)
    done = launch(torchrun(processes), values, tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"engine: ddp on {processes} x CPU" in done.stderr
    assert done.stderr.count("optimiser groups") == 1, "rank 0 alone speaks"
    assert_equal_losses(tmp_path / "run", single)


def test_more_ranks_than_sequences(single, tiny_dataset, tmp_path):
    """At length 64 and 128 tokens a step there are two sequences for three ranks."""
    results = []
    for processes in (1, 3):
        values = tiny_values(
            tiny_dataset, tmp_path / f"run{processes}", batch__tokens_per_step=128, batch__tokens_per_microbatch=64,
            batch__sequence_start=64, batch__sequence_double_every=0, max_steps=6,
        )  # fmt: skip
        done = launch(torchrun(processes), values, tmp_path)
        assert done.returncode == 0, done.stderr
        results.append([row["loss"] for row in rows(tmp_path / f"run{processes}")])
    assert results[0] == pytest.approx(results[1], rel=3e-4)


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1)])
def test_resuming_on_another_number_of_processes(single, tiny_dataset, tmp_path, before, after):
    values = tiny_values(tiny_dataset, tmp_path / "run", max_steps=STEPS, evaluation__every=5)
    values["checkpoint"]["keep"] = 9
    done = launch(torchrun(before), values, tmp_path)
    assert done.returncode == 0, done.stderr
    for step in (8, 12):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
    done = launch(torchrun(after), values, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stderr
    assert_equal_losses(tmp_path / "run", single)


def test_accelerate_launch_on_one_process(single, tiny_dataset, tmp_path):
    values = tiny_values(tiny_dataset, tmp_path / "run", max_steps=STEPS, evaluation__every=5)
    done = launch(["accelerate.commands.launch", "--cpu", "--num_processes", "1"], values, tmp_path)
    assert done.returncode == 0, done.stderr
    assert_equal_losses(tmp_path / "run", single)


def test_pure_bf16_on_two_processes(tiny_dataset, tmp_path):
    """bf16 weights: the losses agree to bf16's own precision."""
    results = []
    for processes in (1, 2):
        values = tiny_values(tiny_dataset, tmp_path / f"run{processes}", precision="pure_bf16", max_steps=6)
        done = launch(torchrun(processes), values, tmp_path)
        assert done.returncode == 0, done.stderr
        results.append([row["loss"] for row in rows(tmp_path / f"run{processes}")])
    assert results[0] == pytest.approx(results[1], rel=2**-5)


def test_contradictions_are_one_line(tiny_dataset, tmp_path):
    values = tiny_values(tiny_dataset, tmp_path / "run", engine={"strategy": "ddp"})
    done = launch(torchrun(1), values, tmp_path)
    assert "engine.strategy: ddp needs several processes and one was started" in done.stderr
    values = tiny_values(tiny_dataset, tmp_path / "run2", engine={"strategy": "single"})
    done = launch(torchrun(2), values, tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("error: engine.strategy: single, but 2 processes were started") == 1


def test_one_bad_rank_ends_all(tiny_dataset, tmp_path):
    """A shard that only reading finds damaged: the run ends with the line, it does not hang."""
    copy = shutil.copytree(tiny_dataset, tmp_path / "data")
    shard = next((copy / "train").glob("*.mds"))
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    done = launch(torchrun(2), tiny_values(copy, tmp_path / "run"), tmp_path)
    assert done.returncode != 0
    assert "is damaged: its xxh64" in done.stderr
