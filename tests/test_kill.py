"""kill -9 at random moments of one run, of one process or of two, and during saves: the same weights as the run nobody touched.

With --nightly many more kills."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import processes
import pytest
import torch
import yaml
from conftest import ROOT, beyond, tiny_values

from trainer.checkpoint import format as checkpoint
from trainer.runs.metrics import read_rows
from trainer.runtime.distributed import World

pytestmark = pytest.mark.slow

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "100", "-m")


def values(dataset, folder, kills):
    # Enough steps to be hit in the middle; a checkpoint every other step, so that many kills fall into a save.
    chosen = tiny_values(
        dataset, folder, max_steps=16 * kills, batch__tokens_per_step=2048, batch__tokens_per_microbatch=1024
    )
    chosen["batch"]["n_max"] = 2  # at its default, 16, steps soon take that much longer
    chosen["checkpoint"] = {"every": 2}
    chosen["evaluation"] = {"every": 40, "max_tokens": 512}
    return chosen


def launch(config: Path) -> subprocess.Popen:
    """The run on two ranks under torchrun."""
    with (config.parent / "log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", *TORCHRUN, "trainer", "train", str(config)],
            cwd=ROOT,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def final(folder: Path) -> tuple[dict, list]:
    newest = checkpoint.found(folder / "checkpoints")[-1][1]
    rows = [
        (row["step"], row["loss"], row["grad_norm"], row["val_loss"]) for row in read_rows(folder / "metrics.jsonl")
    ]
    return checkpoint.load(newest, "", World()), rows


def write(folder: Path, chosen: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.in.yaml"
    config.write_text(yaml.safe_dump(chosen))
    return config


def wait_for_rows(runs: Callable[[], bool], metrics: Path, draw: random.Random) -> int:
    """Wait until some more steps are recorded, and for a random part of the next one; returns the number of rows."""
    before = len(read_rows(metrics)) if metrics.exists() else 0
    goal = before + draw.randrange(4, 14)
    while runs() and not (metrics.exists() and len(read_rows(metrics)) >= goal):
        time.sleep(0.01)
    assert runs(), "finished before it could be killed: give the run more steps"
    time.sleep(draw.random() * 0.1)
    return len(read_rows(metrics))


def assert_same_run(hunted: Path, calm: Path) -> None:
    (expected, expected_rows), (got, got_rows) = final(calm), final(hunted)
    assert got_rows == expected_rows
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    left = [path.name for path in (hunted / "checkpoints").iterdir()]
    assert not [name for name in left if name.endswith(".tmp")]


@pytest.mark.parametrize("kills", beyond([2], [2, 50]))
def test_kills_at_random_moments(tiny_dataset, tmp_path, capsys, kills):
    calm = write(tmp_path / "calm", values(tiny_dataset, tmp_path / "calm" / "run", kills))
    begin = time.monotonic()
    assert processes.forked_trainer("train", calm, seconds=600).codes == [0]
    whole = time.monotonic() - begin

    hunted = write(tmp_path / "hunted", values(tiny_dataset, tmp_path / "hunted" / "run", kills))
    draw, reached = random.Random(0), []
    begin = time.monotonic()
    while len(reached) < kills:
        started = processes.start("-m", "trainer", "train", hunted)
        ended, metrics = started / "result", tmp_path / "hunted" / "run" / "metrics.jsonl"
        reached.append(wait_for_rows(lambda ended=ended: not ended.exists(), metrics, draw))
        processes.send(started, signal.SIGKILL)
        assert processes.wait(started).codes == [-9]
    assert processes.forked_trainer("train", hunted, seconds=600).codes == [0]

    assert_same_run(tmp_path / "hunted" / "run", tmp_path / "calm" / "run")
    took = time.monotonic() - begin
    with capsys.disabled():
        print(f"\n{kills} kills at rows {reached}; the calm run took {whole:.0f} s, the hunted one {took:.0f} s")


def workers(process: subprocess.Popen) -> list[int]:
    """The ranks that torchrun has started and that are there."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    fields = [line.split(maxsplit=2) for line in listed.splitlines()]
    return [int(pid) for pid, parent, args in fields if parent == str(process.pid) and "-m trainer" in args]


