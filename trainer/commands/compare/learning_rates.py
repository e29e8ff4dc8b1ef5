"""How an arm's learning rate is chosen: a sweep on the tuning seed that goes on until both neighbours of the best are worse."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

RULE = (
    "an arm's learning rate is the one with the lowest validation loss at the end of a full run on the tuning seed; while the "
    "best is the lowest or the highest one tried, the sweep goes on in that direction by the same factor, up to {most} "
    "learning rates for each arm; a run that diverged counts as worse than any other"
)
DIVERGED = math.inf
FACTOR = 2.0  # between the learning rates of a sweep that the spec does not give


@dataclass(frozen=True)
class Sweep:
    """Where the sweep of an arm is. tried: learning rates that are or should be tried, sorted.

    chosen: None while runs are missing, or if all runs diverged; bracketed: whether both neighbours of the chosen one are
    worse, None if nothing was tuned
    """

    tried: tuple[float, ...]
    chosen: float | None = None
    bracketed: bool | None = None


def start(given: tuple[float, ...] | None, inferred: float, most: int) -> tuple[float, ...]:
    """The first learning rates of a sweep: those of the spec, or half, once and twice the inferred one."""
    if given is not None:
        return given
    return (inferred,) if most < 3 else tuple(rounded(inferred * factor) for factor in (1 / FACTOR, 1.0, FACTOR))


def sweep(first: tuple[float, ...], losses: Mapping[float, float], most: int) -> Sweep:
    """The sweep that began with `first`, given the losses so far. losses: learning rate -> loss at the end, or DIVERGED.

    It depends on the losses alone, not on the order in which the runs ended.
    """
    if len(first) == 1:
        return Sweep(first, first[0])
    tried = tuple(sorted(first))
    while all(rate in losses for rate in tried):
        best = min(tried, key=lambda rate: (losses[rate], rate))
        if losses[best] != DIVERGED and best not in (tried[0], tried[-1]):
            return Sweep(tried, best, True)
        if len(tried) >= most:
            return Sweep(tried, None if losses[best] == DIVERGED else best, False)
        # If all diverged, `best` is the lowest: the sweep goes on below it.
        tried = (below(tried), *tried) if best == tried[0] else (*tried, above(tried))
    return Sweep(tried)


def below(tried: tuple[float, ...]) -> float:
    return rounded(tried[0] * tried[0] / tried[1])


def above(tried: tuple[float, ...]) -> float:
    return rounded(tried[-1] * tried[-1] / tried[-2])


def rounded(rate: float) -> float:
    """Six digits, so that the same learning rate always has the same name."""
    return float(f"{rate:.6g}")
