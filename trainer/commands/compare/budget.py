"""How long each arm trains, so that all arms of a scale have the same budget as the baseline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from trainer.commands.compare.spec import Arm
from trainer.core.config import LENGTHS
from trainer.core.errors import UserError
from trainer.core.text import printable
from trainer.planning.length import nearest_steps, tokens_at_lengths
from trainer.planning.plan import Plan, resolve, training_flops

SIZE_TOLERANCE = 0.03  # the dial meets its target within this, so sizes may differ by it
Rate = Callable[[Arm, Plan], float]  # tokens per second of an arm


@dataclass(frozen=True)
class Length:
    """How long the runs of an arm train, and what that is. learning_rate: the inferred one; refused: why the arm cannot run."""

    steps: int = 0
    tokens: int = 0
    flops: int = 0
    parameters: int = 0
    flops_per_token: int = 0
    learning_rate: float = 0.0
    refused: str = ""


def lengths(
    arms: list[Arm], budget: str, datasets: Callable[[Any], Any], rate: Rate
) -> dict[tuple[str, float], Length]:
    """The length of every arm. datasets(data config) -> its DatasetInfo, or None; rate: asked only for a budget of seconds.

    UserError if a baseline cannot run, Absent if for want of data. Another arm that cannot is refused alone.
    """
    found: dict[tuple[str, float], Length] = {}
    baselines: dict[float, tuple[Arm, Plan]] = {}
    for arm in arms:
        first = arm.scale not in baselines
        try:
            plan = plan_of(arm, datasets)
            if first:
                baselines[arm.scale] = arm, plan
            found[arm.key] = with_rate(length_of(arm, plan, *baselines[arm.scale], budget, rate), arm, plan, datasets)
        except UserError as error:
            if first:
                raise type(error)(f"baseline {printable(arm.name)}: {error}") from None
            found[arm.key] = Length(refused=str(error))
    return found


def plan_of(arm: Arm, datasets: Callable[[Any], Any]) -> Plan:
    """The plan of the arm's runs. UserError if its number of tokens is not known before it has trained, or its data are of another
    tokenizer than it names: arms are told apart by what they name."""
    config = arm.config()
    plan = resolve(config, datasets(config.data))
    if plan.unused_tokenizer:
        raise UserError(f"{plan.unused_tokenizer}; give another data.path, or leave data.tokenizer out")
    if plan.config.batch.dynamic:
        raise UserError(
            "batch.dynamic: its batch size follows the gradient norm, so its tokens are not known before the run; "
            "set batch.dynamic: false"
        )
    return plan


def with_rate(length: Length, arm: Arm, plan: Plan, datasets: Callable[[Any], Any]) -> Length:
    """The length with the learning rate that is inferred for it; it depends on the steps. plan: of the arm's runs, perhaps of another
    length."""
    config = arm.config()
    if length.steps != plan.config.max_steps and config.optim.lr is None:
        unset: Any = dict.fromkeys(LENGTHS)
        config = replace(config, max_steps=length.steps, **unset)
        plan = resolve(config, datasets(config.data))
    return replace(length, learning_rate=plan.config.optim.lr)


def length_of(arm: Arm, plan: Plan, baseline: Arm, reference: Plan, budget: str, rate: Rate) -> Length:
    """The number of steps that is nearest to the baseline's budget, and what the arm does in them; without a learning rate."""
    steps = reference.config.max_steps
    if arm is not baseline:
        if budget == "parameters":
            check_sizes(plan, reference)
        if budget == "seconds":
            seconds = tokens(reference, steps) / rate(baseline, reference)
            wanted, spent = seconds * rate(arm, plan), tokens
        elif budget == "flops":
            wanted, spent = float(training_flops(reference, steps)), training_flops
        else:
            wanted, spent = float(tokens(reference, steps)), tokens
        steps = nearest_steps(lambda count: spent(plan, count), wanted)
    count, flops = tokens(plan, steps), training_flops(plan, steps)
    return Length(steps, count, flops, plan.parameters, round(flops / count))


def tokens(plan: Plan, steps: int) -> int:
    """Tokens of the first `steps` steps."""
    return sum(tokens_at_lengths(plan.config.batch, steps).values())


def check_sizes(plan: Plan, reference: Plan) -> None:
    """UserError if the arm's number of parameters is not the baseline's."""
    if abs(plan.parameters / reference.parameters - 1) > SIZE_TOLERANCE:
        raise UserError(
            f"budget parameters: it has {plan.parameters:,} parameters, the baseline {reference.parameters:,}, more than "
            f"{SIZE_TOLERANCE:.0%} apart; change model_scale or fields of model.*, or take another budget"
        )
