"""What LoRA changes in a plan: what is refused, the recipe, the learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.lora import has_lora, has_packed_base
from trainer.checkpoint.quantized import check_installed
from trainer.core.errors import UserError
from trainer.recipes import RECIPES, recipe_for
from trainer.recipes.recipe import Default

RATE = 10  # times the learning rate of all weights
RECIPE = "plain"
WHY_RECIPE = "hlb's laws are for the training of all weights"


def recipe_of(model: Mapping[str, Any]) -> tuple[str, str]:
    """(the recipe of a section `model`, why), unless the config names another one."""
    name = recipe_for(model["name"])
    return (RECIPE, f"LoRA: {WHY_RECIPE}") if has_lora(model) and name != RECIPE else (name, RECIPES[name].why)


def check_lora(config: Any) -> None:
    """UserError for a run whose adapters cannot be trained. config: a RunConfig whose model is decided."""
    if not has_lora(config.model):
        return
    if config.init_from is None and config.branch_from is None:
        raise UserError(
            "model.lora_rank: LoRA trains a small update of weights that are trained already; name these with --init_from, "
            "or leave model.lora_rank out"
        )
    if config.optim.recipe not in ("auto", RECIPE):
        raise UserError(
            f"optim.recipe: {config.optim.recipe} does not suit model.lora_rank, as {WHY_RECIPE}; leave it out"
        )
    if has_packed_base(config.model):
        check_installed("nf4", "model.lora_base")


def lora_rate(full: Default) -> Default:
    """The learning rate for adapters. full: for all weights. The factor hardly depends on rank and model, with alpha 32."""
    return Default(
        RATE * full.value, f"{RATE} times {full.rule}, as LoRA needs (LoRA Without Regret, Schulman et al. 2025)"
    )
