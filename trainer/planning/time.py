"""How long a planned run takes, and what it costs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from trainer.engine.meta import flops_per_token
from trainer.planning.plan import Plan, minimum_tokens
from trainer.recipes import PlanEntry

MFUS = (0.5, 0.2)  # typical values: of large models on one GPU, and of small models or many GPUs


class Time(NamedTuple):
    """What a whole run takes. hours, tokens_per_second, cost: None if not known; hours_range: without a bench, from the
    device's peak at MFUS."""

    rule: str
    hours: float | None = None
    tokens_per_second: float | None = None  # of all processes
    cost: float | None = None
    hours_range: tuple[float, float] | None = None

    def entry(self) -> PlanEntry:
        if self.hours_range is not None:
            return PlanEntry("hours", " to ".join(f"{hours:.3g}" for hours in self.hours_range), self.rule)
        return PlanEntry("hours", "unknown" if self.hours is None else self.hours, self.rule)


def find_bench(plan: Plan, device: str) -> tuple[Path, dict[str, Any]] | None:
    """The newest bench.json in runs/ that has this model on such a device, and its trainer row that is most like the plan.

    The row always has the plan's precision, fp8 and sequence length.
    """
    wanted = dataclasses.asdict(plan.config)
    for path in sorted(Path("runs").glob("bench-*/bench.json"), reverse=True):
        with contextlib.suppress(OSError, ValueError, KeyError):
            report = json.loads(path.read_text(encoding="utf-8"))
            if (report["kind"], report["device"]) != ("train", device):
                continue
            rows = [row for row in report["rows"] if row["kind"] == "trainer" and _same_work(row["config"], wanted)]
            if rows:
                row = max(rows, key=lambda row: _settings_in_common(row["config"], wanted))
                return path, row | {"processes": report["processes"]}
    return None


def _same_work(config: dict[str, Any], other: dict[str, Any]) -> bool:
    what = [(c["model"], c["precision"], c["float8"], c["batch"]["sequence_length"]) for c in (config, other)]
    return what[0] == what[1]


def _settings_in_common(config: dict[str, Any], other: dict[str, Any]) -> int:
    """How many of the settings that affect the speed of a step are equal."""
    engine = [key for key in config["engine"] if config["engine"][key] == other["engine"].get(key)]
    return len(engine) + (config["batch"]["tokens_per_microbatch"] == other["batch"]["tokens_per_microbatch"])


def expected_time(plan: Plan, device: str, price: float | None, mfu: float | None = None) -> Time:
    """Hours of the whole run, and its cost if a price per hour is given.

    They come from `mfu` if it is given, else from the newest bench of this model, else from MFUS.
    """
    found = None if mfu is not None else find_bench(plan, device)
    if found is None:
        return _time_by_peak(plan, device, price, mfu)
    path, row = found
    rate = row["tokens_per_second"]["median"] * plan.processes / row["processes"]
    hours = minimum_tokens(plan) / rate / 3600
    rule = "at least: with a multiplier of one; " if plan.config.batch.dynamic else ""
    rule += f"at {rate:,.0f} tokens/s, by {row['name']} of {path}"
    if plan.processes != row["processes"]:
        rule += (
            f" with {row['processes']} process{'es' if row['processes'] > 1 else ''}, if speed grows with their number"
        )
    cost = None if price is None else hours * price * plan.processes
    if cost is not None:
        rule += f"; {cost:,.2f} at {price:g} an hour and device"
    return Time(rule, round(hours, 3), rate, cost)


def _time_by_peak(plan: Plan, device: str, price: float | None, mfu: float | None) -> Time:
    """What a run takes at `mfu` of the device's peak, or at MFUS, if the peak is known."""
    from trainer.runtime.device import peak_of

    rule = f"no bench of this model on {device} in runs/: `python -m trainer bench` makes one"
    if mfu is not None:
        rule = "mfu is set"
    peak = peak_of(device, plan.config.precision, plan.config.float8)
    if peak is None:
        return Time(f"{rule}; no estimate, since the device's peak FLOP/s is not known")
    batch = plan.config.batch
    flops = flops_per_token(plan.model_class, plan.model_config, batch.sequence_length)
    at_peak = minimum_tokens(plan) * flops / (peak * plan.processes) / 3600  # hours
    shares = MFUS if mfu is None else (mfu,)
    guess = "a guess " if mfu is None else ""
    guess += f"at {' to '.join(f'{100 * share:.3g}%' for share in shares)} of {peak / 1e12:,.0f} TFLOP/s"
    guess += ", with a multiplier of one" if batch.dynamic else ""
    hours = [at_peak / share for share in shares]
    costs = [] if price is None else [one * price * plan.processes for one in hours]
    if price is not None:
        guess += f"; {' to '.join(f'{cost:,.2f}' for cost in costs)} at {price:g} an hour and device"
    if mfu is None:
        return Time(f"{guess}; {rule}", hours_range=(hours[0], hours[1]))
    rate = minimum_tokens(plan) / hours[0] / 3600
    return Time(f"{guess}; {rule}", hours[0], rate, costs[0] if costs else None)
