"""Schedules are functions of the step, never state."""

from __future__ import annotations

import math


def constant(step: int) -> float:
    """1, for optimizers that need no schedule."""
    return 1.0


def warmup_cosine(step: int, warmup: int, total: int, final: float = 0.1) -> float:
    """Linear warm-up ((step + 1) / warmup), then a cosine from 1 down to `final` at `total`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


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
