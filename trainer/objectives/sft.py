"""Supervised fine-tuning: cross-entropy of the next token, of the answers alone."""

from __future__ import annotations

import torch
from torch import Tensor

from models.base import Batch
from trainer.data.dataset import LOSS_MASK
from trainer.objectives.base import answers_alone, register_objective
from trainer.objectives.next_token import NextToken


@register_objective("sft")
class SupervisedFineTuning(NextToken):
    """As next_token, but only tokens of answers are targets, with the end-of-text id that closes each. Each target counts the same."""

    counts_every_token = False
    records = ("chat",)

    def targets(self, batch: Batch) -> Tensor:
        return answers_alone(batch)

    def example(self, tokens: Tensor) -> Batch:
        return {**super().example(tokens), LOSS_MASK: torch.ones_like(tokens, dtype=torch.uint8)}  # type: ignore[misc]
