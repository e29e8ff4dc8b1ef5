"""What a comparison will cost: the speed of each arm, measured by `bench`, times what it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.commands.compare.experiment import Experiment
from trainer.commands.compare.spec import Arm, folder_name
from trainer.core import yaml_text
from trainer.core.errors import UserError
from trainer.core.text import markdown_table, printable
from trainer.data.stream import find_dataset
from trainer.planning.memory import GIB
from trainer.planning.speed import is_measured, measure_speed


class Speeds:
    """Measures the speed of arms, each once: `folder` keeps the benches. slot: the environment of the device."""

    def __init__(self, folder: Path, slot: dict[str, str], plugins: list[str], say: Callable[[str], None]) -> None:
        self.folder, self.slot, self.plugins, self.say = folder, slot, plugins, say
        self._benches: dict[str, Path] = {}  # keys of a run -> the bench of the first arm that has them

    def tokens_per_second(self, arm: Arm, plan: Any = None) -> float:
        return self.measured(arm)["tokens_per_second"]["median"]

    def peak_memory_bytes(self, arm: Arm) -> int:
        return self.measured(arm)["peak_memory_bytes"]

    def measured(self, arm: Arm) -> dict[str, Any]:
        """The row of the arm's bench. UserError if it cannot be measured."""
        own = self.folder / f"{folder_name(arm.name)}-scale{arm.scale:g}"
        folder = self._benches.setdefault(yaml_text.dump(yaml_text.untyped(arm.values)), own)
        if not is_measured(arm.values, folder):
            self.say(f"measuring the speed of {arm.name} at scale {arm.scale:g}")
        return measure_speed(arm.values, folder, self.plugins, self.slot)


@dataclass(frozen=True)
class Estimate:
    """What is still to be trained, at most. text: a table of the arms, and notes; hours: of one device; left_out: the arms
    that cannot run or be measured."""

    text: str
    runs: int
    hours: float
    left_out: tuple[str, ...] = ()


def estimate(experiment: Experiment, price: float | None, speeds: Speeds, at_once: int) -> Estimate:
    """What each arm still has to train, and the sum. at_once: runs at a time."""
    rows = [
        ["arm", "scale", "parameters", "steps", "tokens", "TFLOP", "tokens/s", "min a run", "runs left", "hours", "GiB"]
    ]
    notes, left_out, total, most = [], [], 0.0, 0
    for arm in experiment.arms:
        length = experiment.lengths[arm.key]
        try:
            if length.refused:
                raise UserError(length.refused)
            rate, memory = speeds.tokens_per_second(arm), speeds.peak_memory_bytes(arm)
        except UserError as error:
            left_out.append(arm.name)
            notes.append(f"{arm.name} at scale {arm.scale:g} left out: {printable(error)}")
            continue
        seconds = length.tokens / rate + validation_seconds(arm, length.steps, rate)
        runs = experiment.most_runs_left(arm)
        total, most = total + seconds * runs, most + runs
        rows.append(
            [
                *(arm.name, f"{arm.scale:g}", f"{length.parameters:,}", f"{length.steps:,}", f"{length.tokens:,}"),
                *(f"{length.flops / 1e12:,.4g}", f"{rate:,.0f}", f"{seconds / 60:.1f}", str(runs)),
                *(f"{seconds * runs / 3600:.2f}", f"{memory / GIB:.2f}"),
            ]
        )
    hours = total / 3600
    cost = "" if price is None else f", {hours * price:,.2f} at {price:g} an hour and device"
    tried = experiment.facts["most_learning_rates"]
    sweeps = (
        f"at most {most} runs: a sweep ends when it has bracketed its best learning rate, at the latest after {tried}"
    )
    notes = [
        sweeps if tried > 1 else f"runs left: {most}, each at one learning rate",
        f"{hours:.2f} hours of one device{cost}; {hours / at_once:.2f} hours with {at_once} at a time",
        f"tokens/s and GiB: measured by `bench` ({speeds.folder}); with validation, without start and samples",
        *notes,
    ]
    return Estimate(
        "\n".join([*markdown_table(rows), "", *(f"- {note}" for note in notes)]), most, hours, tuple(left_out)
    )


def validation_seconds(arm: Arm, steps: int, rate: float) -> float:
    """Seconds of all validations of a run: the last one reads the whole split, and a moving average reads all once more. A forward
    pass takes a third of a training step's FLOPs."""
    config = arm.config()
    dataset = find_dataset(config.data)
    if dataset is None:
        return 0.0
    whole = dataset.splits["validation"].tokens
    part = min(whole, config.evaluation.max_tokens or whole)
    before = (steps - 1) // config.evaluation.every if config.evaluation.every else 0
    times = 2 if config.optim.ema else 1
    return times * (before * part + whole) / (3 * rate)
