"""`bench`: measures what a training step costs. Also `bench data` and `bench checkpoint`. README.md explains the files they write.

compare.py: the verb `bench`; variants.py: what it compares; baselines.py, nanogpt.py: with what; turns.py, clock.py: how it
measures; report.py: table, JSON and plot; curves.py: the plot of a swept number; data.py, checkpoint.py: the other two verbs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainer.commands import Verb, over_parent
from trainer.core.config import RunConfig
from trainer.core.settings import setting


@dataclass
class BenchConfig(RunConfig):
    """`bench`, `bench data` and `bench checkpoint`: a run's keys, and what to measure."""

    sweep: list[str] = setting((), "KEY=V1,V2: values of a run's key to compare; repeat the flag for all combinations")
    baselines: list[Literal["bare", "eager", "nanogpt", "transformers"]] | None = setting(
        None,
        "bench: bare (a plain PyTorch loop), transformers (the same shape there), nanogpt (gpt2 as nanoGPT writes it), "
        "eager (whole logits, dense attention, nothing compiled); auto: bare, and transformers if available",
    )
    rounds: int = setting(5, "turns that each candidate takes, after one to warm up", low=1)
    steps_per_round: int = setting(5, "optimiser steps of one turn", low=1)
    bench_dir: str | None = setting(
        None,
        "folder for bench.md, .json and .png; `bench checkpoint` measures the disk it is on; auto: runs/bench-TIME",
    )


def run(config: BenchConfig, as_json: bool) -> None:
    """The verb `bench`."""
    from trainer.commands.bench import compare

    compare.run(config, as_json)


def run_data(config: BenchConfig, as_json: bool) -> None:
    """The verb `bench data`."""
    from trainer.commands.bench import data

    data.run(config, as_json)


def run_checkpoint(config: BenchConfig, as_json: bool) -> None:
    """The verb `bench checkpoint`."""
    from trainer.commands.bench import checkpoint

    checkpoint.run(config, as_json)


STEP = Verb(
    name="bench",
    help="speed and memory of a training step: sweeps, compared with a bare PyTorch loop and transformers",
    config=BenchConfig,
    read=over_parent(BenchConfig),
    run=run,
    json=True,
)
DATA = Verb(
    name="bench data",
    help="speed of loader and tokenizer, compared with what training consumes",
    config=BenchConfig,
    read=over_parent(BenchConfig),
    run=run_data,
    json=True,
)
CHECKPOINT = Verb(
    name="bench checkpoint",
    help="speed of saving and loading, compared with a plain file",
    config=BenchConfig,
    read=over_parent(BenchConfig),
    run=run_checkpoint,
    json=True,
)
