"""AdamW (arXiv 1711.05101), by torch's fused kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.core.settings import setting
from trainer.optim.rule import STEP, Declared, GroupSettings, OptimizerRule, register_optimizer


@dataclass
class AdamWConfig:
    """What is not set here is the recipe's, group by group."""

    beta1: float = setting(0.9, "decay of the mean of gradients", low=0, high=0.99999)
    beta2: float = setting(0.95, "decay of the mean of squared gradients", low=0, high=0.99999)
    eps: float = setting(1e-8, "added to the root of the mean of squares", low=0)


@register_optimizer("adamw")
class AdamW(OptimizerRule):
    """Moments are held in the parameter's type or in bf16.

    bf16 moments of fp32 parameters: the update is computed in fp32 from them, and what they become is rounded to nearest
    (see narrow_state.py). That loses a change of less than half a spacing, which lies between 2^-9 and 2^-8 of a bf16
    number. With beta2 = 0.95 a step takes 5 % off a second moment whose gradient is 0, so it follows all the way down
    (0.999 would take off 0.1 % < 2^-9: it could never fall). It rests only where the squared gradient is within
    2^-8 / 0.05 = 8 % of it, 4 % in the root that divides; a first moment rests within 2^-8 / 0.1 = 4 % of the gradient with
    beta1 = 0.9, within 1 % with 0.6. The roundings of many steps add up to no more than that either, 2^-8 / (1 - beta) of
    the largest moment among them, and mostly cancel where gradients fluctuate. Tiny moments are as safe as in fp32, whose
    exponents bf16 has.
    """

    Config = AdamWConfig
    scope = "element"

    def state(self, shape: torch.Size, dtype: torch.dtype) -> Declared:
        return {STEP: (torch.Size(), torch.float32), "exp_avg": (shape, dtype), "exp_avg_sq": (shape, dtype)}

    def update(
        self,
        group: GroupSettings,
        parameters: list[Tensor],
        gradients: list[Tensor],
        states: list[dict[str, Tensor]],
        finite: Tensor,
    ) -> None:
        torch._fused_adamw_(
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
            found_inf=1 - finite,  # the kernel changes nothing where it is 1
        )
