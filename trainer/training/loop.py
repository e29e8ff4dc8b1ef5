"""`train`: from the plan to the trained model. step.py makes one optimiser step; this file decides when to evaluate or stop."""

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
from trainer.optim import names_by_role
from trainer.planning.expected import verdict
from trainer.planning.run_config import plugins_of
from trainer.recipes import schedule_change
from trainer.runs.folder import unused_name, write_start
from trainer.runs.report import Report, average_line
from trainer.runtime.device import device_name, thread_line
from trainer.runtime.signals import stopped_line
from trainer.training.early_stopping import ended, judge
from trainer.training.measuring import Evaluated
from trainer.training.profile import Profiler
from trainer.training.run import Run
from trainer.training.step import StepResult, optimiser_step

COLLECT_EVERY = 50  # optimiser steps, the same on all ranks


def train(run: Run, plan_text: str | None, steps_before: int | None) -> signal.Signals | None:
    """From the plan to the trained model. Returns the signal that stopped the run early, if any. plan_text: None to go on
    with an old run, whose max_steps was steps_before."""
    from trainer.data.tokenizers import Tokenizer

    config, world = run.config, run.world
    if not (plan_text is None and run.restore()):
        world.on_leader(lambda: start_anew(run.folder, world.say))
        run.begin()
    if run.owed is None and finished(run):
        world.say(finished(run))
        return None
    if steps_before is not None:
        world.on_leader(lambda: tell_changes(run, steps_before))
    described = local_folder(config.data, run.dataset)
    device = device_name(run.engine.device)
    world.on_leader(
        lambda: write_start(run.folder, config, plan_text, described, world.say, run.plan.laws, device=device)
    )
    tokenizer = Tokenizer.from_file(
        run.folder / "tokenizer.json", run.dataset.tokenizer.name, run.dataset.tokenizer.eot_id
    )
    groups = run.engine.optimizer.table(names_by_role(run.model))
    world.say(f"{plan_text or ''}\n\noptimiser groups\n{groups}".lstrip() + "\n" + opening(run))
    told = run.state.step - (run.owed is not None)  # the last step whose row and sample are kept
    report = Report(run.folder, run.plan, world, run.engine, told, run.state.seconds, run.rows)
    try:
        run.signals.begin(report.console.say)
        with collecting_by_hand():
            asked = loop(run, report, tokenizer)
        report.console.close()  # the next lines are printed below it
        if asked is None:
            finish(run, report, tokenizer)
        else:
            world.say(stopped_line(asked, run.state.step))
    finally:
        run.stream.close()
        report.close()
    run.engine.close()
    return asked


def finished(run: Run) -> str:
    """The line of a run that has nothing left to do; "" if it has."""
    step, early = run.state.step, ended(run)
    if step >= run.config.max_steps:
        return f"{run.folder} is finished ({step} steps); raise --max_steps to go on, or choose another --run_dir"
    if early:
        return (
            f"{run.folder} ended early at step {step:,}: {early}; raise --evaluation.patience to go on, or set it to 0"
        )
    return ""


def start_anew(folder: Path, say: Callable[[str], None]) -> None:
    """Before step 0: if the folder already has rows or samples, keep them under other names, and say so."""
    for name in ("metrics.jsonl", "samples.txt"):
        path = folder / name
        if not path.is_file() or path.stat().st_size == 0:
            continue
        kept = unused_name(path)
        path.rename(kept)
        say(f"{folder} has no checkpoint: the run starts at step 0; the old {name} is kept as {kept.name}")


def tell_changes(run: Run, steps_before: int) -> None:
    """Say how a new max_steps changes the learning rates of a run that goes on, and which loss it should end with."""
    line = schedule_change(run.config, steps_before, run.state.step)
    if line:
        run.world.say(line)
    if run.plan.expected is not None:
        run.world.say("  ".join(map(str, run.plan.expected.entry())))


def opening(run: Run) -> str:
    """The lines before training: engine, kernels, parameters, and the batch at the first and the last sequence length."""
    lengths, last = run.plan.sequence_lengths, run.config.max_steps - 1
    with autocast(run.device, run.config.precision):
        # Pass the run's device: offloaded weights are on another one.
        kernels = run.model.describe_kernels(run.device, run.config.data.separate_documents)
    threads = f"\n{thread_line()}" if run.device.type == "cpu" else ""
    trained = run.plan.trained
    frozen = (
        f", {trained:,} of them trained ({trained / run.plan.parameters:.2%})" if trained < run.plan.parameters else ""
    )
    return (
        f"\nengine: {run.engine.describe()}{threads}" + (f"\nkernels: {kernels}" if kernels else "") + "\n"
        f"{run.plan.parameters:,} parameters{frozen}; sequences per step {run.plan.sequences(0):,} of {lengths[0]} tokens at the start, "
        f"{run.plan.sequences(last):,} of {run.plan.sequence_length(last)} at the end; lr {run.config.optim.lr:.8f}"
    )


