"""Schedules are functions of the step, never state."""

from __future__ import annotations

import math
from typing import Any


def warmup_cosine(step: int, warmup: int, total: int, final: float = 0.1) -> float:
    """Linear warm-up ((step + 1) / warmup), then a cosine from 1 down to `final` at `total`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def schedule_change(config: Any, before: Any, step: int) -> str:
    """How a new max_steps changes the learning rate of a run that continues after `step`; "" if it changes nothing.

    config: resolved, with the new max_steps; before: max_steps of the run until now.
    """
    optim, now = config.optim, config.max_steps
    if optim.recipe == "hlb" or before == now or not isinstance(before, int):
        return ""
    old, new = (
        optim.lr * warmup_cosine(step, optim.warmup_steps, total, optim.final_lr_fraction) for total in (before, now)
    )
    return (
        f"max_steps: {now:,} instead of {before:,}: the cosine ends there, so the learning rate of step {step + 1:,} is "
        f"{new:.3g}, not {old:.3g}, and {optim.lr * optim.final_lr_fraction:.3g} at step {now:,}"
    )


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
