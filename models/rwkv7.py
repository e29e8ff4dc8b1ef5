"""RWKV-7 "Goose" (arXiv 2503.14456): the generalised delta rule behind token shifts, and an MLP of squared ReLUs; no attention.

`form` "final" is x070 of BlinkDL's RWKV-LM; "preview" is the earlier one that modded-nanogpt-rwkv and BlaGPT have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import register
from models.config import check_choice, check_ranges, setting
from models.layers import fill_, uniform_
from models.layers.causal import Context, previous
from models.layers.chunks import wide
from models.layers.delta_rule import delta_rule
from models.layers.norms import LayerNorm, set_gain
from models.layers.recurrent_kernels import DELTA_RULE
from models.layers.stack import Stack

STRONGEST = -math.exp(-0.5)  # lowest log decay: log w = STRONGEST * sigmoid(z)
HEAD_NORM_EPS = 64e-5


@dataclass(frozen=True)
class Rwkv7Config:
    vocab_size: int = setting(50304, "rows of the embedding and of the output projection", low=1, high=10**9)
    d_model: int = setting(768, "width of the residual stream; a multiple of head_dim", low=1, high=10**6)
    n_layers: int = setting(12, "blocks", low=1, high=1000)
    head_dim: int = setting(64, "channels of a head", low=2, high=10**4)
    form: str = setting("final", "final (x070), or preview: one mixing stage, as in modded-nanogpt-rwkv")
    hidden_ratio: float = setting(0.0, "width of the MLP per d_model; 0: 4, or 3.5 for preview", low=0, high=100)
    norm_eps: float = setting(1e-5, "added to the variance in LayerNorm", above=0, high=1)
    tied: bool = setting(False, "the output projection is the embedding")
    dropout: float = setting(0.0, "part of what each branch adds that is zero in training", low=0, high=0.99)
    scan_kernel: str = setting("auto", "of the delta rule: auto, torch or fla")

    def __post_init__(self) -> None:
        check_ranges(self)
        check_choice(self, "scan_kernel", ("auto", "torch", *DELTA_RULE))
        if self.d_model % self.head_dim:
            raise ValueError(f"head_dim must divide d_model ({self.d_model}), but {self.head_dim} does not")
        if self.form not in ("final", "preview"):
            raise ValueError(f"form must be final or preview, not {self.form!r}")

    @property
    def n_heads(self) -> int:
        return self.d_model // self.head_dim

    @property
    def hidden(self) -> int:
        return round(self.d_model * (self.hidden_ratio or (4 if self.form == "final" else 3.5)) / 32) * 32 or 32


class LowRank(nn.Module):
    """base + f(x A) B; x [B, T, D], with `rank` channels between. AdamW updates it without weight decay, whatever the optimizer."""

    def __init__(self, width: int, rank: int, inner: str = "linear", base: bool = True) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(width, rank))
        self.B = nn.Parameter(torch.empty(rank, width))
        self.base = nn.Parameter(torch.empty(width)) if base else None
        self.inner = {"linear": nn.Identity(), "tanh": nn.Tanh(), "sigmoid": nn.Sigmoid()}[inner]

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x @ self.A.to(x.dtype)) @ self.B.to(x.dtype)
        return y if self.base is None else wide(y) + wide(self.base)

    def reset(self, generator: torch.Generator | None, base: Tensor | None = None) -> None:
        self.A.zero_()
        orthogonal_(self.B, 0.1, generator)
        if self.base is not None:
            assert base is not None
            fill_(self.base, base)


@torch.no_grad()
def orthogonal_(parameter: Tensor, gain: float, generator: torch.Generator | None) -> None:
    """A random matrix with orthonormal rows or columns, times gain sqrt(rows / columns) where it has more rows."""
    rows, columns = parameter.shape
    drawn = torch.empty(rows, columns)
    nn.init.orthogonal_(drawn, gain=gain * math.sqrt(max(1.0, rows / columns)), generator=generator)
    fill_(parameter, drawn)


class Place:
    """Numbers that the initial values follow from. layer: of how many; n [D]: each channel's place in [0, 1)."""

    def __init__(self, layer: int, layers: int, width: int, head_dim: int) -> None:
        self.first = layer / (layers - 1) if layers > 1 else 0.0  # 0 in the first layer, 1 in the last
        self.last = 1 - layer / layers  # 1 in the first layer, near 0 in the last
        n = torch.arange(width, dtype=torch.float32)
        self.channel = n / width
        self.linear = n / max(width - 1, 1) - 0.5
        self.ramp = n / max(width - 1, 1)
        centred = n % head_dim / max(head_dim - 1, 1) * 2 - 1
        self.zigzag = centred * centred.abs()

    def mix(self, power: float) -> Tensor:
        """How much of the token before is mixed in, [D]: 1 - channel^power."""
        return 1 - self.channel**power


