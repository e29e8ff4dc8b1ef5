"""How a model is spread over devices: one class per library, the same few methods on each (see base.Engine)."""

from __future__ import annotations

from typing import Any

from models.base import LanguageModel
from trainer.core.errors import UserError
from trainer.runtime.distributed import World


def build_engine(plan: Any, world: World) -> Any:
    """The engine of the plan's `engine.strategy`, holding model and optimiser; imports no library that it does not use."""
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
