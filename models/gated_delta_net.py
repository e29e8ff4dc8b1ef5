"""Gated delta nets (arXiv 2412.06464) and Kimi delta attention (2510.26692): a delta rule with decay behind short convolutions.

    S_t = decay_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T,  o_t = S_t q_t

`decay` "head": one per head and token (gated delta net); "channel": one for each channel of the keys (KDA). Each block adds a
SwiGLU MLP. There is no attention: Kimi Linear and Qwen3-Next put full attention into every fourth block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Split, register
from models.config import check_choice, check_ranges, setting
from models.layers import fill_, normal_
from models.layers.causal import Context, ShortConvolution
from models.layers.chunks import wide
from models.layers.delta_rule import gated_delta_rule
from models.layers.mamba import draw_time_steps
from models.layers.norms import RMSNorm, rms_norm
from models.layers.recurrent_kernels import CONVOLUTION, GATED_DELTA_RULE
from models.layers.stack import Stack

A_RANGE = 1.0, 16.0  # of the initial decay rates


@dataclass(frozen=True)
class GatedDeltaNetConfig:
    vocab_size: int = setting(50304, "rows of the embedding and of the output projection", low=1, high=10**9)
    d_model: int = setting(768, "width of the residual stream", low=1, high=10**6)
    n_layers: int = setting(12, "blocks", low=1, high=1000)
    head_dim: int = setting(64, "channels of a head's keys", low=1, high=10**4)
    expand_v: int = setting(2, "channels of a head's values per channel of its keys", low=1, high=100)
    delta_heads: int = setting(0, "heads; 0: 3/4 d_model / head_dim, rounded", low=0, high=10**4)
    decay: str = setting(
        "head", "head: one decay per head (gated delta net); channel: one per channel of the keys (KDA)"
    )
    conv_size: int = setting(4, "tokens of the short convolution", low=2, high=100)
    hidden_ratio: float = setting(8 / 3, "width of the MLP per d_model, rounded to a multiple of 32", above=0, high=100)
    norm_eps: float = setting(1e-5, "added to the mean square in RMSNorm", above=0, high=1)
    init_std: float = setting(0.02, "standard deviation of the initial matrices", above=0, high=1)
    tied: bool = setting(False, "the output projection is the embedding")
    dropout: float = setting(0.0, "part of what each branch adds that is zero in training", low=0, high=0.99)
    scan_kernel: str = setting("auto", "of the delta rule: auto, torch or fla")
    conv_kernel: str = setting("auto", "of the short convolution: auto, torch, causal-conv1d or fla")

    def __post_init__(self) -> None:
        check_ranges(self)
        check_choice(self, "scan_kernel", ("auto", "torch", *GATED_DELTA_RULE))
        check_choice(self, "conv_kernel", ("auto", "torch", *CONVOLUTION))
        if self.decay not in ("head", "channel"):
            raise ValueError(f"decay must be head or channel, not {self.decay!r}")

    @property
    def heads(self) -> int:
        return self.delta_heads or max(1, round(0.75 * self.d_model / self.head_dim))

    @property
    def hidden(self) -> int:
        return max(32, round(self.hidden_ratio * self.d_model / 32) * 32)


class DeltaMixer(nn.Module):
    """x [B, T, D] -> [B, T, D]"""

    def __init__(self, config: GatedDeltaNetConfig, layer: int) -> None:
        super().__init__()
        c, d, self.layer = config, config.d_model, layer
        self.heads, self.eps, self.by_channel = c.heads, c.norm_eps, c.decay == "channel"
        keys, values = c.heads * c.head_dim, c.heads * c.head_dim * c.expand_v
        self.widths = {"query": keys, "key": keys, "value": values}
        self.qkv = nn.Linear(d, 2 * keys + values, bias=False)
        self.conv = ShortConvolution(2 * keys + values, c.conv_size, key=(layer, "convolution"), bias=False, silu=True)
        self.rate = nn.Linear(d, c.heads, bias=False)  # beta
        self.A_log = nn.Parameter(torch.empty(c.heads))
        self.dt_bias = nn.Parameter(torch.empty(keys if self.by_channel else c.heads))
        rank = c.head_dim  # of KDA's low-rank projections
        self.decay = _projection(d, len(self.dt_bias), rank if self.by_channel else 0)
        self.gate = _projection(d, values, rank if self.by_channel else 0)
        self.norm = RMSNorm(c.head_dim * c.expand_v, c.norm_eps)
        self.out = nn.Linear(values, d, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        qkv = self.conv(self.qkv(x), context).split(list(self.widths.values()), dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in qkv)  # [B, T, H, K or V]
        q, k = F.normalize(wide(q), dim=-1) / math.sqrt(q.shape[-1]), F.normalize(wide(k), dim=-1)
        beta = torch.sigmoid(wide(self.rate(x))).unsqueeze(-1)  # [B, T, H, 1]
        steps = F.softplus(wide(self.decay(x)) + wide(self.dt_bias)).unflatten(-1, (self.heads, -1))
        log_w = -wide(self.A_log).exp().unsqueeze(-1) * steps  # [B, T, H, 1 or K]
        state, key = context.state, (self.layer, "delta rule")
        shape = v.shape[0], self.heads, v.shape[-1], k.shape[-1]
        held = None if state is None else state.recall(key, k.new_empty(shape))
        scan = context.scan or gated_delta_rule
        o, last = scan(q, log_w, k, v, beta, held, context.documents, keep_state=state is not None)
        if state is not None and last is not None:
            state.remember(key, last)
        gate = wide(self.gate(x)).unflatten(-1, (self.heads, -1))
        o = rms_norm(o, self.norm.weight, self.eps) * (torch.sigmoid(gate) if self.by_channel else F.silu(gate))
        return self.out(o.flatten(2).to(x.dtype))

    def reset(self, generator: torch.Generator | None, std: float, out_std: float) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                normal_(module.weight, out_std if module is self.out else std, generator)
        self.conv.reset(generator)
        self.norm.reset()
        low, high = A_RANGE
        fill_(self.A_log, (low + (high - low) * torch.rand(self.heads, generator=generator)).log())
        fill_(self.dt_bias, draw_time_steps(self.dt_bias.shape[0], generator))


def _projection(width: int, out: int, rank: int) -> nn.Module:
    """A matrix, or a product of two with `rank` channels between them."""
    if not rank:
        return nn.Linear(width, out, bias=False)
    return nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, out, bias=False))


class Block(nn.Module):
    """x + mixer(RMS(x)), then x + MLP(RMS(x)); x [B, T, D]."""

    def __init__(self, config: GatedDeltaNetConfig, layer: int) -> None:
        super().__init__()
        c = config
        self.mixer_norm, self.mlp_norm = RMSNorm(c.d_model, c.norm_eps), RMSNorm(c.d_model, c.norm_eps)
        self.mixer = DeltaMixer(c, layer)
        self.up = nn.Linear(c.d_model, 2 * c.hidden, bias=False)
        self.down = nn.Linear(c.hidden, c.d_model, bias=False)
        self.dropout = nn.Dropout(c.dropout)
        self.std, self.out_std = c.init_std, c.init_std / math.sqrt(2 * c.n_layers)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = x + self.dropout(self.mixer(self.mixer_norm(x), context))
        gate, linear = self.up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.dropout(self.down(F.silu(gate) * linear))

    def reset(self, generator: torch.Generator | None) -> None:
        self.mixer_norm.reset()
        self.mlp_norm.reset()
        self.mixer.reset(generator, self.std, self.out_std)
        normal_(self.up.weight, self.std, generator)
        normal_(self.down.weight, self.out_std, generator)


@register("gated-delta-net")
class GatedDeltaNet(Stack):
    """Embedding, blocks, RMSNorm, output projection."""

    Config = GatedDeltaNetConfig
    kernel_fields, scans = ("scan_kernel", "conv_kernel"), GATED_DELTA_RULE

    def __init__(self, config: GatedDeltaNetConfig) -> None:
        layers = [Block(config, layer) for layer in range(config.n_layers)]
        super().__init__(config, layers, RMSNorm(config.d_model, config.norm_eps))
        self.embedding_std, self.widths = config.init_std, (config.head_dim, config.head_dim * config.expand_v)

    def fused_matrices(self) -> dict[str, Split]:
        found: dict[str, Split] = {}
        for i, layer in enumerate(self.layers):
            found[f"layers.{i}.mixer.qkv.weight"] = Split(0, layer.mixer.widths)
            found[f"layers.{i}.up.weight"] = Split(0, {"gate": self.config.hidden, "linear": self.config.hidden})
        return found
