"""Engines distribute a model over devices: one class per library, all with the same methods (see base.Engine)."""

from __future__ import annotations

from typing import Any

from models.base import LanguageModel
from trainer.core.errors import UserError
from trainer.optim import get_rule
from trainer.runtime.distributed import World


def refuse_scope(config: Any) -> None:
    """UserError if the engine cannot give the optimizer whole matrices or tensors, or cannot evaluate with its other weights."""
    name, strategy = config.optim.name, config.engine.strategy
    rule = get_rule(name)
    scope = rule.scope
    if rule.evaluates_other_weights and strategy in ("zero1", "zero2", "zero3"):
        raise UserError(
            f"optim.name: {name} evaluates with other weights than it trains, but engine.strategy {strategy} keeps those in "
            "pieces of flat vectors; use single, ddp, fsdp, hsdp or zero0"
        )
    needs = "whole matrices" if scope == "matrix" else "whole tensors"
    if scope != "element" and config.engine.offload:
        raise UserError(
            f"optim.name: {name} needs {needs}, which ranks cannot exchange with engine.offload; turn engine.offload off"
        )


def build_engine(plan: Any, world: World) -> Any:
    """The engine of the plan's `engine.strategy`, with model and optimiser. Imports only the libraries that it uses."""
    strategy = plan.config.engine.strategy
    if strategy in ("single", "ddp"):
        from trainer.engine.torch_engine import TorchEngine

        return TorchEngine(plan, world)
    refuse_scope(plan.config)
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
