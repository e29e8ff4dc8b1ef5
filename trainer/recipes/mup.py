"""model.mup in the optimizer: the settings of a group are those of the base, and change with the width and depth of the model."""

from __future__ import annotations

import dataclasses
from typing import Any

from models.mup import base_of
from trainer.optim import Group, get_rule
from trainer.optim.rule import rule_config
from trainer.recipes.recipe import PlanEntry


def with_transfer(group: Group, transfer: Any) -> Group:
    """The group with the learning rate, decay and epsilon that its rule needs at this size. transfer: a Transfer of models/mup.py.

    lr * decay stays, unless decay does not depend on lr.
    """
    rule = get_rule(group.rule, group.given)
    found = rule.width_rule()
    assert found is not None, "check_mup refuses rules that have none"
    power, source = found
    factor, given, why = transfer.width**power, group.given, []
    if factor != 1:
        why.append(f"lr x {factor:.4g}, the width's growth to the power {power:g} ({source})")
    elif transfer.width != 1:
        why.append(f"lr as at the base ({source})")
    decay = group.weight_decay
    if decay and factor != 1 and not getattr(rule.config, "independent_decay", False):
        decay = decay / factor
        why.append(f"weight decay {decay:.4g}, so that lr x decay stays")
    config = rule_config(rule, group.settings.get(group.rule, {}), group.given)
    if hasattr(config, "eps") and transfer.eps != 1:
        given = {**given, "eps": config.eps * transfer.eps}
        why.append(f"eps {given['eps']:.3g}")
    return dataclasses.replace(
        group,
        name=f"{group.name}, {transfer.what}",
        lr=group.lr * factor,
        weight_decay=decay,
        given=given,
        width_factor=factor,
        why="; ".join(why),
    )


def mup_rows(model: Any, groups: list[Group]) -> list[PlanEntry]:
    """The base, the multipliers, and the learning rate of each group that differs from the base's."""
    scales = model.multipliers()
    if scales is None:
        return []
    width, depth, head = base_of(model.config)
    base = PlanEntry(
        "mup base",
        f"{width} x {depth}",
        f"width x depth that optim.lr, weight decay and model.init_std are for; this model is {scales.width:.4g} x as wide, "
        f"{scales.depth:.4g} x as deep",
    )
    rows = [base]
    factors = {
        "mup branches": (scales.branch, "factor of each branch, base depth / depth (2505.01618)"),
        "mup logits": (scales.output, "factor of the head's input, base width / width (2203.03466)"),
        "mup initial std": (scales.hidden_std, "factor of hidden matrices' initial std, sqrt(base width / width)"),
        "mup scores": (
            scales.scores,
            f"factor besides 1 / sqrt(head), sqrt({head} / head), for heads wider than the base's",
        ),
    }
    rows += [PlanEntry(key, value, rule) for key, (value, rule) in factors.items() if value != 1]
    return rows + [
        PlanEntry(f"lr of {group.name}", group.lr, group.why) for group in groups if group.why and not group.role
    ]
