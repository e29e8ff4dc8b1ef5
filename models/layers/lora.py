"""The adapters of LoRA (arXiv 2106.09685): the update of a linear layer is scale B A, with scale = alpha / rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import normal_


class Pair(nn.Module):
    """scale b a x: the update of one matrix [d_out, d_in], x [..., d_in]. a: [rank, d_in], drawn; b: [d_out, rank], zero at the start."""

    def __init__(self, d_in: int, d_out: int, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.a = nn.Parameter(torch.empty(rank, d_in))
        self.b = nn.Parameter(torch.empty(d_out, rank))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.a) * self.scale, self.b)

    def draw(self, generator: torch.Generator | None) -> None:
        """a from N(0, 1 / (3 d_in)): the paper's distribution, with the variance of its code, which draws from U(+-1 / sqrt(d_in))."""
        normal_(self.a, (3 * self.a.shape[1]) ** -0.5, generator)
        nn.init.zeros_(self.b)


class Adapter(nn.ModuleList):
    """The update of a linear layer: a Pair for each matrix that it fuses, in the order of their rows. [..., d_in] -> [..., d_out]"""

    def forward(self, x: Tensor) -> Tensor:
        updates = [pair(x) for pair in self]
        return updates[0] if len(updates) == 1 else torch.cat(updates, dim=-1)


def add_update(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A forward hook. A hook works for every kind of linear layer: a layer that computes in fp8 is of another class."""
    return output + layer.lora(inputs[0])


def updated(weight: Tensor, pairs: list[tuple[Tensor, Tensor]], scale: float) -> Tensor:
    """weight + scale B A, in the dtype of weight; weight: [d_out, d_in]; pairs: (a, b) of each of its matrices. The sum is fp32, as
    bf16 would lose most of an update."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    update = torch.cat([b.to(wide) @ a.to(wide) for a, b in pairs])
    return (weight.to(wide) + scale * update).to(weight.dtype)


def effective_weight(layer: nn.Linear) -> Tensor:
    """The matrix that a linear layer multiplies by, for code that uses it without calling the layer: W, with adapters W + scale B A."""
    adapter: Any = getattr(layer, "lora", None)
    if adapter is None:
        return layer.weight
    return updated(layer.weight, [(pair.a, pair.b) for pair in adapter], adapter[0].scale)
