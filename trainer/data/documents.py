"""Which document of its row each token belongs to."""

from __future__ import annotations

from torch import Tensor


def document_numbers(tokens: Tensor, end: int | None) -> Tensor | None:
    """[..., T] ids -> [..., T] int64: how many documents have ended before each token of the row.

    end: id that ends a document, and is its last token; None: documents are not kept apart.
    """
    if end is None:
        return None
    ends = (tokens == end).long()
    return ends.cumsum(-1) - ends
