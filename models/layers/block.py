"""A block of the decoder: its two branches, their norms, and how they join the residual stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.layers.attention import HEADS, Attention, Context, LatentAttention
from models.layers.mlp import ACTIVATIONS
from models.layers.norms import LayerNorm, make_norm
from models.layers.pattention import Pattention
from models.layers.residual import HyperConnection, Plain, Scaled, Weighted, narrow
from models.state import DecodingState

# Where the norms are: (before the branch, after the branch, after the sum).
NORM_PLACES = {
    "pre": (True, False, False),
    "post": (False, False, True),
    "pre_post": (True, True, False),
    "branch": (False, True, False),
}


class Mlp(nn.Module):
    """down(activation(up(x))); x [B, T, D]."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        inputs, self.activation = ACTIVATIONS[config.mlp]
        self.up = nn.Linear(config.d_model, inputs * config.hidden, bias=config.bias)
        self.out = nn.Linear(config.hidden, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.activation(self.up(x)))

    def fused_rows(self) -> dict[str, dict[str, int]]:
        """Name of a matrix -> the rows of each matrix that it fuses: those of the activation's inputs."""
        hidden, inputs = self.out.in_features, self.up.out_features // self.out.in_features
        return {"up": {f"input {i}": hidden for i in range(inputs)}} if inputs > 1 else {}


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), each added by a residual connection; x [B, T, D] or [B, T, n, D]."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        before, after, last = NORM_PLACES[config.norm_placement]
        self.attention_norm, self.mlp_norm = norm_of(config, before), norm_of(config, before)
        self.attention: nn.Module = attention_class(config)(config, layer)
        self.mlp: nn.Module = mlp_of(config)
        self.attention_post, self.mlp_post = norm_of(config, after), norm_of(config, after)
        self.attention_join, self.mlp_join = join_of(config, 2 * layer), join_of(config, 2 * layer + 1)
        self.attention_last, self.mlp_last = norm_of(config, last), norm_of(config, last)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, values: Tensor | None, context: Context, cache: DecodingState | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """values: mixed into this layer's values, or None; returns (x, values for the next layer)."""
        h, kept = self.attention_join.mix(x)
        attended, values = self.attention(self.attention_norm(h), values, context, cache)
        attended = self.dropout(self.attention_post(attended))
        x = self.attention_last(self.attention_join.merge(x, attended, kept))
        h, kept = self.mlp_join.mix(x)
        transformed = self.dropout(self.mlp_post(self.mlp(self.mlp_norm(h))))
        return self.mlp_last(self.mlp_join.merge(x, transformed, kept)), values

    def residual_projections(self) -> list[nn.Module]:
        """The last matrix of each branch."""
        return [self.attention.out, self.mlp if isinstance(self.mlp, Pattention) else self.mlp.out]  # type: ignore[list-item]

    def branch_ends(self) -> list[nn.Module]:
        """The norm at the end of each branch, if there is one: with zero_init its gain starts at zero."""
        return [post for post in (self.attention_post, self.mlp_post) if not isinstance(post, nn.Identity)]


