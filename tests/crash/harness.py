"""Trials of one short run: a fault at a file operation or a disk as a crash leaves it, then the same command again.

`python tests/crash/harness.py [TRIALS]` runs that many, drawn at random (all without a number), and counts how they end.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(HERE)]

import torch  # noqa: E402
from disk import Record, crashes, lay_out, read_trace  # noqa: E402

from trainer.checkpoint import format as checkpoint  # noqa: E402
from trainer.runs.metrics import read_rows  # noqa: E402
from trainer.runtime.distributed import World  # noqa: E402

FAULTS = {"kill": 1, "torn write": 2, "EIO": 3, "disk full": 4, "disk read-only": 5}  # as in shim.c
WORDS = (
    "the a model learns reads writes small large word sentence of in over under light dark river stone wind and or not"
)
CONFIG = """\
model_scale: 0.05
model: {name: hlb, vocab_size: 320, d_model: 16, n_layers: 1}
max_steps: 4
precision: fp32
device: cpu
data: {path: data, source: TEXT, tokenizer: bytes, validation_fraction: 0.2, sample_length: 32, threads: 1}
batch: {tokens_per_step: 128, tokens_per_microbatch: 128, sequence_start: 16, sequence_length: 32, sequence_double_every: 2}
evaluation: {every: 2}
checkpoint: {every: 2, keep: 1}
log: {demo_tokens: 0, sample_tokens: 2, sample_prompt: the}
run_dir: run
"""


class Trial(NamedTuple):
    """fault: at operation `at` of the run; none: the run finds `files`, as a crash has left them."""

    name: str
    fault: int = 0
    at: int = 0
    files: dict[str, bytes | None] | None = None


class Lab:
    """A server of runs, the run that nothing befell, and the trials that can be made of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.disk = folder, folder / "disk"
        library = folder / "shim.so"
        subprocess.run(
            ["gcc", "-O1", "-shared", "-fPIC", "-o", library, HERE / "shim.c", "-ldl", "-lpthread"], check=True
        )
        environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "server.py")],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        (folder / "text").mkdir()
        for i in range(12):
            (folder / "text" / f"{i:02d}.txt").write_text(
                " ".join(random.Random(i).choices(WORDS.split(), k=40)) + "\n"
            )
        (folder / "config.yaml").write_text(CONFIG.replace("TEXT", str(folder / "text")))
        self.disk.mkdir()
        code, self.operations = self.run(trace=folder / "trace")
        assert code == 0, self.log
        self.trace: list[Record] = read_trace(folder / "trace")
        self.expected = self.result()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def run(
        self, fault: int = 0, at: int = 0, trace: Path | None = None, more: tuple[str, ...] = ()
    ) -> tuple[int, int]:
        """(exit code, file operations) of the command, in the folder that stands for the disk."""
        request = {
            "folder": str(self.disk),
            "words": ["train", str(self.folder / "config.yaml"), *more],
            "root": str(self.disk),
            "at": at,
            "fault": fault,
            "trace": trace and str(trace),
            "log": str(self.folder / "log"),
        }
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["code"], answer["count"]

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def result(self) -> tuple[dict[str, torch.Tensor], list[Any]]:
        run = self.disk / "run"
        rows = [
            (row["step"], row["loss"], row["grad_norm"], row["val_loss"]) for row in read_rows(run / "metrics.jsonl")
        ]
        return checkpoint.load(checkpoint.found(run / "checkpoints")[-1][1], "", World()), rows

    def trials(self) -> list[Trial]:
        """Every trial: each fault at each operation, and each disk that a crash may leave."""
        live = [
            Trial(f"{name} at operation {at}", fault, at)
            for name, fault in FAULTS.items()
            if name not in ("kill", "torn write")  # the disks that these leave are among those of `crashes`
            for at in range(1, self.operations + 1)
        ]
        return live + [Trial(f"crash after {name}", files=files) for name, files in crashes(self.trace, str(self.disk))]

    def attempt(self, trial: Trial) -> list[str]:
        """What went wrong: nothing, or of "traceback", "bricked", "different"."""
        shutil.rmtree(self.disk)
        self.disk.mkdir()
        wrong = []
        if trial.files is not None:
            lay_out(trial.files, self.disk)
        else:
            code, _ = self.run(trial.fault, trial.at)
            wrong += ["traceback"] * ("Traceback" in self.log)
            wrong += ["no line"] * (code != 0 and "error: " not in self.log)
        code, _ = self.run()
        wrong += ["traceback"] * ("Traceback" in self.log) + ["bricked"] * (code != 0)
        return wrong if code else wrong + ["different"] * (not self.is_expected())

    def is_expected(self, rows_too: bool = True) -> bool:
        (weights, rows), (right, right_rows) = self.result(), self.expected
        same = weights.keys() == right.keys() and all(torch.equal(weights[name], right[name]) for name in right)
        return same and (rows == right_rows or not rows_too)


def main() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        lab = Lab(Path(scratch))
        trials = lab.trials()
        print(f"{lab.operations} operations, {len(trials)} trials", flush=True)
        if sys.argv[1:]:
            trials = random.Random(0).sample(trials, min(len(trials), int(sys.argv[1])))
        counts: Counter[str] = Counter()
        for number, trial in enumerate(trials, 1):
            wrong = lab.attempt(trial)
            counts.update(wrong or ["right"])
            if wrong:
                print(f"{trial.name}: {', '.join(wrong)}: {' | '.join(lab.log.splitlines()[-3:])}", flush=True)
            if number % 50 == 0:
                print(f"{number} of {len(trials)}: {dict(counts)}", flush=True)
        print(dict(counts))
        lab.close()


if __name__ == "__main__":
    main()
