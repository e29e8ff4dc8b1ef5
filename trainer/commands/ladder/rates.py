"""The learning rate at several sizes: where its optimum is, how much the rule loses, and a law lr = k N^p through the optima."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

GOAL = 0.01  # nats that the rule may lose against the best of the sweep


@dataclass(frozen=True)
class Optimum:
    """The sweep at one size. rule: the learning rate that `plan` infers; best: the optimum of a parabola through the best rate and
    its neighbours; lost: nats that the rule loses against the lowest of the parabola and the sweep; bracketed: whether both
    neighbours are worse."""

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
            f"within {GOAL:g}" if self.lost <= GOAL else f"off: the best is {self.best / self.rule:.2g} times the rule"
        )


def optimum(size: int, rule: float, losses: Mapping[float, float]) -> Optimum:
    """The optimum of a sweep. losses: learning rate -> loss, which has the rule's."""
    finite = sorted((rate, loss) for rate, loss in losses.items() if math.isfinite(loss))
    rates = [rate for rate, _ in finite]
    at = min(range(len(finite)), key=lambda index: finite[index][1])
    best, lowest = finite[at]
    bracketed = rates[0] < best < rates[-1] or (best == rates[-1] and max(losses) > best and best > rates[0])
    if 0 < at < len(finite) - 1:
        x, y = (np.array(part) for part in zip(*finite[at - 1 : at + 2], strict=True))
        curve, slope, level = np.polyfit(np.log(x), y, 2)
        if curve > 0:
            best = float(np.exp(-slope / (2 * curve)))
            lowest = min(lowest, float(level - slope**2 / (4 * curve)))
    return Optimum(size, rule, best, lowest, losses[rule] - lowest, bracketed)


def power_law(optima: list[Optimum]) -> tuple[float, float]:
    """(k, p) of lr = k N^p, the least squares of ln lr. ValueError for fewer than two sizes."""
    if len({one.size for one in optima}) < 2:
        raise ValueError("a law of the learning rate needs two sizes")
    power, constant = np.polyfit(np.log([one.size for one in optima]), np.log([one.best for one in optima]), 1)
    return float(np.exp(constant)), float(power)
