"""Chooses the strategy that spreads the model over the processes, and the activation checkpointing, by what fits the memory."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from models.bitnet import PLAIN, linear_of
from models.lora import has_packed_base
from trainer.core.errors import UserError
from trainer.objectives import build_objective
from trainer.planning.memory import GIB, MemoryEstimate, ParallelLayout
from trainer.runtime.device import GPUS, Target

CHECKPOINTING = ("none", "selective", "full")  # from the fastest to the one that needs least memory


def refuse_contradictions(config: Any) -> None:
    """UserError if settings contradict each other. The engine section is decided."""
    engine, strategy = config.engine, config.engine.strategy
    if config.precision == "pure_bf16" and strategy.startswith("zero"):
        raise UserError(
            f"precision: pure_bf16 with engine.strategy {strategy}, but DeepSpeed keeps fp32 masters (and zero0 would sum "
            "gradients in bf16); use bf16, ddp or fsdp"
        )
    if config.float8 and config.precision == "fp32":
        raise UserError("float8: products would be far less exact than precision fp32 promises; use bf16")
    if config.float8 and linear_of(config.model) != PLAIN:
        raise UserError(
            f"float8: model.linear {linear_of(config.model)} rounds the products otherwise; leave one of them out"
        )
    if not engine.reshard_after_forward and strategy not in ("fsdp", "hsdp"):
        raise UserError(
            f"engine.reshard_after_forward: {strategy} gathers no blocks; use fsdp or hsdp, or leave it out"
        )
    if engine.offload and strategy in ("single", "ddp", "zero0"):
        raise UserError(
            f"engine.offload: {strategy} has no shards to move to CPU memory; use fsdp, hsdp or zero1 to zero3"
        )
    if config.log.noise_scale and strategy in ("zero1", "zero2", "zero3"):
        raise UserError(
            f"log.noise_scale: {strategy} has no norm of the gradient in the middle of a step; use another strategy or set it to false"
        )
    if has_packed_base(config.model) and strategy in ("zero1", "zero2", "zero3"):
        raise UserError(
            f"model.lora_base: nf4 with engine.strategy {strategy}, but DeepSpeed takes the weights before they are packed; use "
            "single, ddp, fsdp, hsdp or zero0"
        )
    if engine.shard_size is not None and strategy != "hsdp":
        raise UserError(f"engine.shard_size: only hsdp has groups of shards, not {strategy}; use hsdp or leave it out")
    if engine.deepspeed_config is not None and not strategy.startswith("zero"):
        raise UserError(f"engine.deepspeed_config: {strategy} is not DeepSpeed's; use zero0 to zero3 or leave it out")
    if strategy.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f"engine.strategy: {strategy} needs DeepSpeed; `pip install 'deepspeed>=0.19.8,<0.20'`, or use fsdp"
        )


def check_graphs(config: Any, target: Target, model_refusal: str | None) -> None:
    """UserError if engine.cuda_graphs is set but not possible. config: resolved."""
    engine = config.engine
    if not engine.cuda_graphs:
        return
    if target.memory is None:
        why = "a CPU has none"
    elif engine.strategy != "single":
        why = f"{engine.strategy} sums gradients during the backward pass"
    elif config.precision == "pure_bf16":
        why = "pure_bf16 moves the gradients of each microbatch"
    elif engine.activation_checkpointing != "none":
        why = "activation checkpointing reads the random number state"
    elif config.data.packing == "none":
        why = "rows of data.packing none have many widths, and a graph is of one"
    elif model_refusal is not None:
        why = model_refusal
    else:
        return
    raise UserError(f"engine.cuda_graphs: {why}; leave it out")


def background_refusal(config: Any) -> str | None:
    """Why a second process cannot compile while the first one trains; None if it can. config: resolved."""
    engine = config.engine
    if not engine.compile:
        return "nothing is compiled"
    if engine.strategy != "single":
        return f"the ranks of {engine.strategy} compile at the first step, together"
    if config.deterministic:
        return "in a deterministic run the time of compiling must not decide which code runs"
    if engine.cuda_graphs:
        return "CUDA graphs record the code of the first steps"
    if build_objective(config.objective).frozen_models():
        return "the second process would need the models that the objective reads"
    if has_packed_base(config.model):
        return "the second process does not pack the frozen matrices of model.lora_base"
    if config.data.packing == "none":
        return "rows of data.packing none have many widths"
    return None


def check_shard_size(shard_size: int, processes: int) -> None:
    """UserError unless hsdp's groups are equally large."""
    if processes % shard_size:
        raise UserError(
            f"engine.shard_size: {shard_size} does not divide the {processes} processes of this run; choose a divisor"
        )


