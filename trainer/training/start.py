"""From the values of a `train` command to a run that trains, and the exit status at its end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path
from typing import Any

from trainer.checkpoint import format as checkpoint
from trainer.core.config import RunConfig
from trainer.core.errors import Stopped, UserError
from trainer.core.settings import build
from trainer.data.dataset import DatasetInfo
from trainer.data.obtain import absolute_paths, agree_on_dataset, obtain_dataset
from trainer.data.stream import find_dataset
from trainer.engine.gradients import refuse_unreached
from trainer.planning.expected import outcome
from trainer.planning.launcher_config import read_launcher_config
from trainer.planning.parent import with_origin
from trainer.planning.plan import Plan, render, resolve
from trainer.planning.run_config import (
    StoredConfig,
    check_unchanged,
    folder_of,
    merge_run,
    merged_config,
    read_run,
)
from trainer.runs.folder import LOCK_SECONDS, locked
from trainer.runs.going_back import go_back
from trainer.runs.metrics import last_row
from trainer.runs.tensorboard import check_installed
from trainer.runtime.device import choose_device
from trainer.runtime.distributed import World, join, read_world
from trainer.runtime.exit_status import write_exit_status
from trainer.runtime.launcher import restarts
from trainer.runtime.signals import StopSignals, exit_code, follow_launcher, not_begun_line
from trainer.runtime.watchdog import Watchdog
from trainer.training.loop import train
from trainer.training.preflight import before_training
from trainer.training.profile import explain_out_of_memory
from trainer.training.run import Run
from trainer.training.time_limit import with_steps


def start(given: dict[str, Any], as_json: bool = False, from_step: int | None = None) -> None:
    """Train. given: values of the YAML file and the flags, as in RunConfig; as_json: print the results as JSON at the end; from_step:
    see going_back.py."""
    world = read_world()
    stored = read_run(given, world.say)
    if from_step is not None and stored is None:
        raise UserError(
            f"from_step: {folder_of(build(RunConfig, given))} holds no run that could go on; to begin a new run from a checkpoint of "
            "another, give --branch_from RUN@STEP"
        )
    given = with_origin(given, stored, world.size, world.say)
    given = with_steps(given, stored, world)
    values = merge_run(given, stored, world.size)
    given = absolute_paths(given, values, {} if stored is None else stored.values, world.say)
    config = merged_config(given, stored, world.size)
    obtain_dataset(config, world)  # before the process group, whose timeout may be shorter than this takes
    launched = read_launcher_config(os.environ).launcher not in ("python", "srun")
    with StopSignals(world, launched) as signals:
        if launched:
            follow_launcher()
        try:
            asked = run_joined(given, stored, config, world, signals, from_step)
        except Stopped as stop:
            raise before_training_began(stop, folder_of(config), world) from None
    if asked is not None:
        raise SystemExit(exit_code(asked))
    if as_json and world.leader:
        print(json.dumps(results(folder_of(config))))


def results(folder: Path) -> dict[str, Any]:
    """What a run that ended says to a program: its folder, its last row of metrics.jsonl, and how far that is from what was expected."""
    row = last_row(folder / "metrics.jsonl") or {}
    return {"run_dir": str(folder), **row, **outcome(row)}


def before_training_began(stop: Stopped, folder: Path, world: World) -> Stopped:
    """`stop` with a line that names the last checkpoint. Writes the exit status for a script that may start us again."""
    number = signal.Signals(stop.number)
    if world.leader:
        write_exit_status(f"stopped by {number.name} before training began")
    saved = checkpoint.found(folder / "checkpoints")
    return Stopped(number, not_begun_line(number, saved[-1][0] if saved else None))


def run_joined(
    given: dict[str, Any],
    stored: StoredConfig | None,
    config: RunConfig,
    world: World,
    signals: StopSignals,
    from_step: int | None = None,
) -> signal.Signals | None:
    """The run, from the process group's beginning to its end. Returns the signal that ended it early, if any. given: values of
    the command; stored: the run that goes on; config: both together."""
    join(world, config.device, 2 * config.engine.timeout_minutes)  # the watchdog, which knows more, must report first
    dataset = agree_on_dataset(config, world)
    # Rank 0 plans. The others take its plan, or its error.
    plan, plan_text = world.on_leader(lambda: make_plan(given, stored, config, dataset))
    config = plan.config
    if stored is not None and (given.get("data") or {}).get("tokenizer") and plan.unused_tokenizer:
        world.say(plan.unused_tokenizer)  # a new run says it in its plan
    if world.size == 1:
        join(world, config.device, alone=config.engine.strategy != "single")
    with contextlib.ExitStack() as stack:
        folder = folder_of(config)
        world.on_leader(lambda: check_installed(config.log.tensorboard))
        limits = 60 * config.engine.timeout_minutes, 60 * config.engine.step_timeout_minutes
        # A process of an earlier try may survive on a machine that was cut off. It locks the folder until its watchdog ends it.
        patience = 2 * min(limits) if restarts(os.environ) else LOCK_SECONDS
        world.on_leader(lambda: stack.enter_context(locked(folder, patience)) and None)
        watchdog = stack.enter_context(contextlib.closing(Watchdog(world, *limits)))
        world.on_leader(lambda: refuse_unreached(plan, world.say))
        before_training(plan, world)
        if from_step is not None:
            go_back(folder, from_step, world)
        device = choose_device(config.device, world.local_rank)
        with explain_out_of_memory(folder, world.rank, device, lambda: ways_out(config)):
            steps_before = None if stored is None else stored.build().max_steps
            asked = train(Run(plan, world, dataset, watchdog, signals), plan_text, steps_before)
    if world.leader:  # before the other ranks leave: launchers end all processes when the first one fails
        write_exit_status("finished" if asked is None else f"stopped by {asked.name}")
    world.stop()
    return asked


def make_plan(
    given: dict[str, Any], stored: StoredConfig | None, config: RunConfig, dataset: DatasetInfo
) -> tuple[Plan, str | None]:
    """The plan, and its text for a new run. UserError if an existing run was started with other values."""
    plan = resolve(config, dataset)
    if stored is None:
        return plan, render(plan)
    check_unchanged(stored, plan.config, given, lambda other: resolve(other, find_dataset(other.data)).config)
    return plan, None


def ways_out(config: Any) -> str:
    """What to try after memory ran out. config: resolved."""
    batch, engine = config.batch, config.engine
    ways = []
    if batch.tokens_per_microbatch > batch.sequence_length:
        half = max(1, batch.tokens_per_microbatch // batch.sequence_length // 2) * batch.sequence_length
        ways.append(f"--batch.tokens_per_microbatch {half}")
    if engine.cuda_graphs:
        ways.append("--engine.cuda_graphs false")
    elif engine.activation_checkpointing != "full":
        ways.append("--engine.activation_checkpointing full")
    if engine.strategy in ("fsdp", "hsdp", "zero1", "zero2", "zero3") and not engine.offload:
        ways.append("--engine.offload")
    return f"go on with {' or '.join([*ways, 'more devices'])}"
