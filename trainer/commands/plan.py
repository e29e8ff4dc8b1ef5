"""`plan`: every number of a run before the run, each with the rule it came from."""

from __future__ import annotations

import dataclasses
import json
import sys

from trainer.core.config import PlanConfig, RunConfig
from trainer.core.errors import UserError
from trainer.core.text import printable_lines
from trainer.planning.plan import Plan, render, resolve, summary
from trainer.planning.time import expected_time
from trainer.runtime.launcher import RankInfo


def resolve_for(config: PlanConfig) -> tuple[Plan, str]:
    """The plan for the device and processes that `config` names, and the device's name. UserError for an unknown device."""
    from trainer.data.stream import find_dataset
    from trainer.runtime.device import GPUS, choose_device, device_name

    gpu = GPUS.get(config.device)
    if gpu is None and config.device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device: {config.device!r} is not known (allowed: auto, cpu, cuda, {', '.join(GPUS)})")
    size = config.world_size
    world = None if size is None else RankInfo(0, size, 0, min(size, config.processes_per_machine))
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(RunConfig)}
    if gpu is not None:
        values["device"] = "auto"
    plan = resolve(RunConfig(**values), find_dataset(config.data), world, gpu)
    return plan, device_name(choose_device(config.device)) if gpu is None else gpu.name


def run(config: PlanConfig, as_json: bool = False) -> None:
    """The verb: print the plan to stdout (a table, or one JSON object)."""
    plan, device = resolve_for(config)
    time = expected_time(plan, device, config.price)
    if as_json:
        times = {key: value for key, value in time._asdict().items() if key != "rule"}
        text = json.dumps(summary(plan) | times | {"hours_rule": time.rule})
    else:
        text = printable_lines(render(plan, [time.entry()]))
    sys.stdout.write(text + "\n")
