"""`train`: from the command to the trained model. What a step is stands in run.py; here is when to look and what to keep."""

from __future__ import annotations

import contextlib
import gc
import signal
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainer.data.stream import local_folder
from trainer.engine.base import autocast
from trainer.optim.schedules import schedule_change
from trainer.planning.run_config import plugins_of
from trainer.runs.folder import write_start
from trainer.runs.report import Report
from trainer.runtime.device import thread_line
from trainer.runtime.signals import stopped_line
from trainer.training.profile import Profiler
from trainer.training.run import Run

COLLECT_EVERY = 50  # optimiser steps, the same on all ranks


def train(run: Run, plan_text: str | None, steps_before: int | None) -> signal.Signals | None:
    """From the plan to the trained model; returns the signal that stopped it early. plan_text: of a new run; None: go on with an
    old one, whose max_steps was steps_before."""
    from trainer.data.tokenizers import Tokenizer

    config, world = run.config, run.world
    if not (plan_text is None and run.restore()):
        world.on_leader(lambda: start_anew(run.folder, world.say))
    if run.state.step >= config.max_steps:
        world.say(
            f"{run.folder} is finished ({run.state.step} steps); raise --max_steps to go on, or choose another --run_dir"
        )
        return None
    if steps_before is not None:
        world.on_leader(lambda: tell_schedule(run, steps_before))
    described = local_folder(config.data, run.dataset)
    world.on_leader(lambda: write_start(run.folder, config, plan_text, described, world.say))
    tokenizer = Tokenizer.from_file(
        run.folder / "tokenizer.json", run.dataset.tokenizer.name, run.dataset.tokenizer.eot_id
    )
    world.say(f"{plan_text or ''}\n\noptimiser groups\n{run.engine.optimizer.table()}".lstrip() + "\n" + opening(run))
    report = Report(run.folder, run.plan, world, run.engine, run.state.step, run.state.seconds, run.rows)
    try:
        run.signals.begin(report.console.say)
        with collecting_by_hand():
            asked = loop(run, report, tokenizer)
        report.console.close()  # what follows stands below it
        if asked is None:
            finish(run, report, tokenizer)
        else:
            world.say(stopped_line(asked, run.state.step))
    finally:
        run.stream.close()
        report.close()
    run.engine.close()
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


def tell_schedule(run: Run, steps_before: int) -> None:
    """Say what another max_steps does to the learning rates of a run that goes on."""
    line = schedule_change(run.config, steps_before, run.state.step)
    if line:
        run.world.say(line)


def opening(run: Run) -> str:
    """What it is that trains, and how the batch begins and ends."""
    lengths, tokens = run.plan.sequence_lengths, run.config.batch.tokens_per_step
    with autocast(run.device, run.config.precision):
        # Offloaded weights are on another device.
        kernels = run.model.describe_kernels(run.device, run.config.data.separate_documents)
    threads = f"\n{thread_line()}" if run.device.type == "cpu" else ""
    return (
        f"\nengine: {run.engine.describe()}{threads}" + (f"\nkernels: {kernels}" if kernels else "") + "\n"
        f"{run.plan.parameters:,} parameters; sequences per step {tokens // lengths[0]:,} of {lengths[0]} tokens at first, "
        f"{tokens // lengths[-1]:,} of {lengths[-1]} at last; lr {run.config.optim.lr:.8f}"
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


def loop(run: Run, report: Report, tokenizer: Any) -> signal.Signals | None:
    """Step, and at their intervals evaluate, sample and save; returns the signal that ended it before the last step."""
    config, state = run.config, run.state

    def due(every: int) -> bool:
        return state.step == config.max_steps or (every > 0 and state.step % every == 0)

    asked = None
    profiler = None
    if config.profile:
        steps = state.step, config.max_steps
        profiler = Profiler(run.folder, run.world.rank, run.world.size, run.device, *steps, report.console.say)
    while state.step < config.max_steps and asked is None:
        report.step_done(run.optimiser_step())
        if profiler is not None:
            run.watchdog.at(state.step, "profile")
            profiler.step_done()
        if state.step % COLLECT_EVERY == 0:
            gc.collect(1)
        if report.save_failed:
            run.watchdog.at(state.step, "saving")
            run.saver.finish()
        asked = report.asked if state.step < config.max_steps else None
        save = asked is not None or due(config.checkpoint.every) or due(config.checkpoint.keep_every)
        evaluate = asked is None and due(config.evaluation.every)
        if not (evaluate or save or due(config.log.every)):
            continue
        report.wait()  # for the device, which may wait for other ranks: still part of the step
        run.watchdog.at(state.step, "log row")
        accuracy = run.train_accuracy() if asked is None else None  # what a row costs is part of its step's time
        report.stop_clock()
        report.flush(run.validate() if evaluate else None, accuracy)
        if evaluate and config.log.sample_tokens and state.step < config.max_steps:
            run.write_sample(tokenizer, config.log.sample_tokens, f"step {state.step}")
        if evaluate:
            run.watchdog.at(state.step, "curves")
            report.draw_curves()
        if save:
            run.save(report.clock.seconds, report.sync())
        report.clock.start()
    if profiler is not None:
        profiler.close()
    run.saver.finish()
    return asked


def finish(run: Run, report: Report, tokenizer: Any) -> None:
    """The closing demonstration and where everything lies."""
    text = ""
    if run.config.log.demo_tokens:
        sample = run.write_sample(tokenizer, run.config.log.demo_tokens, f"step {run.state.step}, final")
        text = "\n".join(textwrap.fill(line, 80) for line in sample.splitlines()) + "\n\n"
    if not run.world.leader:
        return
    last = report.last
    plugins = "".join(f" --plugin {module}" for module in plugins_of(run.folder))
    report.console.say(
        f"\n{text}{run.state.step:,} steps, {run.state.tokens:,} tokens in {last['seconds']:.1f} s of training: "
        f"validation loss {last['val_loss']:.4f}, {last['val_bits_per_byte']:.4f} bits/byte\n"
        f"{run.folder}: metrics.jsonl, curves.png, samples.txt, checkpoints; "
        f"`python -m trainer generate {run.folder}{plugins}` writes more"
    )
