"""TokenFormer's Pattention (arXiv 2410.23168): attention to learned key and value tokens replaces a weight matrix.

To widen the network, append tokens (`grown`): the function that it computes stays the same.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Added to the mean square of a row, so that a row of zeros has a finite result and a finite gradient (1e5 times the incoming
# one). It is so small because small inputs (averages over a long context) give small scores: it must be negligible against 1e-6.
EPS = 1e-10


class Pattention(nn.Module):
    """weigh(x keys^T) values, without 1 / sqrt(d), bias and dropout. Raises ValueError for an unknown mode.

    keys: [slots, d_in], values: [slots, d_out]; the model draws them.
    tau: sqrt(initial slots), fp32 [1], in the state dict, because it does not change when slots are added. If the model is cast
    to bf16, tau is rounded too, by a factor within 2^-8 of 1.
    mode: a key of MODES.
    """

    tau: Tensor

    def __init__(self, d_in: int, d_out: int, slots: int, mode: str = "l2_norm_gelu") -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
        self.mode = mode
        self.weigh = MODES[mode]
        self.keys = nn.Parameter(torch.empty(slots, d_in))
        self.values = nn.Parameter(torch.empty(slots, d_out))
        self.register_buffer("tau", torch.empty(1, dtype=torch.float32))

    def reset(self) -> None:
        nn.init.constant_(self.tau, math.sqrt(self.keys.shape[0]))

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] -> [..., d_out]"""
        scores = F.linear(x, self.keys)  # [..., slots]
        return self.weigh(scores, self.tau) @ self.values


def grown(pattention: Pattention, values: Tensor) -> Pattention:
    """A copy with further slots that computes the same function: zero keys and the given values [extra, d_out].

    A zero key has weight 0, because gelu(0) = 0 and tau stays the same. The values must not be zero: otherwise neither they nor
    the keys would ever get a gradient. Raises ValueError in mode softmax, where a zero key takes weight from the others.
    """
    if pattention.mode == "softmax":
        raise ValueError("mode softmax cannot grow: a new slot with any key takes weight from the others")
    larger = copy.deepcopy(pattention)
    old_keys, old_values = pattention.keys.detach(), pattention.values.detach()
    new_keys = old_keys.new_zeros(values.shape[0], old_keys.shape[1])
    larger.keys = nn.Parameter(torch.cat((old_keys, new_keys)))
    larger.values = nn.Parameter(torch.cat((old_values, values.detach().to(old_values))))
    return larger


def _normalise(x: Tensor, tau: Tensor) -> Tensor:
    """x tau / |x| along the last axis: with tau^2 entries, the root mean square is 1. Statistics in fp32."""
    statistics = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=statistics)
    return (x * ((norm / tau).square() + EPS).rsqrt()).to(x.dtype)  # rounded only here, not the factor


def _l2_norm_gelu(scores: Tensor, tau: Tensor) -> Tensor:
    return F.gelu(_normalise(scores, tau))


def _gelu_l2_norm(scores: Tensor, tau: Tensor) -> Tensor:
    return _normalise(F.gelu(scores), tau)


def _softmax(scores: Tensor, tau: Tensor) -> Tensor:
    probabilities = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return (probabilities * tau * tau).to(scores.dtype)


# Scores [..., slots] and tau [1] -> weights [..., slots].
MODES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l2_norm_gelu": _l2_norm_gelu,
    "gelu_l2_norm": _gelu_l2_norm,
    "softmax": _softmax,
}
