"""Attention of a block: projections, and between them the heads with the parts that the config switches on.

    softmax       queries, keys and values per head; keys and values shared by groups of heads (GQA, arXiv 2305.13245)
    differential  the difference of two softmax maps (arXiv 2410.05258)
    latent        keys and values are read from one cached latent per token (MLA, arXiv 2405.04434)

`attend.py` computes the softmax itself, with a kernel chosen by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import fill_, normal_
from models.layers.attend import KERNELS, AttentionMask, make_attention_mask
from models.layers.lora import effective_weight
from models.layers.norms import RMSNorm
from models.layers.pattention import Pattention
from models.layers.positions import Alibi, Rotary, Scaling, positions_in_documents, yarn_temperature
from models.layers.quantized import rounds_inputs
from models.layers.sums import running_sum
from models.state import DecodingState, StaticState


class Context(NamedTuple):
    """What all blocks know about the tokens. It has only integers and masks, because mixed-precision wrappers would round floats.

    positions: [T] or [B, T], of each token in its document. attention_masks: what queries see, for each window size.
    """

    positions: Tensor
    attention_masks: dict[int, AttentionMask]
    kernel: str


def context_of(
    choose: Callable[[torch.device, int, int, bool], tuple[str, str]],
    windows: Iterable[int],
    length: int,
    device: torch.device,
    documents: Tensor | None,
    cache: DecodingState | None,
) -> Context:
    """What `length` new tokens see. choose(device, cached tokens, length, whether there are documents) -> (kernel, why)."""
    if isinstance(cache, StaticState):  # a step of fixed shapes
        kernel, _ = choose(device, cache.max_length - length, length, False)
        masks = {w: AttentionMask(mask=cache.visible(length, w)) for w in windows}
        return Context(cache.positions(length, device), masks, kernel)
    start = cache.length if cache is not None else 0
    kernel, _ = choose(device, start, length, documents is not None)
    # Layers with a window w hold only the last w - 1 cached tokens.
    masks = {
        w: make_attention_mask(kernel, min(start, w - 1) if w else start, length, w, documents, device) for w in windows
    }
    positions = torch.arange(start, start + length, device=device)
    if documents is not None:
        positions = positions_in_documents(documents)
    return Context(positions, masks, kernel)


class Joined(nn.ModuleList):
    """Several projections of one input, concatenated."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self], dim=-1)


class Attention(nn.Module):
    """Projection to queries, keys and values, heads, projection back; x [B, T, D]."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        d, slots, mode = config.d_model, config.slots, config.pattention_mode
        self.heads = HEADS[config.attention](config, layer)
        self.qkv: nn.Module
        if "qkv" in config.pattention_of:
            # Three projections, each with its own sum over the slots, as in TokenFormer.
            self.qkv = Joined(Pattention(d, width, slots, mode) for width in self.heads.widths)
        else:
            self.qkv = nn.Linear(d, sum(self.heads.widths), bias=config.qkv_has_bias)
        self.out: nn.Module
        if "out" in config.pattention_of:
            self.out = Pattention(self.heads.d_out, d, slots, mode)
        else:
            self.out = nn.Linear(self.heads.d_out, d, bias=config.out_has_bias)

    def forward(
        self, x: Tensor, values: Tensor | None, context: Context, cache: DecodingState | None
    ) -> tuple[Tensor, Tensor | None]:
        """values: [B, T, G * head_dim] to mix into this layer's, or None; returns (output, values for the next layer)."""
        attended, values = self.heads(self.qkv(x), x, values, context, cache)
        return self.out(attended), values

    def fused_rows(self) -> dict[str, dict[str, int]]:
        """Name of a matrix -> the rows of each matrix that it fuses."""
        return {"qkv": self.heads.rows} if isinstance(self.qkv, nn.Linear) else {}


