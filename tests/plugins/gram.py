"""Two rules that must see tensors whole: `gram` works with products of whole matrices, `unit` with norms of whole tensors."""

from dataclasses import dataclass

import torch

from trainer.optim import OptimizerRule, register_optimizer


@dataclass
class NoConfig:
    pass


@register_optimizer("gram")
class Gram(OptimizerRule):
    """Momentum [m, n] multiplied by the running mean of its Gram matrix [m, m]."""

    Config = NoConfig
    scope = "matrix"

    def state(self, shape, dtype):
        rows = torch.Size([shape[0], shape[0]])
        return {"step": (torch.Size(), torch.float32), "momentum": (shape, dtype), "gram": (rows, torch.float32)}

    def update(self, group, parameters, gradients, states, finite):
        for p, g, state in zip(parameters, gradients, states, strict=True):
            momentum, gram = state["momentum"], state["gram"]
            momentum.lerp_(torch.where(finite > 0, g, momentum), 0.1)
            gram.lerp_(torch.where(finite > 0, (momentum @ momentum.T).float(), gram), 0.1)
            direction = gram.to(p.dtype) @ momentum
            size = direction.norm() / direction.numel() ** 0.5
            p.sub_(group.lr * finite * (direction / (size + 1e-12) + group.weight_decay * p))


@register_optimizer("unit")
class Unit(OptimizerRule):
    """Gradient descent by gradients of norm 1."""

    Config = NoConfig
    scope = "tensor"

    def state(self, shape, dtype):
        return {}

    def update(self, group, parameters, gradients, states, finite):
        for p, g in zip(parameters, gradients, strict=True):
            g = torch.where(finite > 0, g, torch.zeros_like(g))
            p.sub_(group.lr * finite * p.numel() ** 0.5 * g / (g.norm() + 1e-12))
