"""Recipes: defaults, parameter groups and laws that belong together."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from trainer.optim import Optimizer
from trainer.recipes.hlb import hlb_groups, weight_decay_base
from trainer.recipes.plain import plain_groups


def build_optimizer(
    plan: Any, model: Any, shapes: dict[str, torch.Size], local: dict[str, nn.Parameter], device: torch.device
) -> Optimizer:
    """The optimiser of a plan's recipe. shapes: of the whole parameters; local: what this rank updates, by name."""
    config = plan.config
    if config.optim.recipe == "hlb":
        groups = hlb_groups(model, config.optim)
    else:
        groups = plain_groups(shapes, config.optim, config.max_steps)
    # Moments of bf16 parameters are bf16 as they are.
    narrow = config.optim.state_precision == "bf16" and config.precision != "pure_bf16"
    first_loss = math.log(plan.model_config.vocab_size)  # of a model that knows nothing
    decay_base = weight_decay_base(sum(shape.numel() for shape in shapes.values()))
    return Optimizer(groups, shapes, local, first_loss, decay_base, device, narrow)
