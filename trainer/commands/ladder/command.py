"""What the verb does, in order: read the spec, train the sizes, fit, write the prediction, train the held-out size, report.

ladder-NAME/losses/            the runs that the law is fitted to: an experiment of `compare`
            prediction.json    the law and what it expects of the held-out run; written before that run begins, and never again
            held-out/          the run that was predicted
            learning-rates/    the sweeps of `--check lr`
            batches/           the sweeps of `--check batch`
            laws.yaml          the laws that were found, for `dial`
            ladder.md .json .png
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
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
from trainer.commands.ladder.fit import fit
from trainer.commands.ladder.laws_file import keep, law_of_batches, law_of_rates, laws_of, origin
from trainer.commands.ladder.page import BATCHES, RATES, publish_losses, publish_sweeps
from trainer.commands.ladder.rates import FACTOR, Optimum, first_batches, next_batch, optimum
from trainer.commands.ladder.spec import (
    Rung,
    arm,
    check_numbers,
    held_out_multiple,
    held_out_scale,
    ladder_folder,
    means_of,
    middle,
    rung,
)
from trainer.core.errors import UserError
from trainer.core.files import read_json, sealed, write_file
from trainer.core.text import printable, printable_lines
from trainer.data.obtain import obtain_dataset
from trainer.planning.laws import BATCH_POWER, SHARE, Fit, Laws, LossLaw
from trainer.planning.plan import Plan
from trainer.planning.run_config import plugins_in
from trainer.runs.folder import locked
from trainer.runtime.distributed import World
from trainer.runtime.environment import environment

PREDICTION = "prediction.json"
HELD_OUT = "held-out"
MOST_LOSS = 100.0  # nats a token; even ln of 2^31 ids is 21.5: a run that ends so far above has learned nothing


def ladder(config: LadderConfig) -> None:
    """Train what is missing of the ladder, and report it."""
    check_numbers(config)
    folder = ladder_folder(config)
    with locked(folder, key="ladder_dir", doing="at work on"):
        work = Work(config, folder)
        {"none": predict_and_check, "lr": check_rates, "batch": check_batches}[config.check](work)


class Work:
    """What both ladders need. folder: of the ladder."""

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

    def experiment(self, name: str, rungs: list[Rung], seeds: list[int], rates: int) -> Experiment:
        """The experiment of these rungs in the folder `name`. rates: most learning rates of one rung; 1: the inferred one."""
        folder, config = self.folder / name, self.config
        facts = {
            "name": f"{self.folder.name} {name}",
            "command": ["python", "-m", "trainer", *sys.argv[1:]],
            "budget": "tokens_per_parameter",
            "baseline": rungs[0].arm.name,
            "rule": RULE.format(most=rates),
            "seeds": list(seeds),
            "tuning_seed": config.tuning_seed,
            "most_learning_rates": rates,
        }
        made = Experiment(folder, facts, [one.arm for one in rungs], stored_experiment(folder))
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


def predict_and_check(work: Work) -> None:
    """Fit the law, predict the held-out size, train it, and report."""
    config = work.config
    pairs = [(scale, multiple) for scale in config.scales for multiple in config.tokens_per_parameter]
    *fitted, held_out = work.rungs([*pairs, (held_out_scale(config), held_out_multiple(config))])
    check_sizes([*fitted, held_out])
    experiment = work.experiment("losses", fitted, config.seeds, rates=1)
    stored = stored_experiment(work.folder / HELD_OUT)
    seeds = stored["seeds"] if stored else config.seeds[:1]  # more seeds later do not change the run that was predicted
    check = work.experiment(HELD_OUT, [held_out], seeds, rates=1)
    laws = None if config.estimate else work.laws(fitted)
    if not work.train(experiment) or laws is None:
        print("\nThe run that is predicted:\n")
        work.train(check)
        return
    points = [(one, seed, final_loss(experiment, one.arm, seed)) for one in fitted for seed in config.seeds]
    found = fit_points(points)
    prediction = predicted(work.folder / PREDICTION, found, held_out)
    work.train(check)
    measured = final_loss(check, held_out.arm, seeds[0])
    laws.loss = LossLaw.of(found, "nats a token", origin(config, fitted, config.seeds, len(points)))
    laws.loss.held_out = {key: prediction[key] for key in ("N", "D", "loss", "low", "high")} | {"measured": measured}
    keep(work.folder, laws)
    publish_losses(work.folder, points, found, held_out, prediction, measured)


def final_loss(experiment: Experiment, of: Arm, seed: int) -> float:
    """The validation loss of a run at its end. UserError if it failed, diverged or has an impossible loss: a law through the others would
    hide it."""
    task = Task(of, experiment.lengths[of.key].learning_rate, seed, "test")
    loss = loss_or_diverged(experiment, task)
    if math.isinf(loss):
        why = experiment.state(task).message or f"its loss is above {MOST_LOSS:g} nats a token"
        raise UserError(
            f"{task.name}: diverged: {why}; so this ladder has no law, or its prediction failed: another try "
            "needs other `scales` or a lower optim.lr, in another --ladder_dir"
        )
    return loss


def fit_points(points: list[tuple[Rung, int, float]]) -> Fit:
    """The law through the mean of each size and length over its seeds: what the law misses there is the same for all of them, so they are
    not independent points."""
    means = means_of(points)
    try:
        return fit(("N", "D"), [one.point for one, _ in means], [loss for _, loss in means])
    except ValueError as error:
        raise UserError(f"scales, tokens_per_parameter: {error}") from None


def predicted(path: Path, found: Fit, held_out: Rung) -> dict[str, Any]:
    """What the law says of the held-out run. It is written once: a prediction that changes after the run is none."""
    if path.exists():
        before = read_json(path)
        if (before["N"], before["D"]) != (held_out.size, held_out.length.tokens):
            raise UserError(
                f"{printable(path)}: predicts {before['N']:,} parameters and {before['D']:,} tokens, not the {held_out.size:,} and "
                f"{held_out.length.tokens:,} of the spec; put the spec back (what held_out_* does not say follows from scales and "
                "tokens_per_parameter), or choose another --ladder_dir"
            )
        return before
    if any((path.parent / HELD_OUT / "runs").glob("*")):
        raise UserError(
            f"{printable(path)}: is gone, and the run that it predicted has begun: what is written now would be no prediction; put the "
            "file back, or choose another --ladder_dir"
        )
    loss, low, high = found.predict(*held_out.point, share=SHARE)
    content = {
        "environment": environment(),
        "law": found.law.formula(),
        "scale": held_out.arm.scale,
        "N": held_out.size,
        "D": held_out.length.tokens,
        "loss": loss,
        "low": low,
        "high": high,
        "share": SHARE,
    }
    write_file(path, sealed(content))
    say(
        f"prediction: scale {held_out.arm.scale:g}, {held_out.size:,} parameters without embeddings and head, "
        f"{held_out.length.tokens:,} tokens: loss {loss:.4f}, {SHARE:.0%} between {low:.4f} and {high:.4f}; {path}"
    )
    return content


def check_rates(work: Work) -> None:
    """Sweep the learning rate at each scale, and report where the rule is off."""
    config = work.config
    rungs = work.rungs([(scale, middle(config.tokens_per_parameter)) for scale in sorted(config.scales)])
    check_sizes(rungs)
    rungs = [dataclasses.replace(one, arm=around_rule(one)) for one in rungs]
    experiment = work.experiment("learning-rates", rungs, [], rates=config.most_learning_rates)
    laws = None if config.estimate else work.laws(rungs)
    if not work.train(experiment) or laws is None:
        return
    found = [swept(experiment, one) for one in rungs]
    laws.learning_rate = law_of_rates(config, rungs, [best for best, _ in found])
    keep(work.folder, laws)
    publish_sweeps(work.folder, RATES, rungs, found, laws.learning_rate)


def around_rule(one: Rung) -> Arm:
    """The rung's arm, whose sweep begins with the rule's learning rate and its neighbours, and goes on by the same factor."""
    rate = one.length.learning_rate
    return dataclasses.replace(
        one.arm, learning_rates=tuple(rounded(rate * factor) for factor in (1 / FACTOR, 1, FACTOR))
    )


def swept(experiment: Experiment, one: Rung) -> tuple[Optimum, dict[float, float]]:
    """The optimum of a rung, and the losses of its sweep. UserError if a run of it failed."""
    tried, seed = experiment.sweep(one.arm).tried, experiment.facts["tuning_seed"]
    losses = {rate: loss_or_diverged(experiment, Task(one.arm, rate, seed, "tuning")) for rate in tried}
    rule = min(losses, key=lambda rate: abs(rate - one.length.learning_rate))  # six digits of it
    return lowest(one, rule, losses), losses


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


def lowest(one: Rung, rule: float, losses: Mapping[Any, float]) -> Optimum:
    """The optimum of a sweep. UserError if every run of it diverged."""
    if min(losses.values()) == float("inf"):
        raise UserError(f"scale {one.arm.scale:g}: every run of the sweep diverged")
    return optimum(one.size, rule, losses)


def check_batches(work: Work) -> None:
    """Sweep the tokens of a step at each scale, with equal tokens in all, and report where the rule is off."""
    config, multiple = work.config, middle(work.config.tokens_per_parameter)
    inferred = work.rungs([(scale, multiple) for scale in sorted(config.scales)])
    check_sizes(inferred)
    rules = [(one.plan.config.batch.tokens_per_step, one.plan.config.batch.sequence_length) for one in inferred]
    begun = begun_batches(work.folder / BATCHES.name)
    tried = [
        list(dict.fromkeys([*first_batches(*rule), *begun.get(one.arm.scale, [])]))
        for one, rule in zip(inferred, rules, strict=True)
    ]
    laws = None if config.estimate else work.laws(inferred)
    while True:
        rungs = [[work.at_batch(one, batch) for batch in batches] for one, batches in zip(inferred, tried, strict=True)]
        experiment = work.experiment(
            BATCHES.name, [one for part in rungs for one in part], [config.tuning_seed], rates=1
        )
        if not work.train(experiment) or laws is None:
            print(
                f"- a sweep of batches goes on to at most {config.most_learning_rates} of each size; those above are begun or the first"
            )
            return
        sweeps = [
            {
                batch: loss_or_diverged(experiment, task_of(one, config.tuning_seed))
                for batch, one in zip(batches, part, strict=True)
            }
            for batches, part in zip(tried, rungs, strict=True)
        ]
        further = [
            next_batch(losses, length, config.most_learning_rates)
            for losses, (_, length) in zip(sweeps, rules, strict=True)
        ]
        if not any(further):
            break
        tried = [[*batches, *([batch] if batch else [])] for batches, batch in zip(tried, further, strict=True)]
    found = [
        (lowest(one, batches[0], losses), losses) for one, batches, losses in zip(inferred, tried, sweeps, strict=True)
    ]
    laws.batch = law_of_batches(config, inferred, [best for best, _ in found])
    keep(work.folder, laws)
    publish_sweeps(work.folder, BATCHES, inferred, found, laws.batch)


def begun_batches(folder: Path) -> dict[float, list[int]]:
    """The tokens of a step that an earlier command has tried or begun at each scale: a sweep may have grown."""
    stored = stored_experiment(folder)
    found: dict[float, list[int]] = {}
    for entry in stored["arms"] if stored else ():
        found.setdefault(entry["scale"], []).append(int(entry["values"]["batch"]["tokens_per_step"]))
    return found


def task_of(one: Rung, seed: int) -> Task:
    """The only run of a rung whose learning rate is given."""
    assert one.arm.learning_rates is not None
    return Task(one.arm, one.arm.learning_rates[0], seed, "test")
