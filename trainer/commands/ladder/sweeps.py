"""`--check lr` and `--check batch`: sweep one value at each scale, compare what the plan has with the best, and keep the law of the optima."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from statistics import fmean
from typing import Any

from trainer.commands.compare.experiment import Task, stored_experiment
from trainer.commands.compare.learning_rates import above, below, rounded
from trainer.commands.ladder import LadderConfig
from trainer.commands.ladder.laws_file import about, keep, law_of_batches, law_of_rates
from trainer.commands.ladder.page import BATCHES, RATES, Swept, publish_sweeps
from trainer.commands.ladder.rates import FACTOR, Optimum, is_bracketed, optimum
from trainer.commands.ladder.spec import Rung, middle
from trainer.commands.ladder.work import Work, check_sizes, loss_or_diverged
from trainer.core.errors import UserError
from trainer.planning.laws import PowerLaw

Losses = dict[float, list[float]]  # value that was tried -> loss of each seed


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a value is swept. swept: its words; field: of Laws, where its law belongs; law: fits it.

    first: the values that a rung begins with, that of the plan first; at: the rung with another value; of: the value of an arm's entry in
    experiment.json; further: the next value below the lowest, or above the highest, of a rung's sorted ones, None if there is none
    """

    swept: Swept
    field: str
    law: Callable[[LadderConfig, list[Rung], list[Optimum]], PowerLaw | None]
    first: Callable[[Rung], list[Any]]
    at: Callable[[Work, Rung, Any], Rung]
    of: Callable[[dict[str, Any]], Any]
    further: Callable[[Rung, list[Any], bool], Any]


def sweep_and_check(work: Work, kind: Kind) -> None:
    """Sweep each scale until both neighbours of its best value are worse, and report how much the plan's value loses."""
    config = work.config
    rungs = work.rungs([(scale, middle(config.tokens_per_parameter)) for scale in sorted(config.scales)])
    check_sizes(rungs)
    begun = begun_values(work, kind)
    tried = [list(dict.fromkeys([*kind.first(one), *begun.get(one.arm.scale, [])])) for one in rungs]
    laws = None if config.estimate else work.laws(rungs)
    while True:
        losses = train(work, kind, rungs, tried)
        if losses is None or laws is None:
            print(
                f"- a sweep goes on to at most {config.most_values} values of each size; those above are begun or the first"
            )
            return
        further = [next_value(kind, *of, config.most_values) for of in zip(rungs, losses, strict=True)]
        if not any(further):
            break
        tried = [[*values, *([value] if value else [])] for values, value in zip(tried, further, strict=True)]
    found = [lowest(one, values[0], part) for one, values, part in zip(rungs, tried, losses, strict=True)]
    law = kind.law(config, rungs, found)
    setattr(laws, kind.field, law)
    keep(work.folder, laws)
    publish_sweeps(work.folder, about(laws.of), kind.swept, rungs, list(zip(found, losses, strict=True)), law)


def begun_values(work: Work, kind: Kind) -> dict[float, list[Any]]:
    """The values that an earlier command has tried or begun at each scale: a sweep may have grown."""
    stored = stored_experiment(work.folder / kind.swept.name)
    found: dict[float, list[Any]] = {}
    for entry in stored["arms"] if stored else ():
        found.setdefault(entry["scale"], []).append(kind.of(entry))
    return found


def train(work: Work, kind: Kind, rungs: list[Rung], tried: list[list[Any]]) -> list[Losses] | None:
    """Train what is missing of each rung's values, each with one learning rate; None if only the cost was asked for."""
    made = [[kind.at(work, one, value) for value in values] for one, values in zip(rungs, tried, strict=True)]
    seeds = work.config.seeds
    experiment = work.experiment(kind.swept.name, [one for part in made for one in part], seeds)
    if not work.train(experiment):
        return None

    def loss(one: Rung, seed: int) -> float:
        assert one.arm.learning_rates is not None
        return loss_or_diverged(experiment, Task(one.arm, one.arm.learning_rates[0], seed, "test"))

    return [
        {value: [loss(one, seed) for seed in seeds] for value, one in zip(values, part, strict=True)}
        for values, part in zip(tried, made, strict=True)
    ]


def next_value(kind: Kind, one: Rung, losses: Losses, most: int) -> Any:
    """The value to try next: beyond the end of the sweep that is best. None if both neighbours of the best are worse, if `most` have been
    tried, or there is none. If all diverged, the lowest is the best."""
    means = {value: fmean(of) for value, of in losses.items()}
    if len(losses) >= most or is_bracketed(means):
        return None
    tried = sorted(means)
    best = min(tried, key=lambda value: (means[value], value))
    return kind.further(one, tried, best == tried[0])


def lowest(one: Rung, own: float, losses: Losses) -> Optimum:
    """The optimum of a sweep. own: the plan's value. UserError if no value has trained with every seed."""
    if min(map(max, losses.values())) == float("inf"):
        raise UserError(f"scale {one.arm.scale:g}: every value of the sweep diverged")
    return optimum(one.size, own, losses)


# -- learning rates ------------------------------------------------------------------------------------------------------------


def first_rates(one: Rung) -> list[float]:
    """The plan's learning rate and its neighbours."""
    return [rounded(one.length.learning_rate * factor) for factor in (1, 1 / FACTOR, FACTOR)]


def at_rate(work: Work, one: Rung, rate: float) -> Rung:
    """The rung with another learning rate."""
    arm = dataclasses.replace(one.arm, name=f"{one.arm.name} lr {rate:g}", learning_rates=(rate,))
    return dataclasses.replace(one, arm=arm)


def further_rate(one: Rung, tried: list[float], lower: bool) -> float:
    return below(tuple(tried)) if lower else above(tuple(tried))


LEARNING_RATES = Kind(
    RATES,
    "learning_rate",
    law_of_rates,
    first_rates,
    at_rate,
    lambda entry: entry["first_learning_rates"][0],
    further_rate,
)

# -- tokens of a step ----------------------------------------------------------------------------------------------------------


def first_batches(one: Rung) -> list[int]:
    """The plan's tokens of a step, half and twice as many, in whole sequences."""
    batch = one.plan.config.batch
    sequences, length = max(1, batch.tokens_per_step // batch.sequence_length), batch.sequence_length
    return [count * length for count in dict.fromkeys((sequences, max(1, sequences // 2), 2 * sequences))]


def further_batch(one: Rung, tried: list[int], lower: bool) -> int | None:
    """Half or twice as many, in whole sequences; None below one sequence."""
    length = one.plan.config.batch.sequence_length
    return tried[0] // length // 2 * length or None if lower else 2 * tried[-1]


TOKENS_OF_A_STEP = Kind(
    BATCHES,
    "batch",
    law_of_batches,
    first_batches,
    Work.at_batch,
    lambda entry: int(entry["values"]["batch"]["tokens_per_step"]),
    further_batch,
)
