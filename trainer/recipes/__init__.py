"""Recipes: defaults, parameter groups and laws that belong together."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from trainer.optim import Optimizer, get_rule, matrices_of, with_rule
from trainer.recipes.hlb import hlb_groups, weight_decay_base
from trainer.recipes.plain import plain_groups


def build_optimizer(
    plan: Any,
    model: Any,
    shapes: dict[str, torch.Size],
    local: dict[str, nn.Parameter],
    device: torch.device,
    whole_tensors: bool,
) -> Optimizer:
    """The optimizer of a plan: the groups of its recipe, updated by the rule optim.name.

    shapes: of the whole parameters; local: what this rank updates, by name; whole_tensors: whether these are whole parameters.
    """
    config = plan.config
    if config.optim.recipe == "hlb":
        groups = hlb_groups(model, config.optim)
    else:
        groups = plain_groups(shapes, config.optim, config.max_steps)
    scope = get_rule(config.optim.name).scope
    names = matrices_of(model, shapes) if scope == "matrix" else set(shapes)
    groups = with_rule(groups, config.optim.name, names)
    # The state of bf16 parameters is bf16 in any case.
    narrow = config.optim.state_precision == "bf16" and config.precision != "pure_bf16"
    first_loss = math.log(plan.model_config.vocab_size)  # of a model that knows nothing
    decay_base = weight_decay_base(sum(shape.numel() for shape in shapes.values()))
    given = {config.optim.name: config.optim.settings}
    by_owner = scope == "matrix" or (scope == "tensor" and not whole_tensors)
    whole = [name for name in shapes if by_owner and name in names]
    return Optimizer(groups, shapes, local, first_loss, decay_base, device, narrow, given, whole)
