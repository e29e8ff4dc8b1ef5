"""Cautious AdamW (arXiv 2411.16085)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.core.settings import setting
from trainer.optim.foreach import (
    States,
    adam_directions,
    cleared,
    counts,
    descend_,
    moments_,
    norms,
    scalars,
)
from trainer.optim.rule import GroupSettings, register_optimizer
from trainer.optim.rules.adam import Moments


@dataclass
class CautiousAdamWConfig:
    beta1: float = setting(0.9, "decay of the mean of gradients", low=0, high=0.99999)
    beta2: float = setting(0.95, "decay of the mean of squared gradients", low=0, high=0.99999)
    eps: float = setting(1e-8, "added to the root of the mean of squares", above=0)


@register_optimizer("cautious-adamw")
class CautiousAdamW(Moments):
    """Cautious AdamW (arXiv 2411.16085): leaves out numbers whose sign is not the gradient's, and scales up the rest.

    The factor is n / (number of those kept + 1), n: numbers of the tensor, as in the paper. The authors' code divides by the share
    that is kept, at least 0.001. Decay is decoupled and not masked.
    """

    Config = CautiousAdamWConfig
    scope = "tensor"
    entrywise = True

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
        means, squares = moments_(states, gradients, own.beta1, own.beta2, finite)
        directions = adam_directions(means, squares, steps, own.beta1, own.beta2, own.eps)

        masks = torch._foreach_sign(directions)  # by signs: a product of tiny numbers would be 0
        torch._foreach_mul_(masks, torch._foreach_sign(gradients))
        torch._foreach_clamp_min_(masks, 0)  # 1 where the signs are the same
        kept = norms(masks, 1)
        torch._foreach_mul_(directions, masks)
        shares = scalars(1 / (kept + 1))
        # Numbers of Python: nothing is copied to the device.
        torch._foreach_mul_(shares, [float(mask.numel()) for mask in masks])
        torch._foreach_mul_(directions, shares)
        descend_(parameters, directions, group.lr * finite, group.weight_decay)
