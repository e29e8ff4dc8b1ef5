"""ZeRO-3 gathers a weight for a forward pass and drops it afterwards. torch's linear would hold on to it until the backward pass,
through the transposed view it keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

plain_linear = torch.nn.functional.linear


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)  # the parameter itself: empty in between, gathered again for the backward pass
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
    """x [..., in], weight [out, in] -> [..., out]; keeps of the weight nothing but the parameter."""
    return _Linear.apply(x, weight, bias)