class SoftmaxHeads(nn.Module):
    """Concatenated queries, keys and values [B, T, (H + 2 G) head_dim] -> outputs of the heads [B, T, H head_dim]."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        h, g, d = config.n_heads, config.kv_heads, config.head_width
        self.layer, self.head_dim = layer, d
        self.rows, self.d_out = {"query": h * d, "key": g * d, "value": g * d}, h * d
        self.widths = list(self.rows.values())
        self.window, self.softcap = config.window_of(layer), config.attention_softcap
        self.scale = d**-0.5 * config.multipliers.scores
        self.query_norm = RMSNorm(d, config.norm_eps) if config.qk_norm else None
        self.key_norm = RMSNorm(d, config.norm_eps) if config.qk_norm else None
        self.rotary = rotary(config, d, self.window) if config.positions == "rotary" else None
        self.shift = KeyValueShift(config, layer) if config.kv_shift else None
        self.value_mix = ValueMix() if mixes_values(config, layer) else None
        self.passes_values_on = config.value_residual
        self.gate = (
            nn.Linear(config.d_model, GATES[config.attention_gate](config), bias=False) if gated(config) else None
        )
        self.slopes = Alibi(h) if config.positions == "alibi" else None
        self.forget = ForgetGate(config, layer) if config.forget_gate else None

    def forward(
        self, qkv: Tensor, x: Tensor, values: Tensor | None, context: Context, cache: DecodingState | None
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = qkv.split(self.widths, dim=-1)
        if self.shift is not None:
            k, v = self.shift(k, v, context, cache)
        if self.passes_values_on and values is None:
            values = v  # this is the first layer
        elif self.value_mix is not None:
            v = self.value_mix(v, values)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in (q, k, v))  # [B, H or G, T, head_dim]
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.rotary is not None:
            q, k = self.rotary.rotate_query(q, context.positions), self.rotary.rotate_key(k, context.positions)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v, dim=2, window=self.window)
        attended = self.attend(q, k, v, context, self.attention_bias(x, k, cache)).transpose(
            1, 2
        )  # [B, T, H, head_dim]
        if self.gate is not None:
            attended = attended * self.gate(x).sigmoid().unflatten(-1, (attended.shape[2], -1))
        return attended.flatten(2), values

    def attention_bias(self, x: Tensor, k: Tensor, cache: DecodingState | None) -> Tensor | None:
        """The bias of the scores, see attend.py: fp32 [1 or B, H, T_k], or None."""
        attention_bias = None if self.slopes is None else self.slopes(k.shape[2])
        if self.forget is None:
            return attention_bias
        gates = self.forget(x, cache)
        return gates if attention_bias is None else gates + attention_bias

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context, attention_bias: Tensor | None) -> Tensor:
        attention_mask = context.attention_masks[self.window]
        return KERNELS[context.kernel](
            q, k, v, attention_mask, scale=self.scale, softcap=self.softcap, attention_bias=attention_bias
        )


class DifferentialHeads(SoftmaxHeads):
    """softmax_1 v - lambda softmax_2 v, then a norm per head (arXiv 2410.05258): H / 2 heads with values of twice the width."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__(config, layer)
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer)
        self.lambdas = nn.Parameter(torch.empty(4 * self.head_dim))  # q1, k1, q2, k2
        self.head_norm = RMSNorm(2 * self.head_dim, config.norm_eps)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context, attention_bias: Tensor | None) -> Tensor:
        q1, k1, q2, k2 = self.lambdas.float().chunk(4)
        weight = (q1 * k1).sum().exp() - (q2 * k2).sum().exp() + self.lambda_init
        v = torch.cat((v[:, 0::2], v[:, 1::2]), dim=-1)  # [B, G / 2, T, 2 head_dim]
        first, second = (
            super(DifferentialHeads, self).attend(
                q[:, i::2], k[:, i::2], v, context, None if attention_bias is None else attention_bias[:, i::2]
            )
            for i in (0, 1)
        )
        attended = self.head_norm((first.float() - weight * second.float()).to(v.dtype))  # [B, H / 2, T, 2 head_dim]
        attended = attended * (1 - self.lambda_init)
        return attended.unflatten(-1, (2, -1)).transpose(2, 3).flatten(1, 2)  # [B, H, T, head_dim]

    def draw(self, generator: torch.Generator | None) -> None:
        normal_(self.lambdas, 0.1, generator)


