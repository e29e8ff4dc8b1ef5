"""The entries of optim.roles: what is refused, and the learning rate of a role that names an optimizer of its own."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from trainer.core.config import OptimConfig, RoleConfig
from trainer.core.errors import UserError
from trainer.core.text import printable
from trainer.optim import Assignment, assign, get_rule, rule_class, settings_of_run, trained_parameters
from trainer.optim.groups import shapes_of
from trainer.planning.resolver import Draft, ModelFacts, check_schedule, optim_defaults, rate_of
from trainer.recipes import groups_of
from trainer.recipes.recipe import Default


def check_roles(optim: OptimConfig, model: ModelFacts) -> None:
    """UserError for an entry of optim.roles that the model, the optimizer or the recipe cannot follow. The recipe is decided."""
    for role, own in optim.roles.items():
        section = f"optim.roles.{printable(role, 100)}"
        check_role(section, role, model)
        try:
            if own.name is not None:
                get_rule(own.name, own.settings)
            assigned = set(assign(model.meta, replace(optim, roles={role: own})).values())
            for how in assigned:
                get_rule(how.rule, how.given(optim))
        except UserError as error:
            raise UserError(re.sub(r"(?<![\w.])optim\.(?=name|settings)", f"{section}.", str(error))) from None
        treated_as = model.meta.further_roles.get(role, role)
        if own.name is not None and rule_class(own.name).scope == "matrix" and treated_as != "matrix":
            raise UserError(f"{section}.name: {own.name} updates matrices only; name it at optim.roles.matrix")
        check_role_schedule(section, own, optim, assigned)


def check_role(section: str, role: str, model: ModelFacts) -> None:
    """UserError if there is no such role, or the model has no parameters of it."""
    known = (*model.meta.roles, *model.meta.further_roles)
    if role not in known:
        raise UserError(f"{section}: is not a role of {model.name} (allowed: {', '.join(known)})")
    trained = trained_parameters(model.meta)
    groups, treated_as = model.meta.parameter_groups(), model.meta.names_by_role()
    held = [name for name in known if trained.keys() & {*groups.get(name, []), *treated_as.get(name, [])}]
    if role not in held:
        tied = "; its head is the embedding's matrix" if role == "head" and model.meta.tied_embedding() else ""
        raise UserError(
            f"{section}: {model.name} has no parameters of this role (it has: {', '.join(held)}){tied}; leave it out"
        )


def check_role_schedule(section: str, own: RoleConfig, optim: OptimConfig, assigned: set[Assignment]) -> None:
    """UserError if the role's schedule has no effect, or if the recipe cannot follow it. assigned: of the role's parameters."""
    if own.schedule is None:
        return
    constant = sorted({how.rule for how in assigned if how.role and rule_class(how.rule).own_schedule})
    if constant:
        raise UserError(f"{section}.schedule: {constant[0]} needs no schedule; leave it out")
    check_schedule(optim, own.schedule, section)


def choose_roles(draft: Draft, model: ModelFacts) -> Draft:
    """What the entries with an optimizer of their own leave open: the learning rate, and settings that stand for the run's."""
    for role, own in draft.config.optim.roles.items():
        if own.name is None:
            continue
        optim, key = draft.config.optim, f"optim.roles.{role}"
        given = {**(optim.settings if own.name == optim.name else {}), **own.settings}
        found = settings_of_run(own.name, given, draft.config.max_steps, optim.warmup_steps)
        for field, value in found.items():
            draft = draft.note(f"{key}.settings.{field}", value, "that of the run at its first start")
        lr = own.lr
        if lr is None:
            lr, source = inferred_rate(role, replace(own, settings=given), draft, model)
            draft = draft.note(f"{key}.lr", lr, source)
        own = replace(own, lr=lr, settings={**own.settings, **found})
        draft = draft.set("optim", "roles", {**optim.roles, role: own})
    return draft


def inferred_rate(role: str, own: RoleConfig, draft: Draft, model: ModelFacts) -> tuple[float, str]:
    """The rate that the role has without its own optimizer, times the ratio of what both optimizers take instead of AdamW's rate.

    own: with a name, and with all settings that hold for it.
    """
    plain = replace(draft.config, optim=replace(draft.config.optim, roles={role: replace(own, name=None, settings={})}))
    groups = groups_of(plain, model.meta, shapes_of(model.meta), transferred=False)
    group = next(group for group in groups if group.role == role)
    adamw = optim_defaults(draft, model)["lr"]

    def rate(name: str, settings: dict[str, Any]) -> Default:
        return rate_of(get_rule(name, settings), name, adamw)

    before, now = rate(group.rule, group.given), rate(own.name or group.rule, own.settings)
    return group.lr * (now.value / before.value), now.rule
