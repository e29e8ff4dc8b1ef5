"""Norms over the last dimension, by name: LayerNorm, RMSNorm and DyT."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import without_autocast


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), rounded to the dtype of x, times a gain (arXiv 1910.07467); x [..., width], no bias.

    The mean and the division are fp32 (fp64 for fp64). compute: the function used, `rms_norm` or another with its signature.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.compute: Callable[[Tensor, Tensor, float], Tensor] = rms_norm

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, self.weight, self.eps)

    def reset(self) -> None:
        set_gain(self, 1.0)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The reference; x [..., width], weight [width]."""
    # F.rms_norm computes in fp32 for every dtype of x. Autocast on a GPU would make and keep an fp32 copy of x.
    with without_autocast(x.device.type):
        return F.rms_norm(x, x.shape[-1:], eps=eps) * weight.to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm with gain and bias in the dtype of x, which the result has too; x [..., width].

    The statistics are fp32 (fp64 for fp64); a CPU keeps them for the backward pass in the dtype of x. Under autocast on a GPU,
    nn.LayerNorm makes and keeps an fp32 copy of x, and returns fp32.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        with without_autocast(x.device.type):
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class DyT(nn.Module):
    """Dynamic tanh instead of a norm: weight tanh(alpha x) + bias (arXiv 2503.10622); x [..., width].

    The tanh is fp32 (fp64 for fp64), because the gradient of alpha is a sum over every entry of x.
    """

    def __init__(self, width: int, bias: bool = True) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), 0.5))
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bent = torch.tanh(self.alpha.float() * x).to(x.dtype)
        if self.bias is None:
            return bent * self.weight.to(x.dtype)
        return torch.addcmul(self.bias.to(x.dtype), bent, self.weight.to(x.dtype))

    def reset(self) -> None:
        set_gain(self, 1.0)


_MAKERS: dict[str, Callable[[int, float, bool], nn.Module]] = {
    "layer": lambda width, eps, bias: nn.LayerNorm(width, eps=eps, bias=bias),
    "rms": lambda width, eps, bias: RMSNorm(width, eps),
    "dyt": lambda width, eps, bias: DyT(width, bias),
}
NORMS = tuple(_MAKERS)


def make_norm(kind: str, width: int, eps: float, bias: bool = True) -> nn.Module:
    """The norm named `kind`, one of NORMS, over [..., width]; RMSNorm has no bias, DyT no eps. ValueError for other names."""
    return _MAKERS[_known(kind)](width, eps, bias)


def _known(kind: str) -> str:
    if kind not in _MAKERS:
        raise ValueError(f"norm must be {', '.join(NORMS[:-1])} or {NORMS[-1]}, not {kind!r}")
    return kind


@torch.no_grad()
def set_gain(norm: nn.Module, value: float) -> None:
    """Set all parameters of a norm: the gain to `value`, a bias to 0, DyT's alpha to 0.5.

    A gain of 0 on a branch's output makes the block the identity, with gradients of the usual size. A zero projection before
    a norm would also give the identity, but the slope of a norm at 0 is 1 / sqrt(eps).
    """
    norm.get_parameter("weight").fill_(value)
    for name, parameter in norm.named_parameters():
        if name == "bias":
            parameter.zero_()
        elif name == "alpha":
            parameter.fill_(0.5)
