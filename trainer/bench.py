"""`bench`: what the trainer costs over a bare PyTorch loop, and how fast checkpoints are, as ratios from one run on one machine.

Everything that is compared is built first and then takes turns, so that whatever else the machine does falls on all alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from trainer import checkpoint
from trainer.config import BenchConfig, RunConfig
from trainer.data.stream import find_dataset
from trainer.device import peak_memory_bytes
from trainer.engine.base import autocast, with_storage
from trainer.engine.distributed import World, join, read_world
from trainer.engine.signals import StopSignals
from trainer.engine.watchdog import Watchdog
from trainer.files import sync_path
from trainer.memory import GIB, build_meta
from trainer.plan import resolve
from trainer.settings import build
from trainer.train import Run, obtain_dataset

BLOCK = 1 << 24  # bytes per write of the plain file that checkpoints are compared with


def run(config: BenchConfig, as_json: bool = False) -> None:
    """The verb: prints a table to stdout, or one JSON object."""
    world = read_world()
    obtain_dataset(config, world)
    join(world, config.device, config.engine.timeout_minutes, alone=True)
    runs = {name: prepare(config, name, world) for name in config.strategies or ["auto"]}
    first = next(iter(runs.values()))
    report = {
        "model": first.config.model["name"],
        "parameters": first.plan.parameters,
        "processes": world.size,
        "device": first.engine.describe().partition(",")[0].partition(" x ")[2],
        "tokens_per_second": measure(config, {"bare loop": BareLoop(first).step} | steppers(runs), first),
        "peak_memory_gib": peak_memory_bytes(first.device) / GIB,
        "checkpoint": {name: measure_checkpoint(one, config) for name, one in runs.items()},
    }
    for one in runs.values():
        one.stream.close()
        one.engine.close()
    world.stop()
    if world.leader:
        sys.stdout.write((json.dumps(report) if as_json else render(report)) + "\n")


def prepare(config: BenchConfig, strategy: str, world: World) -> Run:
    """A run of `config` under `strategy`; nothing is written but by `measure_checkpoint`."""
    values = dataclasses.asdict(config)
    for field in dataclasses.fields(BenchConfig):
        if field.name not in {f.name for f in dataclasses.fields(RunConfig)}:
            del values[field.name]
    values["engine"]["strategy"] = strategy
    dataset = find_dataset(config.data)
    assert dataset is not None
    plan = resolve(build(RunConfig, values), dataset)
    return Run(plan, world, dataset, Watchdog(World(), 1), StopSignals(world))


class BareLoop:
    """The loop everyone writes first: fp32 or autocast, fused AdamW, clipping, DDP where there are several processes."""

    def __init__(self, run: Run) -> None:
        self.run, config = run, run.config
        model = with_storage(build_meta(run.plan.model_class, run.plan.model_config), run.device)
        model.init_weights(torch.Generator().manual_seed(config.seed))
        self.model: Any = DistributedDataParallel(model) if run.world.size > 1 else model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(self) -> int:
        """One optimiser step on the batch that the run is at; returns its tokens on all ranks."""
        run = self.run
        length = run.plan.sequence_length(run.state.step)
        sequences = run.config.batch.tokens_per_step // length
        for tokens, targets, last in run.microbatches(run.read(length, sequences), length, sequences):
            quiet = run.world.size > 1 and not last
            with self.model.no_sync() if quiet else contextlib.nullcontext():
                with autocast(run.device, run.config.precision):
                    loss = self.model(tokens, targets=targets, reduction="sum").loss
                (loss / (sequences * length)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return sequences * length


def steppers(runs: dict[str, Run]) -> dict[str, Callable[[], int]]:
    return {name: lambda one=one: one.optimiser_step().step_tokens for name, one in runs.items()}  # type: ignore[misc]


def measure(config: BenchConfig, steps: dict[str, Callable[[], int]], run: Run) -> dict[str, dict[str, float]]:
    """Name -> tokens per second (median over the rounds) and its ratio to the first of `steps`."""
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(config.rounds + 1):
        for name, step in rotated(list(steps.items()), number):
            begin = time.perf_counter()
            tokens = sum(step() for _ in range(config.steps_per_round))
            synchronise(run.device)
            if number > 0:  # the first round warms up
                rates[name].append(tokens / (time.perf_counter() - begin))
    base = rates[next(iter(steps))]
    return {
        name: {
            "tokens_per_second": statistics.median(values),
            "ratio": statistics.median(value / other for value, other in zip(values, base, strict=True)),
        }
        for name, values in rates.items()
    }


def rotated(items: list, by: int) -> list:
    """So that nobody always comes first."""
    return items[by % len(items) :] + items[: by % len(items)]


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_checkpoint(run: Run, config: BenchConfig) -> dict[str, float]:
    """MB/s of a whole save and load, and their ratios to a plain file of the same bytes on the same disk (written with fsync).

    Reading comes from the page cache in both cases.
    """
    world = run.world
    folder = world.on_leader(lambda: Path(tempfile.mkdtemp(dir=config.bench_dir)))
    try:
        begin = time.perf_counter()
        tensors = run.engine.tensors()
        path = checkpoint.save(folder, 1, tensors, {}, world, checkpoint.retention(1, 0))
        saving = time.perf_counter() - begin
        begin = time.perf_counter()
        checkpoint.check(path, world)
        run.engine.load(path)
        loading = time.perf_counter() - begin
        size = sum(file.stat().st_size for file in path.iterdir())
        writing, reading = world.on_leader(lambda: plain_file(folder / "plain", size))
    finally:
        world.on_leader(lambda: shutil.rmtree(folder, ignore_errors=True))
    return {
        "megabytes": size / 1e6,
        "save": size / 1e6 / saving,
        "save_ratio": writing / saving,
        "load": size / 1e6 / loading,
        "load_ratio": reading / loading,
    }


def plain_file(path: Path, size: int) -> tuple[float, float]:
    """Seconds to write `size` bytes with fsync, and to read them, as dd does."""
    block = os.urandom(BLOCK)
    begin = time.perf_counter()
    with path.open("wb") as file:
        for at in range(0, size, BLOCK):
            file.write(block[: min(BLOCK, size - at)])
    sync_path(path)
    writing = time.perf_counter() - begin
    begin = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(bytearray(BLOCK)):
            pass
    return writing, time.perf_counter() - begin


def render(report: dict[str, Any]) -> str:
    """The report as two small tables."""
    lines = [
        f"{report['model']}, {report['parameters']:,} parameters, {report['processes']} process(es), {report['device']}",
        f"{'':<12}{'tokens/s':>12}{'ratio':>8}",
    ]
    for name, row in report["tokens_per_second"].items():
        lines.append(f"{name:<12}{row['tokens_per_second']:>12,.0f}{row['ratio']:>8.3f}")
    lines.append(f"peak memory of all of them together: {report['peak_memory_gib']:.2f} GiB")
    lines.append(f"{'checkpoint':<12}{'MB':>8}{'save MB/s':>11}{'/ plain':>9}{'load MB/s':>11}{'/ plain':>9}")
    for name, row in report["checkpoint"].items():
        lines.append(
            f"{name:<12}{row['megabytes']:>8.1f}{row['save']:>11.0f}{row['save_ratio']:>9.2f}"
            f"{row['load']:>11.0f}{row['load_ratio']:>9.2f}"
        )
    return "\n".join(lines)
