"""Zamba2 (arXiv 2411.15242): Mamba-2 layers, and a few transformer blocks that are shared by many depths.

At a hybrid layer a shared block reads the residual stream x beside the embeddings e, and its output t enters the mixer only:

    t = W_i MLP(RMS(attention(RMS([x; e])))),  x <- x + mixer(RMS(x + t))

The shared blocks take turns. Each use has its own W_i, and its own low-rank change of the MLP's (and the attention's) input matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Split, register
from models.config import check_choice, setting
from models.layers import normal_
from models.layers.attend import KERNELS
from models.layers.causal import Context
from models.layers.mamba import Mamba2Mixer
from models.layers.norms import RMSNorm
from models.layers.plain_attention import PlainAttention
from models.layers.recurrent_kernels import SSD
from models.layers.stack import HybridStack, frame_parts
from models.mamba2 import Mamba2Config

STD = 0.02


@dataclass(frozen=True)
class Zamba2Config(Mamba2Config):
    d_model: int = setting(768, "width of the residual stream", low=1, high=10**6)
    n_layers: int = setting(18, "Mamba-2 layers", low=1, high=1000)
    hybrid_every: int = setting(6, "the last layer of so many uses a shared block", low=1, high=1000)
    shared_blocks: int = setting(2, "shared blocks, which take turns", low=1, high=100)
    attention_head_dim: int = setting(
        128, "channels of a head of attention, which is 2 d_model wide", low=1, high=10**4
    )
    rope_theta: float = setting(0.0, "base of rotary positions in shared attention; 0: no positions", low=0, high=1e12)
    mlp_ratio: int = setting(4, "width of the shared MLP per d_model", low=1, high=100)
    adapter_rank: int = setting(128, "channels of the low-rank change of each use", low=1, high=10**4)
    attention_adapter: bool = setting(False, "each use changes the attention's input matrix too")
    state_size: int = setting(64, "numbers that the state holds for each channel (N)", low=1, high=10**4)
    attention_kernel: str = setting("auto", "auto, torch, sdpa, cudnn, flex, flash or flash3")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "attention_kernel", ("auto", *KERNELS))
        if 2 * self.d_model % self.attention_head_dim:
            raise ValueError(
                f"attention_head_dim must divide 2 d_model ({2 * self.d_model}), but {self.attention_head_dim} does not"
            )
        if 0 < self.rope_theta <= 1:
            raise ValueError(f"rope_theta must be 0 or above 1, not {self.rope_theta}")

    @property
    def hybrids(self) -> list[int]:
        """The layers that use a shared block. A model too shallow for any has one in its middle."""
        return list(range(self.hybrid_every - 1, self.n_layers, self.hybrid_every)) or [self.n_layers // 2]


class Adapter(nn.Module):
    """x A B; x [B, T, d_in] -> [B, T, d_out]. It starts at zero."""

    def __init__(self, d_in: int, rank: int, d_out: int) -> None:
        super().__init__()
        self.A, self.B = nn.Linear(d_in, rank, bias=False), nn.Linear(rank, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.B(self.A(x))

    def reset(self, generator: torch.Generator | None) -> None:
        normal_(self.A.weight, STD, generator)
        nn.init.zeros_(self.B.weight)


class SharedBlock(nn.Module):
    """Attention over [x; e], then an MLP, without a residual; x and e [B, T, D] -> [B, T, D]. uses: how often the model calls it."""

    def __init__(self, config: Zamba2Config, uses: int) -> None:
        super().__init__()
        c, d = config, config.d_model
        heads = 2 * d // c.attention_head_dim
        self.norm, self.mlp_norm = RMSNorm(2 * d, c.norm_eps), RMSNorm(d, c.norm_eps)
        scale = (c.attention_head_dim / 2) ** -0.5
        self.attention = PlainAttention(
            2 * d, d, (heads, heads), c.attention_head_dim, rope_theta=c.rope_theta, scale=scale
        )
        self.up = nn.Linear(d, 2 * c.mlp_ratio * d, bias=False)
        self.down = nn.Linear(c.mlp_ratio * d, d, bias=False)
        self.adapters = nn.ModuleList(adapter_of(c, "mlp") for _ in range(uses))
        self.attention_adapters = nn.ModuleList(
            adapter_of(c, "attention") for _ in range(uses if c.attention_adapter else 0)
        )

    def forward(self, x: Tensor, embeddings: Tensor, use: int, layer: int, context: Context) -> Tensor:
        """use: number of this call among those of the block; layer: key of its keys and values, which each use has of its own."""
        both = self.norm(torch.cat((x, embeddings), dim=-1))
        more = self.attention_adapters[use](both) if len(self.attention_adapters) else None
        y = self.mlp_norm(self.attention(both, context, (layer, "shared"), more))
        gate, linear = (self.up(y) + self.adapters[use](y)).chunk(2, dim=-1)
        return self.down(F.gelu(gate) * linear)

    def reset(self, generator: torch.Generator | None) -> None:
        for norm in (self.norm, self.mlp_norm):
            norm.reset()
        self.attention.reset()
        for module in (self.attention.qkv, self.attention.out, self.up, self.down):
            normal_(module.weight, STD, generator)
        for adapter in (*self.adapters, *self.attention_adapters):
            adapter.reset(generator)


def adapter_of(config: Zamba2Config, part: str) -> Adapter:
    d, rank = config.d_model, config.adapter_rank
    return Adapter(d, rank, 2 * config.mlp_ratio * d) if part == "mlp" else Adapter(2 * d, rank, 6 * d)


class Layer(nn.Module):
    """x + mixer(RMS(x + t)), with t = W shared, or 0; x, shared [B, T, D]."""

    def __init__(self, config: Zamba2Config, layer: int, hybrid: bool) -> None:
        super().__init__()
        d = config.d_model
        self.linear = nn.Linear(d, d, bias=False) if hybrid else None
        self.norm = RMSNorm(d, config.norm_eps)
        self.mixer = Mamba2Mixer(config, layer)
        self.dropout = nn.Dropout(config.dropout)
        self.depth = config.n_layers

    def forward(self, x: Tensor, shared: Tensor | None, context: Context) -> Tensor:
        entering = x if self.linear is None or shared is None else x + self.linear(shared)
        return x + self.dropout(self.mixer(self.norm(entering), context))

    def reset(self, generator: torch.Generator | None) -> None:
        if self.linear is not None:
            normal_(self.linear.weight, STD, generator)
        self.norm.reset()
        self.mixer.reset(generator, 1 / math.sqrt(self.depth))


@register("zamba2")
class Zamba2(HybridStack):
    """Embedding, layers and shared blocks, RMSNorm, tied output projection; the reference is transformers' Zamba2ForCausalLM."""

    Config = Zamba2Config
    kernel_fields, scans = ("attention_kernel", "scan_kernel", "conv_kernel"), SSD

    def __init__(self, config: Zamba2Config) -> None:
        kinds = self.kinds(config)
        super().__init__(
            config,
            [Layer(config, layer, kind != "mamba") for layer, kind in enumerate(kinds)],
            RMSNorm(config.d_model, config.norm_eps),
        )
        self.attention_head_dim, self.widths = config.attention_head_dim, (config.state_size, config.ssm_head_dim)
        self.turn = {layer: divmod(use, config.shared_blocks) for use, layer in enumerate(config.hybrids)}
        uses = [[b for _, b in self.turn.values()].count(block) for block in range(config.shared_blocks)]
        self.shared: Any = nn.ModuleList(SharedBlock(config, count) for count in uses if count)

    def run_layers(self, x: Tensor, context: Context) -> Tensor:
        embeddings = x
        for i, layer in enumerate(self.layers):
            shared = None
            if i in self.turn:
                use, block = self.turn[i]
                shared = self.shared[block](x, embeddings, use, i, context)
            x = layer(x, shared, context)
        return x

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        super().init_weights(generator)
        for block in self.shared:
            block.reset(generator)

    def blocks(self) -> list[nn.Module]:
        return [*self.layers, *self.shared]

    @classmethod
    def kinds(cls, config: Zamba2Config) -> list[str]:
        """hybrid: uses a shared block; first: the first use of one, which counts with it."""
        kinds = ["mamba"] * config.n_layers
        for use, layer in enumerate(config.hybrids):
            kinds[layer] = "first" if use < config.shared_blocks else "hybrid"
        return kinds

    @classmethod
    def parts(cls, config: Zamba2Config, kind: str) -> list[nn.Module]:
        if kind == "frame":
            return frame_parts(config)
        if kind == "first":
            return [Layer(config, 0, True), SharedBlock(config, 1)]
        if kind == "mamba":
            return [Layer(config, 0, False)]
        parts = ["mlp", "attention"] if config.attention_adapter else ["mlp"]
        return [Layer(config, 0, True), *(adapter_of(config, part) for part in parts)]

    def fused_matrices(self) -> dict[str, Split]:
        found: dict[str, Split] = {}
        for i, layer in enumerate(self.layers):
            found |= {f"layers.{i}.mixer.{name}": split for name, split in layer.mixer.fused_rows().items()}
        for i, block in enumerate(self.shared):
            found[f"shared.{i}.attention.qkv.weight"] = Split(0, block.attention.rows)
            hidden = self.config.mlp_ratio * self.config.d_model
            found[f"shared.{i}.up.weight"] = Split(0, {"gate": hidden, "linear": hidden})
        return found
