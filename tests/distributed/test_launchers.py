"""Real processes over gloo: torchrun and accelerate launch train what one process trains. Forked ones, where no launcher is tested."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from cases import run
from conftest import PATIENCE, ROOT, beyond, tiny_values
from processes import forked_trainer, free_port

from trainer.runs.metrics import read_rows

pytestmark = pytest.mark.slow

STEPS = 12


def launch(words, values, tmp_path: Path) -> subprocess.CompletedProcess:
    config = tmp_path / f"{Path(values['run_dir']).name}.yaml"
    config.write_text(yaml.safe_dump(values))
    return subprocess.run(
        [sys.executable, "-m", *words, "-m", "trainer", "train", str(config)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
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
    done = run(values)
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


@pytest.mark.parametrize("processes", beyond([2], [2, 3]))
def test_ddp_equals_one_process(single, tiny_dataset, tmp_path, processes):
    """Three ranks share 8 sequences unevenly."""
    values = tiny_values(tiny_dataset, tmp_path / "run", max_steps=STEPS, evaluation__every=5)
    done = launch(torchrun(processes), values, tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"engine: ddp on {processes} x CPU" in done.stderr
    assert done.stderr.count("optimiser groups") == 1, "rank 0 alone speaks"
    assert_equal_losses(tmp_path / "run", single)


def test_more_ranks_than_sequences(tiny_dataset, tmp_path):
    """At length 64 and 128 tokens a step there are two sequences for three ranks."""
    results = []
    for processes in (1, 3):
        values = tiny_values(
            tiny_dataset, tmp_path / f"run{processes}", batch__tokens_per_step=128, batch__tokens_per_microbatch=64,
            batch__sequence_start=64, batch__sequence_double_every=0, max_steps=6,
        )  # fmt: skip
        done = run(values, processes)
        assert done.returncode == 0, done.stderr
        results.append([row["loss"] for row in rows(tmp_path / f"run{processes}")])
    assert results[0] == pytest.approx(results[1], rel=3e-4)


def test_accelerate_launch_on_one_process(single, tiny_dataset, tmp_path):
    values = tiny_values(tiny_dataset, tmp_path / "run", max_steps=STEPS, evaluation__every=5)
    done = launch(["accelerate.commands.launch", "--cpu", "--num_processes", "1"], values, tmp_path)
    assert done.returncode == 0, done.stderr
    assert_equal_losses(tmp_path / "run", single)


def test_contradictions_are_one_line(tiny_dataset, tmp_path):
    values = tiny_values(tiny_dataset, tmp_path / "run", engine={"strategy": "ddp"})
    done = run(values)
    assert "engine.strategy: ddp needs several processes and one was started" in done.stderr
    values = tiny_values(tiny_dataset, tmp_path / "run2", engine={"strategy": "single"})
    done = run(values, 2)
    assert done.returncode != 0
    assert done.stderr.count("error: engine.strategy: single, but 2 processes were started") == 1


RANK_ONE_FAILS = """
import os
import torch
from models.base import register
from models.hlb import Hlb, HlbConfig

@register("fails")
class Fails(Hlb):
    Config = HlbConfig
    def forward(self, tokens, **kwargs):
        out = super().forward(tokens, **kwargs)
        if type(tokens) is torch.Tensor and not tokens.is_meta and MOMENT:
            ACTION
        return out
