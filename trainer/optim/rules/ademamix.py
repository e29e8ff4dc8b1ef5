"""AdEMAMix (arXiv 2409.03137): Adam with a second, much slower mean of gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.core.settings import setting
from trainer.optim.foreach import (
    States,
    average_,
    average_squares_,
    cleared,
    counts,
    descend_,
    roots,
    scalars,
)
from trainer.optim.rule import STEP, Declared, GroupSettings, OptimizerRule, register_optimizer


@dataclass
class AdEMAMixConfig:
    beta1: float = setting(0.9, "decay of the fast mean of gradients", above=0, high=0.99999)
    beta2: float = setting(0.999, "decay of the mean of squared gradients", low=0, high=0.99999)
    beta3: float = setting(
        0.9999, "last decay of the slow mean; 0.999 to 0.9995 for runs of some thousand steps", above=0, high=0.999999
    )
    alpha: float = setting(5.0, "last weight of the slow mean", low=0)
    eps: float = setting(1e-8, "added to the root of the mean of squares", above=0)
    total_steps: int | None = setting(
        None,
        "steps in which alpha and beta3 reach their last values; auto: max_steps; 0: they are there at once",
        low=0,
    )


@register_optimizer("ademamix")
class AdEMAMix(OptimizerRule):
    """AdEMAMix (arXiv 2409.03137): Adam with a second, much slower mean of gradients.

    w = w - lr ((m1 / (1 - beta1^t) + alpha_t m2) / (sqrt(nu / (1 - beta2^t)) + eps) + decay w).

    m2 is not corrected for its first steps: alpha_t and beta3_t rise over the run instead. Without that, or with a corrected m2,
    runs diverge: their first step is tenfold, and the slow mean is alpha times the fast one at once.
    """

    Config = AdEMAMixConfig
    entrywise = True

    def state(self, shape: torch.Size, dtype: torch.dtype) -> Declared:
        return {STEP: (torch.Size(), torch.float32), **dict.fromkeys(("m1", "m2", "nu"), (shape, dtype))}

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
        fast, slow, squares = ([state[key] for state in states] for key in ("m1", "m2", "nu"))
        alpha, beta3 = schedules(own, steps)
        average_(fast, gradients, own.beta1, finite)
        average_squares_(squares, gradients, own.beta2, finite)
        torch._foreach_mul_(slow, scalars(1 - (1 - beta3) * finite))
        torch._foreach_add_(slow, torch._foreach_mul(gradients, scalars(1 - beta3)))

        directions = torch._foreach_mul(slow, scalars(alpha))
        torch._foreach_add_(directions, torch._foreach_div(fast, scalars(1 - own.beta1**steps)))
        torch._foreach_div_(directions, roots(squares, steps, own.beta2, own.eps))
        descend_(parameters, directions, group.lr * finite, group.weight_decay)


def schedules(own: AdEMAMixConfig, steps: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, beta3) at 1-based `steps`. alpha rises in proportion, beta3 so that its half-life does (equation 5, appendix A.1)."""
    share = (steps / own.total_steps).clamp(max=1) if own.total_steps else torch.ones_like(steps)
    first, last = math.log(own.beta1), math.log(own.beta3)
    return share * own.alpha, (first * last / ((1 - share) * last + share * first)).exp().clamp(max=own.beta3)