@pytest.mark.parametrize("kills", beyond([2], [2, 20]))
def test_kills_of_one_rank_or_of_all(tiny_dataset, tmp_path, capsys, kills):
    """FSDP on two ranks with asynchronous checkpoints. torchrun restarts a run that has lost one; with all, it goes too."""
    configs = {}
    for name in ("calm", "hunted"):
        chosen = values(tiny_dataset, tmp_path / name / "run", kills)
        chosen["engine"] = {"strategy": "fsdp"}
        chosen["checkpoint"]["asynchronous"] = True
        configs[name] = write(tmp_path / name, chosen)
    assert launch(configs["calm"]).wait(timeout=600) == 0

    metrics = tmp_path / "hunted" / "run" / "metrics.jsonl"
    draw, hits = random.Random(1), []
    process = launch(configs["hunted"])
    try:
        while len(hits) < kills:
            row = wait_for_rows(lambda running=process: running.poll() is None, metrics, draw)
            ranks = workers(process)
            victims = [process.pid, *ranks] if len(hits) % 3 == 1 else [draw.choice(ranks)]
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
            hits.append(f"{len(victims) - 1 or 'one'} at {row}")
            if len(victims) > 1:
                process.wait()
                process = launch(configs["hunted"])
        assert process.wait(timeout=600) == 0
    finally:
        for pid in [*workers(process), *([process.pid] if process.poll() is None else [])]:
            os.kill(pid, signal.SIGKILL)
    assert_same_run(tmp_path / "hunted" / "run", tmp_path / "calm" / "run")
    with capsys.disabled():
        print(f"\nranks killed, and at which row: {', '.join(hits)}")


@pytest.mark.parametrize("moment", ["tensors", "manifest", "rename", "latest", "purge"])
def test_killed_inside_a_save(tiny_dataset, tmp_path, moment):
    """The process kills itself at each stage of the second save; the next start finds a good checkpoint and says which."""
    script = tmp_path / "die.py"
    script.write_text(SCRIPT)
    chosen = tiny_values(tiny_dataset, tmp_path / "run", max_steps=6)
    chosen["checkpoint"] = {"every": 2, "keep": 1}
    config = write(tmp_path, chosen)
    assert processes.run(script, moment, config).codes == [-9]
    whole = [step for step, path in checkpoint.found(tmp_path / "run" / "checkpoints") if checkpoint.check(path)]
    assert whole and whole[-1] == (4 if moment in ("latest", "purge") else 2)
    done = processes.forked_trainer("train", config)
    assert done.returncode == 0, done.stderr
    assert f"going on from {tmp_path}/run/checkpoints/step-{whole[-1]:08d}" in done.stderr
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 7))


SCRIPT = """
import os, signal, sys
from pathlib import Path
from trainer.checkpoint import format as checkpoint
from trainer.commands.train import run
from trainer.core.settings import load_yaml

moment, config = sys.argv[1:]
saves = 0

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

original = checkpoint.dcp.save
def save(*args, **kwargs):
    global saves
    saves += 1
    if saves == 2:
        if moment == "tensors":
            die()
        elif moment == "manifest":
            checkpoint._publish = die
        elif moment == "rename":
            Path.rename = lambda self, to, real=Path.rename: die() if str(self).endswith("4.tmp") else real(self, to)
        elif moment == "latest":
            write = checkpoint.write_file
            checkpoint.write_file = lambda path, text: die() if path.name == "latest" else write(path, text)
        else:
            checkpoint.shutil.rmtree = lambda path, *a, **k: die() if str(path).endswith("2.tmp") and path.exists() else None
    return original(*args, **kwargs)

checkpoint.dcp.save = save
run(load_yaml(config))
"""
