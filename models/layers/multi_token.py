"""Multi-token prediction: head i of n predicts the token i places ahead, so head 1 the next token (arXiv 2404.19737)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.base import IGNORE
from models.layers.linear_cross_entropy import divisor, weighted_linear_cross_entropy


def shifted_targets(targets: Tensor, i: int, documents: Tensor | None = None) -> Tensor:
    """targets[:, t + i] at position t; IGNORE at the end, and if positions t + i and t are in different documents; all [B, T]."""
    shifted = F.pad(targets, (0, i), value=IGNORE)[:, i:]
    if documents is None:
        return shifted
    return shifted.where(F.pad(documents, (0, i))[:, i:] == documents, IGNORE)  # padded targets are IGNORE already


def multi_token_loss(
    hidden: Sequence[Tensor],
    weights: Tensor | Sequence[Tensor],
    targets: Tensor,
    reduction: str,
    *,
    target_weights: Tensor | None = None,
    documents: Tensor | None = None,
    head_weights: Sequence[float],
    softcap: float | None = None,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, parts) of n heads: the sum of their weighted cross-entropies in nats; fp32 scalars.

    hidden: [B, T, D] of each head; weights: [V, D], one unembedding for all heads, or a list with one per head; targets: [B, T].
    reduction: sum over all targets of all heads, or mean: this sum divided by the number of head 1's targets.
    head_weights: weight of each head. The first is 1, so that the loss minus its parts is the cross-entropy of the next token.
    target_weights: [B, T], factor of each target's loss in every head; None: 1.
    parts: the parts of the loss from further heads (head_2, ...) and, with z_loss, from all z-losses; without gradient.

    softcap, z_loss, vocab_size: as in linear_cross_entropy. ValueError if the numbers of heads do not match.
    With one [V, D] the rows of all heads go through one call of the loss, which holds a chunk of logits at a time and
    one gradient of the matrix: memory of O(V + D), not O(n V + D). The paper reaches this by running one head after another.
    """
    n = len(hidden)
    if len(head_weights) != n or head_weights[0] != 1:
        raise ValueError(
            f"head_weights must be {n} numbers, one for each head, with 1 as the first, not {list(head_weights)}"
        )
    labels = [shifted_targets(targets, i, documents) for i in range(n)]
    # Filled on the device, because a tensor made from a list would be a copy that waits for the device.
    wide = torch.promote_types(hidden[0].dtype, torch.float32)
    factors = [torch.full_like(targets, factor, dtype=wide) for factor in head_weights]
    if target_weights is not None:
        factors = [factor * F.pad(target_weights, (0, i))[:, i:] for i, factor in enumerate(factors)]
    if n == 1 and isinstance(weights, Tensor):
        weights = [weights]  # torch.cat copies even a single tensor: fp32 [B, T, D], held while the loss runs
    if isinstance(weights, Tensor):
        calls = [(torch.cat(tuple(hidden)), weights, torch.cat(labels), torch.cat(factors))]
    elif len(weights) == n:
        calls = list(zip(hidden, weights, labels, factors, strict=True))
    else:
        raise ValueError(f"weights must be one matrix or one for each of {n} heads, not {len(weights)}")
    divide_by = divisor(targets, reduction)
    scored = [
        weighted_linear_cross_entropy(*call, divide_by, softcap=softcap, z_loss=z_loss, vocab_size=vocab_size)
        for call in calls
    ]
    losses, cross_entropies, z_losses = zip(*scored, strict=True)
    sums = {f"head_{i}": part.sum() for i, part in enumerate(torch.cat(cross_entropies).chunk(n)[1:], 2)}
    if z_loss:
        sums["z_loss"] = torch.cat(z_losses).sum()
    parts = sums if divide_by is None else {name: part / divide_by for name, part in sums.items()}
    return torch.stack(losses).sum(), parts
