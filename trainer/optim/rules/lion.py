"""Lion (arXiv 2302.06675)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.core.settings import setting
from trainer.optim.foreach import States, average_, cleared, descend_
from trainer.optim.rule import Declared, GroupSettings, OptimizerRule, register_optimizer


@dataclass
class LionConfig:
    beta1: float = setting(0.9, "weight of the momentum in the update", low=0, high=1)
    beta2: float = setting(0.99, "decay of the momentum", low=0, high=0.99999)


@register_optimizer("lion")
class Lion(OptimizerRule):
    """Lion (arXiv 2302.06675): the sign of momentum and gradient, with decoupled decay. Every number moves by lr: use 3 to 10 times less lr than AdamW's,
    and as much more decay."""

    Config = LionConfig
    entrywise = True

    def default_lr(self, adamw: float) -> tuple[float, str] | None:
        return (
            0.2 * adamw,
            "0.2 x AdamW's, for Lion's authors take a third to a tenth of it (arXiv 2302.06675, section 5)",
        )

    def state(self, shape: torch.Size, dtype: torch.dtype) -> Declared:
        return {"m": (shape, dtype)}

    def update(
        self,
        group: GroupSettings,
        parameters: list[Tensor],
        gradients: list[Tensor],
        states: States,
        finite: Tensor,
    ) -> None:
        own, momenta = group.config, [state["m"] for state in states]
        gradients = cleared(gradients, finite)
        directions = torch._foreach_lerp(gradients, momenta, own.beta1)
        torch._foreach_sign_(directions)
        descend_(parameters, directions, group.lr * finite, group.weight_decay)
        average_(momenta, gradients, own.beta2, finite)
