"""Linear layers that compute with weights of one bit or of three values: BitNet (arXiv 2310.11453) and BitNet b1.58 (2402.17764).

The parameter is the latent weight, in full precision. Each product rounds it again: to {-1, 1} (sign) or {-1, 0, 1} (bitnet), with one
scale for a whole matrix. Inputs are normed and rounded to 8 bits, with one scale for each token. Gradients pass the rounding as if it
were not there (straight-through), and train the latent weight. Names, shapes and checkpoints are those of nn.Linear.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import autocast_dtype, without_autocast

LEVELS = 127  # an input is one of -127 .. 127
LEAST = 1e-5  # smallest scale of a weight or an input, as in the papers; all zeros would divide by zero

Rounding = Callable[[Tensor, Sequence[int]], tuple[Tensor, Tensor]]


def signs(weight: Tensor, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """sign(W - mean W) and the scale mean |W|: (-1 or 1 [out, in], in the dtype of weight; fp32 scales [matrices]).

    weight: [out, in], one or several matrices on top of each other; rows: of each, their sum is out.
    """
    parts = weight.split(list(rows))
    rounded = [torch.where(part.float() > part.float().mean(), 1, -1).to(weight.dtype) for part in parts]
    return torch.cat(rounded), _mean_sizes(parts)


def ternary(weight: Tensor, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """W / mean |W|, rounded and clipped to -1, 0 or 1, and the scale mean |W|; arguments and results as in `signs`."""
    parts = weight.split(list(rows))
    scales = _mean_sizes(parts)
    rounded = [
        (part.float() / scale).round().clamp(-1, 1).to(weight.dtype) for part, scale in zip(parts, scales, strict=True)
    ]
    return torch.cat(rounded), scales


def _mean_sizes(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([part.abs().mean(dtype=torch.float32) for part in parts]).clamp(min=LEAST)


ROUNDINGS: dict[str, Rounding] = {"bitnet": ternary, "sign": signs}


def of_rows(scales: Tensor, rows: Sequence[int]) -> Tensor:
    """The scale of each row [out], of scales of matrices or of rows."""
    if len(scales) == sum(rows):
        return scales
    return torch.cat([scale.expand(count) for scale, count in zip(scales, rows, strict=True)])


class BitLinear(nn.Linear):
    """nn.Linear that computes with the rounded weight. Made in place by `to_bit_linear`. Evaluation computes the same."""

    kind: str
    rows: tuple[int, ...]  # of each matrix that the weight fuses: each has its own scale

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the output dtype of nn.Linear."""
        dtype = autocast_dtype(x.device.type) or x.dtype
        out = _Product.apply(normed(x), self.weight, self.kind, self.rows, dtype)
        return out if self.bias is None else out + self.bias.to(dtype)


def to_bit_linear(layer: Any, kind: str, rows: Sequence[int]) -> None:
    """Make an nn.Linear a BitLinear, in place."""
    layer.__class__ = BitLinear
    layer.kind, layer.rows = kind, tuple(rows)


def normed(x: Tensor) -> Tensor:
    """x / its root mean square over the last dimension, in the dtype of x; without parameters."""
    with without_autocast(x.device.type):
        return F.rms_norm(x, x.shape[-1:], eps=LEAST)


def eight_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """(integers -127 .. 127 as int8 [..., in], the fp32 size [..., 1] of one of them), by the largest |x| of each token."""
    size = x.abs().amax(-1, keepdim=True).float().clamp(min=LEAST) / LEVELS
    return (x.float() / size).round().to(torch.int8), size


def integer_product(x: Tensor, weight: Tensor, row_scales: Tensor, dtype: torch.dtype) -> Tensor:
    """x [..., in] by eight_bits, times a weight [out, in] of small integers in `dtype`, times the scales of its rows [out].

    Sums are exact: integers up to 127 are exact in bf16, and their sums in fp32 up to rows of 132,000 entries. (A result in bf16 is
    rounded.)
    """
    integers, size = eight_bits(x)
    return (F.linear(integers.to(dtype), weight) * (size * row_scales)).to(dtype)


class _Product(torch.autograd.Function):
    """What integer_product gives for the rounded weight. The backward pass keeps the inputs in 8 bits, and the parameter instead of
    its rounded copy, which would hold a whole matrix if the parameter is sharded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kind: str, rows: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        rounded, scales = ROUNDINGS[kind](weight, rows)
        integers, size = eight_bits(x)
        ctx.save_for_backward(integers, size, weight)
        ctx.kind, ctx.rows, ctx.x_dtype = kind, rows, x.dtype
        return (F.linear(integers.to(dtype), rounded.to(dtype)) * (size * of_rows(scales, rows))).to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # type: ignore[override]
        integers, size, weight = ctx.saved_tensors
        dtype, dx, dweight = gradient.dtype, None, None
        if ctx.needs_input_grad[0]:
            rounded, scales = ROUNDINGS[ctx.kind](weight, ctx.rows)
            scaled = gradient * of_rows(scales, ctx.rows).to(dtype)  # [..., out]
            dx = (scaled @ rounded.to(dtype)).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            inputs = (integers * size).to(dtype).flatten(0, -2)  # [N, in]
            dweight = (gradient.flatten(0, -2).t() @ inputs).to(weight.dtype)
        return dx, dweight, None, None, None
