"""`evaluate`: measures the loss of a checkpoint on a split, or its answers to tasks."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from trainer.commands import Verb, run_folder
from trainer.core.config import (
    LONGEST,
    STEP,
    TASKS_DIR_HELP,
    TASKS_HELP,
    TASKS_LIMIT_HELP,
    WEIGHTS,
    DataConfig,
    Precision,
    Step,
)
from trainer.core.errors import UserError
from trainer.core.files import user_path
from trainer.core.settings import setting
from trainer.core.text import printable

if TYPE_CHECKING:
    from trainer.data.raw_text import RawText
    from trainer.inference.tasks.suite import Suite
    from trainer.runs.opening import OpenRun
    from trainer.runtime.distributed import World

TELL_SECONDS = 30.0  # between two lines about the progress


@dataclass
class EvaluateConfig:
    """`evaluate`: loss of a run's checkpoint on a validation split."""

    run_dir: str | None = setting(None, "folder of the run (the flag itself is optional)")
    step: Step = setting(None, STEP, low=0)
    weights: str = setting("evaluation", WEIGHTS)
    data: DataConfig = field(default_factory=DataConfig)
    text: str | None = setting(None, "a file of UTF-8 text to evaluate on, instead of a dataset")
    split: Literal["validation", "train"] = setting("validation", "which split")
    protocol: Literal["full", "hlb", "both"] = setting("both", "see evaluation.protocol")
    tasks: list[str] = setting((), TASKS_HELP + "; instead of the loss")
    tasks_dir: str | None = setting(None, TASKS_DIR_HELP)
    tasks_limit: int = setting(0, TASKS_LIMIT_HELP, low=0)
    shots: int | None = setting(
        None, "examples in the prompt of each question; auto: as the task says, else none", low=0
    )
    metrics: list[str] = setting((), "names of your own metrics, which --plugin FILE.py registers; instead of the loss")
    sequence_length: int | None = setting(None, "window length; auto: the run's", low=1, high=LONGEST)
    seed: int | None = setting(None, "seed of the hlb windows; auto: the run's", low=0, high=2**62)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to compute")
    precision: Precision = setting("auto", "compute type; auto: the run's")


def run(config: EvaluateConfig, as_json: bool = False) -> None:
    """Run the verb: print a checkpoint's loss on its own validation split, on another dataset with the same tokenizer, or on a text."""
    from trainer.inference.evaluation import check_enough, validate
    from trainer.runs.opening import open_run
    from trainer.runtime.distributed import join, read_world

    world = read_world()
    join(world, config.device)
    instead = load_asked(config, world)
    opened = open_run(config.run_dir, config.step, config.device, config.precision, world, config.weights)
    if instead is not None:
        answer(instead, config, opened, world, as_json)
        return
    split = opened.split(config.data, config.split) if config.text is None else text_of(config, opened, world.say)
    check_enough(split, config.protocol, "protocol")
    trained, length = opened.config, length_of(config, opened)
    protocol = dataclasses.replace(trained.evaluation, protocol=config.protocol, sequence_length=length)
    asked = dataclasses.replace(trained, evaluation=protocol)
    results = validate(opened, split, asked, world, opened.step, config.seed)
    if world.leader:
        where = {"run": str(opened.folder), "step": opened.step, "weights": config.weights}
        report = where | {"data": str(split.folder), "split": split.name} | results
        sys.stdout.write((json.dumps(report) if as_json else render(report)) + "\n")
    world.stop()


def length_of(config: EvaluateConfig, opened: OpenRun) -> int:
    """Tokens that the model reads at once. UserError if they are more than its context."""
    trained = opened.config
    length = config.sequence_length or trained.evaluation.sequence_length or trained.batch.sequence_length
    if length is None:
        raise UserError("sequence_length: the run's config does not set it; give --sequence_length")
    opened.check_length(length)
    return length


class Asked(NamedTuple):
    """What is measured instead of the loss."""

    suite: Suite | None
    metrics: list[str]


def load_asked(config: EvaluateConfig, world: World) -> Asked | None:
    """The tasks and metrics that are asked for, before the model is read. None if there are none."""
    from trainer.checkpoint.format import together
    from trainer.inference.metrics import check_metrics
    from trainer.inference.tasks.suite import Suite, split_names

    names, metrics = split_names(config.tasks, "tasks"), split_names(config.metrics, "metrics")
    if not names and not metrics:
        return None
    if config.text is not None or config.data.path is not None:
        raise UserError("tasks, metrics: need no data; leave out data.path and text")
    check_metrics(metrics, "metrics")
    loaded: list[Suite] = []
    if names:
        together(lambda: loaded.append(Suite(names, config.tasks_dir, config.tasks_limit, config.shots)), world)
    return Asked(loaded[0] if loaded else None, metrics)


