"""Causal softmax attention for models that mix it with recurrent layers: a window, grouped keys and values, rotary positions."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from models.layers import compute_dtype
from models.layers.attend import KERNELS, choose_kernel
from models.layers.attention import Context as Visible
from models.layers.attention import context_of
from models.layers.causal import Context
from models.layers.norms import RMSNorm
from models.layers.positions import Rotary


def visible(
    wanted: str, windows: Iterable[int], head_dim: int, weight: Tensor, tokens: Tensor, context: Context
) -> Visible:
    """What the attention of one forward pass sees. wanted: name of a kernel, or auto; weight: one of the model's, whose dtype counts."""

    def choose(device: torch.device, start: int, length: int, documents: bool) -> tuple[str, str]:
        return kernel_for(wanted, windows, head_dim, weight, device, start, length, documents)

    return context_of(choose, windows, tokens.shape[1], tokens.device, context.documents, context.state)


def kernel_for(
    wanted: str,
    windows: Iterable[int],
    head_dim: int,
    weight: Tensor,
    device: torch.device,
    start: int,
    length: int,
    documents: bool,
) -> tuple[str, str]:
    """(kernel, why), see choose_kernel; start: number of cached tokens."""
    return choose_kernel(
        wanted,
        head_dim=head_dim,
        value_dim=head_dim,
        softcap=False,
        attention_bias=False,
        window=any(0 < window < start + length for window in windows),
        documents=documents,
        cached=start > 0,
        length=length,
        dtype=compute_dtype(weight, device),
        device=device,
    )


def check_attention_sizes(width: int, head_dim: int, kv_heads: int) -> None:
    """ValueError unless the heads divide the width, and those of keys and values the heads."""
    if width % head_dim:
        raise ValueError(f"attention_head_dim must divide {width} channels, but {head_dim} does not")
    if kv_heads and width // head_dim % kv_heads:
        raise ValueError(f"attention_kv_heads must divide the {width // head_dim} heads, but {kv_heads} does not")


class PlainAttention(nn.Module):
    """x [B, T, d_in] -> [B, T, d_out]. heads: (of queries, of keys and values); window: 0 for none; rope_theta: 0 for no positions;
    scale: of the scores, head_dim^-0.5 by default."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        heads: tuple[int, int],
        head_dim: int,
        *,
        window: int = 0,
        rope_theta: float = 0.0,
        bias: bool = False,
        qk_norm_eps: float = 0.0,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        queries, keys = heads
        self.head_dim, self.window = head_dim, window
        self.scale = head_dim**-0.5 if scale is None else scale
        self.rows = {"query": queries * head_dim, "key": keys * head_dim, "value": keys * head_dim}
        self.qkv = nn.Linear(d_in, sum(self.rows.values()), bias=bias)
        self.out = nn.Linear(queries * head_dim, d_out, bias=bias)
        self.query_norm = RMSNorm(head_dim, qk_norm_eps) if qk_norm_eps else None
        self.key_norm = RMSNorm(head_dim, qk_norm_eps) if qk_norm_eps else None
        self.rotary = Rotary(head_dim, rope_theta) if rope_theta else None

    def forward(self, x: Tensor, context: Context, key: Hashable, more: Tensor | None = None) -> Tensor:
        """key: of the keys and values in the decoding state; more: added to queries, keys and values, [B, T, sum of rows]."""
        seen: Any = context.visible
        qkv = self.qkv(x) if more is None else self.qkv(x) + more
        q, k, v = (
            y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in qkv.split(list(self.rows.values()), dim=-1)
        )  # [B, H or G, T, head_dim]
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.rotary is not None:
            q, k = self.rotary.rotate_query(q, seen.positions), self.rotary.rotate_key(k, seen.positions)
        if context.state is not None:
            k = context.state.append((key, "keys"), k, dim=2, window=self.window)
            v = context.state.append((key, "values"), v, dim=2, window=self.window)
        mask = seen.attention_masks[self.window]
        attended = KERNELS[seen.kernel](q, k, v, mask, scale=self.scale, softcap=0.0, attention_bias=None)
        return self.out(attended.transpose(1, 2).flatten(2))

    def reset(self) -> None:
        """Set norms and tables; the caller draws the matrices."""
        for part in (self.query_norm, self.key_norm, self.rotary):
            if part is not None:
                part.reset()