class ParallelBlock(nn.Module):
    """x + attention(norm(x)) + MLP(norm(x)) with one norm, and one input and one output matrix for both branches (PaLM,
    arXiv 2204.02311); x [B, T, D]."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        inputs, self.activation = ACTIVATIONS[config.mlp]
        self.norm = norm_of(config, True)
        self.heads = HEADS[config.attention](config, layer)
        self.rows = self.heads.rows | {f"input {i}": config.hidden for i in range(inputs)}
        self.widths = [sum(self.heads.widths), inputs * config.hidden]
        self.up = nn.Linear(config.d_model, sum(self.widths), bias=config.qkv_has_bias)
        self.out = nn.Linear(self.heads.d_out + config.hidden, config.d_model, bias=config.out_has_bias)
        self.join = join_of(config, layer)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, values: Tensor | None, context: Context, cache: DecodingState | None = None
    ) -> tuple[Tensor, Tensor | None]:
        h, kept = self.join.mix(x)
        h = self.norm(h)
        qkv, hidden = self.up(h).split(self.widths, dim=-1)
        attended, values = self.heads(qkv, h, values, context, cache)
        added = self.dropout(self.out(torch.cat((attended, self.activation(hidden)), dim=-1)))
        return self.join.merge(x, added, kept), values

    def fused_rows(self) -> dict[str, dict[str, int]]:
        """Name of a matrix -> the rows of each matrix that it fuses. `out` fuses two by columns, which add up as one product."""
        return {"up": self.rows}

    def residual_projections(self) -> list[nn.Module]:
        return [self.out]

    def branch_ends(self) -> list[nn.Module]:
        return []


class ParallelBlockTwoNorms(Block):
    """x + attention(norm_1(x)) + MLP(norm_2(x)); x [B, T, D]."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__(config, layer)
        del self.mlp_join

    def forward(
        self, x: Tensor, values: Tensor | None, context: Context, cache: DecodingState | None = None
    ) -> tuple[Tensor, Tensor | None]:
        h, kept = self.attention_join.mix(x)
        attended, values = self.attention(self.attention_norm(h), values, context, cache)
        added = self.dropout(attended + self.mlp(self.mlp_norm(h)))
        return self.attention_join.merge(x, added, kept), values


def attention_class(config: Any) -> Any:
    """The attention branch for the switch `attention`: latent, or one with heads from HEADS."""
    return LatentAttention if config.attention == "latent" else Attention


BLOCKS: dict[str, Any] = {"serial": Block, "parallel": ParallelBlock, "parallel_two_norms": ParallelBlockTwoNorms}


class FurtherHead(nn.Module):
    """Predicts the token `index` places after the next one (arXiv 2404.19737): from the last hidden states, or with its own
    block parallel to the trunk's last block, which belongs to the first head."""

    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        linear = config.prediction_heads == "linear"
        self.norm = norm_of(config, linear)
        self.block = None if linear else BLOCKS[config.block](config, config.n_layers - 1 + index)
        self.unembedding = (
            None if config.share_unembedding else nn.Linear(config.d_model, config.vocab_size, bias=False)
        )

    def forward(
        self,
        x: Tensor,
        before: Tensor,
        values: Tensor | None,
        context: Context,
        last_norm: nn.Module,
        cache: DecodingState | None = None,
    ) -> Tensor:
        """x [B, T, D]: the trunk's output -> [B, T, D]; before: input of the trunk's last block; last_norm: the trunk's final norm,
        used after a block."""
        if self.block is None:
            return self.norm(x)
        return last_norm(narrowed(self.block(before, values, context, cache)[0]).to(x.dtype))


def norm_of(config: Any, here: bool) -> nn.Module:
    """The norm of the config's name, or an Identity. For a bf16 stream, its result has the dtype of its input."""
    if not here:
        return nn.Identity()
    if config.norm == "layer" and config.residual_dtype == "bf16":
        return LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)
    return make_norm(config.norm, config.d_model, config.norm_eps, config.bias)


def mlp_of(config: Any) -> nn.Module:
    if "mlp" not in config.pattention_of:
        return Mlp(config)
    slots = config.mlp_slots
    return Pattention(config.d_model, config.d_model, slots, config.pattention_mode)


def join_of(config: Any, index: int) -> Any:
    return JOINS[config.residual](config, index)


JOINS: dict[str, Any] = {
    "plain": lambda config, index: Plain() if (scale := config.multipliers.branch) == 1 else Scaled(scale),
    "weighted": lambda config, index: Weighted(),
    "static_hyper": lambda config, index: HyperConnection(config.d_model, config.n_streams, index, dynamic=False),
    "dynamic_hyper": lambda config, index: HyperConnection(config.d_model, config.n_streams, index, dynamic=True),
}


def narrowed(x: Tensor) -> Tensor:
    """The sum of the streams, if there are several."""
    return x if x.ndim == 3 else narrow(x)
