"""Rene (cartesia-ai's Rene-v0.1): Mamba-2, attention in a window and MLPs, one of them in each layer, without positions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Split, register
from models.config import check_choice, setting
from models.layers import uniform_
from models.layers.attend import KERNELS
from models.layers.causal import Context
from models.layers.mamba import Mamba2Mixer
from models.layers.norms import RMSNorm
from models.layers.plain_attention import PlainAttention, check_attention_sizes
from models.layers.recurrent_kernels import SSD
from models.layers.stack import HybridStack, frame_parts
from models.mamba2 import Mamba2Config


@dataclass(frozen=True)
class ReneConfig(Mamba2Config):
    d_model: int = setting(1024, "width of the residual stream; a multiple of attention_head_dim", low=1, high=10**6)
    n_layers: int = setting(12, "layers, each with one mixer", low=1, high=1000)
    attention_every: int = setting(12, "one layer of so many is attention, in the middle of them", low=2, high=1000)
    mlp_every: int = setting(3, "the last layer of so many is an MLP", low=2, high=1000)
    attention_head_dim: int = setting(64, "channels of a head of attention", low=1, high=10**4)
    attention_kv_heads: int = setting(0, "heads of keys and values; 0: as many as of queries", low=0, high=10**4)
    window: int = setting(2048, "a query sees itself and the window - 1 tokens before it; 0: all", low=0, high=10**9)
    mlp_ratio: int = setting(3, "width of an MLP per d_model", low=1, high=100)
    attention_kernel: str = setting("auto", "auto, torch, sdpa, cudnn, flex, flash or flash3")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "attention_kernel", ("auto", *KERNELS))
        check_attention_sizes(self.d_model, self.attention_head_dim, self.attention_kv_heads)

    @property
    def heads(self) -> tuple[int, int]:
        queries = self.d_model // self.attention_head_dim
        return queries, self.attention_kv_heads or queries


class Mlp(nn.Module):
    """out(gelu(up(x))), with biases; x [B, T, D]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.out = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.up(x)))


class Layer(nn.Module):
    """x + mixer(RMS(x)); x [B, T, D]."""

    def __init__(self, config: ReneConfig, layer: int, kind: str) -> None:
        super().__init__()
        c, self.layer, self.kind, self.depth = config, layer, kind, config.n_layers
        self.norm = RMSNorm(c.d_model, c.norm_eps)
        self.mixer: Any
        if kind == "mamba":
            self.mixer = Mamba2Mixer(c, layer, norm_before_gate=True)
        elif kind == "attention":
            d = c.d_model
            self.mixer = PlainAttention(d, d, c.heads, c.attention_head_dim, window=c.window, bias=True)
        else:
            self.mixer = Mlp(c.d_model, c.mlp_ratio * c.d_model)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        y = self.norm(x)
        if self.kind == "mamba":
            y = self.mixer(y, context)
        elif self.kind == "attention":
            y = self.mixer(y, context, self.layer)
        else:
            y = self.mixer(y)
        return x + self.dropout(y)

    def reset(self, generator: torch.Generator | None) -> None:
        """Linear layers as nn.Linear without bias; the last matrix of a mixer is divided by the root of the depth."""
        self.norm.reset()
        if self.kind == "mamba":
            self.mixer.reset(generator, 1 / math.sqrt(self.depth))
            return
        for module in self.mixer.modules():
            if isinstance(module, nn.Linear):
                scale = 1 / math.sqrt(self.depth) if module is self.mixer.out else 1.0
                uniform_(module.weight, scale / math.sqrt(module.in_features), generator)
                nn.init.zeros_(module.bias)


@register("rene")
class Rene(HybridStack):
    """Embedding, layers, RMSNorm, tied output projection. The default has BlaGPT's order: attention at 6 of 12, MLPs at 2, 5, 8, 11."""

    Config = ReneConfig
    kernel_fields, scans = ("attention_kernel", "scan_kernel", "conv_kernel"), SSD

    def __init__(self, config: ReneConfig) -> None:
        layers = [Layer(config, layer, kind) for layer, kind in enumerate(self.kinds(config))]
        super().__init__(config, layers, RMSNorm(config.d_model, config.norm_eps))
        self.windows, self.attention_head_dim = (config.window,), config.attention_head_dim
        self.widths = config.state_size, config.ssm_head_dim

    @classmethod
    def kinds(cls, config: ReneConfig) -> list[str]:
        """A model of fewer layers than the middle of attention_every has attention in its own middle, from two layers on."""
        c = config
        kinds = ["mlp" if i % c.mlp_every == c.mlp_every - 1 else "mamba" for i in range(c.n_layers)]
        middles = range(c.attention_every // 2, c.n_layers, c.attention_every)
        for i in middles or ([c.n_layers // 2] if c.n_layers > 1 else []):
            kinds[i] = "attention"
        return kinds

    @classmethod
    def parts(cls, config: ReneConfig, kind: str) -> list[nn.Module]:
        return [Layer(config, 0, kind)] if kind != "frame" else frame_parts(config)

    def fused_matrices(self) -> dict[str, Split]:
        found: dict[str, Split] = {}
        for i, layer in enumerate(self.layers):
            if layer.kind == "mamba":
                found |= {f"layers.{i}.mixer.{name}": split for name, split in layer.mixer.fused_rows().items()}
            elif layer.kind == "attention":
                found[f"layers.{i}.mixer.qkv.weight"] = Split(0, layer.mixer.rows)
        return found
