"""A linear for ZeRO-3, which gathers a weight for a forward pass and frees it afterwards. torch's linear saves a transposed view
of the weight, which would keep the gathered weight alive until the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

plain_linear = torch.nn.functional.linear


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)  # the parameter itself: empty after forward, gathered again for backward
        ctx.has_bias = bias is not None
        return plain_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)  # [B T, out]
        return (
            gradient @ weight if ctx.needs_input_grad[0] else None,
            rows.t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None,
            rows.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in], weight [out, in] -> [..., out]. For the backward pass it saves only the parameter, not a view of it."""
    return _Linear.apply(x, weight, bias)
