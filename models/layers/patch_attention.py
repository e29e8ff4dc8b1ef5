"""Cross-attention between bytes and patches: the vectors of a patch read its bytes, and bytes read the vectors of a patch."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor, nn

from models.base import Split
from models.layers.causal import Context
from models.layers.norms import RMSNorm
from models.layers.patching import attend_to_own_bytes, of_patch
from models.layers.plain_block import Shape, reset_parts


class CrossAttention(nn.Module):
    """Queries, keys and values of `width` channels, each normed before it is projected; no positions. The caller adds the residual."""

    def __init__(self, width: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.head_dim, self.scale = head_dim, head_dim**-0.5
        self.query_norm, self.byte_norm = RMSNorm(width, eps), RMSNorm(width, eps)
        self.query = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.split = Split(0, {"key": width, "value": width})

    def queries(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., H, d]"""
        return self.query(self.query_norm(x)).unflatten(-1, (-1, self.head_dim))

    def reset(self, generator: torch.Generator | None, shape: Shape) -> None:
        """shape: of the layer beside it."""
        reset_parts(self, shape, generator)


class PatchQueries(CrossAttention):
    """Vectors of patches attend to the bytes of their own patch. key: of keys and values of bytes in a decoding state."""

    def __init__(self, width: int, head_dim: int, eps: float, key: Hashable) -> None:
        super().__init__(width, head_dim, eps)
        self.key = key

    def keys_and_values(self, x: Tensor, context: Context, count: int) -> Tensor:
        """Of the last `count` bytes, [B, count, 2 width]; x: the new ones, [B, T, width]."""
        kv = self.kv(self.byte_norm(x))
        return kv if context.state is None else context.state.append(self.key, kv, dim=1)[:, -count:]

    def forward(self, vectors: Tensor, kv: Tensor, ids: Tensor, inside: Tensor) -> Tensor:
        """vectors: [B, M, K, width], kv: [B, T, 2 width], ids and inside: [B, T], see layers/patching.py -> as vectors."""
        k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in kv.chunk(2, dim=-1))
        attended = attend_to_own_bytes(self.queries(vectors), k, v, ids, inside, self.scale)
        return self.out(attended.flatten(-2).to(kv.dtype))


class ByteQueries(CrossAttention):
    """Bytes attend to the vectors of one patch each."""

    def forward(self, x: Tensor, vectors: Tensor, patch: Tensor, known: Tensor | None) -> Tensor:
        """x: [B, T, width], vectors: [B, M, K, width], patch: [B, T], the patch of each byte; known: [B, T] bool, whether it has one
        (None: all have) -> as x."""
        q = self.queries(x)[:, :, None]  # [B, T, 1, H, d]
        kv = of_patch(self.kv(self.byte_norm(vectors)), patch).unflatten(-1, (2, -1, self.head_dim))
        k, v = kv.unbind(3)  # [B, T, K, H, d]
        wide = torch.promote_types(q.dtype, torch.float32)
        weights = ((q.to(wide) * k.to(wide)).sum(-1) * self.scale).softmax(2)
        attended = (weights[..., None] * v.to(wide)).sum(2).flatten(-2).to(kv.dtype)
        attended = attended if known is None else attended * known[..., None]
        return self.out(attended)
