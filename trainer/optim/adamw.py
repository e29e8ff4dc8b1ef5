"""AdamW (arXiv 1711.05101), by torch's fused kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.core.settings import setting
from trainer.optim.rule import STEP, Declared, GroupSettings, OptimizerRule, register_optimizer


@dataclass
class AdamWConfig:
    """Fields that the user does not set come from the recipe, group by group."""

    beta1: float = setting(0.9, "decay of the mean of gradients", low=0, high=0.99999)
    beta2: float = setting(0.95, "decay of the mean of squared gradients", low=0, high=0.99999)
    eps: float = setting(1e-8, "added to the root of the mean of squares", low=0)
    independent_decay: bool = setting(
        False, "weight decay is multiplied by the schedule, but not by the peak learning rate (try 1e-4)"
    )


@register_optimizer("adamw")
class AdamW(OptimizerRule):
    """AdamW (arXiv 1711.05101), by torch's fused kernel. Moments have the parameter's type or bf16.

    bf16 moments of fp32 parameters: the update is computed from them in fp32, and the new moments are rounded to nearest
    (see narrow_state.py). Rounding loses a change of less than half a spacing; half a spacing is between 2^-9 and 2^-8 of a
    bf16 number. With beta2 = 0.95 and a gradient of 0, a step takes 5 % off a second moment, so it falls all the way (0.999
    would take off 0.1 % < 2^-9: it could never fall). A second moment stands still only if the squared gradient is within
    2^-8 / 0.05 = 8 % of it, 4 % in the root that divides. A first moment stands still within 2^-8 / 0.1 = 4 % of the gradient
    with beta1 = 0.9, within 1 % with 0.6. The rounding errors of many steps together have the same bound, 2^-8 / (1 - beta)
    of the largest moment among them, and mostly cancel if gradients fluctuate. Tiny moments are as safe as in fp32, because
    bf16 has the same range of exponents.

    Decay is decoupled: w = (1 - lr decay) w. independent_decay (arXiv 2309.14322): w = (1 - s decay) w, s: the schedule, which
    is 1 at its peak. So another lr does not change how much weights decay.
    """

    Config = AdamWConfig
    scope = "element"
    in_place = True
    entrywise = True

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
            # The kernel multiplies it by lr.
            weight_decay=group.weight_decay / (group.peak_lr if group.config.independent_decay else 1),
            eps=group.config.eps,
            amsgrad=False,
            maximize=False,
            found_inf=1 - finite,  # the kernel changes nothing if it is 1
        )