class HeadNorm(nn.Module):
    """GroupNorm of each head, y [B, T, D], with a gain and a bias, in fp32."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.weight, self.bias = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))

    def forward(self, y: Tensor) -> Tensor:
        grouped = heads_of(wide(y), self.heads)
        normed = F.layer_norm(grouped, grouped.shape[-1:], eps=HEAD_NORM_EPS).flatten(2)
        return torch.addcmul(wide(self.bias), normed, wide(self.weight))


class TimeMixFinal(nn.Module):
    """x070's time mixing; x [B, T, D] -> [B, T, D]. values: v of the first layer, [B, T, D], None in the first layer."""

    MIXED = ("r", "w", "k", "v", "a", "g")

    def __init__(self, config: Rwkv7Config, layer: int) -> None:
        super().__init__()
        d, self.layer, self.heads, self.depth = config.d_model, layer, config.n_heads, config.n_layers
        self.mix = nn.Parameter(torch.empty(len(self.MIXED), d))
        self.receptance, self.key, self.value, self.out = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.decay, self.rate = LowRank(d, rank_of(2.5, d), "tanh"), LowRank(d, rank_of(2.5, d))
        self.from_first = LowRank(d, rank_of(1.7, d)) if layer else None
        self.gate = LowRank(d, rank_of(5.0, d), "sigmoid", base=False)
        self.removal_scale, self.key_rate = nn.Parameter(torch.empty(d)), nn.Parameter(torch.empty(d))  # k_k, k_a
        self.bonus = nn.Parameter(torch.empty(d))  # r_k
        self.norm = HeadNorm(self.heads, d)

    def forward(self, x: Tensor, values: Tensor | None, context: Context) -> tuple[Tensor, Tensor]:
        """Returns (output, v of the first layer)."""
        change = previous(x, context, (self.layer, "time")) - x
        mixed = (x + change * mix.to(x.dtype) for mix in self.mix)
        xr, xw, xk, xv, xa, xg = mixed
        r, k, v = self.receptance(xr), wide(self.key(xk)), wide(self.value(xv))
        if self.from_first is None or values is None:
            values = v
        else:
            v = v + (values - v) * torch.sigmoid(self.from_first(xv))
        rate = torch.sigmoid(self.rate(xa))
        removal = F.normalize(heads_of(k * wide(self.removal_scale), self.heads), dim=-1)
        k = k * (1 + (rate - 1) * wide(self.key_rate))
        log_w = STRONGEST * torch.sigmoid(self.decay(xw))
        y = recurrence(self, context, r, log_w, k, v, removal, rate)
        y = self.norm(y) + with_bonus(r, k, v, self.bonus, self.heads)
        return self.out(y.to(x.dtype) * self.gate(xg)), values

    def reset(self, generator: torch.Generator | None, place: Place) -> None:
        powers = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
        fill_(self.mix, torch.stack([place.mix(powers[name] * place.last) for name in self.MIXED]))
        for module, gain in ((self.receptance, 1.0), (self.key, 0.1), (self.value, 1.0)):
            orthogonal_(module.weight, gain, generator)
        nn.init.zeros_(self.out.weight)
        self.decay.reset(generator, -6 + 6 * place.ramp ** (1 + place.first**0.3) + 0.5 + 2.5 * place.zigzag)
        self.rate.reset(generator, -0.19 + 0.3 * place.zigzag + 0.4 * place.linear)
        if self.from_first is not None:
            self.from_first.reset(generator, 0.73 - 0.4 * place.linear)
        self.gate.reset(generator)
        fill_(self.removal_scale, 0.71 - 0.1 * place.linear)
        self.key_rate.fill_(1.02)
        self.bonus.fill_(-0.04)
        set_gain(self.norm, ((self.layer + 1) / self.depth) ** 0.7)


