"""`train`: from the command to the trained model. What a step is stands in run.py; here is when to look and what to keep."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainer import checkpoint
from trainer.config import RunConfig
from trainer.data.obtain import absolute_paths, agree_on_dataset, obtain_dataset
from trainer.data.stream import find_dataset, local_folder
from trainer.device import choose_device, thread_line
from trainer.engine.base import autocast
from trainer.engine.distributed import World, join, read_world
from trainer.engine.gradients import refuse_unreached
from trainer.engine.signals import StopSignals, exit_code, follow_launcher, not_begun_line, stopped_line
from trainer.engine.watchdog import Watchdog
from trainer.engine.wishes import read_wishes
from trainer.errors import Stopped
from trainer.launcher import restarts
from trainer.metrics.report import Report
from trainer.optim import schedule_change
from trainer.outcome import tell_outcome
from trainer.plan import render, resolve
from trainer.preflight import before_training
from trainer.profile import Profiler, explain_out_of_memory
from trainer.run import Run
from trainer.run_config import check_unchanged, combined_config, combined_values, folder_of, plugins_of, read_config
from trainer.run_folder import locked, write_start

COLLECT_EVERY = 50  # optimiser steps, the same on all ranks


def run(given: dict[str, Any]) -> None:
    """The verb. given: values of the YAML file and the flags, as in RunConfig."""
    world = read_world()
    values, stored = combined_values(given)
    given = absolute_paths(given, values, {} if stored is None else stored.values, world.say)
    config, _ = combined_config(given)
    obtain_dataset(config, world)  # before the process group, which would not wait as long as this may take
    launched = read_wishes(os.environ).launcher not in ("python", "srun")
    with StopSignals(world, launched) as signals:
        if launched:
            follow_launcher()
        try:
            asked = run_joined(given, config, world, signals)
        except Stopped as stop:
            raise before_training_began(stop, folder_of(config), world) from None
    if asked is not None:
        raise SystemExit(exit_code(asked))


def before_training_began(stop: Stopped, folder: Path, world: World) -> Stopped:
    """`stop` with the line that says what there is; the script that started us may start us again."""
    number = signal.Signals(stop.number)
    if world.leader:
        tell_outcome(f"stopped by {number.name} before training began")
    saved = checkpoint.found(folder / "checkpoints")
    return Stopped(number, not_begun_line(number, saved[-1][0] if saved else None))


def run_joined(given: dict[str, Any], config: RunConfig, world: World, signals: StopSignals) -> signal.Signals | None:
    """The run, from the process group's beginning to its end; returns the signal that ended it early."""
    join(world, config.device, 2 * config.engine.timeout_minutes)  # the watchdog, which knows more, speaks first
    # Rank 0 looks and resolves; the others take what it found, and its error where there is one.
    config, plan_text = world.on_leader(lambda: resolve_run(given, world))
    if world.size == 1:
        join(world, config.device, alone=config.engine.strategy != "single")
    dataset = agree_on_dataset(config, world)
    with contextlib.ExitStack() as stack:
        folder = folder_of(config)
        limits = 60 * config.engine.timeout_minutes, 60 * config.engine.step_timeout_minutes
        # What is left of a job's try on a machine that was cut off holds the folder until its own watchdog ends it.
        patience = 2 * min(limits) if restarts(os.environ) else 0
        world.on_leader(lambda: stack.enter_context(locked(folder, patience)) and None)
        watchdog = stack.enter_context(contextlib.closing(Watchdog(world, *limits)))
        plan = resolve(config, dataset)
        world.on_leader(lambda: refuse_unreached(plan, world.say))
        before_training(plan, world)
        device = choose_device(plan.config.device, world.local_rank)
        with explain_out_of_memory(folder, world.rank, device, lambda: ways_out(plan.config)):
            asked = train(Run(plan, world, dataset, watchdog, signals), plan_text)
    if world.leader:  # before the other ranks leave: launchers end all processes when the first ends badly
        tell_outcome("finished" if asked is None else f"stopped by {asked.name}")
    world.stop()
    return asked