class LatentAttention(nn.Module):
    """Keys and values are two projections of a latent c [B, T, kv_rank]. One key of rope_dim channels, shared by all heads,
    carries the position. The cache holds only c and this key. Decoding multiplies queries instead of keys: the queries absorb
    W_UK, the output absorbs W_UV (arXiv 2405.04434)."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        h, d = config.n_heads, config.head_width
        rope, rank, q_rank = latent_widths(config)
        bias = config.qkv_has_bias
        self.layer, self.n_heads, self.head_dim, self.rope_dim, self.rank = layer, h, d, rope, rank
        self.window, self.softcap, self.scale = config.window_of(layer), config.attention_softcap, (d + rope) ** -0.5
        if config.rope_mscale_all_dim:
            self.scale *= yarn_temperature(config.rope_factor, config.rope_mscale_all_dim) ** 2
        self.query_down = nn.Linear(config.d_model, q_rank, bias=False) if q_rank else None
        self.query_norm = RMSNorm(q_rank, config.norm_eps) if q_rank else None
        self.query = nn.Linear(q_rank or config.d_model, h * (d + rope), bias=bias)
        self.down = nn.Linear(config.d_model, rank + rope, bias=False)
        self.latent_norm = RMSNorm(rank, config.norm_eps)
        self.up = nn.Linear(rank, 2 * h * d, bias=False)  # all heads' keys, then all heads' values
        self.rotary = rotary(config, rope, self.window)
        self.out = nn.Linear(h * d, config.d_model, bias=config.out_has_bias)

    def forward(
        self, x: Tensor, values: Tensor | None, context: Context, cache: DecodingState | None
    ) -> tuple[Tensor, Tensor | None]:
        low = x if self.query_down is None or self.query_norm is None else self.query_norm(self.query_down(x))
        q = self.query(low).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # [B, H, T, head_dim + rope_dim]
        q, q_rotated = q.split([self.head_dim, self.rope_dim], dim=-1)
        q_rotated = self.rotary.rotate_query(q_rotated, context.positions)
        latent, k_rotated = self.down(x).split([self.rank, self.rope_dim], dim=-1)
        latent = self.latent_norm(latent)[:, None]  # [B, 1, T, rank]
        k_rotated = self.rotary.rotate_key(k_rotated[:, None], context.positions)  # [B, 1, T, rope_dim]
        if cache is not None:
            latent, k_rotated = cache.extend(self.layer, latent, k_rotated, dim=2, window=self.window)
        # For a prompt, keys of head_dim channels are cheaper than keys of kv_rank, and the kernels of training can be used.
        # Nor can a product that rounds its inputs be taken into the query.
        prompt = latent.shape[2] == x.shape[1]
        attend = self.expanded if prompt or rounds_inputs(self.up) else self.absorbed
        attended = attend(q, q_rotated, latent, k_rotated, context)  # [B, H, T, head_dim]
        return self.out(attended.transpose(1, 2).flatten(2)), values

    def fused_rows(self) -> dict[str, dict[str, int]]:
        """Name of a matrix -> the rows of each matrix that it fuses."""
        width = self.n_heads * self.head_dim
        return {"down": {"latent": self.rank, "rotated key": self.rope_dim}, "up": {"key": width, "value": width}}

    def expanded(self, q: Tensor, q_rotated: Tensor, latent: Tensor, k_rotated: Tensor, context: Context) -> Tensor:
        """Attention with the keys and values of every head, as in training."""
        k, v = self.up(latent[:, 0]).unflatten(-1, (2, self.n_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        k = torch.cat((k, k_rotated.expand(-1, self.n_heads, -1, -1)), dim=-1)
        return self.attend(torch.cat((q, q_rotated), dim=-1), k, v, context)

    def absorbed(self, q: Tensor, q_rotated: Tensor, latent: Tensor, k_rotated: Tensor, context: Context) -> Tensor:
        """Attention where all heads use the latent itself as their one key and one value."""
        up = effective_weight(self.up)  # [2 H head_dim, rank]
        of_keys, of_values = up.unflatten(0, (2, self.n_heads, -1)).unbind()  # [H, head_dim, rank]
        q = torch.cat((q @ of_keys.to(q.dtype), q_rotated), dim=-1)  # [B, H, T, rank + rope_dim]
        read = self.attend(q, torch.cat((latent, k_rotated), dim=-1), latent, context)  # [B, H, T, rank]
        return read @ of_values.to(read.dtype).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        attention_mask = context.attention_masks[self.window]
        return KERNELS[context.kernel](
            q, k, v, attention_mask, scale=self.scale, softcap=self.softcap, attention_bias=None
        )


def latent_widths(config: Any) -> tuple[int, int, int]:
    """(rope_dim, kv_rank, q_rank) of latent attention."""
    d = config.head_width
    return config.rope_dim or d // 2, config.kv_rank or 4 * d, config.q_rank


def rotary(config: Any, width: int, window: int) -> Rotary:
    """The rotary embedding of the config for heads of `width` channels, in a layer with this window (0: none)."""
    if window and config.rope_local_theta:
        return Rotary(width, config.rope_local_theta, config.rope_fraction)
    # With rope_mscale_all_dim, the scale of all scores already contains the temperature.
    temperature = 1.0 if config.rope_mscale_all_dim else None
    how = rope_scaling(config)
    return Rotary(width, config.rope_theta, config.rope_fraction, *how, temperature=temperature)


def rope_scaling(config: Any) -> Scaling:
    return Scaling(
        config.rope_scaling,
        config.rope_factor,
        config.rope_original_context,
        config.rope_low_freq_factor,
        config.rope_high_freq_factor,
    )


GATES: dict[str, Callable[[Any], int]] = {
    "none": lambda config: 0,
    "head": lambda config: config.n_heads,
    "channel": lambda config: config.n_heads * config.head_width,
}


def gated(config: Any) -> bool:
    return GATES[config.attention_gate](config) > 0


def mixes_values(config: Any, layer: int) -> bool:
    """Whether other values (of the first layer or of a table) are mixed into the values of this layer."""
    return (config.value_residual and layer > 0) or config.value_table_of(layer) is not None


class ValueMix(nn.Module):
    """a v + b values, with learned a and b that start at 0.5."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.empty(2))

    def forward(self, v: Tensor, values: Tensor) -> Tensor:
        weights = self.weights.to(v.dtype)
        return weights[0] * v + weights[1] * values

    @torch.no_grad()
    def reset(self) -> None:
        self.weights.fill_(0.5)


