"""model.mup: which recipes and optimizers are refused, because no rule says how their settings change with the width."""

from __future__ import annotations

from typing import Any

from trainer.core.errors import UserError
from trainer.optim import rules_used
from trainer.planning.resolver import ModelFacts


def check_mup(optim: Any, model: ModelFacts) -> None:
    """UserError with model.mup, if the recipe or an optimizer has no rule by which its settings change with the width."""
    if not model.has_base:
        return
    if optim.recipe != "plain":
        raise UserError(
            f"optim.recipe: {optim.recipe} has its own laws of learning rate and decay over the size, and so has model.mup; set it to plain"
        )
    if optim.loss_driven_decay:
        raise UserError(
            "optim.loss_driven_decay: the decay by hlb's law over the size has no rule with model.mup; leave it out"
        )
    for used in rules_used(model.meta, optim):
        if used.rule.width_rule() is None:
            raise UserError(
                f"{used.section}.name: no rule is known by which the learning rate of {used.name} changes with the width, which model.mup "
                "needs; use adamw, lion, muon or another of trainer/optim/README.md, or leave model.mup out"
            )