def resolve_run(given: dict[str, Any], world: World) -> tuple[Any, str | None]:
    """The config with nothing left to infer, and the text of a new run's plan; UserError where a run was started otherwise."""
    config, stored = combined_config(given, world.say)
    plan = resolve(config, find_dataset(config.data, lambda line: None))  # what there is to say `agree_on_dataset` says
    if stored is None:
        return plan.config, render(plan)
    check_unchanged(stored, plan.config, given, lambda other: resolve(other, find_dataset(other.data)).config)
    return plan.config, None


def train(this: Run, plan_text: str | None) -> signal.Signals | None:
    """From the plan to the trained model; returns the signal that stopped it early. plan_text: of a new run; None: go on with an old one."""
    from trainer.data.tokenizers import Tokenizer

    config, world = this.config, this.world
    if not (plan_text is None and this.restore()):
        world.on_leader(lambda: start_anew(this.folder, world.say))
    if this.state.step >= config.max_steps and this.owed is None:
        world.say(
            f"{this.folder} is finished ({this.state.step} steps); raise --max_steps to go on, or choose another --run_dir"
        )
        return None
    if plan_text is None:
        world.on_leader(lambda: tell_schedule(this))
    described = local_folder(config.data, this.dataset)
    world.on_leader(lambda: write_start(this.folder, config, plan_text, described, world.say))
    tokenizer = Tokenizer.from_file(
        this.folder / "tokenizer.json", this.dataset.tokenizer.name, this.dataset.tokenizer.eot_id
    )
    world.say(f"{plan_text or ''}\n\noptimiser groups\n{this.engine.optimizer.table()}".lstrip() + "\n" + opening(this))
    told = this.state.step - (this.owed is not None)  # the last step of which rows and samples are kept
    report = Report(this.folder, this.plan, world, this.engine, told, this.state.seconds, this.rows)
    try:
        this.signals.begin(report.console.say)
        with collecting_by_hand():
            asked = loop(this, report, tokenizer)
        report.console.close()  # what follows stands below it
        if asked is None:
            finish(this, report, tokenizer)
        else:
            world.say(stopped_line(asked, this.state.step))
    finally:
        this.stream.close()
        report.close()
    this.engine.close()
    return asked


def start_anew(folder: Path, say: Callable[[str], None]) -> None:
    """Before step 0 in a folder that has rows or samples already: say so, and keep them under other names."""
    for name in ("metrics.jsonl", "samples.txt"):
        path = folder / name
        if not path.is_file() or path.stat().st_size == 0:
            continue
        number = 1
        while (kept := path.with_name(f"{path.stem}.before-{number}{path.suffix}")).exists():
            number += 1
        path.rename(kept)
        say(f"{folder} has no checkpoint: the run starts at step 0; {name} of before is kept as {kept.name}")


def tell_schedule(this: Run) -> None:
    """Say what another max_steps does to the learning rates of a run that goes on."""
    before = read_config(this.folder, lambda line: None).build().max_steps  # not yet written again
    line = schedule_change(this.config, before, this.state.step)
    if line:
        this.world.say(line)


def opening(this: Run) -> str:
    """What it is that trains, and how the batch begins and ends."""
    lengths, tokens = this.plan.sequence_lengths, this.config.batch.tokens_per_step
    with autocast(this.device, this.config.precision):
        # Offloaded weights are on another device.
        kernels = this.model.describe_kernels(this.device, this.config.data.separate_documents)
    threads = f"\n{thread_line()}" if this.device.type == "cpu" else ""
    return (
        f"\nengine: {this.engine.describe()}{threads}" + (f"\nkernels: {kernels}" if kernels else "") + "\n"
        f"{this.plan.parameters:,} parameters; sequences per step {tokens // lengths[0]:,} of {lengths[0]} tokens at first, "
        f"{tokens // lengths[-1]:,} of {lengths[-1]} at last; lr {this.config.optim.lr:.8f}"
    )


