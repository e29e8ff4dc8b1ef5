"""How a model is spread over devices. The loop sees `model`, `device`, `autocast()`, `describe()` and

loss_sum = engine.backward(tokens, targets, scale, last)   # per microbatch; gradients are global after the last
"""

from __future__ import annotations

from typing import Any

from trainer.engine.distributed import World
from trainer.errors import UserError


def build_engine(plan: Any, world: World) -> Any:
    """The engine of `engine.strategy`, holding the model with its initial weights."""
    from trainer.engine.torch_engine import TorchEngine

    strategy = plan.config.engine.strategy
    if strategy == "auto":
        strategy = "ddp" if world.size > 1 else "single"
    if strategy == "single" and world.size > 1:
        raise UserError(
            f"engine.strategy: single, but {world.size} processes were started; use ddp or start one process"
        )
    if strategy == "ddp" and world.size == 1:
        raise UserError(
            "engine.strategy: ddp needs several processes and one was started; "
            "use `torchrun --nproc_per_node N -m trainer ...` or engine.strategy single"
        )
    return TorchEngine(plan, world, strategy)
