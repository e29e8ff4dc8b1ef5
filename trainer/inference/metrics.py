"""Metrics of your own: functions that a plug-in registers, and that an evaluation calls."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

from trainer.core.errors import UserError
from trainer.core.text import printable

METRICS: dict[str, Callable[[Measured], Any]] = {}


@dataclass(frozen=True)
class Measured:
    """What a metric gets, on every rank.

    runner: has the `model`, in evaluation mode and without gradients, its `device`, `autocast()`, and `predict(tokens)`, the logits
    [B, T, V] of tokens [B, T]. With a sharded model all ranks must call `predict` equally often.
    tokenizer: the run's own; `encode(text)` gives an array of ids. step: optimiser steps that the model has had.
    world: `rank`, `size`, and `sum(tensor)` over the ranks. say: prints a line, on rank 0.
    """

    runner: Any
    tokenizer: Any
    step: int
    world: Any
    say: Callable[[str], None]


def register_metric(name: str) -> Callable[[Any], Any]:
    """Function decorator: register a metric as `name`. The function takes a Measured and returns a number, or numbers by name.
    ValueError if the name is taken."""

    def add(function: Callable[[Measured], Any]) -> Callable[[Measured], Any]:
        taken = METRICS.get(name)
        if taken is not None and taken.__qualname__ != function.__qualname__:
            raise ValueError(f"metric name {name!r} is taken by {taken.__module__}")
        METRICS[name] = function
        return function

    return add


def check_metrics(names: list[str], key: str) -> None:
    """UserError, which begins with `key`, if no plug-in has registered one of the names."""
    for name in names:
        if name not in METRICS:
            known = ", ".join(sorted(METRICS)) or "none"
            raise UserError(
                f"{key}: no metric {printable(repr(name), 100)} is registered (there are: {known}); name its file with "
                "--plugin FILE.py"
            )


def measure(name: str, measured: Measured) -> dict[str, float]:
    """The numbers of a metric: metric_NAME, or metric_NAME_KEY if it gives several; rank 0's on all ranks. UserError on all ranks if
    it fails on one of them, or gives something else than finite numbers."""
    import torch

    model = measured.runner.model
    training = model.training
    model.eval()
    found: dict[str, float] = {}
    problem = ""
    try:
        with torch.no_grad():
            found = checked(METRICS[name](measured), f"metric_{name}")
    except UserError as error:
        problem = str(error)
    except Exception as error:
        problem = f"{type(error).__name__}: {printable(error, 300)}"
    model.train(training)
    outcomes = measured.world.gather((found, problem))
    for rank, (_, told) in enumerate(outcomes):
        if told:
            raise UserError(f"metric {printable(name, 100)}: {told}" + (f" (rank {rank})" if rank else ""))
    return outcomes[0][0]


def checked(result: Any, column: str) -> dict[str, float]:
    """A metric's result by column. UserError if it is not a finite number, or a dict of such."""
    if isinstance(result, dict):
        return {name: value for key, part in result.items() for name, value in checked(part, f"{column}_{key}").items()}
    if isinstance(result, bool) or not isinstance(result, Real):
        hint = "; a tensor's number is its item()" if hasattr(result, "item") else ""
        raise UserError(
            f"{printable(column, 100)} is {printable(type(result).__name__, 60)}, and a metric is a number or a dict of numbers{hint}"
        )
    if not math.isfinite(result):
        raise UserError(f"{printable(column, 100)} is {float(result)}, and a metric must be a finite number")
    return {column: float(result)}