@contextlib.contextmanager
def collecting_by_hand() -> Iterator[None]:
    """Within, Python's garbage collector runs only when told: by itself it would hold up one process and then another."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def ways_out(config: Any) -> str:
    """What to try where memory ran out. config: resolved."""
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


def loop(this: Run, report: Report, tokenizer: Any) -> signal.Signals | None:
    """Step, and at their intervals evaluate, sample and save; returns the signal that ended it before the last step, or before
    the evaluation of the last step was made."""
    config, state = this.config, this.state

    def due(every: int) -> bool:
        return state.step == config.max_steps or (every > 0 and state.step % every == 0)

    asked = None if this.owed is None else make_up(this, this.owed, report, tokenizer)
    profiler = None
    if config.profile and state.step < config.max_steps:
        steps = state.step, config.max_steps
        profiler = Profiler(this.folder, this.world.rank, this.world.size, this.device, *steps, report.console.say)
    while state.step < config.max_steps and asked is None:
        report.step_done(this.optimiser_step())
        if profiler is not None:
            this.watchdog.at(state.step, "profile")
            profiler.step_done()
        if state.step % COLLECT_EVERY == 0:
            gc.collect(1)
        if report.save_failed:
            this.watchdog.at(state.step, "saving")
            this.saver.finish()
        asked = report.asked if state.step < config.max_steps else None
        save, evaluation = (
            due(config.checkpoint.every) or due(config.checkpoint.keep_every),
            due(config.evaluation.every),
        )
        if not (asked is not None or evaluation or save or due(config.log.every)):
            continue
        report.wait()  # for the device, which may wait for other ranks: still part of the step
        this.watchdog.at(state.step, "log row")
        accuracy = this.train_accuracy() if asked is None else None  # what a row costs is part of its step's time
        report.stop_clock()
        if not evaluation:
            report.flush(None, accuracy)
        elif asked is None:
            asked = evaluate(this, report, tokenizer, accuracy)
        if save or asked is not None:
            owed = report.withhold() if evaluation and asked is not None else None
            this.save(report.clock.seconds, report.sync(), owed)
        report.clock.start()
    if profiler is not None:
        profiler.close()
    this.saver.finish()
    return asked


def evaluate(this: Run, report: Report, tokenizer: Any, accuracy: float | None) -> signal.Signals | None:
    """Validation, the row of the step with it, a text sample and the curves. Returns the signal that broke validation off; nothing
    is told then."""
    config, step = this.config, this.state.step
    try:
        validation = this.validate()
    except Stopped as stop:
        return signal.Signals(stop.number)
    report.flush(validation, accuracy)
    if config.log.sample_tokens and step < config.max_steps:
        this.write_sample(tokenizer, config.log.sample_tokens, f"step {step}")
    this.watchdog.at(step, "curves")
    report.draw_curves()
    return None


def make_up(this: Run, row: dict[str, Any], report: Report, tokenizer: Any) -> signal.Signals | None:
    """The evaluation that the checkpoint owes which the run goes on from, and its `row`. Returns the signal that broke it off."""
    report.stop_clock()
    report.take_up(row)
    asked = evaluate(this, report, tokenizer, this.train_accuracy())
    if asked is None:
        this.settle(report.sync())
    report.clock.start()
    return asked


def finish(this: Run, report: Report, tokenizer: Any) -> None:
    """The closing demonstration and where everything lies."""
    text = ""
    if this.config.log.demo_tokens:
        sample = this.write_sample(tokenizer, this.config.log.demo_tokens, f"step {this.state.step}, final")
        text = "\n".join(textwrap.fill(line, 80) for line in sample.splitlines()) + "\n\n"
    if not this.world.leader:
        return
    last = report.last
    plugins = "".join(f" --plugin {module}" for module in plugins_of(this.folder))
    report.console.say(
        f"\n{text}{this.state.step:,} steps, {this.state.tokens:,} tokens in {last['seconds']:.1f} s of training: "
        f"validation loss {last['val_loss']:.4f}, {last['val_bits_per_byte']:.4f} bits/byte\n"
        f"{this.folder}: metrics.jsonl, curves.png, samples.txt, checkpoints; "
        f"`python -m trainer generate {this.folder}{plugins}` writes more"
    )
