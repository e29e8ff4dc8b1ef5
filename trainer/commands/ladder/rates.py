"""Sweeps of the learning rate, or of the batch, at several sizes: where the optimum is, how much the rule loses, and a law k N^p."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

GOAL = 0.01  # nats that the rule may lose against the best of the sweep
FACTOR = math.sqrt(2)  # between the learning rates of a sweep


@dataclass(frozen=True)
class Optimum:
    """The sweep at one size. rule: the value that `plan` infers, or a given one; best: the optimum of a parabola through the best value and its
    neighbours, over the logarithm; lowest: loss of the sweep, not of the parabola, which is too low beside a steep side; lost: nats that
    the rule loses against it; bracketed: whether both neighbours are worse."""

    size: int
    rule: float
    best: float
    lowest: float
    lost: float
    bracketed: bool

    @property
    def verdict(self) -> str:
        if not self.bracketed:
            return "open: the best is at the end of the sweep"
        return (
            f"within {GOAL:g}" if self.lost <= GOAL else f"off: the best is {self.best / self.rule:.2g} times as large"
        )


def optimum(size: int, rule: float, losses: Mapping[Any, float]) -> Optimum:
    """The optimum of a sweep. losses: learning rate, or tokens of a step -> loss, which has the rule's."""
    finite = sorted((rate, loss) for rate, loss in losses.items() if math.isfinite(loss))
    at = min(range(len(finite)), key=lambda index: finite[index][1])
    best, lowest = finite[at]
    bracketed = min(losses) < best < max(losses)  # one that diverged is worse
    if 0 < at < len(finite) - 1:
        x, y = (np.array(part) for part in zip(*finite[at - 1 : at + 2], strict=True))
        curve, slope, _ = np.polyfit(np.log(x), y, 2)
        if curve > 0:
            best = float(np.exp(-slope / (2 * curve)))
    return Optimum(size, rule, best, lowest, losses[rule] - lowest, bracketed)


def power_law(optima: list[Optimum]) -> tuple[float, float]:
    """(k, p) of k N^p, the least squares of the optima's logarithms. ValueError for fewer than two sizes."""
    if len({one.size for one in optima}) < 2:
        raise ValueError("a law of the optimum needs two sizes")
    power, constant = np.polyfit(np.log([one.size for one in optima]), np.log([one.best for one in optima]), 1)
    return float(np.exp(constant)), float(power)


def first_batches(rule: int, length: int) -> list[int]:
    """The tokens of a step that a sweep begins with: those of the rule, half and twice as many, in whole sequences of `length`."""
    sequences = max(1, rule // length)
    return [count * length for count in dict.fromkeys((sequences, max(1, sequences // 2), 2 * sequences))]


def next_batch(losses: Mapping[int, float], length: int, most: int) -> int | None:
    """The tokens of a step to try next: beyond the end of the sweep that is best. None if both neighbours of the best are worse, if
    `most` have been tried, or below one sequence."""
    tried = sorted(losses)
    best = min(tried, key=lambda batch: (losses[batch], batch))
    if len(tried) >= most or best not in (tried[0], tried[-1]):
        return None
    if best == tried[0]:
        return tried[0] // length // 2 * length or None
    return 2 * tried[-1]
