"""Mamba-2 (arXiv 2405.21060): a stack of state space mixers, x + mixer(RMS(x)), without attention and without MLP."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.base import Split, register
from models.config import check_choice, check_ranges, setting
from models.layers.causal import Context
from models.layers.mamba import Mamba2Mixer, check_ssm_sizes
from models.layers.norms import RMSNorm
from models.layers.recurrent_kernels import CONVOLUTION, SSD
from models.layers.stack import Stack


@dataclass(frozen=True)
class Mamba2Config:
    vocab_size: int = setting(50304, "rows of the embedding and of the output projection", low=1, high=10**9)
    d_model: int = setting(768, "width of the residual stream", low=1, high=10**6)
    n_layers: int = setting(24, "mixers", low=1, high=1000)
    state_size: int = setting(128, "numbers that the state holds for each channel (N)", low=1, high=10**4)
    ssm_head_dim: int = setting(64, "channels of a head; must divide expand * d_model", low=1, high=10**4)
    expand: int = setting(2, "inner width of a mixer per d_model", low=1, high=100)
    n_groups: int = setting(1, "groups of heads that share B and C, and a norm", low=1, high=1000)
    conv_size: int = setting(4, "tokens of the short convolution", low=2, high=100)
    norm_eps: float = setting(1e-5, "added to the mean square in RMSNorm", above=0, high=1)
    tied: bool = setting(True, "the output projection is the embedding")
    dropout: float = setting(0.0, "part of what each mixer adds that is zero in training", low=0, high=0.99)
    scan_kernel: str = setting("auto", "of the state space: auto, torch, mamba-ssm or fla")
    conv_kernel: str = setting("auto", "of the short convolution: auto, torch, causal-conv1d or fla")

    def __post_init__(self) -> None:
        check_ranges(self)
        check_ssm_sizes(self)
        check_choice(self, "scan_kernel", ("auto", "torch", *SSD))
        check_choice(self, "conv_kernel", ("auto", "torch", *CONVOLUTION))


class Layer(nn.Module):
    """x + mixer(RMS(x)); x [B, T, D]."""

    def __init__(self, config: Mamba2Config, layer: int) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = Mamba2Mixer(config, layer)
        self.dropout = nn.Dropout(config.dropout)
        self.depth = config.n_layers

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return x + self.dropout(self.mixer(self.norm(x), context))

    def reset(self, generator: torch.Generator | None) -> None:
        self.norm.reset()
        self.mixer.reset(generator, 1 / math.sqrt(self.depth))


@register("mamba2")
class Mamba2(Stack):
    """Embedding, mixers, RMSNorm, tied output projection; the reference is mamba_ssm's MambaLMHeadModel with Mamba2 layers."""

    Config = Mamba2Config
    kernel_fields, scans = ("scan_kernel", "conv_kernel"), SSD

    def __init__(self, config: Mamba2Config) -> None:
        layers = [Layer(config, layer) for layer in range(config.n_layers)]
        super().__init__(config, layers, RMSNorm(config.d_model, config.norm_eps))
        self.widths = config.state_size, config.ssm_head_dim

    def fused_matrices(self) -> dict[str, Split]:
        return {
            f"layers.{i}.mixer.{name}": split
            for i, layer in enumerate(self.layers)
            for name, split in layer.mixer.fused_rows().items()
        }
