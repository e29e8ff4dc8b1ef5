"""kill -9 at random moments, ten times over one run, and during saves: the same weights as the run nobody touched."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, tiny_values

from trainer import checkpoint
from trainer.engine.distributed import World
from trainer.metrics.record import read_rows

pytestmark = pytest.mark.slow

KILLS = 10


def values(dataset, folder):
    # Enough steps to be hit in the middle; a checkpoint every other step, so that many kills fall into a save.
    chosen = tiny_values(dataset, folder, max_steps=160, batch__tokens_per_step=2048, batch__tokens_per_microbatch=1024)
    chosen["checkpoint"] = {"every": 2}
    chosen["evaluation"] = {"every": 40, "max_tokens": 512}
    return chosen


def start(config: Path) -> subprocess.Popen:
    with (config.parent / "log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "trainer", "train", str(config)],
            cwd=ROOT,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "2"},
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


def test_ten_kills(tiny_dataset, tmp_path, capsys):
    calm = write(tmp_path / "calm", values(tiny_dataset, tmp_path / "calm" / "run"))
    begin = time.monotonic()
    assert start(calm).wait(timeout=600) == 0
    whole = time.monotonic() - begin

    hunted = write(tmp_path / "hunted", values(tiny_dataset, tmp_path / "hunted" / "run"))
    metrics = tmp_path / "hunted" / "run" / "metrics.jsonl"
    draw, kills, reached = random.Random(0), 0, []
    while kills < KILLS:
        process = start(hunted)
        before = len(read_rows(metrics)) if metrics.exists() else 0
        goal = before + draw.randrange(4, 14)
        while process.poll() is None and not (metrics.exists() and len(read_rows(metrics)) >= goal):
            time.sleep(0.01)
        assert process.poll() is None, "finished before it could be killed: give the run more steps"
        time.sleep(draw.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        reached.append(len(read_rows(metrics)))
    assert start(hunted).wait(timeout=600) == 0

    (expected, expected_rows), (got, got_rows) = final(tmp_path / "calm" / "run"), final(tmp_path / "hunted" / "run")
    assert got_rows == expected_rows
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    left = [path.name for path in (tmp_path / "hunted" / "run" / "checkpoints").iterdir()]
    assert not [name for name in left if name.endswith(".tmp")]
    with capsys.disabled():
        print(f"\n{KILLS} kills at rows {reached}; the calm run took {whole:.0f} s")


@pytest.mark.parametrize("moment", ["tensors", "manifest", "rename", "latest", "purge"])
def test_killed_inside_a_save(tiny_dataset, tmp_path, moment):
    """The process kills itself at each stage of the second save; the next start finds a good checkpoint and says which."""
    script = tmp_path / "die.py"
    script.write_text(SCRIPT)
    chosen = tiny_values(tiny_dataset, tmp_path / "run", max_steps=6)
    chosen["checkpoint"] = {"every": 2, "keep": 1}
    config = write(tmp_path, chosen)
    words = [sys.executable, str(script), moment, str(config)]
    assert (
        subprocess.run(words, cwd=ROOT, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode
        == -9
    )
    whole = [step for step, path in checkpoint.found(tmp_path / "run" / "checkpoints") if checkpoint.check(path)]
    assert whole and whole[-1] == (4 if moment in ("latest", "purge") else 2)
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "train", str(config)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert f"going on from {tmp_path}/run/checkpoints/step-{whole[-1]:08d}" in done.stderr
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 7))


SCRIPT = """
import os, signal, sys
from pathlib import Path
from trainer import checkpoint
from trainer.settings import load_yaml
from trainer.train import run

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
            checkpoint.shutil.rmtree = lambda path, *a, **k: die() if str(path).endswith("2") else None
    return original(*args, **kwargs)

checkpoint.dcp.save = save
run(load_yaml(config))
"""
