"""Make a frozen run with the release that is checked out: `python tests/frozen/make.py NAME`, once for each release.

A frozen run is a tiny dataset, a run of 8 steps on it, and what that release made of it afterwards: the rows of 8 more steps, a
figure and a text. `tests/test_frozen.py` asks all this of every later version. Never make one anew: a run that a user has
cannot be made anew either.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

from trainer.checkpoint import format as checkpoint  # noqa: E402
from trainer.checkpoint.manifest import amend  # noqa: E402
from trainer.core.files import digest_of  # noqa: E402
from trainer.planning import run_config  # noqa: E402

WORDS = (
    "the a model learns reads writes small large word sentence of in over under light dark river stone wind and or not"
)
CONFIG = """\
model_scale: 0.05
model: {name: hlb, vocab_size: 320, d_model: 16, n_layers: 2}
max_steps: 8
precision: fp32
device: cpu
data: {path: data}
batch: {tokens_per_step: 512, tokens_per_microbatch: 256, sequence_start: 16, sequence_length: 64, sequence_double_every: 3}
evaluation: {every: 8, protocol: both}
checkpoint: {every: 4, keep: 1}
log: {demo_tokens: 0, sample_tokens: 8, sample_prompt: the}
run_dir: run
"""
LEFT_OUT = ("curves.png", ".lock", "plan.txt")  # nothing goes on from these


def trainer(folder: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "trainer", *words]
    return subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, encoding="utf-8", check=True
    ).stdout


def anonymous(run: Path, scratch: str) -> None:
    """Take out where and on which machine it was made: names within the folder `scratch` become relative. Digests follow."""
    start = json.loads((run / "environment.jsonl").read_text())
    start["command"][0], start["host"] = "trainer/__main__.py", "host"
    (run / "environment.jsonl").write_text(json.dumps({**start, "digest": digest_of(start)}) + "\n")
    header, body = (run / run_config.CONFIG).read_text().split("\n", 1)
    found = run_config.HEADER.fullmatch(header)
    assert found is not None
    (run / run_config.CONFIG).write_text(run_config.seal(body.replace(f"{scratch}/", ""), *found.groups()[:2]))
    for _, path in checkpoint.found(run / "checkpoints"):
        config = json.dumps(checkpoint.check(path)["config"]).replace(f"{scratch}/", "")
        amend(path, {"config": json.loads(config)})


def make(name: str) -> None:
    target = HERE / name
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "text").mkdir()
        for i in range(30):
            draw = random.Random(i)
            (folder / "text" / f"{i:02d}.txt").write_text(" ".join(draw.choices(WORDS.split(), k=160)) + "\n")
        (folder / "config.yaml").write_text(CONFIG)
        prepare = ("prepare", "--source", "text", "--tokenizer", "bytes", "--validation_fraction", "0.1")
        trainer(folder, *prepare, "--sample_length", "64", "--workers", "1", "--out", "data")
        trainer(folder, "train", "config.yaml")
        target.mkdir()
        ignored = shutil.ignore_patterns(*LEFT_OUT)
        for part in ("data", "run"):
            shutil.copytree(folder / part, target / part, ignore=ignored)
        anonymous(target / "run", scratch)
        expected = {
            "evaluate": json.loads(trainer(folder, "evaluate", "run", "--json")),
            "text": trainer(
                folder, "generate", "run", "--prompt", "the", "--temperature", "0", "--max_new_tokens", "12"
            ),
        }
        trainer(folder, "train", "config.yaml", "--max_steps", "16")
        rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        expected["rows"] = [row for row in rows if row["step"] > 8]
        (target / "expected.json").write_text(json.dumps(expected, indent=1).replace(f"{scratch}/", "") + "\n")


if __name__ == "__main__":
    make(sys.argv[1])