"""


def launch_failing(tmp_path, tiny_dataset, moment, action, **changes):
    code = RANK_ONE_FAILS.replace("MOMENT", moment).replace("ACTION", action)
    (tmp_path / "fails.py").write_text(code)
    values = tiny_values(tiny_dataset, tmp_path / "run", model={"name": "fails"}, optim__recipe="hlb", **changes)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    return forked_trainer("train", config, "--plugin", "fails", ranks=2, env={"PYTHONPATH": str(tmp_path)})


def test_a_crash_on_one_rank_ends_all(tiny_dataset, tmp_path):
    done = launch_failing(tmp_path, tiny_dataset, 'os.environ["RANK"] == "1"', 'raise RuntimeError("rank one is ill")')
    assert done.returncode != 0
    assert "rank one is ill" in done.stderr


def test_out_of_memory_on_one_rank_is_a_line(tiny_dataset, tmp_path):
    action = 'raise RuntimeError("CUDA out of memory. Tried to allocate")'
    done = launch_failing(tmp_path, tiny_dataset, 'os.environ["RANK"] == "1"', action)
    assert "error: [rank 1] out of memory: lower batch.tokens_per_microbatch" in done.stderr


def test_nan_on_one_rank_stops_all(tiny_dataset, tmp_path):
    done = launch_failing(
        tmp_path, tiny_dataset, 'os.environ["RANK"] == "1" and out.loss is not None', "out = out._replace(loss=out.loss * float('nan'))",
    )  # fmt: skip
    assert done.returncode != 0
    assert "step 1: loss or gradient is not finite" in done.stderr


def test_a_refusal_by_rank_zero_ends_all(single, tiny_dataset, tmp_path):
    folder = shutil.copytree(single, tmp_path / "run")
    done = run(tiny_values(tiny_dataset, folder, seed=9, evaluation__every=5), 2)
    assert "error: seed: " in done.stderr


def test_a_checkpoint_folder_that_cannot_be_made_ends_all(tiny_dataset, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("")
    done = run(tiny_values(tiny_dataset, tmp_path / "run"), 2)
    assert done.stderr.count("error: checkpoint: step 4 could not be written") == 1


@pytest.mark.parametrize("source, works", [("text.txt", True), ("missing.txt", False)])
def test_first_use_prepares_once_for_all_ranks(tmp_path, source, works):
    (tmp_path / "text.txt").write_text("the cat sat on the mat.\n" * 2000)
    values = tiny_values(tmp_path / "data", tmp_path / "run", max_steps=2)
    values["data"] |= {"source": str(tmp_path / source), "tokenizer": "bytes", "sample_length": 64}
    values["data"]["validation_fraction"] = 0.1
    done = run(values, 2)
    assert (done.returncode == 0) == works, done.stderr
    if not works:
        assert done.stderr.count("error: ") == 1 and "missing.txt" in done.stderr


def test_rank_zero_alone_prints_plans(tiny_dataset):
    done = forked_trainer("plan", "--model_scale", "0.1", "--json", ranks=2)
    assert json.loads(done.stdout)["model_scale"] == 0.1


def test_one_bad_rank_ends_all(tiny_dataset, tmp_path):
    """A shard that only reading finds damaged: the run ends with the line, it does not hang."""
    copy = shutil.copytree(tiny_dataset, tmp_path / "data")
    shard = next((copy / "train").glob("*.mds"))
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    done = run(tiny_values(copy, tmp_path / "run"), 2)
    assert done.returncode != 0
    assert "is damaged: its xxh64" in done.stderr


def accelerate_launch(tmp_path: Path, **config) -> list[str]:
    """As after `accelerate config` with these answers."""
    values = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "machine_rank": 0, "main_process_port": 0}
    values |= {"num_processes": 2, "mixed_precision": "no", "use_cpu": True}
    path = tmp_path / "accelerate.yaml"
    path.write_text(yaml.safe_dump(values | config))
    return ["accelerate.commands.launch", "--config_file", str(path)]


def test_processes_that_accelerate_does_not_start(tiny_dataset, tmp_path):
    """accelerate 1.15 starts one process for a MULTI_CPU config of two."""
    values = tiny_values(tiny_dataset, tmp_path / "run")
    done = launch(accelerate_launch(tmp_path, distributed_type="MULTI_CPU"), values, tmp_path)
    assert "error: accelerate launch: several processes were asked for, but it started only one" in done.stderr
    assert not (tmp_path / "run").exists()


PRINT_LAUNCHER_CONFIG = """
import dataclasses, json, os
from trainer.planning.launcher_config import read_launcher_config
if os.environ["RANK"] == "0":
    print("launcher config", json.dumps(dataclasses.asdict(read_launcher_config(os.environ))))
"""


@pytest.mark.parametrize(
    "config, launcher_config",
    [
        (
            {
                "distributed_type": "FSDP",
                "fsdp_config": {
                    "fsdp_version": 2,
                    "fsdp_reshard_after_forward": False,
                    "fsdp_offload_params": True,
                    "fsdp_activation_checkpointing": True,
                },
            },
            {
                "strategy": "fsdp",
                "reshard_after_forward": False,
                "offload": True,
                "activation_checkpointing": "full",
            },
        ),
        (
            {"distributed_type": "FSDP", "fsdp_config": {"fsdp_sharding_strategy": "HYBRID_SHARD"}},
            {"strategy": "hsdp"},
        ),
        (
            {
                "distributed_type": "DEEPSPEED",
                "mixed_precision": "bf16",
                "deepspeed_config": {"zero_stage": 3, "offload_optimizer_device": "cpu", "gradient_clipping": 1.0},
            },
            {"strategy": "zero3", "offload": True, "clip_norm": 1.0, "mixed_precision": "bf16"},
        ),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": "ds.json"}},
            {"deepspeed_config": "ds.json"},
        ),
    ],
)
def test_what_accelerate_really_hands_on(tmp_path, config, launcher_config):
    (tmp_path / "print_launcher_config.py").write_text(PRINT_LAUNCHER_CONFIG)
    words = [*accelerate_launch(tmp_path, **config), str(tmp_path / "print_launcher_config.py")]
    done = subprocess.run(
        [sys.executable, "-m", *words], capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("launcher config ")]
    assert len(lines) == 1, done.stderr
    said = {
        key: value for key, value in json.loads(lines[0].removeprefix("launcher config ")).items() if value is not None
    }
    assert said == {"launcher": "accelerate"} | launcher_config


def test_deepspeed_launcher(single, tiny_dataset, tmp_path, monkeypatch):
    """It puts --local_rank into the command line."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    values = tiny_values(tiny_dataset, tmp_path / "run", max_steps=STEPS, evaluation__every=5)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    words = ["deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", free_port(), "--module", "trainer"]
    done = subprocess.run(
        [sys.executable, "-m", *words, "train", str(tmp_path / "run.yaml")],
        capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--local_rank=1" in done.stdout + done.stderr
    assert "engine: ddp on 2 x CPU" in done.stderr
    assert_equal_losses(tmp_path / "run", single)


def test_a_worker_does_not_outlive_its_launcher(tiny_dataset, tmp_path):
    """accelerate with one process ends of SIGTERM by itself; the worker then hears of it from the kernel."""
    values = tiny_values(tiny_dataset, tmp_path / "run", max_steps=100_000)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    words = ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "trainer", "train"]
    launcher = subprocess.Popen(
        [sys.executable, "-m", *words, str(tmp_path / "run.yaml")],
        stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    launcher.terminate()
    try:
        text = launcher.communicate(timeout=PATIENCE)[1]  # ends with the last process that holds the pipe, the worker
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
    assert "stopped by SIGTERM at step" in text
