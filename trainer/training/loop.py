"""`train`: from the plan to the trained model. step.py makes one optimiser step; here is when to evaluate, save and stop."""

from __future__ import annotations

import contextlib
import gc
import signal
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainer.core.errors import Stopped, UserError
from trainer.data.stream import local_folder
from trainer.engine.base import autocast
from trainer.planning.run_config import plugins_of
from trainer.recipes import schedule_change
from trainer.runs.folder import write_start
from trainer.runs.report import Report
from trainer.runtime.device import thread_line
from trainer.runtime.signals import stopped_line
from trainer.training.profile import Profiler
from trainer.training.run import Run
from trainer.training.step import StepResult, optimiser_step

COLLECT_EVERY = 50  # optimiser steps, the same on all ranks


def train(run: Run, plan_text: str | None, steps_before: int | None) -> signal.Signals | None:
    """From the plan to the trained model; returns the signal that stopped it early. plan_text: of a new run; None: go on with an
    old one, whose max_steps was steps_before."""
    from trainer.data.tokenizers import Tokenizer

    config, world = run.config, run.world
    if not (plan_text is None and run.restore()):
        world.on_leader(lambda: start_anew(run.folder, world.say))
    if run.state.step >= config.max_steps and run.owed is None:
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
    told = run.state.step - (run.owed is not None)  # the last step of which rows and samples are kept
    report = Report(run.folder, run.plan, world, run.engine, told, run.state.seconds, run.rows)
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
    """Within, Python's garbage collector runs only when called: by itself it would stop one process after the other."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def loop(run: Run, report: Report, tokenizer: Any) -> signal.Signals | None:
    """Step, and at their intervals evaluate, sample and save. Returns the signal that ended it before the last step, or before
    the evaluation of the last step was made.

    All decisions are taken here. What the device measured of a step is looked at when the next step has been launched, so
    the device never waits; all ranks see the same numbers, and so decide the same.
    """
    config, state = run.config, run.state
    check_finite = FiniteCheck(config.optim, report.console.say)

    def due(every: int) -> bool:
        return state.step == config.max_steps or (every > 0 and state.step % every == 0)

    stop = None if run.owed is None else make_up(run, run.owed, report, tokenizer)
    previous: StepResult | None = None
    unreported: StepResult | None = None
    profiler = None
    if config.profile and state.step < config.max_steps:
        steps = state.step, config.max_steps
        profiler = Profiler(run.folder, run.world.rank, run.world.size, run.device, *steps, report.console.say)
    while state.step < config.max_steps and stop is None:
        result = optimiser_step(run)
        if unreported is not None:
            row = report.row(unreported)
            report.write(row)
            check_finite(row)
        unreported = result
        report.stamp()
        if profiler is not None:
            run.watchdog.at(state.step, "profile")
            profiler.step_done()
        if state.step % COLLECT_EVERY == 0:
            gc.collect(1)
        if previous is not None:
            if previous.save_failed:
                run.watchdog.at(state.step, "saving")
                run.saver.finish()
            stop = previous.stop_signal if state.step < config.max_steps else None
        previous = result
        save = due(config.checkpoint.every) or due(config.checkpoint.keep_every)
        evaluate = due(config.evaluation.every)
        if not (stop is not None or evaluate or save or due(config.log.every)):
            continue
        result.wait()  # for the device, which may wait for other ranks: still part of the step
        run.watchdog.at(state.step, "log row")
        report.stop_clock()
        row, unreported, validation = report.row(result), None, None
        if evaluate and stop is None:
            validation, stop = validated(run)
        owed = row if evaluate and stop is not None else None  # its evaluation is left to the process that goes on
        if owed is None:
            report.write(row, validation)
        check_finite(row)
        if validation is not None:
            show_progress(run, report, tokenizer)
        if save or stop is not None:
            run.save(report.clock.seconds, report.sync(), owed)
        report.clock.start()
    if profiler is not None:
        profiler.close()
    run.saver.finish()
    return stop


def validated(run: Run) -> tuple[dict[str, Any] | None, signal.Signals | None]:
    """(results of the run's evaluation, None), or (None, the signal that broke it off)."""
    try:
        return run.validate(), None
    except Stopped as stop:
        return None, signal.Signals(stop.number)


def show_progress(run: Run, report: Report, tokenizer: Any) -> None:
    """A text sample and the curves, after an evaluation. The last sample is the closing demonstration."""
    step, tokens = run.state.step, run.config.log.sample_tokens
    if tokens and step < run.config.max_steps:
        run.write_sample(tokenizer, tokens, f"step {step}")
    run.watchdog.at(step, "curves")
    report.draw_curves()


def make_up(run: Run, row: dict[str, Any], report: Report, tokenizer: Any) -> signal.Signals | None:
    """Make the evaluation that the checkpoint owes which the run goes on from, and write its `row`. Returns the signal that broke
    it off."""
    report.stop_clock()
    validation, stop = validated(run)
    if stop is None:
        report.write(row, validation)
        show_progress(run, report, tokenizer)
        run.settle(report.sync())
    report.clock.start()
    return stop


class FiniteCheck:
    """Called with each step's row. A step that is not finite has changed nothing; it is skipped and said, or ends the run.

    optim: OptimConfig; UserError as its non_finite and max_skips say.
    """

    def __init__(self, optim: Any, say: Callable[[str], None]) -> None:
        self._optim, self._say = optim, say
        self._skips = 0  # in a row

    def __call__(self, row: dict[str, Any]) -> None:
        step, finite = row["step"], row["loss"] is not None
        self._skips = 0 if finite else self._skips + 1
        if finite:
            return
        if self._optim.non_finite == "stop" or self._skips > self._optim.max_skips:
            raise UserError(
                f"step {step}: loss or gradient is not finite ({self._skips} in a row); it did not touch the weights; go on "
                "from the last checkpoint with --optim.non_finite skip, or start with a lower --optim.lr in another --run_dir"
            )
        self._say(f"step {step}: loss or gradient is not finite; the step is skipped")


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
