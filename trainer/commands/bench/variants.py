"""What `bench` compares: a run's config with every combination of `--sweep`, each built as `train` builds it."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from trainer.commands.bench import BenchConfig
from trainer.commands.bench.clock import PhaseClock
from trainer.core.config import RunConfig, model_name
from trainer.core.errors import UserError
from trainer.core.sweep import Sweep, changed, combinations, label, parse_sweep
from trainer.planning.memory import expected_memory
from trainer.planning.plan import Plan, resolve
from trainer.runtime.distributed import World
from trainer.runtime.signals import StopSignals
from trainer.runtime.watchdog import Watchdog
from trainer.training.profile import what_ran_out
from trainer.training.run import Run
from trainer.training.step import optimiser_step

# Keys that a sweep cannot change: one process has one device, one setting of determinism and one dataset.
FIXED = ("device", "deterministic", "data.")


@dataclass
class Record:
    """The measurements of a candidate. beside: for each round, the rate of the first candidate at that time."""

    rates: list[float] = field(default_factory=list)  # tokens per second, one for each round
    beside: list[float] = field(default_factory=list)
    first_step_seconds: float | None = None
    peak_memory_bytes: int = 0
    recompilations: int = 0
    phases_ms: dict[str, float | None] = field(default_factory=dict)


class Candidate:
    """Something that trains. plan: its shape, batch and precision; details: how it differs, for the report."""

    kind: str

    def __init__(self, name: str, plan: Plan, dataset: Any, world: World, device: torch.device) -> None:
        self.name, self.plan, self.dataset, self.world, self.device = name, plan, dataset, world, device
        self.details: dict[str, str] = {}
        self.record = Record()

    def build(self) -> None:
        """Allocate memory and prepare the first step."""
        raise NotImplementedError

    def step(self) -> int:
        """One optimiser step; returns its tokens on all ranks. It need not wait for the device."""
        raise NotImplementedError

    def watch(self, clock: PhaseClock) -> None:
        """Let `clock` time the phases of every step from now on."""
        raise NotImplementedError

    def close(self) -> None:
        """Free the memory; `build` may be called again."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def needs(self) -> dict[str, int]:
        """Bytes it is expected to need on one device, by part (see trainer.planning.memory.expected_memory)."""
        return expected_memory(self.plan)


class Variant(Candidate):
    """The trainer itself, with one combination of the sweep."""

    kind = "trainer"
    run: Run

    def build(self) -> None:
        self.run = Run(self.plan, self.world, self.dataset, Watchdog(World(), 1), StopSignals(self.world))

    def step(self) -> int:
        return optimiser_step(self.run).step_tokens

    def watch(self, clock: PhaseClock) -> None:
        engine = self.run.engine
        clock.watch(self.run, "read", "data")
        clock.watch(engine, "backward", "backward")
        clock.watch(engine, "step", "optimiser")
        clock.watch_module(engine.joined, "forward")

    def close(self) -> None:
        if hasattr(self, "run"):  # missing if `build` failed
            self.run.stream.close()
            self.run.engine.close()
            del self.run
        super().close()


def comparable(sweep: Sweep) -> Sweep:
    """Returns the sweep itself. Raises UserError if it changes one of the FIXED keys."""
    for key in sweep:
        if key.startswith(FIXED):
            raise UserError(
                f"sweep: one process cannot compare several values of {key}; start bench once for each value"
            )
    return sweep


def variants(config: BenchConfig, dataset: Any, world: World, device: torch.device) -> tuple[list[Variant], list[str]]:
    """Every combination of the sweep that can run here, resolved but not built, and a note on each of the others.

    The combination of all first values comes first. Raises UserError if that one cannot run.
    """
    found: list[Variant] = []
    notes: list[str] = []
    for changes in combinations(comparable(parse_sweep(config.sweep))):
        wanted = run_config(config, changes)  # not inside leaving_out: an unknown key or value is a mistake
        name = label(changes) or model_name(wanted.model)
        with leaving_out(name, not found, notes, world):
            variant = Variant(name, steady(resolve(wanted, dataset)), dataset, world, device)
            variant.details = changes
            found.append(variant)
    return found, notes


@contextlib.contextmanager
def leaving_out(name: str, first: bool, notes: list[str], world: World) -> Iterator[None]:
    """If the block fails because `name` cannot run here, print and note the reason. Raises UserError instead if `name` is the
    first candidate, since all others are compared with it."""
    try:
        yield
    except (
        UserError,
        ValueError,
        torch.OutOfMemoryError,
    ) as error:  # the model raises ValueError at its first forward pass
        why = str(error)
        if isinstance(error, torch.OutOfMemoryError):
            if world.size > 1:
                raise  # other ranks may have had enough memory, and wait for this one
            why = what_ran_out(error)
        if first:
            raise UserError(why) from None
        notes.append(f"{name} left out: {why}")
        world.say(notes[-1])


def run_config(config: BenchConfig, changes: dict[str, str]) -> RunConfig:
    """The run that a bench's config describes, with dotted keys changed."""
    values = dataclasses.asdict(config)
    for name in {f.name for f in dataclasses.fields(BenchConfig)} - {f.name for f in dataclasses.fields(RunConfig)}:
        del values[name]
    return changed(values, changes)


def steady(plan: Plan) -> Plan:
    """The plan with all steps the same: the longest sequence from the start, a batch that does not grow, and compiled code from
    the first step on."""
    plan.config.engine.background_compile = False
    plan.config.batch.sequence_start = plan.config.batch.sequence_length
    plan.config.batch.sequence_double_every = 0
    plan.config.batch.n_max = 1.0
    plan.config.batch.ramp_steps = 0
    return plan
