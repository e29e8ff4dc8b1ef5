"""The dial: how many parameters a model has at model_scale."""

from __future__ import annotations

import math


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