class MemoryOptions(NamedTuple):
    """How a run is made to fit. checkpointing: engine.activation_checkpointing; narrow: the optimizer's state in bf16."""

    checkpointing: str
    narrow: bool


class StrategySelector:
    """Decides by what fits.

    config: RunConfig, its precision and sequence length decided; world: has size and local_size; target: the device of every
    process; wanted: tokens that a device must hold in one microbatch; step: most tokens of an optimiser step.
    """

    def __init__(
        self, estimate: MemoryEstimate, config: Any, world: Any, target: Target, wanted: int, step: float
    ) -> None:
        self.estimate, self.config, self.world = estimate, config, world
        self.target, self.wanted, self.step = target, wanted, step
        self.memory = target.memory
        asked, state = config.engine.activation_checkpointing, config.optim.state_precision
        checkpointing = CHECKPOINTING if asked == "auto" else (asked,)
        fixed = config.precision == "pure_bf16" or state != "auto"  # pure_bf16: bf16 like the weights
        # First the options that give the same weights. Among these, from the fastest to the one that needs least memory.
        self.options = [
            MemoryOptions(how, n)
            for n in ((config.optim.narrow_state,) if fixed else (False, True))
            for how in checkpointing
        ]
        self.room = "" if target.memory is None else f"{target.memory / GIB:.0f} GiB"

    def fits(self, options: MemoryOptions, layout: ParallelLayout) -> bool:
        layout = replace(layout, narrow=options.narrow)
        fit = self.estimate.tokens_that_fit(self.memory, layout, options.checkpointing, self.accumulates(layout))
        return fit >= self.wanted

    def accumulates(self, layout: ParallelLayout) -> bool:
        """Whether a step may need several microbatches of `wanted` tokens."""
        return self.step > self.wanted * layout.processes

    def needed(self, layout: ParallelLayout, options: MemoryOptions) -> int:
        """Expected bytes with microbatches of `wanted` tokens."""
        layout = replace(layout, narrow=options.narrow)
        sequences = max(1, self.wanted // self.estimate.length)
        return self.estimate.most_held(layout, options.checkpointing, sequences, self.accumulates(layout))

    def layout(self, strategy: str, shards: int = 1) -> ParallelLayout:
        return ParallelLayout.of(self.config, self.world.size, self.target, strategy, shards)

    def strategy(self) -> tuple[str, bool, str]:
        """(strategy, offload, why) for engine.strategy auto."""
        size, offload = self.world.size, self.config.engine.offload
        if offload:
            return "fsdp", True, "engine.offload needs shards"
        if size > 1:
            return self._several()
        if self.memory is None:
            return "single", False, "one process on a CPU"
        if self.fits(self.options[-1], self.layout("single")):
            return "single", False, f"one process; its GPU's {self.room} hold the run"
        why = f"nothing else fits even one sequence in {self.room}: weights and optimiser in CPU memory"
        return "fsdp", True, why + self.without_offload("single")

    def _several(self) -> tuple[str, bool, str]:
        size, local_size = self.world.size, self.world.local_size
        if self.memory is None:
            return "ddp", False, f"{size} processes on CPUs"
        if self.fits(self.options[0], self.layout("ddp")):
            return "ddp", False, f"{size} processes; each GPU's {self.room} hold a whole copy"
        why = f"a whole copy does not fit a GPU's {self.room}"
        offload = not self.fits(self.options[-1], self.layout("fsdp", size))
        why += f"; with all in CPU memory{self.without_offload('fsdp', size)}" if offload else ""
        if size == local_size:
            return "fsdp", offload, f"{why}: shards over the {size} processes of this machine"
        # Links between machines are slow: it is better to recompute activations than to gather weights from another machine.
        even = local_size > 1 and size % local_size == 0
        if even and self.fits(self.options[-1], self.layout("hsdp", local_size)):
            return "hsdp", False, f"{why}; one copy in {local_size} shards fits each machine"
        return "fsdp", offload, f"{why}, nor the GPUs of one machine: shards over all {size} processes"

    def without_offload(self, strategy: str, shards: int = 1) -> str:
        """What to set, if anything, so that a run that needs CPU memory fits on the GPUs."""
        fits = self.pure_bf16(self.layout(strategy, shards), lambda layout: self.fits(self.options[-1], layout))
        return f" (--precision pure_bf16 fits {strategy} without)" if fits else ""

    def pure_bf16(self, layout: ParallelLayout, fits: Callable[[ParallelLayout], bool]) -> bool:
        """Whether a run in bf16 that does not fit would fit in pure_bf16: 8 bytes a parameter, 12 with several microbatches."""
        allowed = layout.precision == "bf16" and not layout.strategy.startswith("zero")
        return allowed and self.config.optim.state_precision != "fp32" and fits(replace(layout, precision="pure_bf16"))

    def choose_options(self, layout: ParallelLayout) -> tuple[MemoryOptions, str]:
        """(options, why) for engine.activation_checkpointing and optim.state_precision where they are auto."""
        if self.memory is None:
            return self.options[0], "memory of a CPU does not limit a batch"
        # With offloading, the state is in CPU memory: a smaller state frees nothing on the GPU.
        options_here = [options for options in self.options if not (layout.offload and options.narrow)] or self.options
        for options in options_here:
            if self.fits(options, layout):
                without = (
                    "" if options is self.options[0] else f"; without it {self.wanted:,} tokens do not fit {self.room}"
                )
                return options, "the fastest that fits" + without
        return options_here[-1], f"the least there is, but {self.wanted:,} tokens still exceed 90 % of {self.room}"

    def refuse_the_impossible(self, layout: ParallelLayout, options: MemoryOptions) -> None:
        """UserError, which names what would fit, if `wanted` tokens are not expected to fit the whole memory of the GPU."""
        needed = self.needed(layout, options)
        if self.memory is None or needed <= self.memory:
            return
        how = f"{layout.strategy}{', offloaded' * layout.offload}, recomputing {options.checkpointing}"
        ways = ", ".join(self.ways_out(layout)) or "a smaller model_scale"
        raise UserError(
            f"memory: {self.wanted:,} tokens at a time are expected to need {needed / GIB:.1f} GiB ({how}), and the GPU has "
            f"{self.memory / GIB:.1f}; what would fit: {ways}"
        )

    def ways_out(self, layout: ParallelLayout) -> list[str]:
        """What would fit: pure_bf16, offloading, more processes or another GPU; of each the smallest that does."""
        sharded = replace(layout, strategy="fsdp", offload=False)
        ways, least = [], self.options[-1]

        def holds(layout: ParallelLayout, memory: float) -> bool:
            return self.needed(layout, least) <= 0.9 * memory

        assert self.memory is not None
        memory = self.memory
        if self.pure_bf16(layout, lambda layout: holds(layout, memory)):
            ways.append("--precision pure_bf16")
        if not layout.offload and holds(replace(sharded, offload=True, shards=layout.processes), self.memory):
            ways.append("--engine.offload with fsdp")
        for size in (2**n for n in range(1, 11)):
            if size > layout.processes and holds(replace(sharded, processes=size, shards=size), self.memory):
                ways.append(f"fsdp on {size} such GPUs")
                break
        for key, gpu in sorted(GPUS.items(), key=lambda item: item[1].gibibytes):
            if gpu.gibibytes * GIB > self.memory and holds(layout, gpu.gibibytes * GIB):
                ways.append(f"the same on {key}")
                break
        return ways
