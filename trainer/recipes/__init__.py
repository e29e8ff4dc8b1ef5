"""Recipes: defaults, parameter groups and laws that belong together."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import nn

from trainer.optim import Optimizer, matrices_of, rule_class, with_rule
from trainer.recipes.hlb import Hlb, evaluation_rows, law_rows, weight_decay, weight_decay_base
from trainer.recipes.plain import Plain
from trainer.recipes.recipe import PlanEntry, Recipe

RECIPES: dict[str, Recipe] = {"hlb": Hlb(), "plain": Plain()}  # the choices of optim.recipe


def recipe_for(model_name: str) -> str:
    """The recipe of a model, unless the config says otherwise."""
    return next((name for name, recipe in RECIPES.items() if model_name in recipe.made_for), "plain")


def recipe_rows(config: Any, parameters: int, tied: bool) -> list[PlanEntry]:
    """What follows from the recipe beyond the settings. config: resolved; tied: the head shares the embedding's matrix."""
    rows, name = RECIPES[config.optim.recipe].rows(config, tied), config.optim.name
    if rule_class(name).own_schedule:
        rows = [row._replace(rule=f"constant, because {name} needs no schedule") for row in rows]
    return [*law_rows(config, parameters), *rows, *evaluation_rows(config)]


def schedule_change(config: Any, before: Any, step: int) -> str:
    """As Recipe.schedule_change, but `before` comes from a stored config: "" if it is not a number, or the same one, or if the
    optimizer needs no schedule."""
    if before == config.max_steps or not isinstance(before, int) or rule_class(config.optim.name).own_schedule:
        return ""
    return RECIPES[config.optim.recipe].schedule_change(config, before, step)


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
    groups = RECIPES[config.optim.recipe].groups(model, shapes, config)
    scope = rule_class(config.optim.name).scope
    names = matrices_of(model, shapes) if scope == "matrix" else dict.fromkeys(shapes)
    rest_lr = (config.optim.rest_lr or config.optim.lr) / config.optim.lr
    groups = with_rule(groups, config.optim.name, names, rest_lr)
    # The state of bf16 parameters is bf16 in any case.
    narrow = config.optim.state_precision == "bf16" and config.precision != "pure_bf16"
    first_loss = math.log(plan.model_config.vocab_size)  # of a model that knows nothing
    decay_of = partial(weight_decay, base=weight_decay_base(sum(shape.numel() for shape in shapes.values())))
    given = {config.optim.name: config.optim.settings}
    by_owner = scope == "matrix" or (scope == "tensor" and not whole_tensors)
    whole = {name: split for name, split in names.items() if by_owner}
    return Optimizer(groups, shapes, local, first_loss, decay_of, device, narrow, given, whole)
