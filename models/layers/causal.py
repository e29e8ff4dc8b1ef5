"""Mixing with the few tokens before: the short convolution and the token shift of recurrent models. Documents are kept apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import uniform_
from models.layers.chunks import wide
from models.state import DecodingState


class Context(NamedTuple):
    """What the layers of a model need besides x. documents: [B, T] as `number_documents` returns them, or None; state: of decoding;
    visible: what attention sees (attention.Context), of a model that has it; scan, convolution: fused kernels of the recurrence and
    of the short convolution (recurrent_kernels.py), None for torch's."""

    documents: Tensor | None = None
    state: DecodingState | None = None
    visible: Any = None
    scan: Callable[..., Any] | None = None
    convolution: Callable[..., Any] | None = None


def with_earlier(x: Tensor, count: int, context: Context, key: Hashable) -> Tensor:
    """x [B, T, C] after the `count` tokens before it, [B, count + T, C]: those that the state holds under `key`, zeros at the start."""
    state = context.state
    if state is None:
        return F.pad(x, (0, 0, count, 0))
    held = torch.cat((state.recall(key, x.new_empty(x.shape[0], count, x.shape[2])), x), dim=1)
    state.remember(key, held[:, -count:])
    return held


def same_document(documents: Tensor, lag: int) -> Tensor:
    """Whether the token `lag` places before is of the same document; [B, T] -> [B, T, 1]."""
    return F.pad(documents[:, lag:] == documents[:, :-lag], (lag, 0)).unsqueeze(-1)


def previous(x: Tensor, context: Context, key: Hashable) -> Tensor:
    """x of the token before, [B, T, C]: zeros at the start of a document."""
    before = with_earlier(x, 1, context, key)[:, :-1]
    return before if context.documents is None else before * same_document(context.documents, 1).to(x.dtype)


class ShortConvolution(nn.Module):
    """A causal convolution of each channel over `size` tokens, in fp32; x [B, T, C]. key: of its entry in the state; silu: whether SiLU
    follows."""

    def __init__(self, channels: int, size: int, key: Hashable, bias: bool = True, silu: bool = False) -> None:
        super().__init__()
        self.channels, self.size, self.key, self.silu = channels, size, key, silu
        self.weight = nn.Parameter(torch.empty(channels, size))  # the last column is for the token itself
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """[B, T, C] in the dtype of x."""
        length, taps = x.shape[1], wide(self.weight).unbind(1)
        if context.convolution is not None:
            before = x if context.state is None else with_earlier(x, self.size - 1, context, self.key)
            return context.convolution(before, self.weight, self.bias, context.documents, self.silu)[:, -length:]
        held = with_earlier(x, self.size - 1, context, self.key)
        y = x * taps[-1] if self.bias is None else torch.addcmul(wide(self.bias), wide(x), taps[-1])
        for lag in range(1, min(self.size, held.shape[1])):
            start = self.size - 1 - lag
            tap = held[:, start : start + length] * taps[-1 - lag]
            if context.documents is not None and lag < length:
                tap = tap * same_document(context.documents, lag).to(tap.dtype)
            y = y + tap
        return F.silu(y.to(x.dtype)) if self.silu else y.to(x.dtype)

    def reset(self, generator: torch.Generator | None) -> None:
        """The initial values of nn.Conv1d."""
        for parameter in self.parameters():
            uniform_(parameter, 1 / math.sqrt(self.size), generator)
