"""`plan`: prints every number of a run before it starts, each with the rule it came from."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.commands import Verb, over_parent
from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import setting
from trainer.core.text import printable_lines
from trainer.runtime.launcher import RankInfo

if TYPE_CHECKING:
    from trainer.planning.plan import Plan


@dataclass
class PlanConfig(RunConfig):
    """`plan`: a run's keys, and the machines to plan for."""

    device: str = setting("auto", "auto, cpu, cuda, or a GPU to plan for, such as a100-40gb")  # type: ignore[assignment]
    world_size: int | None = setting(None, "number of processes; auto: as many as were started", low=1)
    processes_per_machine: int = setting(8, "how many of the world_size processes one machine runs", low=1)
    price: float | None = setting(None, "price of one device for one hour, in any currency", above=0)
    mfu: float | None = setting(
        None, "share of the device's peak FLOP/s to expect; auto: a bench in runs/, else 0.5 to 0.2", above=0, high=1
    )


def resolve_for(config: PlanConfig) -> tuple[Plan, str]:
    """The plan for the device and processes that `config` names, and the device's name. UserError for an unknown device."""
    from trainer.data.stream import find_dataset
    from trainer.planning.plan import resolve
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
    """Run the verb: print the plan to stdout (a table, or one JSON object)."""
    from trainer.planning.plan import render, summary
    from trainer.planning.time import expected_time

    plan, device = resolve_for(config)
    time = expected_time(plan, device, config.price, config.mfu)
    if as_json:
        times = {key: value for key, value in time._asdict().items() if key != "rule"}
        text = json.dumps(summary(plan) | times | {"hours_rule": time.rule})
    else:
        text = printable_lines(render(plan, [time.entry()]))
    sys.stdout.write(text + "\n")


VERB = Verb(
    name="plan",
    help="every number of a run and the rule it came from",
    config=PlanConfig,
    run=run,
    alone=True,
    json=True,
    read=over_parent(PlanConfig),
    resolved=lambda config: resolve_for(config)[0].config,
)