class KeyValueShift(nn.Module):
    """Per head a k_t + b k_{t-1}, and the same for values (arXiv 2411.19574). At the start a is drawn from U(0, 1), and b = 1 - a.
    For the first token of a document, the previous key and value are 0."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.layer, self.heads = layer, config.kv_heads
        self.own = nn.Parameter(torch.empty(2 * config.kv_heads))  # a of the keys, a of the values
        self.before = nn.Parameter(torch.empty(2 * config.kv_heads))

    def forward(self, k: Tensor, v: Tensor, context: Context, cache: DecodingState | None) -> tuple[Tensor, Tensor]:
        first = (context.positions == 0).expand(k.shape[:2])[:, :, None]
        both = torch.stack((k, v), dim=2)  # [B, T, 2, G head_dim]
        if cache is None:
            last = both.new_zeros(both[:, :1].shape)
        else:
            last = cache.recall((self.layer, "shift"), both[:, :1])
            cache.remember((self.layer, "shift"), both[:, -1:])
        before = torch.cat((last, both[:, :-1]), dim=1).masked_fill(first[..., None], 0)
        a, b = (weights.to(k.dtype).view(2, self.heads, 1) for weights in (self.own, self.before))
        mixed = a * both.unflatten(-1, (self.heads, -1)) + b * before.unflatten(-1, (self.heads, -1))
        k, v = mixed.flatten(3).unbind(2)
        return k, v

    def draw(self, generator: torch.Generator | None) -> None:
        own = torch.rand(self.own.shape, generator=generator, device="cpu", dtype=torch.float32)
        fill_(self.own, own)
        fill_(self.before, 1 - own)


class ForgetGate(nn.Module):
    """The running sum of log f_t, with f_t = sigmoid(w x_t + b) per head (arXiv 2503.02130), in fp32."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.layer, self.window = layer, config.window_of(layer)
        self.gate = nn.Linear(config.d_model, config.n_heads)

    def forward(self, x: Tensor, cache: DecodingState | None) -> Tensor:
        """[B, T, D] -> [B, H, T_k]"""
        sums = running_sum(F.logsigmoid(self.gate(x).float()), 1).transpose(1, 2)
        if cache is None:
            return sums
        last = cache.last((self.layer, "forget"))  # [B, H, 1]
        sums = sums if last is None else last + sums
        return cache.append((self.layer, "forget"), sums, dim=2, window=self.window)


HEADS: dict[str, type[SoftmaxHeads]] = {"softmax": SoftmaxHeads, "differential": DifferentialHeads}