class TimeMixPreview(nn.Module):
    """The preview's time mixing: one shift, four low-rank corrections of it; x [B, T, D] -> [B, T, D]."""

    MIXED = ("rg", "wa", "k", "v")

    def __init__(self, config: Rwkv7Config, layer: int) -> None:
        super().__init__()
        d, self.layer, self.heads = config.d_model, layer, config.n_heads
        self.mix, self.mix_first = nn.Parameter(torch.empty(len(self.MIXED), d)), nn.Parameter(torch.empty(d))
        self.shift_A = nn.Parameter(torch.empty(d, 32 * len(self.MIXED)))
        self.shift_B = nn.Parameter(torch.empty(len(self.MIXED), 32, d))
        self.receptance, self.key, self.value, self.out = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.decay, self.gate = LowRank(d, 64, "tanh"), LowRank(d, 128, "tanh", base=False)
        self.removal = LowRank(d, 16, "tanh", base=False)
        self.rate, self.key_rate, self.key_decay = LowRank(d, 16), LowRank(d, 16), LowRank(d, 16)  # a, m, n
        self.bonus = nn.Parameter(torch.empty(d))  # u
        self.norm = HeadNorm(self.heads, d)

    def forward(self, x: Tensor, values: Tensor | None, context: Context) -> tuple[Tensor, Tensor | None]:
        change = previous(x, context, (self.layer, "time")) - x
        first = x + change * self.mix_first.to(x.dtype)
        inner = torch.tanh(first @ self.shift_A.to(x.dtype)).unflatten(-1, (len(self.MIXED), -1))  # [B, T, 4, 32]
        corrections = torch.einsum("btir,ird->ibtd", inner, self.shift_B.to(inner.dtype))
        xrg, xwa, xk, xv = (
            x + change * (mix.to(x.dtype) + more) for mix, more in zip(self.mix, corrections.to(x.dtype), strict=True)
        )
        r, k, v = self.receptance(xrg), wide(self.key(xk)), wide(self.value(xv))
        z = self.decay(xwa)
        log_w = STRONGEST * torch.sigmoid(z)  # -exp(w~), with w~ = -softplus(-z) - 1/2
        removal = F.normalize(heads_of(k + self.removal(xk), self.heads), dim=-1)
        rate, key_rate = torch.sigmoid(self.rate(xwa)), torch.sigmoid(self.key_rate(xwa))
        k = k * (key_rate + rate * (1 - key_rate))
        k = k * ((F.logsigmoid(z) - 0.5) * torch.sigmoid(self.key_decay(xk))).exp()  # exp(w~ n), which is at most 1
        y = recurrence(self, context, r, log_w, k, v, removal, rate)
        y = self.norm(y) + with_bonus(r, k, v, self.bonus, self.heads)
        return self.out(y.to(x.dtype) * self.gate(xrg)), values

    def reset(self, generator: torch.Generator | None, place: Place) -> None:
        n, first, last = place.channel, place.first, place.last
        fill_(self.mix_first, 1 - n ** (0.6 * last**0.9))
        starts = [place.mix(0.2 * last), place.mix(0.9 * last)]
        starts += [1 - (n ** (0.9 * last) + 0.4 * first), 1 - (n ** (0.4 * last) + 0.6 * first)]
        fill_(self.mix, torch.stack(starts))
        nn.init.zeros_(self.shift_A)
        uniform_(self.shift_B, 1e-2, generator)
        bound = 0.5 / math.sqrt(len(n))
        for module, scale in ((self.receptance, 1.0), (self.key, 0.1), (self.value, 1.0)):
            uniform_(module.weight, scale * bound, generator)
        nn.init.zeros_(self.out.weight)
        self.decay.reset(generator, -7 + 5 * place.ramp ** (0.85 + math.sqrt(first)) + 0.5)
        for part in (self.rate, self.key_rate, self.key_decay):
            part.reset(generator, torch.zeros_like(n))
        for part in (self.gate, self.removal):
            part.reset(generator)
        self.bonus.zero_()
        set_gain(self.norm, 1.0)


def rank_of(factor: float, width: int) -> int:
    """x070's rule for the ranks of its low-rank parts."""
    return max(32, round(factor * math.sqrt(width) / 32) * 32)


def heads_of(x: Tensor, heads: int) -> Tensor:
    """[B, T, D] -> [B, T, H, D / H]"""
    return x.unflatten(-1, (heads, -1))


