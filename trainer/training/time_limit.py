"""max_seconds: a run that trains as long as it is asked to. Its speed is measured first, so the schedule ends where the run ends."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import build, drop_alternatives
from trainer.data.stream import find_dataset
from trainer.planning.length import nearest_steps, tokens_at_lengths
from trainer.planning.plan import resolve
from trainer.planning.run_config import StoredConfig, merge_run, plugins_in
from trainer.planning.speed import measure_speed
from trainer.runtime.distributed import World


def with_steps(given: dict[str, Any], stored: StoredConfig | None, world: World) -> dict[str, Any]:
    """The values of a `train` command, with the max_steps that its max_seconds come to on this machine.

    A run that goes on with the same max_seconds keeps its max_steps, and so does a config that has both, as that of a run. UserError
    if the speed cannot be measured, or would not tell the length.
    """
    asked = build(RunConfig, given)
    seconds = asked.max_seconds
    if seconds is None:
        return given
    if asked.max_steps is not None:
        world.say(f"max_seconds: max_steps {asked.max_steps:,} is given too, so the speed is not measured")
        return given
    if stored is not None and stored.build().max_seconds == seconds:
        return drop_alternatives(given, "max_seconds")
    if world.size > 1:
        raise UserError(
            f"max_seconds: is for one process, here are {world.size}; run `bench`, then give max_steps or tokens"
        )
    values = {**drop_alternatives(merge_run(given, stored, 1), "max_seconds"), "max_steps": 1}
    if planned_batch(values).dynamic:
        raise UserError("max_seconds: batch.dynamic makes steps longer as the run goes on; set batch.dynamic false")
    world.say(f"max_seconds: measuring the speed, for a run of {seconds:g} s")
    with tempfile.TemporaryDirectory() as folder:
        rate = measure_speed(values, Path(folder), plugins_in(sys.argv[2:]))["tokens_per_second"]["median"]
    batch = planned_batch(values)  # again, because `bench` has prepared the data if they were not there
    steps = nearest_steps(lambda count: sum(tokens_at_lengths(batch, count).values()), rate * seconds)
    world.say(f"max_seconds: {rate:,.0f} tokens/s, so {steps:,} steps take {seconds:g} s")
    return {**given, "max_steps": steps}


def planned_batch(values: dict[str, Any]) -> Any:
    """The section `batch` of the resolved config."""
    config = build(RunConfig, values)
    return resolve(config, find_dataset(config.data)).config.batch
