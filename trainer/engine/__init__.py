"""Engines distribute a model over devices: one class per library, all with the same methods (see base.Engine)."""

from __future__ import annotations

from typing import Any

import torch

from models.base import LanguageModel
from trainer.core.errors import UserError
from trainer.optim import Used
from trainer.runtime.distributed import World


def refuse_scope(engine: Any, rules: list[Used]) -> None:
    """UserError if the engine cannot give the rules whole matrices or tensors, or cannot keep what they keep. engine: that section
    of the config."""
    strategy = engine.strategy
    flat, ways = strategy in ("zero1", "zero2", "zero3"), "use single, ddp, fsdp, hsdp or zero0"
    for section, name, rule in rules:
        needs = "whole matrices" if rule.scope == "matrix" else "whole tensors"
        if rule.evaluates_other_weights and flat:
            raise UserError(
                f"{section}.name: {name} evaluates with other weights than it trains, but engine.strategy {strategy} keeps "
                f"those in pieces of flat vectors; {ways}"
            )
        if rule.scope != "element" and engine.offload:
            raise UserError(
                f"{section}.name: {name} needs {needs}, which ranks cannot exchange with engine.offload; turn "
                "engine.offload off"
            )
    by_number = [one for one in rules if one.rule.scope == "element"]
    kinds = {(name, *sorted(rule.state(torch.Size((2, 3)), torch.float32))) for _, name, rule in by_number}
    if flat and len(kinds) > 1:
        raise UserError(
            f"optim.roles: engine.strategy {strategy} needs one optimizer, with one kind of state, for all parameters that are not "
            f"updated whole, but these are asked for: {', '.join(dict.fromkeys(one.name for one in by_number))}; {ways}"
        )


def build_engine(plan: Any, world: World) -> Any:
    """The engine of the plan's `engine.strategy`, with model and optimiser. Imports only the libraries that it uses."""
    strategy = plan.config.engine.strategy
    if strategy in ("single", "ddp"):
        from trainer.engine.torch_engine import TorchEngine

        return TorchEngine(plan, world)
    if plan.model_class.post_step is not LanguageModel.post_step and strategy in ("zero1", "zero2", "zero3"):
        raise UserError(
            f"engine.strategy: {strategy} keeps the weights in flat vectors, which the projection after each step "
            f"(post_step) of {plan.config.model['name']} cannot reach; define projections, or use ddp, fsdp, hsdp or zero0"
        )
    if strategy in ("fsdp", "hsdp"):
        from trainer.engine.fsdp_engine import FsdpEngine

        return FsdpEngine(plan, world)
    from trainer.engine.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(plan, world)
