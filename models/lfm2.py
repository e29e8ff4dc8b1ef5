"""LFM2 (Liquid AI): gated short convolutions, and attention with grouped keys and values in some layers; a SwiGLU MLP in all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Split, register
from models.config import check_choice, check_ranges, setting
from models.layers import normal_
from models.layers.attend import KERNELS
from models.layers.causal import Context, ShortConvolution
from models.layers.norms import RMSNorm
from models.layers.plain_attention import PlainAttention, check_attention_sizes
from models.layers.recurrent_kernels import CONVOLUTION
from models.layers.stack import HybridStack, frame_parts


@dataclass(frozen=True)
class Lfm2Config:
    vocab_size: int = setting(50304, "rows of the embedding and of the output projection", low=1, high=10**9)
    d_model: int = setting(768, "width of the residual stream; a multiple of attention_head_dim", low=1, high=10**6)
    n_layers: int = setting(12, "blocks", low=1, high=1000)
    attention_every: int = setting(
        3, "the last block of so many has attention, the others a convolution", low=1, high=1000
    )
    attention_head_dim: int = setting(64, "channels of a head of attention", low=2, high=10**4)
    attention_kv_heads: int = setting(
        0, "heads of keys and values; 0: half of the heads, or all if they are odd", low=0, high=10**4
    )
    rope_theta: float = setting(1e6, "base of the rotary wavelengths", above=1, high=1e12)
    conv_size: int = setting(3, "tokens of the short convolution", low=2, high=100)
    hidden_ratio: float = setting(8 / 3, "width of the MLP per d_model, rounded to a multiple of 32", above=0, high=100)
    norm_eps: float = setting(1e-5, "added to the mean square in RMSNorm", above=0, high=1)
    init_std: float = setting(0.02, "standard deviation of the initial matrices", above=0, high=1)
    tied: bool = setting(True, "the output projection is the embedding")
    dropout: float = setting(0.0, "part of what each branch adds that is zero in training", low=0, high=0.99)
    attention_kernel: str = setting("auto", "auto, torch, sdpa, cudnn, flex, flash or flash3")
    conv_kernel: str = setting("auto", "of the short convolution: auto, torch, causal-conv1d or fla")

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.attention_head_dim % 2:
            raise ValueError(f"attention_head_dim must be even, for rotary positions, not {self.attention_head_dim}")
        check_attention_sizes(self.d_model, self.attention_head_dim, self.attention_kv_heads)
        check_choice(self, "attention_kernel", ("auto", *KERNELS))
        check_choice(self, "conv_kernel", ("auto", "torch", *CONVOLUTION))

    @property
    def heads(self) -> tuple[int, int]:
        queries = self.d_model // self.attention_head_dim
        return queries, self.attention_kv_heads or (queries if queries % 2 else queries // 2)

    @property
    def hidden(self) -> int:
        return max(32, round(self.hidden_ratio * self.d_model / 32) * 32)


class GatedConvolution(nn.Module):
    """out(C * convolution(B * x)), with B, C and x from one projection; x [B, T, D]."""

    def __init__(self, config: Lfm2Config, layer: int) -> None:
        super().__init__()
        d = config.d_model
        self.rows = {"B": d, "C": d, "x": d}
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.conv = ShortConvolution(d, config.conv_size, key=(layer, "convolution"), bias=False)
        self.out = nn.Linear(d, d, bias=False)

    def forward(self, x: Tensor, context: Context, key: Any) -> Tensor:
        before, after, x = self.qkv(x).chunk(3, dim=-1)
        return self.out(after * self.conv(before * x, context))


class Block(nn.Module):
    """x + mixer(RMS(x)), then x + MLP(RMS(x)); x [B, T, D]."""

    def __init__(self, config: Lfm2Config, layer: int, kind: str) -> None:
        super().__init__()
        c, d, self.layer = config, config.d_model, layer
        self.mixer_norm, self.mlp_norm = RMSNorm(d, c.norm_eps), RMSNorm(d, c.norm_eps)
        self.mixer: Any = (
            GatedConvolution(c, layer)
            if kind == "convolution"
            else PlainAttention(d, d, c.heads, c.attention_head_dim, rope_theta=c.rope_theta, qk_norm_eps=c.norm_eps)
        )
        self.up, self.down = nn.Linear(d, 2 * c.hidden, bias=False), nn.Linear(c.hidden, d, bias=False)
        self.dropout = nn.Dropout(c.dropout)
        self.std, self.out_std = c.init_std, c.init_std / math.sqrt(2 * c.n_layers)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = x + self.dropout(self.mixer(self.mixer_norm(x), context, self.layer))
        gate, linear = self.up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.dropout(self.down(F.silu(gate) * linear))

    def reset(self, generator: torch.Generator | None) -> None:
        for norm in (self.mixer_norm, self.mlp_norm):
            norm.reset()
        if isinstance(self.mixer, PlainAttention):
            self.mixer.reset()
        else:
            self.mixer.conv.reset(generator)
        for module, std in ((self.mixer.qkv, self.std), (self.up, self.std)):
            normal_(module.weight, std, generator)
        for module in (self.mixer.out, self.down):
            normal_(module.weight, self.out_std, generator)


@register("lfm2")
class Lfm2(HybridStack):
    """Embedding, blocks, RMSNorm, tied output projection; the reference is transformers' Lfm2ForCausalLM."""

    Config = Lfm2Config
    kernel_fields = ("attention_kernel", "conv_kernel")

    def __init__(self, config: Lfm2Config) -> None:
        layers = [Block(config, layer, kind) for layer, kind in enumerate(self.kinds(config))]
        super().__init__(config, layers, RMSNorm(config.d_model, config.norm_eps))
        self.attention_head_dim, self.embedding_std = config.attention_head_dim, config.init_std

    @classmethod
    def kinds(cls, config: Lfm2Config) -> list[str]:
        every = config.attention_every
        return ["attention" if i % every == every - 1 else "convolution" for i in range(config.n_layers)]

    @classmethod
    def parts(cls, config: Lfm2Config, kind: str) -> list[nn.Module]:
        return [Block(config, 0, kind)] if kind != "frame" else frame_parts(config)

    def fused_matrices(self) -> dict[str, Split]:
        found: dict[str, Split] = {}
        for i, layer in enumerate(self.layers):
            found[f"layers.{i}.mixer.qkv.weight"] = Split(0, layer.mixer.rows)
            found[f"layers.{i}.up.weight"] = Split(0, {"gate": self.config.hidden, "linear": self.config.hidden})
        return found
