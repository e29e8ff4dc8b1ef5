"""MARS (arXiv 2411.10438) in its AdamW form: gradients with reduced variance, then AdamW."""

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
from trainer.optim.rule import STEP, Declared, GroupSettings, OptimizerRule, register_optimizer


@dataclass
class MARSConfig:
    beta1: float = setting(0.95, "decay of the mean of corrected gradients", low=0, high=0.99999)
    beta2: float = setting(0.99, "decay of the mean of their squares", low=0, high=0.99999)
    gamma: float = setting(0.025, "how much of the change since the last gradient is added", low=0)
    eps: float = setting(1e-8, "added to the root of the mean of squares", above=0)


@register_optimizer("mars")
class MARS(OptimizerRule):
    """MARS (arXiv 2411.10438), AdamW form: gradients with reduced variance, then AdamW.

    c = g + gamma beta1 / (1 - beta1) (g - last g), scaled down to norm 1 over each whole tensor; then AdamW with c for g.

    The approximate form: the last gradient is the one of the last batch, not computed anew. In the first step c = g, as in the
    paper; the authors' code takes 0 for the gradient before it. That code also leaves vectors to AdamW; here every tensor is
    treated alike.
    """

    Config = MARSConfig
    scope = "tensor"
    entrywise = True

    def default_lr(self, adamw: float) -> tuple[float, str] | None:
        return max(adamw, min(10 * adamw, 6e-3)), (
            "10 x AdamW's but at most 6e-3, as the authors for GPT-2 from 770 M down to 125 M (their README, arXiv "
            "2411.10438), and never below AdamW's"
        )

    def state(self, shape: torch.Size, dtype: torch.dtype) -> Declared:
        keys = ("exp_avg", "exp_avg_sq", "last_grad")
        return {STEP: (torch.Size(), torch.float32), **dict.fromkeys(keys, (shape, dtype))}

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
        last = [state["last_grad"] for state in states]

        corrected = torch._foreach_sub(gradients, last)
        torch._foreach_mul_(corrected, scalars(own.gamma * own.beta1 / (1 - own.beta1) * (steps > 1)))
        torch._foreach_add_(corrected, gradients)
        torch._foreach_mul_(corrected, scalars(finite / norms(corrected, 2).clamp(min=1)))

        means, squares = moments_(states, corrected, own.beta1, own.beta2, finite)
        directions = adam_directions(means, squares, steps, own.beta1, own.beta2, own.eps)
        descend_(parameters, directions, group.lr * finite, group.weight_decay)
        torch._foreach_mul_(last, 1 - finite)
        torch._foreach_add_(last, gradients)
