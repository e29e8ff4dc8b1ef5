"""Gradient descent that is evaluated with a running mean of its weights."""

from dataclasses import dataclass

import torch

from trainer.optim import OptimizerRule, register_optimizer


@dataclass
class AveragedConfig:
    share: float = 0.5  # of the newest weights


@register_optimizer("averaged")
class Averaged(OptimizerRule):
    Config = AveragedConfig

    def state(self, shape, dtype):
        return {"step": (torch.Size(), torch.float32), "mean": (shape, dtype)}

    def update(self, group, parameters, gradients, states, finite):
        for p, g, state in zip(parameters, gradients, states, strict=True):
            p.sub_(group.lr * finite * torch.where(finite > 0, g, 0))
            share = torch.where(state["step"] > 1, group.config.share, 1.0) * finite
            state["mean"].add_(share * (p - state["mean"]))

    def evaluation_weights(self, parameter, state):
        return state["mean"]
