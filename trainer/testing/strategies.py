"""Checks of a model inside the trainer: steps with every strategy that works in one process, and checkpoints."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from models.base import Batch
from trainer.checkpoint import format as checkpoint
from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import build
from trainer.engine import build_engine
from trainer.engine.gradients import refuse_unreached
from trainer.objectives import build_objective, resolve_objective
from trainer.planning.plan import resolve
from trainer.runtime.distributed import World, join
from trainer.testing.subject import SCALE, Check, Skipped, Subject, require, require_close

SPREAD = ("ddp", "fsdp", "zero0", "zero1", "zero2", "zero3")
STEPS = 3  # the last shows what the second has changed in weights behind a matrix that began at zero
# A different order of sums changes about 1e-6 relative; a lost share or a wrong mean changes 0.1 to 1.
SAME = 1e-4


@contextlib.contextmanager
def group_of_one() -> Iterator[None]:
    """Within the block there is a process group that holds only this process."""
    join(World(), "cpu", alone=True)
    try:
        yield
    finally:
        dist.destroy_process_group()


def plan_of(subject: Subject, strategy: str, **settings: Any) -> Any:
    """The plan of a small run without data. Raises Skipped if it would need frozen models, which `check` does not have."""
    if build_objective(resolve_objective(subject.objective)).frozen_models():
        raise Skipped("it needs a frozen model")
    values = {
        "model_scale": SCALE,
        "model": {"name": subject.name, **subject.choices},
        "objective": subject.objective,
        "device": "cpu",
        "precision": "fp32",
        "data": {"tokenizer": "bytes"},
        "engine": {"strategy": strategy},
        **settings,
    }
    # A plan for ddp needs several processes; in a group of one, ddp computes the same as among several.
    world = World(size=2, local_size=2) if strategy == "ddp" else World()
    return resolve(build(RunConfig, values), world=world)


@contextlib.contextmanager
def engine_of(subject: Subject, strategy: str, **settings: Any) -> Iterator[Any]:
    with contextlib.closing(build_engine(plan_of(subject, strategy, **settings), World())) as engine:
        yield engine


def losses_of(engine: Any, subject: Subject, first: int, steps: int) -> list[float]:
    """Mean loss of some optimiser steps on one batch, from step `first` on."""
    batch: Batch = subject.batch
    count, losses = engine.count(batch, batch["tokens"].numel()), []
    for step in range(first, first + steps):
        loss = engine.backward(batch, 1 / count, True)[0] / count
        engine.step(step, loss)
        losses.append(loss.item())
    return losses


def one_device_trains(subject: Subject) -> None:
    with engine_of(subject, "single") as engine:
        losses = losses_of(engine, subject, 0, STEPS)
    require(torch.tensor(losses).isfinite().all(), f"the losses of {STEPS} steps are {losses}")
    require(losses[0] != losses[1], f"a step changes nothing: the losses of {STEPS} steps are {losses}")


def spread_trains_the_same(subject: Subject, strategy: str) -> None:
    try:
        plan_of(subject, strategy)
    except UserError as error:  # it is not installed, or does not work with this model
        raise Skipped(str(error)) from None
    with engine_of(subject, "single") as engine:
        alone = losses_of(engine, subject, 0, STEPS)
    with engine_of(subject, strategy) as engine:
        losses = losses_of(engine, subject, 0, STEPS)
    told = f"losses {losses} of {STEPS} steps, and {alone} on one device"
    require_close(torch.tensor(losses), torch.tensor(alone), told, SAME)


def checkpoints_carry_a_run(subject: Subject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with engine_of(subject, "single") as engine:
            losses_of(engine, subject, 0, STEPS)
            keep = checkpoint.retention(1, 0)
            path = checkpoint.save(Path(folder), STEPS, engine.tensors(), {}, World(), keep)
            went_on = losses_of(engine, subject, STEPS, STEPS)
        with engine_of(subject, "single", seed=1) as engine:
            engine.load(path)
            resumed = losses_of(engine, subject, STEPS, STEPS)
    require(resumed == went_on, f"after loading a checkpoint the losses are {resumed}, without loading {went_on}")


def training_begins(subject: Subject) -> None:
    """The check that `train` itself makes before its first step."""
    warnings: list[str] = []
    refuse_unreached(plan_of(subject, "single"), warnings.append)
    require(not warnings, "; ".join(warnings))


CHECKS = [
    Check("start", "training begins", training_begins, True),
    Check("checkpoint", "a run continues from its checkpoint, bit for bit", checkpoints_carry_a_run),
    Check("single", "one device trains it", one_device_trains),
    *(
        Check(name, f"{name} trains the same", functools.partial(spread_trains_the_same, strategy=name))
        for name in SPREAD
    ),
]
