"""From the spec to the sizes and lengths of a ladder. A size at one length is an `Arm` of `compare`, which trains it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from trainer.commands.compare.budget import Length, tokens
from trainer.commands.compare.spec import Arm, refuse_ours, run_values
from trainer.commands.ladder import LadderConfig
from trainer.core.config import LENGTHS
from trainer.core.errors import UserError
from trainer.core.files import user_path
from trainer.core.settings import merge
from trainer.planning.length import nearest_steps
from trainer.planning.plan import Plan, training_flops

OURS = {  # keys of a run that the ladder sets itself
    "run_dir": "each run has its own folder",
    "seed": "use `seeds`",
    "model_scale": "use `scales`",
    "parameters": "use `scales`",
    **dict.fromkeys(("max_steps", *LENGTHS), "the ladder's own tokens_per_parameter decides how long a run is"),
}


@dataclass(frozen=True)
class Rung:
    """One size at one length. size: parameters outside embeddings and head; length: what the arm trains; plan: of its runs, but for their
    length."""

    arm: Arm
    multiple: float
    size: int
    length: Length
    plan: Plan

    @property
    def epochs(self) -> float:
        """How many times its runs read the training split."""
        assert self.plan.epoch is not None  # a ladder prepares its data first
        return self.length.tokens / self.plan.epoch.tokens

    @property
    def point(self) -> tuple[float, float]:
        """(N, D): parameters without embeddings and head, training tokens."""
        return float(self.size), float(self.length.tokens)


def ladder_folder(config: LadderConfig) -> Path:
    return user_path(config.ladder_dir or "runs/ladder", "ladder_dir")


def check_numbers(config: LadderConfig) -> None:
    """UserError for scales, multiples or seeds that make no ladder."""
    for key in ("scales", "tokens_per_parameter", "seeds"):
        values = getattr(config, key)
        if not values or len({f"{value:g}" for value in values}) < len(values) or min(values) < 0:
            raise UserError(f"{key}: is empty, names a value twice, or holds one below 0")
    if min(config.scales) <= 0 or min(config.tokens_per_parameter) <= 0:
        raise UserError("scales, tokens_per_parameter: must be above 0")
    least = 3 if config.check == "none" else 2
    if len(config.scales) < least:
        raise UserError(f"scales: a ladder needs {least} or more, not {len(config.scales)}")
    if config.check == "none" and len(config.tokens_per_parameter) < 3:
        raise UserError("tokens_per_parameter: L(N, D) needs three or more, to tell tokens from parameters")
    if held_out_scale(config) in config.scales:
        raise UserError("held_out_scale: is one of `scales`, which the law is fitted to; choose another")


def held_out_scale(config: LadderConfig) -> float:
    """The scale that is predicted: as far above the largest as that is above the one before it, in ratio."""
    *_, before, last = sorted(config.scales)
    return config.held_out_scale or float(f"{last * last / before:.3g}")


def held_out_multiple(config: LadderConfig) -> float:
    return config.held_out_tokens or middle(config.tokens_per_parameter)


def middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def arm(config: LadderConfig, scale: float, multiple: float, batch: int | None = None) -> Arm:
    """A size at a length. batch: tokens of a step; None: as the spec or the plan says. UserError if the spec sets what the ladder sets."""
    refuse_ours(config.common, "common", ours=OURS)
    values = merge(run_values(config.config, config.common), {"model_scale": scale})
    for key in ("max_steps", *LENGTHS):
        values.pop(key, None)  # a config of configs/ has its own length
    if batch is not None:
        values = merge(values, {"batch": {"tokens_per_step": batch}})
    made = Arm(f"{multiple:g}x" + f" batch {batch}" * (batch is not None), scale, values, {}, None)
    if made.config().evaluation.patience:
        raise UserError("evaluation.patience: a run that ends early is no point of a law; leave it out")
    return made


def whose(one: Rung, key: str) -> str:
    """Whose value of `key` a sweep begins with: that of its rule, or a given one, which says nothing of the rule."""
    section, field = key.split(".")
    return "rule's" if getattr(getattr(one.arm.config(), section), field) is None else "given"


def means_of(points: Sequence[tuple[Rung, int, float]]) -> list[tuple[Rung, float]]:
    """The mean loss of each rung over its seeds. points: (rung, seed, loss)."""
    losses: dict[tuple[str, float], list[float]] = {}
    for one, _, loss in points:
        losses.setdefault(one.arm.key, []).append(loss)
    rungs = {one.arm.key: one for one, _, _ in points}
    return [(one, fmean(losses[key])) for key, one in rungs.items()]


def rung(made: Arm, multiple: float, plan: Plan) -> Rung:
    """The rung of an arm: as many whole steps as come nearest to `multiple` tokens a parameter; without a learning rate. plan: of the
    arm's runs."""
    steps = nearest_steps(lambda count: tokens(plan, count), multiple * plan.non_embedding)
    count, flops = tokens(plan, steps), training_flops(plan, steps)
    length = Length(steps, count, flops, plan.parameters, round(flops / count))
    return Rung(made, multiple, plan.non_embedding, length, plan)
