"""Tiny runs for tests: their weights and losses, one that is built and not started, and another dataset."""

from pathlib import Path

import torch
from conftest import tiny_values

from trainer.checkpoint import format as checkpoint
from trainer.core.config import PrepareConfig, RunConfig
from trainer.core.settings import build
from trainer.data.prepare import prepare
from trainer.data.stream import find_dataset
from trainer.planning.plan import resolve
from trainer.runs.metrics import read_rows
from trainer.runtime.distributed import World
from trainer.runtime.signals import StopSignals
from trainer.runtime.watchdog import Watchdog
from trainer.training.run import Run

WORLD = World()


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / "checkpoints" / checkpoint.step_name(step), "", WORLD)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(folder: Path) -> list:
    return [(row["step"], row["loss"], row["grad_norm"], row["tokens"]) for row in read_rows(folder / "metrics.jsonl")]


def make(dataset, folder, **changes) -> Run:
    config = build(RunConfig, tiny_values(dataset, folder, **changes))
    info = find_dataset(config.data)
    return Run(resolve(config, info), WORLD, info, Watchdog(WORLD, 60), StopSignals(WORLD))


def other_data(folder: Path) -> Path:
    """A dataset in `folder` that is none of the others, with the same tokenizer."""
    (folder / "other.txt").write_text("the cat sat on the mat.\n" * 500)
    values = {"source": str(folder / "other.txt"), "tokenizer": "bytes", "validation_fraction": 0.2, "workers": 1}
    prepare(PrepareConfig(**values, sample_length=64, out=str(folder / "data")), lambda line: None)
    return folder / "data"
