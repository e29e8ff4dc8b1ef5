"""Adam-mini (arXiv 2406.16793): Adam with one second moment for each block of numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.core.settings import setting
from trainer.optim.foreach import States, average_, cleared, counts, descend_, roots, scalars
from trainer.optim.rule import STEP, Declared, GroupSettings, OptimizerRule, register_optimizer


@dataclass
class AdamMiniConfig:
    beta1: float = setting(0.9, "decay of the mean of gradients", low=0, high=0.99999)
    beta2: float = setting(0.95, "decay of the mean of squared gradients", low=0, high=0.99999)
    eps: float = setting(1e-8, "added to the root of the mean of squares", above=0)


@register_optimizer("adam-mini")
class AdamMini(OptimizerRule):
    """Adam-mini (arXiv 2406.16793): one second moment for each block of numbers.

    v is the mean over a block of squared gradients: half of Adam's memory. Decay is decoupled.

    A block is a row of a parameter with two dimensions or more (an output neuron, or a token of an embedding), and the whole of
    a vector. That is the authors' partition except for query and key, whose block is a head: a rule does not know the heads,
    and their rows are a finer partition.
    """

    Config = AdamMiniConfig
    scope = "tensor"

    def default_lr(self, adamw: float) -> tuple[float, str] | None:
        return adamw, "AdamW's, as the authors of Adam-mini recommend (arXiv 2406.16793)"

    def state(self, shape: torch.Size, dtype: torch.dtype) -> Declared:
        blocks = torch.Size([shape[0], *[1] * (len(shape) - 1)]) if len(shape) > 1 else torch.Size([1] * len(shape))
        return {
            STEP: (torch.Size(), torch.float32),
            "m": (shape, dtype),
            "v": (blocks, dtype if blocks == shape else torch.float32),
        }

    def update(
        self,
        group: GroupSettings,
        parameters: list[Tensor],
        gradients: list[Tensor],
        states: States,
        finite: Tensor,
    ) -> None:
        own, steps = group.config, counts(states)
        gradients = cleared(gradients, finite)
        means, squares = [state["m"] for state in states], [state["v"] for state in states]
        average_(means, gradients, own.beta1, finite)
        powers = [
            gradient.square().mean(
                [d for d, size in enumerate(square.shape) if size == 1], keepdim=True, dtype=square.dtype
            )
            for gradient, square in zip(gradients, squares, strict=True)
        ]
        average_(squares, powers, own.beta2, finite)
        directions = torch._foreach_div(means, scalars(1 - own.beta1**steps))
        torch._foreach_div_(directions, roots(squares, steps, own.beta2, own.eps))
        descend_(parameters, directions, group.lr * finite, group.weight_decay)
