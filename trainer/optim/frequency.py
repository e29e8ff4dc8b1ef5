"""hlb's scaling of embedding gradients by how often each token occurs in the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class FrequencyScaling:
    """Divides the gradient of each row of an embedding by the number of times its token occurs in the step's global batch.

    It divides the gradient at the embedding's output, position by position. So the result does not depend on how the
    embedding's own gradient is then summed, sharded or flattened.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        self.rows = embedding.num_embeddings
        self.counts: Tensor | None = None
        embedding.register_forward_hook(self._watch)

    def count(self, tokens: Tensor, world: Any) -> None:
        """Count a step's tokens over all ranks. tokens: [B, T], this rank's tokens of all its microbatches."""
        flat = tokens.flatten()
        counts = torch.zeros(self.rows, device=tokens.device)  # [V]
        counts.index_add_(0, flat, torch.ones_like(flat, dtype=counts.dtype))  # bincount would wait for the device
        counts = world.sum(counts).clamp_(min=1)
        # In place: a microbatch recorded as a CUDA graph reads the counts at this address.
        self.counts = counts if self.counts is None else self.counts.copy_(counts)

    def _watch(self, embedding: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad or self.counts is None:
            return
        counts, tokens = self.counts, inputs[0]
        output.register_hook(lambda gradient: (gradient / counts[tokens].unsqueeze(-1)).to(gradient.dtype))
