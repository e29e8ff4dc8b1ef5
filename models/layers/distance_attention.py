"""Single-head causal attention with a learned slope over the distance, and values wider than its queries and keys.

score(i, j) = q_i k_j / sqrt(d_qk) + slope (j - i), as in ALiBi (arXiv 2108.12409) but with a learned slope. Two
kernels compute it, `attend_dense` and `attend_flex`. In both, distances, bias and softmax are fp32 (`attend_dense` computes
q k^T in the dtype of q).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from models.layers import flex

FLEX_VALUE_WIDTH = 128  # largest value width that suits one Flex kernel
# Up to this length a GPU uses plain products. That they are faster is calculated (models/README.md), not measured. Flex skips the
# masked half of the scores, but it computes them again for each 128 channels of the values, and its backward pass sums the
# gradient of the slope with one atomic addition per score: on an H100 it took 12 of the 50 ms of a step at 1024 tokens. The
# plain form sums that gradient by rows and needs no code of its own for each kind of mask.
DENSE_LENGTH = 1024


class Reach(NamedTuple):
    """What each query sees, and how far away it is."""

    # [Tq, Tk] j - i: integers, because mixed-precision wrappers do not round them; bf16 only to emulate hlb-gpt's rounding
    distance: Tensor
    visible: Tensor  # [Tq, Tk] or [B, Tq, Tk] bool


def attend_dense(q: Tensor, k: Tensor, v: Tensor, slope: Tensor, reach: Reach) -> Tensor:
    """softmax(q k^T / sqrt(d_qk) + slope (j - i)) v; q [B, Tq, d_qk], k [B, Tk, d_qk], v [B, Tk, D] -> [B, Tq, D].

    It uses plain products, because the fused kernels of scaled_dot_product_attention take a learned bias only in the dtype of
    q, and positions must not be in half precision.
    """
    if reach.distance.is_floating_point():
        slope = slope.to(reach.distance.dtype)
    scores = (q @ k.transpose(1, 2)).float() * q.shape[-1] ** -0.5 + (slope * reach.distance).float()  # [B, Tq, Tk]
    return scores.masked_fill(~reach.visible, -math.inf).softmax(dim=-1).to(v.dtype) @ v


def attend_flex(q: Tensor, k: Tensor, v: Tensor, slope: Tensor, block_mask: BlockMask) -> Tensor:
    """The same as `attend_dense` in one FlexAttention kernel, with fp32 scores; q, k and v have the same length.

    Values of D channels are too wide for the kernel, so chunks of them become heads that share q and k (views, no copies).
    """
    length, d_qk, d_v = q.shape[1], q.shape[2], v.shape[2]
    width = max(flex.MIN_WIDTH, min(FLEX_VALUE_WIDTH, d_v))
    n_chunks = -(-d_v // width)
    v = _widened(v, n_chunks * width).unflatten(-1, (n_chunks, width)).transpose(1, 2)  # [B, chunks, T, width]
    q, k = (_widened(x, max(flex.MIN_WIDTH, d_qk)).unsqueeze(1).expand(-1, n_chunks, -1, -1) for x in (q, k))
    # One copy of the slope per query: the kernel sums its gradient with atomics, which are slow on a single address.
    slopes = slope.expand(length).contiguous()

    def add_bias(score: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + slopes[i] * (j - i)

    out = flex.attention(q, k, v, score_mod=add_bias, block_mask=block_mask, scale=d_qk**-0.5)  # [B, chunks, T, width]
    return out.transpose(1, 2).flatten(2)[..., :d_v]


def _widened(x: Tensor, width: int) -> Tensor:
    """x padded with zero channels to `width`. (F.pad would copy x even if there is nothing to add.)"""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def flex_refusal(length: int, d_qk: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why `attend_dense` is the better or only choice for training at this length; None if Flex is better."""
    refusal = flex.device_refusal(device)
    refusal = refusal or flex.width_refusal(max(flex.MIN_WIDTH, d_qk), flex.MIN_WIDTH, dtype)
    if refusal is None and torch.are_deterministic_algorithms_enabled():
        refusal = "it sums the slope's gradient in no fixed order"
    if refusal is None and length <= DENSE_LENGTH:
        refusal = f"plain products up to {DENSE_LENGTH} tokens"
    return refusal and f"flex: {refusal}"
