"""Adam (arXiv 1412.6980) by torch's fused kernel, and RAdam (arXiv 1908.03265)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.core.settings import setting
from trainer.optim.foreach import States, cleared, counts, descend_, moments_, scalars
from trainer.optim.rule import STEP, Declared, GroupSettings, OptimizerRule, register_optimizer


@dataclass
class AdamConfig:
    beta1: float = setting(0.9, "decay of the mean of gradients", low=0, high=0.99999)
    beta2: float = setting(0.999, "decay of the mean of squared gradients", low=0, high=0.99999)
    eps: float = setting(1e-8, "added to the root of the mean of squares", above=0)


class Moments(OptimizerRule):
    """State of Adam and its kin: moments of the parameter's shape, and the count of steps."""

    def state(self, shape: torch.Size, dtype: torch.dtype) -> Declared:
        return {STEP: (torch.Size(), torch.float32), "exp_avg": (shape, dtype), "exp_avg_sq": (shape, dtype)}


@register_optimizer("adam")
class Adam(Moments):
    """Adam (arXiv 1412.6980), by torch's fused kernel.

    Decay is coupled, as in torch.optim.Adam: decay * w is added to the gradient (L2), so it is divided by the root too.
    """

    Config = AdamConfig
    in_place = True

    def update(
        self,
        group: GroupSettings,
        parameters: list[Tensor],
        gradients: list[Tensor],
        states: States,
        finite: Tensor,
    ) -> None:
        torch._fused_adam_(
            parameters,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state[STEP] for state in states],
            lr=group.lr,
            beta1=group.config.beta1,
            beta2=group.config.beta2,
            weight_decay=group.weight_decay,
            eps=group.config.eps,
            amsgrad=False,
            maximize=False,
            found_inf=1 - finite,  # the kernel changes nothing if it is 1
        )


@dataclass
class RAdamConfig(AdamConfig):
    pass


@register_optimizer("radam")
class RAdam(Moments):
    """Adam whose divisor is left out while too few steps are in its mean, then rectified: a warm-up by formula.

    Decay is decoupled, as in the authors' code; torch.optim.RAdam does it only with decoupled_weight_decay. eps is where torch
    has it: added to the root before it is corrected for its first steps.
    """

    Config = RAdamConfig

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

        power = own.beta2**steps
        longest = 2 / (1 - own.beta2) - 1  # rho_infinity: the number of steps that a full mean is worth
        length = longest - 2 * steps * power / (1 - power)  # rho_t
        share = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        rectified = length > 5
        factor = torch.where(rectified, (share * (1 - power)).sqrt(), 0.0) / (1 - own.beta1**steps)
        plain = torch.where(rectified, 0.0, 1 / (1 - own.beta1**steps))

        # mean * (factor / (root + eps) + plain)
        scales = torch._foreach_sqrt(squares)
        torch._foreach_add_(scales, own.eps)
        torch._foreach_reciprocal_(scales)
        torch._foreach_mul_(scales, scalars(factor))
        torch._foreach_add_(scales, scalars(plain))
        torch._foreach_mul_(scales, means)
        descend_(parameters, scales, group.lr * finite, group.weight_decay)
