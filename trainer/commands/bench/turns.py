"""How candidates are measured. Normally all are built and then take turns, so that other load on the machine affects all equally.
If they would not fit the device together, or would share compiled code: one by one, and the first again after each."""

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

# The second step is the first with the optimiser's state in memory; CUDA graphs are recorded at the third.
FIRST_STEPS = 2
ROOM = 0.9  # share of the memory that the candidates may be expected to take


def measure(candidates: list[Candidate], config: BenchConfig, together: bool) -> list[str]:
    """Fill the record of each candidate that can run here; returns a note on each of the others, whose record has no rates.

    Raises UserError if the first cannot run.
    """
    return (in_turns if together else one_by_one)(candidates, config)


def in_turns(candidates: list[Candidate], config: BenchConfig) -> list[str]:
    """Build all candidates; in each round each takes its turn, and a different one begins. One round warms up."""
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
    """Measure first, second, first, third, first ...; `beside` of each is the mean of the first before and after it."""
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
    """Build and take the first steps; records peak memory, and the time to the end of the first step: only once, since a later
    visit finds compiled kernels on disk."""
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
    """Tokens per second over `steps` steps, from an idle device to an idle one; also counts recompilations."""
    compiled = compilations()
    synchronise(one.device)
    begin = time.perf_counter()
    tokens = sum(one.step() for _ in range(steps))
    synchronise(one.device)
    seconds = time.perf_counter() - begin
    one.record.recompilations += compilations() - compiled
    return tokens / seconds


def look_inside(one: Candidate, config: BenchConfig) -> None:
    """Measure the phases in separate steps. Do not time `one` after this: its phases stay under watch."""
    alone = one.world.size == 1
    communication = 0.0 if alone else communication_ms(one.step, config.steps_per_round, one.device)
    clock = PhaseClock(one.device)
    one.watch(clock)
    one.record.phases_ms = clock.measure(one.step, config.steps_per_round) | {"communication": communication}


def rotated(items: list[Any], by: int) -> list[Any]:
    """The items in their order, beginning with number `by`, so that no item always comes first."""
    return items[by % len(items) :] + items[: by % len(items)]


def share_compiled_code(candidates: list[Candidate]) -> bool:
    """Whether the candidates have several shapes and compiled code. torch.compile keeps code per function, so it would take these
    for one shape that changes. On a GPU some attention kernels are compiled whatever the config says.
    """
    configs = [one.plan.config for one in candidates]
    shapes = {(str(c.model), c.batch.sequence_length, c.batch.tokens_per_microbatch) for c in configs}
    return len(shapes) > 1 and (candidates[0].device.type == "cuda" or any(c.engine.compile for c in configs))


def fit_together(candidates: list[Candidate], memory: float) -> bool:
    """Whether all candidates, with the activations of one at a time, are expected to fit into ROOM of `memory` bytes."""
    needs = [one.needs() for one in candidates]
    held = sum(need["total"] - need["activations"] for need in needs)
    return held + max(need["activations"] for need in needs) <= ROOM * memory


def memory_of_process(device: torch.device, world: World) -> float:
    """Bytes that this process may take: the GPU's, or its share of the machine's."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return memory_bytes(device) or machine / world.local_size
