"""A transformer layer for models that join several stacks of different widths: attention, then a SwiGLU MLP, pre-norm."""

from __future__ import annotations

import math
from collections.abc import Hashable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Split
from models.layers import normal_
from models.layers.causal import Context
from models.layers.norms import RMSNorm
from models.layers.plain_attention import PlainAttention


def hidden_width(width: int, ratio: float) -> int:
    """Of the MLP."""
    return max(32, round(ratio * width / 32) * 32)


def plain_layer_parameters(width: int, hidden_ratio: float) -> int:
    """The number of parameters of a PlainLayer."""
    return 4 * width * width + 3 * width * hidden_width(width, hidden_ratio) + 2 * width


class PlainLayer(nn.Module):
    """x + attention(RMS(x)), then x + MLP(RMS(x)); x [B, T, width]. key: of its keys and values in a decoding state; window: 0 for none;
    depth: of all layers of the model, by which the initial values of what is added are scaled down."""

    def __init__(
        self,
        width: int,
        head_dim: int,
        key: Hashable,
        depth: int,
        *,
        hidden_ratio: float,
        rope_theta: float,
        norm_eps: float,
        dropout: float,
        init_std: float,
        window: int = 0,
    ) -> None:
        super().__init__()
        heads = width // head_dim
        self.key, self.hidden = key, hidden_width(width, hidden_ratio)
        self.attention_norm, self.mlp_norm = RMSNorm(width, norm_eps), RMSNorm(width, norm_eps)
        self.attention = PlainAttention(width, width, (heads, heads), head_dim, window=window, rope_theta=rope_theta)
        self.up = nn.Linear(width, 2 * self.hidden, bias=False)
        self.down = nn.Linear(self.hidden, width, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.std, self.out_std = init_std, init_std / math.sqrt(2 * depth)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), context, self.key))
        gate, linear = self.up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.dropout(self.down(F.silu(gate) * linear))

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None) -> None:
        for norm in (self.attention_norm, self.mlp_norm):
            norm.reset()
        self.attention.reset()
        for module, std in (
            (self.attention.qkv, self.std),
            (self.attention.out, self.out_std),
            (self.up, self.std),
            (self.down, self.out_std),
        ):
            normal_(module.weight, std, generator)

    def fused_matrices(self, name: str) -> dict[str, Split]:
        """name: of this layer in its model."""
        return {
            f"{name}.attention.qkv.weight": Split(0, self.attention.rows),
            f"{name}.up.weight": Split(0, {"gate": self.hidden, "linear": self.hidden}),
        }
