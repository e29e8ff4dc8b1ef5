"""Which strategy spreads the model over the processes there are, and which activations are computed twice: what fits decides."""

from __future__ import annotations

import importlib.util
from typing import Any

from trainer.errors import UserError
from trainer.memory import GIB, Demand, Spread

CHECKPOINTING = ("none", "selective", "full")  # from the fastest to the one that holds least


def refuse_contradictions(config: Any) -> None:
    """UserError where settings of a decided engine section do not go together."""
    engine, strategy = config.engine, config.engine.strategy
    if config.precision == "pure_bf16" and strategy.startswith("zero"):
        raise UserError(
            f"precision: pure_bf16 with engine.strategy {strategy}, but DeepSpeed keeps fp32 masters (and zero0 would sum "
            "gradients in bf16); use bf16, ddp or fsdp"
        )
    if not engine.reshard_after_forward and strategy not in ("fsdp", "hsdp"):
        raise UserError(
            f"engine.reshard_after_forward: {strategy} gathers no blocks; use fsdp or hsdp, or leave it out"
        )
    if engine.offload and strategy in ("single", "ddp", "zero0"):
        raise UserError(
            f"engine.offload: {strategy} has no shards to move to CPU memory; use fsdp, hsdp or zero1 to zero3"
        )
    if engine.shard_size is not None and strategy != "hsdp":
        raise UserError(f"engine.shard_size: only hsdp has groups of shards, not {strategy}; use hsdp or leave it out")
    if engine.deepspeed_config is not None and not strategy.startswith("zero"):
        raise UserError(f"engine.deepspeed_config: {strategy} is not DeepSpeed's; use zero0 to zero3 or leave it out")
    if strategy.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f"engine.strategy: {strategy} needs DeepSpeed; `pip install 'deepspeed>=0.19.8,<0.20'`, or use fsdp"
        )


def check_shard_size(shard_size: int, processes: int) -> None:
    """UserError unless hsdp's groups come out even."""
    if processes % shard_size:
        raise UserError(
            f"engine.shard_size: {shard_size} does not divide the {processes} processes of this run; choose a divisor"
        )


class Chooser:
    """Decides by what fits.

    config: RunConfig, its precision and sequence length decided; world: size and local_size; memory: bytes of a GPU, None on
    a CPU; wanted: tokens that a device must hold in one microbatch; step: most tokens of an optimiser step.
    """

    def __init__(self, demand: Demand, config: Any, world: Any, memory: int | None, wanted: int, step: float) -> None:
        self.demand, self.config, self.world = demand, config, world
        self.memory, self.wanted, self.step = memory, wanted, step
        self.asked = config.engine.activation_checkpointing
        self.room = "" if memory is None else f"{memory / GIB:.0f} GiB"

    def fits(self, how: str, spread: Spread) -> bool:
        return self.demand.tokens_that_fit(self.memory, spread, how, self.step) >= self.wanted

    def strategy(self) -> tuple[str, bool, str]:
        """(strategy, offload, why) where engine.strategy is auto."""
        size, offload = self.world.size, self.config.engine.offload
        if offload:
            return "fsdp", True, "engine.offload needs shards"
        if size > 1:
            return self._several()
        if self.memory is None:
            return "single", False, "one process on a CPU"
        if self.fits(self._least(), Spread("single", self.config.precision)):
            return "single", False, f"one process; its GPU's {self.room} hold the run"
        why = (
            f"not one sequence fits {self.room} even with activation checkpointing: weights and optimiser in CPU memory"
        )
        return "fsdp", True, why

    def _several(self) -> tuple[str, bool, str]:
        size, local_size, precision = self.world.size, self.world.local_size, self.config.precision
        if self.memory is None:
            return "ddp", False, f"{size} processes on CPUs"
        fastest = "none" if self.asked == "auto" else self.asked
        if self.fits(fastest, Spread("ddp", precision, size)):
            return "ddp", False, f"{size} processes; each GPU's {self.room} hold a whole copy"
        why = f"a whole copy does not fit a GPU's {self.room}"
        if size == local_size:
            return "fsdp", False, f"{why}: shards over the {size} processes of this machine"
        # Between machines it is slow: rather compute activations twice than gather weights from another machine.
        even = local_size > 1 and size % local_size == 0
        if even and self.fits(self._least(), Spread("hsdp", precision, size, local_size)):
            return "hsdp", False, f"{why}; one copy in {local_size} shards fits each machine"
        return "fsdp", False, f"{why}, nor one machine's: shards over all {size} processes"

    def checkpointing(self, spread: Spread) -> tuple[str, str]:
        """(how, why) where engine.activation_checkpointing is auto."""
        if self.memory is None:
            return "none", "memory of a CPU is not what limits a batch"
        for how in CHECKPOINTING:
            if self.fits(how, spread):
                without = "" if how == "none" else f"; without it {self.wanted:,} tokens do not fit {self.room}"
                return how, "the fastest that fits" + without
        return CHECKPOINTING[-1], f"the least there is, and yet {self.wanted:,} tokens exceed {self.room}"

    def _least(self) -> str:
        return CHECKPOINTING[-1] if self.asked == "auto" else self.asked