def recurrence(
    mixer: Any, context: Context, r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, removal: Tensor, rate: Tensor
) -> Tensor:
    """The delta rule of both forms with its state in `context`: fp32 [B, T, D]. removal [B, T, H, D / H], the others [B, T, D]."""
    r, log_w, k, v, rate = (heads_of(x, mixer.heads) for x in (r, log_w, k, v, rate))
    state, key = context.state, (mixer.layer, "delta rule")
    size = v.shape[-1]
    held = None if state is None else state.recall(key, v.new_empty(v.shape[0], mixer.heads, size, size))
    y, last = (context.scan or delta_rule)(
        r, log_w, k, v, -removal, removal * rate, held, context.documents, state is not None, least_log_w=STRONGEST
    )
    if state is not None and last is not None:
        state.remember(key, last)
    return y.flatten(2)


def with_bonus(r: Tensor, k: Tensor, v: Tensor, bonus: Tensor, heads: int) -> Tensor:
    """(sum over a head of r k bonus) v, fp32 [B, T, D]."""
    scores = heads_of(wide(r) * k * wide(bonus), heads).sum(-1, keepdim=True)
    return (scores * heads_of(v, heads)).flatten(2)


class ChannelMix(nn.Module):
    """W_value relu(W_key x)^2; x [B, T, D], in the final form mixed with the token before."""

    def __init__(self, config: Rwkv7Config, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.mix = nn.Parameter(torch.empty(config.d_model)) if config.form == "final" else None
        self.key = nn.Linear(config.d_model, config.hidden, bias=False)
        self.value = nn.Linear(config.hidden, config.d_model, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if self.mix is not None:
            x = x + (previous(x, context, (self.layer, "channel")) - x) * self.mix.to(x.dtype)
        return self.value(F.relu(self.key(x)).square())

    def reset(self, generator: torch.Generator | None, place: Place) -> None:
        if self.mix is not None:
            fill_(self.mix, place.mix(place.last**4))
        uniform_(self.key.weight, 0.5 / math.sqrt(self.key.in_features), generator)
        nn.init.zeros_(self.value.weight)


class Block(nn.Module):
    """x + time mixing, then x + channel mixing; x [B, T, D]."""

    def __init__(self, config: Rwkv7Config, layer: int) -> None:
        super().__init__()
        self.place = layer, config.n_layers, config.d_model, config.head_dim
        self.time_norm, self.channel_norm = (LayerNorm(config.d_model, eps=config.norm_eps) for _ in range(2))
        self.time: Any = (TimeMixFinal if config.form == "final" else TimeMixPreview)(config, layer)
        self.channel = ChannelMix(config, layer)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, values: Tensor | None, context: Context) -> tuple[Tensor, Tensor | None]:
        mixed, values = self.time(self.time_norm(x), values, context)
        x = x + self.dropout(mixed)
        return x + self.dropout(self.channel(self.channel_norm(x), context)), values

    def reset(self, generator: torch.Generator | None) -> None:
        place = Place(*self.place)
        for norm in (self.time_norm, self.channel_norm):
            set_gain(norm, 1.0)
        self.time.reset(generator, place)
        self.channel.reset(generator, place)


@register("rwkv7")
class Rwkv7(Stack):
    """Embedding, LayerNorm, blocks, LayerNorm, output projection. The preview doubles the embedding instead of its LayerNorm."""

    Config = Rwkv7Config
    kernel_fields, scans = ("scan_kernel",), DELTA_RULE
    further_roles: ClassVar[dict[str, str]] = {"low rank": "norm", "token shift": "norm"}

    def __init__(self, config: Rwkv7Config) -> None:
        layers = [Block(config, layer) for layer in range(config.n_layers)]
        super().__init__(config, layers, LayerNorm(config.d_model, eps=config.norm_eps))
        self.widths = config.head_dim, config.head_dim
        self.embedding_norm = LayerNorm(config.d_model, eps=config.norm_eps) if config.form == "final" else None

    def embed(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return 2 * x if self.embedding_norm is None else self.embedding_norm(x)

    def run_layers(self, x: Tensor, context: Context) -> Tensor:
        values = None
        for layer in self.layers:
            x, values = layer(x, values, context)
        return x

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        super().init_weights(generator)
        if self.embedding_norm is not None:
            uniform_(self.embedding.weight, 1e-4, generator)
            set_gain(self.embedding_norm, 1.0)
        else:
            uniform_(self.embedding.weight, 1 / math.sqrt(self.config.d_model), generator)
        if self.head is not None:
            orthogonal_(self.head.weight, 0.5, generator)

    def role_of(self, module: nn.Module, kind: str) -> str:
        if isinstance(module, LowRank) or kind in ("shift_A", "shift_B"):
            return "low rank"
        return "token shift" if kind in ("mix", "mix_first") else super().role_of(module, kind)
