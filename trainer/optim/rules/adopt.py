"""ADOPT (arXiv 2411.02853), the clipped form that the authors published on 22 November 2024."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.core.settings import setting
from trainer.optim.foreach import States, average_, cleared, counts, scalars
from trainer.optim.rule import STEP, Declared, GroupSettings, OptimizerRule, register_optimizer


@dataclass
class ADOPTConfig:
    beta1: float = setting(0.9, "decay of the mean of normalised gradients", low=0, high=0.99999)
    beta2: float = setting(0.9999, "decay of the mean of squared gradients", low=0, high=0.999999)
    eps: float = setting(1e-6, "smallest divisor", above=0)
    clip: bool = setting(
        True, "clip normalised gradients to t^0.25; without it, first gradients near 0 make runs diverge"
    )


@register_optimizer("adopt")
class ADOPT(OptimizerRule):
    """ADOPT (arXiv 2411.02853), the clipped form of November 2024: divides by the second moment of the step before.

    m = beta1 m + (1 - beta1) clip(g / max(sqrt(v), eps)); w = (1 - lr decay) w - lr m; then v = beta2 v + (1 - beta2) g^2.

    A gradient is divided by the mean of those before it. So the first step of a parameter only sets v = g^2.
    """

    Config = ADOPTConfig
    entrywise = True

    def state(self, shape: torch.Size, dtype: torch.dtype) -> Declared:
        return {STEP: (torch.Size(), torch.float32), "m": (shape, dtype), "v": (shape, dtype)}

    def update(
        self,
        group: GroupSettings,
        parameters: list[Tensor],
        gradients: list[Tensor],
        states: States,
        finite: Tensor,
    ) -> None:
        own, before = group.config, counts(states) - 1  # [n]: steps that v has seen
        gradients = cleared(gradients, finite)
        momenta, squares = [state["m"] for state in states], [state["v"] for state in states]

        divisors = torch._foreach_sqrt(squares)
        torch._foreach_clamp_min_(divisors, own.eps)
        normalised = torch._foreach_div(gradients, divisors)
        # A limit of 0 in the first step leaves m = 0.
        limits = before**0.25 if own.clip else torch.where(before > 0, math.inf, 0.0)
        torch._foreach_minimum_(normalised, scalars(limits))
        torch._foreach_maximum_(normalised, scalars(-limits))
        average_(momenta, normalised, own.beta1, finite)

        lr = group.lr * finite
        if group.weight_decay:
            torch._foreach_mul_(parameters, scalars(1 - lr * group.weight_decay * (before > 0)))
        torch._foreach_sub_(parameters, torch._foreach_mul(momenta, lr))

        weight = torch.where(before > 0, 1 - own.beta2, 1.0)  # of the newest square
        torch._foreach_mul_(squares, scalars(1 - weight * finite))
        torch._foreach_add_(squares, torch._foreach_mul(torch._foreach_mul(gradients, gradients), scalars(weight)))
