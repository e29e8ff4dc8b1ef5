"""How candidates are measured: all built and then in turns, so that what else the machine does falls on all alike;
where they would not fit the device, or share compiled code, one by one, the first again after each."""

from __future__ import annotations

import os
import statistics
import time
from typing import Any

import torch

from trainer.commands.bench import BenchConfig
from trainer.commands.bench.clock import PhaseClock, communication_ms, compilations, peak_memory, synchronise
from trainer.commands.bench.variants import Candidate, leaving_out
from trainer.runtime.device import memory_bytes
from trainer.runtime.distributed import World

# The second is the first that holds the optimiser's state while it computes; at the third CUDA graphs are recorded.
FIRST_STEPS = 2
ROOM = 0.9  # of the memory may be expected to be taken


def measure(candidates: list[Candidate], config: BenchConfig, together: bool) -> list[str]:
    """Fill the record of each candidate that can run here; returns a line on each other one, which has no rates.

    UserError where the first cannot run.
    """
    return (in_turns if together else one_by_one)(candidates, config)


def in_turns(candidates: list[Candidate], config: BenchConfig) -> list[str]:
    """All are built; in each round each takes its turn, none always first. One round warms up."""
    able: list[Candidate] = []
    notes: list[str] = []
    for one in candidates:
        with leaving_out(one.name, not able, notes, one.world):
            start(one)
            able.append(one)
        if one not in able:
            one.close()
    for number in range(config.rounds + 1):
        for one in rotated(able, number):
            rate = turn(one, config.steps_per_round)
            if number > 0:
                one.record.rates.append(rate)
    for one in able:
        one.record.beside = able[0].record.rates
        look_inside(one, config)
        one.close()
    return notes


def one_by_one(candidates: list[Candidate], config: BenchConfig) -> list[str]:
    """First, second, first, third, first ...: of each, the mean of the first before and after stands beside."""
    first, *others = candidates
    notes: list[str] = []
    with leaving_out(first.name, True, notes, first.world):
        before = visit(first, config)
    for one in others:
        with leaving_out(one.name, False, notes, one.world):
            visit(one, config)
        if not one.record.rates:
            one.close()
            continue
        after = visit(first, config)
        one.record.beside = [(before + after) / 2] * config.rounds
        before = after
    first.record.beside = first.record.rates
    return notes


def visit(one: Candidate, config: BenchConfig) -> float:
    """Build, warm up, measure all rounds and close; returns the median rate."""
    torch.compiler.reset()  # what was compiled for another shape must not make this one's code dynamic
    start(one)
    turn(one, config.steps_per_round)
    rates = [turn(one, config.steps_per_round) for _ in range(config.rounds)]
    one.record.rates += rates
    look_inside(one, config)
    one.close()
    return statistics.median(rates)


def start(one: Candidate) -> None:
    """Build and take the first steps: time to the first, and peak memory. A later visit finds kernels on disk."""
    with peak_memory(one.device) as peak:
        begin = time.perf_counter()
        one.build()
        one.step()
        synchronise(one.device)
        seconds = time.perf_counter() - begin
        for _ in range(FIRST_STEPS - 1 + one.plan.config.engine.cuda_graphs):
            one.step()
        synchronise(one.device)
    record = one.record
    record.peak_memory_bytes = max(record.peak_memory_bytes, peak.bytes)
    if record.first_step_seconds is None:
        record.first_step_seconds = seconds
        one.world.say(f"{one.name}: first step after {seconds:.1f} s")


def turn(one: Candidate, steps: int) -> float:
    """Tokens per second over `steps` steps, from an idle device to an idle one; counts what is compiled meanwhile."""
    compiled = compilations()
    synchronise(one.device)
    begin = time.perf_counter()
    tokens = sum(one.step() for _ in range(steps))
    synchronise(one.device)
    seconds = time.perf_counter() - begin
    one.record.recompilations += compilations() - compiled
    return tokens / seconds


def look_inside(one: Candidate, config: BenchConfig) -> None:
    """Phases, in steps of their own; after this `one` is not timed any more."""
    alone = one.world.size == 1
    communication = 0.0 if alone else communication_ms(one.step, config.steps_per_round, one.device)
    clock = PhaseClock(one.device)
    one.watch(clock)
    one.record.phases_ms = clock.measure(one.step, config.steps_per_round) | {"communication": communication}


def rotated(items: list[Any], by: int) -> list[Any]:
    """So that nobody always comes first."""
    return items[by % len(items) :] + items[: by % len(items)]


def share_compiled_code(candidates: list[Candidate]) -> bool:
    """Whether torch.compile, which keeps code by function, would take several shapes for one that changes.

    On a GPU some attention kernels are compiled whatever the config says.
    """
    configs = [one.plan.config for one in candidates]
    shapes = {(str(c.model), c.batch.sequence_length, c.batch.tokens_per_microbatch) for c in configs}
    return len(shapes) > 1 and (candidates[0].device.type == "cuda" or any(c.engine.compile for c in configs))


def fit_together(candidates: list[Candidate], memory: float) -> bool:
    """Whether what all hold, and the activations of one at a time, are expected to fit into `memory` bytes."""
    needs = [one.needs() for one in candidates]
    held = sum(need["total"] - need["activations"] for need in needs)
    return held + max(need["activations"] for need in needs) <= ROOM * memory


def memory_of_process(device: torch.device, world: World) -> float:
    """Bytes that this process may take: the GPU's, or its share of the machine's."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return memory_bytes(device) or machine / world.local_size