@contextlib.contextmanager
def collecting_by_hand() -> Iterator[None]:
    """Inside, Python's garbage collector runs only when called. By itself it would pause one process after the other."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def loop(run: Run, report: Report, tokenizer: Any) -> signal.Signals | None:
    """Make the optimiser steps; evaluate, sample and save at their intervals. Returns the signal that ended the loop before the
    last step or its evaluation was done, if any.

    All decisions are made here. The loop reads the results of a step after it has launched the next one, so the device never
    waits. All ranks see the same numbers, so they decide the same.
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
    while state.step < config.max_steps and stop is None and not ended(run):
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
        evaluate = due(config.evaluation.every) or run.measuring.due(state.step, config.max_steps)
        if not (stop is not None or evaluate or save or due(config.log.every)):
            continue
        result.wait()  # the device may wait for other ranks, which is part of the step's time
        run.watchdog.at(state.step, "log row")
        report.stop_clock()
        row, unreported, evaluated = report.row(result), None, None
        if evaluate and stop is None:
            evaluated, stop = evaluation(run, report, tokenizer)
        if evaluated is not None:
            save = judge(run, evaluated.validation) or bool(ended(run)) or save
        owed = row if evaluate and stop is not None else None  # the process that goes on makes its evaluation
        if owed is None:
            report.write(row | at_the_end(run), evaluated)
        check_finite(row)
        if evaluated is not None:
            show_progress(run, report, tokenizer)
        if save or stop is not None:
            run.save(report.clock.seconds, report.sync(), owed)
        report.clock.start()
    if profiler is not None:
        profiler.close()
    run.saver.finish()
    return stop


def at_the_end(run: Run) -> dict[str, Any]:
    """What only the last row of a run says: why it ends early, or which loss its plan expected."""
    early = ended(run)
    if early:
        return {"ended_early": early}
    expected = run.plan.expected
    return {} if expected is None or run.state.step < run.config.max_steps else expected.columns()


def evaluation(run: Run, report: Report, tokenizer: Any) -> tuple[Evaluated | None, signal.Signals | None]:
    """(results of the run's evaluation, None), or (None, the signal that stopped it)."""
    try:
        return run.evaluate(tokenizer, report.console.say), None
    except Stopped as stop:
        return None, signal.Signals(stop.number)


def show_progress(run: Run, report: Report, tokenizer: Any) -> None:
    """Write a text sample and the curves after an evaluation. After the last step, `finish` writes the sample."""
    step, tokens = run.state.step, run.config.log.sample_tokens
    if tokens and step < run.config.max_steps and not ended(run):
        report.sample(run.write_sample(tokenizer, tokens, f"step {step}"), step)
    run.watchdog.at(step, "curves")
    report.draw_curves()


def make_up(run: Run, row: dict[str, Any], report: Report, tokenizer: Any) -> signal.Signals | None:
    """Make the evaluation that was still to be made when the run's checkpoint was saved, and write its `row`. Returns the
    signal that stopped it, if any."""
    report.stop_clock()
    evaluated, stop = evaluation(run, report, tokenizer)
    if stop is None:
        assert evaluated is not None
        judge(run, evaluated.validation)
        report.write(row | at_the_end(run), evaluated)
        show_progress(run, report, tokenizer)
        run.settle(report.sync())
    report.clock.start()
    return stop


class FiniteCheck:
    """Checks each step's row. A step with a loss or gradient that is not finite changes nothing. It is skipped with a message,
    or ends the run.

    optim: OptimConfig; its non_finite and max_skips decide when to raise UserError.
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
                f"step {step}: loss or gradient is not finite ({self._skips} in a row); the weights are unchanged; go on "
                "from the last checkpoint with --optim.non_finite skip, or start with a lower --optim.lr in another --run_dir"
            )
        self._say(f"step {step}: loss or gradient is not finite; the step is skipped")


def finish(run: Run, report: Report, tokenizer: Any) -> None:
    """Print the closing demonstration, the results, and where the files are."""
    text = ""
    if run.config.log.demo_tokens:
        sample = run.write_sample(tokenizer, run.config.log.demo_tokens, f"step {run.state.step}, final")
        report.sample(sample, run.state.step)
        text = "\n".join(textwrap.fill(line, 80) for line in sample.splitlines()) + "\n\n"
    if not run.world.leader:
        return
    last, early = report.last, ended(run)
    if early:
        text += f"ended early at step {run.state.step:,} of {run.config.max_steps:,}: {early}\n\n"
    if run.best:
        text += f"best: step {run.best[0][1]:,}, {run.state.metric} {run.best[0][0]:.4f}; `--step best` chooses it\n\n"
    off = verdict(last)
    text += f"{off}\n\n" * bool(off)
    plugins = "".join(f" --plugin {module}" for module in plugins_of(run.folder))
    seconds = last.get("compile_seconds", 0.0)  # missing if the last row was owed by an older release
    average = average_line(last)
    compiling = f" ({seconds:.1f} s of them compiling)" if seconds >= 0.05 else ""
    report.console.say(
        f"\n{text}{run.state.step:,} steps, {run.state.tokens:,} tokens in {last['seconds']:.1f} s of training{compiling}: "
        f"validation loss {last['val_loss']:.4f}, {last['val_bits_per_byte']:.4f} bits/byte{'; ' * bool(average)}{average}\n"
        f"{run.folder}: metrics.jsonl, curves.png, samples.txt, checkpoints; "
        f"`python -m trainer generate {run.folder}{plugins}` writes more"
    )
