"""Schedules are functions of the step, never state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Decay:
    """What a learning-rate schedule after its warm-up depends on.

    warmup, total: steps; final: the multiplier at `total`, for the schedules that have an end; decay_steps: of the final decay of
    `wsd`; power: the exponent of `power`
    """

    warmup: int
    total: int
    final: float = 0.1
    decay_steps: int = 0
    power: float = 0.5

    def progress(self, step: int) -> float:
        """0 at the end of the warm-up, 1 at `total` and later."""
        return min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))


def cosine(step: int, decay: Decay) -> float:
    """A quarter of a wave from 1 to `final` (arXiv 1608.03983)."""
    return decay.final + (1 - decay.final) * 0.5 * (1 + math.cos(math.pi * decay.progress(step)))


def linear(step: int, decay: Decay) -> float:
    """A straight line from 1 to `final`."""
    return 1 - (1 - decay.final) * decay.progress(step)


def wsd(step: int, decay: Decay) -> float:
    """1, then a straight line to `final` in the last decay_steps (warm-up, stable, decay: arXiv 2404.06395; a trapezoid)."""
    left = max(0, decay.total - step)
    return decay.final + (1 - decay.final) * min(1.0, left / max(1, decay.decay_steps))


def exponential(step: int, decay: Decay) -> float:
    """The same factor in each step, from 1 to `final`."""
    return decay.final ** decay.progress(step)


def power(step: int, decay: Decay) -> float:
    """(step / warmup)^-power. It has no end: a run can go on at any step (the power law of arXiv 2408.13359)."""
    return (max(step + 1, 1) / max(1, decay.warmup)) ** -decay.power


def inverse_sqrt(step: int, decay: Decay) -> float:
    """`power` with exponent 0.5 (arXiv 1706.03762)."""
    return (max(step + 1, 1) / max(1, decay.warmup)) ** -0.5


def constant(step: int, decay: Decay) -> float:
    return 1.0


SCHEDULES: dict[str, Callable[[int, Decay], float]] = {
    function.__name__: function for function in (cosine, linear, wsd, exponential, power, inverse_sqrt, constant)
}


def multiplier(name: str, step: int, decay: Decay) -> float:
    """Multiplier of the learning rate at 0-based `step`: linear warm-up, (step + 1) / warmup, then the schedule `name`."""
    return (step + 1) / decay.warmup if step < decay.warmup else SCHEDULES[name](step, decay)


def ramped(step: int, start: int, full: int, steps: int) -> int:
    """Tokens of 0-based `step` if a batch grows in a straight line from `start` to `full` tokens in `steps` steps."""
    return full if step >= steps else start + (full - start) * step // steps


def sequence_length(step: int, start: int, longest: int, double_every: int) -> int:
    """Sequence length at 0-based `step`. It doubles every `double_every` steps, for the first time at step double_every + 1."""
    if double_every == 0:
        return longest
    doublings = max(0, (step - 1) // double_every)
    return min(longest, start * 2 ** min(doublings, 32))


def sequence_lengths(start: int, longest: int, double_every: int) -> list[int]:
    """The sequence lengths of a run, in order."""
    if double_every == 0:
        return [longest]
    lengths = [start]
    while lengths[-1] < longest:
        lengths.append(min(longest, lengths[-1] * 2))
    return lengths
