"""The dial: how many parameters a model has at model_scale."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable

DEFAULT_SCALE = 1.0
GRID = range(-3000, 4001)  # 1000 log10 of the scales that `scale_for` tries


def dimensions(scale: float) -> tuple[int, int]:
    """(d_model, n_layers) of hlb at this scale: d = 64 rint(6 log2(1+s)), L = rint(8 log2(1+s)); at least (64, 1)."""
    growth = math.log2(1 + scale)
    return max(64, 64 * round(6 * growth)), max(1, round(8 * growth))


def hlb_parameters(d_model: int, n_layers: int, vocab_size: int) -> int:
    """N = 2 V d + L (6.25 d^2 + d + 1) + d, exact where 8 divides d."""
    return 2 * vocab_size * d_model + n_layers * (25 * d_model**2 // 4 + d_model + 1) + d_model


def target_parameters(scale: float, vocab_size: int) -> int:
    """The number of parameters that every architecture meets within 3 % at this scale: hlb's count with this vocabulary."""
    return hlb_parameters(*dimensions(scale), vocab_size)


def scale_for(parameters: int, vocab_size: int) -> float:
    """The scale, to four digits, whose target is the nearest to `parameters`. Where several have that target, the middle one."""

    def scale(index: int) -> float:
        return float(f"{10 ** (index / 1000):.4g}")

    def first(reached: Callable[[int], bool]) -> int:
        """The first index of GRID whose target has reached something, at most the last index."""
        at = bisect.bisect_left(GRID, True, key=lambda index: reached(target_parameters(scale(index), vocab_size)))
        return min(at, len(GRID) - 1)

    above = first(lambda target: target >= parameters)
    near = [target_parameters(scale(GRID[at]), vocab_size) for at in (max(above - 1, 0), above)]
    nearest = min(near, key=lambda target: abs(target - parameters))
    begin, end = first(lambda target: target >= nearest), first(lambda target: target > nearest)
    return scale(GRID[max(begin, (begin + end - 1) // 2)])
