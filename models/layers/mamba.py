"""The mixer of Mamba-2 (arXiv 2405.21060): a state space with one decay per head, behind a short convolution and a gate."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Split
from models.layers import fill_, uniform_
from models.layers.causal import Context, ShortConvolution
from models.layers.chunks import wide
from models.layers.norms import RMSNorm
from models.layers.ssd import ssd

DT_RANGE = 1e-3, 0.1  # of the initial time steps
LEAST_DT = 1e-4
A_RANGE = 1.0, 16.0  # of the initial decay rates


class Mamba2Mixer(nn.Module):
    """x [B, T, D] -> [B, T, D].

    config: has d_model, state_size (N), ssm_head_dim (P), expand, n_groups (G), conv_size, norm_eps. layer: key of its entries in the
    decoding state. norm_before_gate: RMS(y) silu(z) (Rene) instead of RMS(y silu(z)); the norm is over each of the G groups.
    """

    def __init__(self, config: Any, layer: int, norm_before_gate: bool = False) -> None:
        super().__init__()
        c, self.layer, self.norm_before_gate = config, layer, norm_before_gate
        inner = c.expand * c.d_model
        self.heads, self.head_dim, self.groups, self.state_size = (
            inner // c.ssm_head_dim,
            c.ssm_head_dim,
            c.n_groups,
            c.state_size,
        )
        shared = self.groups * self.state_size
        self.widths = {"gate": inner, "x": inner, "B": shared, "C": shared, "dt": self.heads}
        self.in_proj = nn.Linear(c.d_model, sum(self.widths.values()), bias=False)
        self.conv = ShortConvolution(inner + 2 * shared, c.conv_size, key=(layer, "convolution"), silu=True)
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.empty(self.heads))
        self.norm = RMSNorm(inner, c.norm_eps)
        self.out_proj = nn.Linear(inner, c.d_model, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        inner, shared = self.widths["x"], self.widths["B"]
        gate, mixed, dt = self.in_proj(x).split([inner, inner + 2 * shared, self.heads], dim=-1)
        u, B, C = self.conv(mixed, context).split([inner, shared, shared], dim=-1)
        u = u.unflatten(-1, (self.heads, self.head_dim))  # [B, T, H, P]
        B, C = (t.unflatten(-1, (self.groups, self.state_size)) for t in (B, C))  # [B, T, G, N]
        dt = F.softplus(wide(dt) + wide(self.dt_bias))  # [B, T, H]
        state, key = context.state, (self.layer, "state space")
        shape = x.shape[0], self.heads, self.head_dim, self.state_size
        held = None if state is None else state.recall(key, dt.new_empty(shape))
        scan = context.scan or ssd
        y, last = scan(u, dt, -wide(self.A_log).exp(), B, C, held, context.documents, keep_state=state is not None)
        if state is not None and last is not None:
            state.remember(key, last)
        y = y + (wide(self.D).unsqueeze(-1) * u).to(y.dtype)
        return self.out_proj(self.gated_norm(y.flatten(2), gate))

    def gated_norm(self, y: Tensor, gate: Tensor) -> Tensor:
        """y, gate [B, T, inner]"""
        if not self.norm_before_gate:
            y = y * F.silu(gate)
        grouped = F.rms_norm(wide(y).unflatten(-1, (self.groups, -1)), (y.shape[-1] // self.groups,), eps=self.norm.eps)
        y = grouped.flatten(-2).to(y.dtype) * self.norm.weight.to(y.dtype)
        return y * F.silu(gate) if self.norm_before_gate else y

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None, residual_scale: float = 1.0) -> None:
        """The initial values of the reference. residual_scale: multiplies the last matrix."""
        for module, scale in ((self.in_proj, 1.0), (self.out_proj, residual_scale)):
            uniform_(module.weight, scale / math.sqrt(module.in_features), generator)  # as nn.Linear
        self.conv.reset(generator)
        self.norm.reset()
        fill_(self.dt_bias, draw_time_steps(self.heads, generator))
        least, most = A_RANGE
        fill_(self.A_log, (least + (most - least) * torch.rand(self.heads, generator=generator)).log())
        self.D.fill_(1.0)

    def fused_rows(self) -> dict[str, Split]:
        """Name of a matrix that holds several -> how its rows split."""
        return {"in_proj.weight": Split(0, self.widths)}


def draw_time_steps(count: int, generator: torch.Generator | None) -> Tensor:
    """[count], from whose softplus follow the initial time steps: their logarithms are uniform over DT_RANGE."""
    low, high = (math.log(x) for x in DT_RANGE)
    dt = (low + (high - low) * torch.rand(count, generator=generator)).exp().clamp(min=LEAST_DT)
    return dt + (-torch.expm1(-dt)).log()


def check_ssm_sizes(config: Any) -> None:
    """ValueError unless the heads divide the inner width, and the groups the heads."""
    inner = config.expand * config.d_model
    if inner % config.ssm_head_dim:
        raise ValueError(f"ssm_head_dim must divide expand * d_model ({inner}), but {config.ssm_head_dim} does not")
    heads = inner // config.ssm_head_dim
    if heads % config.n_groups:
        raise ValueError(f"n_groups must divide the {heads} heads, but {config.n_groups} does not")