def answer(asked: Asked, config: EvaluateConfig, opened: OpenRun, world: World, as_json: bool) -> None:
    """Measure the metrics, and let the model answer the tasks. Prints the figures, and keeps those of tasks in RUN/evaluation."""
    from trainer.inference.metrics import Measured, measure
    from trainer.runs.console import format_number
    from trainer.runs.task_results import columns, table, write_results

    record: dict[str, Any] = {"run": str(opened.folder), "step": opened.step, "weights": config.weights}
    found: dict[str, float] = {}
    for name in asked.metrics:
        found |= measure(name, Measured(opened, opened.tokenizer, opened.step, world, world.say))
    if found:
        record["metrics"] = found
    if asked.suite is not None:
        length = length_of(config, opened)
        record |= asked.suite.evaluate(opened, opened.tokenizer, length, world, Progress(world.say))
    if world.leader:
        lines = [f"{name} {format_number(value)}" for name, value in found.items()]
        lines += [table(record)] if asked.suite is not None else []
        sys.stdout.write((json.dumps(record) if as_json else "\n".join(lines)) + "\n")
        sys.stdout.flush()
        if asked.suite is not None:
            world.say(f"{write_results(opened.folder, record)}: {record['documents_per_second']:,.1f} documents/s")
            found |= columns(record)
        tell_wandb(opened, found, config.weights, world)
    world.stop()


def tell_wandb(opened: OpenRun, figures: dict[str, float], weights: str, world: World) -> None:
    """If the run is recorded by wandb: add the figures to its summary there, as evaluate_FIGURE, with their step."""
    from trainer.runs.wandb import Wandb

    log = opened.config.log
    if log.wandb == "disabled":
        return
    prefix = "evaluate_" if weights == "evaluation" else f"evaluate_{weights}_"
    recorder = Wandb(log.wandb, log.wandb_project, opened.folder, {}, world)
    recorder.summarise({f"{prefix}{name}": value for name, value in figures.items()} | {f"{prefix}step": opened.step})
    recorder.close()


class Progress:
    """Says every half minute how far a long evaluation is."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._told = say, time.monotonic()

    def __call__(self, where: str) -> None:
        if time.monotonic() - self._told >= TELL_SECONDS:
            self._told = time.monotonic()
            self._say(where)


def text_of(config: EvaluateConfig, opened: OpenRun, say: Callable[[str], None]) -> RawText:
    """The text to evaluate on. UserError if a dataset is named too."""
    from trainer.data.dataset import TOKENIZER
    from trainer.data.raw_text import RawText

    if config.data.path is not None or config.split != "validation":
        raise UserError("text: is evaluated instead of a dataset; leave out data.path and split")
    path, own = user_path(config.text or "", "text"), opened.tokenizer
    return RawText(path, opened.folder / TOKENIZER, own.eot_id, own.vocab_size, say)


def render(report: dict[str, Any]) -> str:
    """The results as a few lines."""
    from trainer.inference.evaluation import ESTIMATED
    from trainer.runs.console import format_number

    which = "" if report["weights"] == "evaluation" else f", weights {report['weights']}"
    lines = [printable(f"{report['run']}, step {report['step']}{which}, {of_what(report)}")]
    for protocol in ("full", "hlb"):
        if protocol in report:
            values = report[protocol]
            shown = [
                f"{key} {format_number(value)}" if isinstance(value, float) else f"{key} {value:,}"
                for key, value in values.items()
                if value is not None and not isinstance(value, bool)
            ]
            lines.append(f"{protocol}: " + ", ".join(shown))
            if values["bits_per_byte_is_estimate"]:
                lines[-1] += f" (figures per byte or word are estimates: {ESTIMATED[protocol]})"
    return "\n".join(lines)


def of_what(report: dict[str, Any]) -> str:
    return report["data"] if report["split"] == "text" else f"{report['split']} split of {report['data']}"


VERB = Verb(
    name="evaluate",
    help="loss of a run's checkpoint on a validation split, or its figures in tasks",
    config=EvaluateConfig,
    run=run,
    json=True,
    positional=run_folder,
)
