"""Sweeps of the learning rate, or of the batch, at several sizes: where the optimum is, how much the plan's value loses, and a law k N^p."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np

GOAL = 0.01  # nats that the plan's value may lose against the best of the sweep
FACTOR = math.sqrt(2)  # between the learning rates of a sweep


@dataclass(frozen=True)
class Optimum:
    """The sweep at one size. Its losses are means over the seeds.

    own: the value that the plan has; own_loss: there; best: the optimum of a parabola through the best value and its neighbours, over the
    logarithm; lowest: loss of the best value, not of the parabola, which is too low beside a steep side; error: standard error of
    own_loss - lowest, from its differences seed by seed, None for one seed; bracketed: whether both neighbours are worse
    """

    size: int
    own: float
    own_loss: float
    best: float
    lowest: float
    error: float | None
    bracketed: bool

    @property
    def lost(self) -> float:
        """Nats that the plan's value loses."""
        return self.own_loss - self.lowest

    @property
    def verdict(self) -> str:
        if not self.bracketed:
            return "open: the best is at the end of the sweep"
        return (
            f"within {GOAL:g}" if self.lost <= GOAL else f"off: the best is {self.best / self.own:.2g} times as large"
        )


def is_bracketed(means: Mapping[Any, float]) -> bool:
    """Whether both neighbours of the best value are worse; one that diverged is."""
    best = min(sorted(means), key=lambda value: means[value])
    return means[best] < math.inf and min(means) < best < max(means)


def optimum(size: int, own: Any, losses: Mapping[Any, Sequence[float]]) -> Optimum:
    """The optimum of a sweep. own: the plan's value, one of those of `losses`; losses: value -> loss of each seed, infinity if it
    diverged; at least one value has none."""
    means = {value: fmean(losses[value]) for value in sorted(losses)}
    finite = [(value, mean) for value, mean in means.items() if math.isfinite(mean)]
    at = min(range(len(finite)), key=lambda index: finite[index][1])
    best, lowest = finite[at]
    differences = [one - other for one, other in zip(losses[own], losses[best], strict=True)]
    error = (
        stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 and math.isfinite(means[own]) else None
    )
    if 0 < at < len(finite) - 1:
        x, y = (np.array(part) for part in zip(*finite[at - 1 : at + 2], strict=True))
        curve, slope, _ = np.polyfit(np.log(x), y, 2)
        if curve > 0:
            best = float(np.exp(-slope / (2 * curve)))
    return Optimum(size, own, means[own], best, lowest, error, is_bracketed(means))


def power_law(optima: list[Optimum]) -> tuple[float, float]:
    """(k, p) of k N^p, the least squares of the optima's logarithms. ValueError for fewer than two sizes."""
    if len({one.size for one in optima}) < 2:
        raise ValueError("a law of the optimum needs two sizes")
    power, constant = np.polyfit(np.log([one.size for one in optima]), np.log([one.best for one in optima]), 1)
    return float(np.exp(constant)), float(power)
