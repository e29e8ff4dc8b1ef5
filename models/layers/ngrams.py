"""Embeddings of hashed n-grams of bytes (arXiv 2412.09871): one table for each n."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import normal_

BASE = 1_000_000_007  # a prime of ten digits


def signed(number: int) -> int:
    """`number` modulo 2^64, as int64 holds it."""
    return (number + 2**63) % 2**64 - 2**63


def ngram_hash(ids: Tensor, n: int) -> Tensor:
    """The sum of ids[t - j] BASE^j for j = 0 ... n - 1, modulo 2^64; [B, T] int64 -> [B, T]. Before the row, ids are 0."""
    total = ids
    for j in range(1, n):
        total = total + F.pad(ids, (j, 0))[:, : ids.shape[1]] * signed(BASE**j)  # integers wrap around
    return total


class HashedNgrams(nn.Module):
    """The sum over n of what table n has for the n ids that end at a token. lengths: the n; rows: of each table."""

    def __init__(self, lengths: Iterable[int], rows: int, width: int) -> None:
        super().__init__()
        self.lengths, self.rows = list(lengths), rows
        self.tables = nn.ModuleList(nn.Embedding(rows, width) for _ in self.lengths)

    def forward(self, ids: Tensor, places: Tensor, new: int) -> Tensor:
        """[B, new, width] of the last `new` of ids [B, T]. places: [B, T], position of each in its document; n-grams that begin before the
        document are left out."""
        ids, places = ids[:, -(new + max(self.lengths) - 1) :], places[:, -new:]
        total = 0
        for n, table in zip(self.lengths, self.tables, strict=True):
            found = table(ngram_hash(ids, n)[:, -new:] % self.rows)
            total = total + found * (places >= n - 1)[..., None]
        return total  # type: ignore[return-value]

    def reset(self, generator: torch.Generator | None, std: float) -> None:
        for table in self.tables:
            normal_(table.weight, std, generator)  # type: ignore[arg-type]
