"""Table, JSON and plot of a bench. README.md beside this file documents the fields of the JSON."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainer.commands.bench import BenchConfig
from trainer.commands.bench.clock import PHASES
from trainer.commands.bench.curves import Curves, curves_of, draw_curves
from trainer.commands.bench.variants import Candidate
from trainer.core.files import user_path, write_file
from trainer.core.text import markdown_table, printable, printable_lines
from trainer.engine.meta import flops_per_token
from trainer.planning.memory import GIB
from trainer.runtime.device import device_name, memory_bytes, peak_flops
from trainer.runtime.environment import environment

FORMAT = 1
MISSING = "n/a"


@dataclass
class Report:
    """The results. body: for the JSON; table: header and rows; notes: lines below; bars: name -> samples to plot; curves: to plot
    instead of them."""

    config: BenchConfig
    kind: str  # train, data or checkpoint
    title: str
    body: dict[str, Any]
    table: list[list[str]]
    notes: list[str]
    bars: dict[str, list[float]] = field(default_factory=dict)
    curves: Curves | None = None

    def publish(self, as_json: bool) -> None:
        """Write the files, and print the JSON or the table to stdout."""
        folder = bench_folder(self.config)
        text = json.dumps({"format": FORMAT, "kind": self.kind, "environment": environment(), **self.body}, indent=1)
        markdown = "\n".join([f"# {self.title}", "", *markdown_table(self.table), "", *[f"- {n}" for n in self.notes]])
        write_file(folder / "bench.json", text + "\n")
        write_file(folder / "bench.md", markdown + "\n")
        if self.curves:
            draw_curves(self.curves, folder / "bench.png", self.title)
        elif self.bars:
            draw(self.bars, folder / "bench.png", self.title)
        sys.stdout.write((text if as_json else printable_lines(markdown)) + "\n")
        written = ", ".join(sorted(path.name for path in folder.glob("bench.*")))
        print(f"{printable(folder)}: {written}", file=sys.stderr)


def bench_folder(config: BenchConfig) -> Path:
    """The folder for the files; created if it is missing."""
    if config.bench_dir is None:
        config.bench_dir = str(Path("runs") / time.strftime("bench-%Y%m%d-%H%M%S"))
    folder = user_path(config.bench_dir, "bench_dir")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def train_report(config: BenchConfig, candidates: list[Candidate], together: bool, notes: list[str]) -> Report:
    """The report of `bench`: a row for each candidate, with ratios to the baselines and to the first variant."""
    first = candidates[0]
    variants = [one for one in candidates if one.kind == "trainer"]
    references = [one for one in candidates if one.kind == "baseline"] + ([first] if len(variants) > 1 else [])
    rows = [row(one, references) for one in candidates]
    order = "in turns" if together else "one by one"
    body = device_facts(first) | {
        "order": order,
        "rounds": config.rounds,
        "steps_per_round": config.steps_per_round,
        "rows": rows,
        "notes": notes,
    }
    header = [
        "",
        "tokens/s",
        "spread",
        *(f"/ {'first' if one is first else one.name}" for one in references),
        "MFU",
        "ms/step",
    ]
    header += [*PHASES, "communication", "peak GiB", "expected", "first step s", "recompiled"]
    table = [header, *(cells(entry, [one.name for one in references]) for entry in rows)]
    lines = [*reading(first, rows, order, config), *notes]
    bars = {one.name: one.record.rates for one in reversed(candidates)}
    return Report(config, "train", title(first), body, table, lines, bars, curves_of(candidates))


def device_facts(one: Candidate) -> dict[str, Any]:
    """The devices that it was measured on, for the JSON."""
    return {
        "device": device_name(one.device),
        "device_memory_bytes": memory_bytes(one.device),
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "processes": one.world.size,
    }


def title(one: Candidate) -> str:
    plan = one.plan
    threads = f", {torch.get_num_threads()} threads" if one.device.type == "cpu" else ""
    where = f"{one.world.size} x {device_name(one.device)}{threads}"
    return f"{plan.config.model['name']}, {plan.parameters:,} parameters, {where}, torch {torch.__version__}"


def row(one: Candidate, references: list[Candidate]) -> dict[str, Any]:
    """All measurements of a candidate, for the JSON."""
    config, record = one.plan.config, one.record
    length = config.batch.sequence_length
    flops = flops_per_token(one.plan.model_class, one.plan.model_config, length)
    rate, peak = statistics.median(record.rates), peak_flops(one.device, config.precision, config.float8)
    return {
        "name": one.name,
        "kind": one.kind,
        "details": one.details,
        "parameters": one.plan.parameters,
        "tokens_per_second": distribution(record.rates),
        "ratio": {other.name: ratio(record, other.record) for other in references},
        "flops_per_token": flops,
        "peak_flops": peak,
        "mfu": None if peak is None else rate * flops / (peak * one.world.size),
        "phases_ms": record.phases_ms,
        "peak_memory_bytes": record.peak_memory_bytes,
        "expected_memory_bytes": one.needs() if one.kind == "trainer" else None,
        "first_step_seconds": record.first_step_seconds,
        "recompilations": record.recompilations,
        "config": dataclasses.asdict(config),
    }


def distribution(samples: list[float]) -> dict[str, Any]:
    """Median, spread (interquartile range over median; None for fewer than two samples) and the samples."""
    median = statistics.median(samples)
    if len(samples) < 2:
        return {"median": median, "spread": None, "samples": samples}
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": median, "spread": (high - low) / median, "samples": samples}


def ratio(one: Any, other: Any) -> float:
    """Median over the rounds of the rate of `one` over that of `other`, each first divided by its `beside` (see Record)."""
    pairs = zip(one.rates, one.beside, other.rates, other.beside, strict=False)
    return statistics.median((rate / beside) / (rate2 / beside2) for rate, beside, rate2, beside2 in pairs)


def cells(entry: dict[str, Any], references: list[str]) -> list[str]:
    """A row of the table."""
    rate, phases, expected = entry["tokens_per_second"], entry["phases_ms"], entry["expected_memory_bytes"]
    return [
        entry["name"],
        f"{rate['median']:,.0f}",
        show(rate["spread"], ".1%"),
        *(f"{entry['ratio'][name]:.3f}" for name in references),
        show(entry["mfu"], ".1%"),
        *(show(phases[name], ".1f") for name in ("step", *PHASES, "communication")),
        f"{entry['peak_memory_bytes'] / GIB:.3f}",
        MISSING if expected is None else f"{expected['total'] / GIB:.3f}",
        f"{entry['first_step_seconds']:.1f}",
        str(entry["recompilations"]),
    ]


def show(value: float | None, form: str) -> str:
    return MISSING if value is None else format(value, form)


def reading(first: Candidate, rows: list[dict[str, Any]], order: str, config: BenchConfig) -> list[str]:
    """How to read the table."""
    counted = "CUDA's allocator" if first.device.type == "cuda" else "torch's CPU allocator (by its profiler)"
    how = {
        "in turns": "all in memory at once, taking turns",
        "one by one": "one by one, because together they would not fit into memory or would share compiled code; the first "
        "again after each, and ratios relative to it",
    }[order]
    peaks = {entry["config"]["precision"]: entry["peak_flops"] for entry in rows}
    name = device_name(first.device)
    known = "; ".join(
        f"{precision}: {peak / 1e12:g} TFLOP/s" if peak else f"{precision}: {MISSING}, not on record"
        for precision, peak in peaks.items()
    )
    lines = [
        f"{settings_line(first.plan.config)}, unless the name of a row says otherwise",
        f"tokens/s: of all processes; median of {config.rounds} rounds of {config.steps_per_round} steps after one to warm up; "
        f"spread: interquartile range / median; {how}",
        f"MFU: tokens/s x FLOPs per token / (peak x devices); peak of {name!r}, {known}; FLOPs: {flops_line(rows)}",
        "ms/step and phases: medians of one process, measured in separate steps; communication: any collective under way, "
        "which overlaps the other phases; the trainer's forward includes the head's backward (its loss computes both)",
        f"peak GiB: the most that {counted} handed out, from building to the end of the second step; "
        "expected: what `plan` expects for these settings",
        "first step: includes building and compiling; code that an earlier row or bench has compiled is only loaded",
    ]
    return lines + [f"{entry['name']}: {entry['details']['what']}" for entry in rows if "what" in entry["details"]]


def settings_line(config: Any) -> str:
    """The settings of the first candidate, which hold for all rows unless a row's name says otherwise."""
    batch, engine = config.batch, config.engine
    return (
        f"{config.precision}, sequences of {batch.sequence_length:,}, {batch.tokens_per_step:,} tokens per step in microbatches of "
        f"{batch.tokens_per_microbatch:,}, strategy {engine.strategy}, recomputing {engine.activation_checkpointing}, "
        f"{'compiled' if engine.compile else 'eager'}"
    )


def flops_line(rows: list[dict[str, Any]]) -> str:
    """How FLOPs are counted, and how many there are."""
    counts = ", ".join(f"{count:,}" for count in sorted({entry["flops_per_token"] for entry in rows}))
    return f"{counts} per token, 6 for each weight of a matrix product, and attention over the whole [T, T] square, masked or not"


def draw(bars: dict[str, list[float]], out: Path, title: str) -> None:
    """Draw medians as bars (the last name on top) and every sample as a dot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.5 * len(bars)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.barh(list(bars), [statistics.median(samples) for samples in bars.values()], alpha=0.6)
    for name, samples in bars.items():
        axis.plot(samples, [name] * len(samples), "k.", markersize=4)
    axis.set(xlabel="tokens per second", title=title)
    axis.title.set_fontsize(9)
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(out, dpi=110)
