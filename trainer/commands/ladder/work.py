"""What all that a ladder does needs: its rungs with their plans, its experiments, and the loss of a run."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.commands.compare.budget import Length, plan_of, with_rate
from trainer.commands.compare.command import dataset_finder, say
from trainer.commands.compare.estimate import Speeds, estimate
from trainer.commands.compare.experiment import SPEED, Experiment, Task, stored_experiment
from trainer.commands.compare.learning_rates import RULE, rounded
from trainer.commands.compare.queue import Queue, device_slots
from trainer.commands.compare.spec import Arm
from trainer.commands.ladder import LadderConfig
from trainer.commands.ladder.laws_file import laws_of
from trainer.commands.ladder.spec import Rung, arm, rung
from trainer.core.errors import UserError
from trainer.core.text import printable, printable_lines
from trainer.data.obtain import obtain_dataset
from trainer.planning.laws import BATCH_POWER, Laws
from trainer.planning.plan import Plan
from trainer.planning.run_config import plugins_in
from trainer.runtime.distributed import World

MOST_LOSS = 100.0  # nats a token; even ln of 2^31 ids is 21.5: a run that ends so far above has learned nothing


class Work:
    """What a ladder and its checks need. folder: of the ladder."""

    def __init__(self, config: LadderConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.plugins = plugins_in(sys.argv[1:])
        self.datasets: Callable[[Any], Any] = dataset_finder()
        self.plans: dict[tuple[float, int | None], Plan] = {}  # by scale and batch: the length changes the rate alone

    def rungs(self, sizes: list[tuple[float, float]]) -> list[Rung]:
        """The rungs of (scale, multiple) pairs; prepares the data where it is missing."""
        arms = [(arm(self.config, scale, multiple), multiple) for scale, multiple in sizes]
        with contextlib.suppress(UserError):  # the plan reports it
            obtain_dataset(arms[0][0].config(), World())
        return [self.rung(made, multiple) for made, multiple in arms]

    def rung(self, made: Arm, multiple: float, batch: int | None = None) -> Rung:
        """The rung of an arm. batch: tokens of a step, if the arm sets them."""
        found = rung(made, multiple, self.plan(made, batch))
        return dataclasses.replace(found, length=with_rate(found.length, made, found.plan, self.datasets))

    def plan(self, made: Arm, batch: int | None = None) -> Plan:
        """The plan of the arm's runs. batch: tokens of a step, if the arm sets them."""
        key = made.scale, batch
        if key not in self.plans:
            self.plans[key] = plan_of(made, self.datasets)
        return self.plans[key]

    def at_batch(self, one: Rung, batch: int) -> Rung:
        """The rung with other tokens of a step, as many in all, and a learning rate that follows the square root of the batch."""
        made = arm(self.config, one.arm.scale, one.multiple, batch)
        rate = one.length.learning_rate * (batch / one.plan.config.batch.tokens_per_step) ** BATCH_POWER
        made = dataclasses.replace(made, learning_rates=(rounded(rate),))
        return self.rung(made, one.multiple, batch)

    def laws(self, rungs: list[Rung]) -> Laws:
        """The laws that the folder has so far. UserError if they are of something else than these rungs, or there are no data."""
        config = rungs[0].arm.config()
        obtain_dataset(config, World())
        return laws_of(self.folder, rungs, self.datasets(config.data))

    def experiment(self, name: str, rungs: list[Rung], seeds: list[int]) -> Experiment:
        """The experiment of these rungs in the folder `name`, each with one learning rate."""
        folder = self.folder / name
        stored = stored_experiment(folder)
        facts = {
            "name": f"{self.folder.name} {name}",
            "command": ["python", "-m", "trainer", *sys.argv[1:]],
            "budget": "tokens_per_parameter",
            "baseline": rungs[0].arm.name,
            "rule": RULE.format(most=1),
            "seeds": list(seeds),
            "tuning_seed": stored["tuning_seed"] if stored else None,  # nothing is tuned; an earlier release wrote one
            "most_learning_rates": 1,
        }
        made = Experiment(folder, facts, [one.arm for one in rungs], stored)
        check_lengths(folder, made, rungs)
        made.lengths = {one.arm.key: one.length for one in rungs}
        return made

    def train(self, experiment: Experiment) -> bool:
        """Train what is missing; false if only the cost was asked for."""
        slots = device_slots(self.config.jobs, experiment.arms[0].config().device)
        if self.config.estimate:
            speeds = Speeds(experiment.folder / SPEED, slots[0], self.plugins, say)
            sys.stdout.write(printable_lines(estimate(experiment, self.config.price, speeds, len(slots)).text) + "\n")
            return False
        experiment.write()
        Queue(experiment, slots, self.plugins, say).run()
        return True


def check_sizes(rungs: list[Rung]) -> None:
    """UserError if two scales are the same model: below 1 M parameters the dial's steps are coarse."""
    scales: dict[int, float] = {}
    for one in rungs:
        other = scales.setdefault(one.size, one.arm.scale)
        if other != one.arm.scale:
            raise UserError(
                f"scales: {other:g} and {one.arm.scale:g} are one size, {one.size:,} parameters without embeddings and head; choose "
                "others (`plan --model_scale S` shows the shapes)"
            )


def check_lengths(folder: Path, experiment: Experiment, rungs: list[Rung]) -> None:
    """UserError if runs of the folder have another length or learning rate than the rungs: the program, the data or the rule has changed."""
    for one in rungs:
        before = experiment.lengths.get(one.arm.key)
        if before is not None and decisive(before) != decisive(one.length):
            raise UserError(
                f"ladder_dir: {printable(folder)} has {one.arm.name} at scale {one.arm.scale:g} with {decisive(before)}, now it has "
                f"{decisive(one.length)}; choose another --ladder_dir"
            )


def decisive(length: Length) -> str:
    """What decides the loss of a rung's runs, and must not change in a folder."""
    return (
        f"{length.parameters:,} parameters, {length.steps:,} steps and learning rate {rounded(length.learning_rate):g}"
    )


def loss_or_diverged(experiment: Experiment, task: Task) -> float:
    """The loss of a run, infinity if it diverged or is above MOST_LOSS. UserError if it failed, or its loss is not above 0."""
    state = experiment.state(task)
    if state.word not in ("finished", "diverged"):
        raise UserError(
            f"{task.name}: {state.word}: {state.message or 'it has no loss'}; the same command tries it again"
        )
    loss = float("inf") if state.loss is None else state.loss
    if not loss > 0:
        raise UserError(
            f"{task.name}: has a validation loss of {loss:g}, and a law is of losses above 0; delete {printable(experiment.run_folder(task))}, "
            "and the same command trains it again"
        )
    return loss if loss <= MOST_LOSS else float("inf")
