"""Recipes: defaults, parameter groups and laws that belong together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from models.base import Split
from trainer.core.config import RoleConfig
from trainer.optim import Assignment, Group, Optimizer, assign, matrices_of, no_schedule, rule_class
from trainer.optim.groups import shapes_of
from trainer.optim.narrow_state import StochasticRounding
from trainer.recipes.hlb import Hlb, evaluation_rows, law_rows, weight_decay, weight_decay_base
from trainer.recipes.mup import mup_rows, with_transfer
from trainer.recipes.plain import Plain
from trainer.recipes.recipe import PlanEntry, Recipe

RECIPES: dict[str, Recipe] = {"hlb": Hlb(), "plain": Plain()}  # the choices of optim.recipe


def recipe_for(model_name: str) -> str:
    """The recipe of a model, unless the config says otherwise."""
    return next((name for name, recipe in RECIPES.items() if model_name in recipe.made_for), "plain")


def recipe_rows(config: Any, model: Any) -> list[PlanEntry]:
    """What follows from the recipe beyond the settings. config: resolved; model: may have no storage."""
    rows, name = RECIPES[config.optim.recipe].rows(config, model.tied_embedding()), config.optim.name
    if rule_class(name).own_schedule:
        rows = [row._replace(rule=f"constant, because {name} needs no schedule") for row in rows]
    shapes = shapes_of(model)
    parameters = sum(shape.numel() for shape in shapes.values())
    groups = groups_of(config, model, shapes)
    rows += [*role_rows(config, groups), *mup_rows(model, groups)]
    return [*law_rows(config, parameters), *rows, *evaluation_rows(config)]


def role_rows(config: Any, groups: list[Group]) -> list[PlanEntry]:
    """How the groups of each entry of optim.roles are trained. config: resolved."""
    rows = []
    for group in groups:
        if group.role:
            schedule = config.optim.roles[group.role].schedule or config.optim.schedule
            schedule = "no schedule" if rule_class(group.rule).own_schedule else f"schedule {schedule}"
            decay = "by the loss" if group.loss_driven_decay else f"{group.weight_decay:g}"
            how = f"{group.rule}, {schedule}, weight decay {decay}" + f"; mup: {group.why}" * bool(group.why)
            rows.append(PlanEntry(f"lr of role {group.name}", group.lr, how))
    return rows


def schedule_change(config: Any, before: Any, step: int) -> str:
    """As Recipe.schedule_change, but `before` comes from a stored config: "" if it is not a number, or the same one, or if no
    optimizer needs a schedule."""
    optim = config.optim
    names = {optim.name, *(own.name for own in optim.roles.values() if own.name is not None)}
    if (
        before == config.max_steps
        or not isinstance(before, int)
        or all(rule_class(name).own_schedule for name in names)
    ):
        return ""
    line = RECIPES[optim.recipe].schedule_change(config, before, step)
    others = [role for role, own in optim.roles.items() if own.schedule not in (None, optim.schedule)]
    return f"{line}; the schedules of the roles {', '.join(others)} change as well" if line and others else line


def groups_of(config: Any, model: Any, shapes: Mapping[str, torch.Size], transferred: bool = True) -> list[Group]:
    """The groups of the recipe, cut by rule and by role, and with model.mup by what that changes. Those that hold matrices come first in
    theirs. config: resolved; transferred: False gives the settings of the base of model.mup."""
    assigned, matrices, groups = assign(model, config.optim, shapes), matrices_of(model, shapes), []
    transfers: dict[str, Any] = model.transfers() if transferred else {}
    for group in RECIPES[config.optim.recipe].groups(model, shapes, config):
        parts: dict[tuple[Assignment, Any], list[str]] = {}
        for name in group.parameters:
            parts.setdefault((assigned[name], transfers.get(name)), []).append(name)
        ordered = sorted(parts.items(), key=lambda part: matrices.keys().isdisjoint(part[1]))
        several = len({how for how, _ in parts}) > 1
        for (how, transfer), names in ordered:
            part = part_of(group, names, how, config, several)
            groups.append(part if transfer is None else with_transfer(part, transfer))
    return groups


def part_of(group: Group, names: list[str], how: Assignment, config: Any, several: bool) -> Group:
    """The group of some parameters of a recipe's group. several: whether that is cut."""
    optim, own = config.optim, config.optim.roles.get(how.role, RoleConfig())
    lr, schedule = group.lr, group.schedule
    if how.own and own.lr is not None:
        lr = own.lr
    elif how.rest and optim.rest_lr is not None:
        lr = group.lr * (optim.rest_lr / optim.lr)
    if rule_class(how.rule).own_schedule:
        schedule = no_schedule
    elif own.schedule not in (None, optim.schedule):
        schedule = RECIPES[optim.recipe].schedule(own.schedule, config)
    decay = {} if own.weight_decay is None else {"weight_decay": own.weight_decay, "loss_driven_decay": False}
    is_rest = not how.own if how.role else how.rest and several
    return replace(
        group,
        name=(how.role or group.name) + ", rest" * is_rest,
        parameters=names,
        lr=lr,
        schedule=schedule,
        rule=how.rule,
        given=how.given(optim),
        role=how.role,
        **decay,
    )


def build_optimizer(
    plan: Any,
    model: Any,
    shapes: dict[str, torch.Size],
    local: dict[str, nn.Parameter],
    device: torch.device,
    whole_tensors: bool,
) -> Optimizer:
    """The optimizer of a plan: the groups of its recipe, updated by the rules of optim.name and optim.roles.

    shapes: of the whole parameters; local: what this rank updates, by name; whole_tensors: whether these are whole parameters.
    """
    config = plan.config
    groups, matrices = groups_of(config, model, shapes), matrices_of(model, shapes)
    # The state of bf16 parameters is bf16 in any case.
    narrow = config.optim.narrow_state and config.precision != "pure_bf16"
    rounding = StochasticRounding(config.seed) if config.optim.state_precision == "bf16_stochastic" else None
    first_loss = math.log(plan.model_config.vocab_size)  # of a model that knows nothing
    decay_of = partial(weight_decay, base=weight_decay_base(sum(shape.numel() for shape in shapes.values())))
    whole: dict[str, Split | None] = {}
    for group in groups:
        scope = rule_class(group.rule).scope
        if scope == "matrix" or (scope == "tensor" and not whole_tensors):
            whole |= {name: matrices[name] if scope == "matrix" else None for name in group.parameters}
    return Optimizer(groups, shapes, local, first_loss, decay_of, device, narrow, whole, rounding)
