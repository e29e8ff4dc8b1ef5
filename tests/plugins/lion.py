"""Lion (arXiv 2302.06675): the sign of momentum, with decoupled weight decay."""

from dataclasses import dataclass

import torch

from trainer.optim import OptimizerRule, register_optimizer


@dataclass
class LionConfig:
    beta1: float = 0.9
    beta2: float = 0.99


@register_optimizer("lion")
class Lion(OptimizerRule):
    Config = LionConfig

    def state(self, shape, dtype):
        return {"momentum": (shape, dtype)}

    def update(self, group, parameters, gradients, states, finite):
        lr, beta1, beta2 = group.lr * finite, group.config.beta1, group.config.beta2
        for p, g, m in zip(parameters, gradients, (state["momentum"] for state in states), strict=True):
            g = torch.where(finite > 0, g, m)
            p.mul_(1 - lr * group.weight_decay).sub_(lr * torch.sign(beta1 * m + (1 - beta1) * g))
            m.lerp_(g, 1 - beta2)
