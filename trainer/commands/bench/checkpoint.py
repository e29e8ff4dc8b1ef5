"""`bench checkpoint`: measures how fast checkpoints are written and read, against a plain file of the same size on the same disk."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.checkpoint import format as checkpoint
from trainer.checkpoint.saver import Saver
from trainer.commands.bench import BenchConfig
from trainer.commands.bench.compare import enter
from trainer.commands.bench.report import Report, bench_folder, device_facts, title
from trainer.commands.bench.variants import Variant, leaving_out
from trainer.core.files import sync_path

BLOCK = 1 << 24  # bytes per write of the plain file
TIMES = ("waiting", "saving", "loading", "plain_writing", "plain_reading")


def run(config: BenchConfig, as_json: bool = False) -> None:
    """Run the verb: measure one variant after the other, write bench.json and bench.md, print the table or the JSON to stdout."""
    world, found, left_out, _ = enter(config)
    world.on_leader(lambda: bench_folder(config))
    rows: list[dict[str, Any]] = []
    for variant in found:
        with leaving_out(variant.name, not rows, left_out, world):
            rows.append(measure_checkpoint(variant, config))
        variant.close()
    if world.leader:
        checkpoint_report(config, found[0], rows, left_out).publish(as_json)
    world.stop()


def measure_checkpoint(variant: Variant, config: BenchConfig) -> dict[str, Any]:
    """A row of the report: the size, and the median over the rounds of each of TIMES in seconds. One earlier round warms up."""
    world = variant.world
    variant.build()
    variant.step()
    folder = world.on_leader(lambda: Path(tempfile.mkdtemp(dir=bench_folder(config))))
    keep = checkpoint.retention(1, 0)
    saver = Saver(folder, world, keep, variant.plan.config.checkpoint.asynchronous)
    try:
        rounds = [measure_round(variant, saver, folder, number) for number in range(1, config.rounds + 2)]
    finally:
        world.on_leader(lambda: shutil.rmtree(folder, ignore_errors=True))
    seconds = {name: [times[name] for times, _ in rounds[1:]] for name in TIMES}
    row: dict[str, Any] = {"name": variant.name, "details": variant.details, "bytes": rounds[-1][1]}
    row["seconds"] = {name: {"median": statistics.median(times), "samples": times} for name, times in seconds.items()}
    for name, plain in (("saving", "plain_writing"), ("loading", "plain_reading")):
        row[f"{name}_ratio"] = statistics.median(
            theirs / ours for theirs, ours in zip(seconds[plain], seconds[name], strict=True)
        )
    return row


def measure_round(variant: Variant, saver: Saver, folder: Path, number: int) -> tuple[dict[str, float], int]:
    """Save and load once, then write and read a plain file of the same size; returns (seconds by name of TIMES, bytes)."""
    world, engine = variant.world, variant.run.engine
    path = folder / checkpoint.step_name(number)
    times = {}
    times["waiting"] = seconds(lambda: saver.save(number, engine.tensors(), {}))
    times["saving"] = times["waiting"] + seconds(saver.finish)
    times["loading"] = seconds(lambda: (checkpoint.check(path, world), engine.load(path)))
    size = sum(file.stat().st_size for file in path.iterdir())
    times["plain_writing"], times["plain_reading"] = world.on_leader(lambda: plain_file(folder / "plain", size))
    return times, size


def seconds(work: Callable[[], object]) -> float:
    """How long `work` takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def plain_file(path: Path, size: int) -> tuple[float, float]:
    """Seconds to write `size` bytes with fsync, and to read them, as dd does."""
    block = os.urandom(BLOCK)

    def write() -> None:
        with path.open("wb") as file:
            for at in range(0, size, BLOCK):
                file.write(block[: min(BLOCK, size - at)])
        sync_path(path)

    def read() -> None:
        with path.open("rb", buffering=0) as file:
            while file.readinto(bytearray(BLOCK)):
                pass

    return seconds(write), seconds(read)


def checkpoint_report(config: BenchConfig, first: Variant, rows: list[dict[str, Any]], left_out: list[str]) -> Report:
    """The report: a row for each variant."""
    header = ["", "MB", "training waits s", "save MB/s", "/ plain file", "load MB/s", "/ plain file"]
    table = [header]
    for row in rows:
        megabytes = row["bytes"] / 1e6
        waiting, saving, loading = (row["seconds"][name]["median"] for name in TIMES[:3])
        table.append(
            [
                row["name"],
                f"{megabytes:,.1f}",
                f"{waiting:.2f}",
                f"{megabytes / saving:,.0f}",
                f"{row['saving_ratio']:.2f}",
                f"{megabytes / loading:,.0f}",
                f"{row['loading_ratio']:.2f}",
            ]
        )
    notes = [
        f"medians of {config.rounds} rounds after one to warm up; saving ends when everything is on the disk (fsync); loading "
        "checks the hashes; loading and plain file both read from the page cache",
        *left_out,
    ]
    body = device_facts(first) | {"rounds": config.rounds, "rows": rows, "notes": left_out}
    return Report(config, "checkpoint", title(first), body, table, notes)
