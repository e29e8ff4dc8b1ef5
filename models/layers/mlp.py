"""Activations of a block's MLP: plain (2 matrices, hidden width 4 d) or gated (3 matrices, 8/3 d: the same number of parameters)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(NamedTuple):
    """apply: [..., inputs * hidden] -> [..., hidden]; with two inputs the gate is the first half."""

    inputs: int
    apply: Callable[[Tensor], Tensor]


def _gated(activation: Callable[[Tensor], Tensor]) -> Activation:
    def apply(x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return activation(gate) * value

    return Activation(2, apply)


def _maxout(x: Tensor) -> Tensor:
    return torch.maximum(*x.chunk(2, dim=-1))


def _negout(x: Tensor) -> Tensor:
    p, n = x.chunk(2, dim=-1)
    return torch.where(n > p, -n, p)


def _tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _squared_relu(x: Tensor) -> Tensor:
    positive = F.relu(x)
    return positive * positive  # autocast on a GPU would compute square() in fp32, and hold that


ACTIVATIONS = {
    "gelu": Activation(1, F.gelu),
    "gelu_tanh": Activation(1, _tanh_gelu),
    "relu2": Activation(1, _squared_relu),  # Primer, arXiv 2109.08668
    "geglu": _gated(F.gelu),  # arXiv 2002.05202, as swiglu
    "geglu_tanh": _gated(_tanh_gelu),  # Gemma's
    "swiglu": _gated(F.silu),
    "maxout": Activation(2, _maxout),
    "negout": Activation(2, _negout),  # BlaGPT's
}


def hidden_width(activation: str, d_model: int, multiple: int) -> int:
    """4 d_model; with two inputs 8/3 d_model, rounded up to a multiple of `multiple`."""
    if ACTIVATIONS[activation].inputs == 1:
        return 4 * d_model
    return -(-8 * d_model // (3 * multiple)) * multiple
