"""From the spec to the arms of the comparison: every variant with every combination of the grid, at every scale."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.commands.compare import CompareConfig
from trainer.commands.report.study import GIVEN_LENGTH
from trainer.core.config import LENGTHS, RunConfig
from trainer.core.errors import UserError
from trainer.core.files import user_path
from trainer.core.settings import build, coerce, load_yaml, merge
from trainer.core.sweep import check_key, combinations, label, with_changes
from trainer.core.text import printable
from trainer.planning.dial import DEFAULT_SCALE
from trainer.planning.run_config import flat

# The comparison sets these keys of every run itself. optim.lr is not one of them: it is where an arm's sweep begins.
OURS = {
    "run_dir": "each run has its own folder",
    "seed": "use `seeds` and `tuning_seed`",
    "max_steps": "only `common` sets it: it is the length of the baseline's runs, and `budget` decides the others",
    "model_scale": "use `scales`",
    "parameters": "use `scales`",
    **dict.fromkeys(LENGTHS, "only `common` sets it, for the baseline; `budget` decides the others"),
    "max_seconds": "give max_steps in `common`, and `budget: seconds`",
}
KEPT_CHECKPOINTS = {"checkpoint": {"keep": 1}}  # a comparison has many runs; the newest is enough to go on


@dataclass(frozen=True)
class Arm:
    """A variant at one scale. It is identified by both.

    values: the keys of its runs, nested, as text; changes: those that differ from the shared ones, by dotted key
    learning_rates: the start of its sweep; None: from the inferred one
    """

    name: str
    scale: float
    values: dict[str, Any]
    changes: dict[str, str]
    learning_rates: tuple[float, ...] | None

    @property
    def key(self) -> tuple[str, float]:
        return self.name, self.scale

    def config(self, **changes: Any) -> RunConfig:
        """The RunConfig of its runs, with top-level or nested `changes`. UserError for a bad key or value names the variant."""
        try:
            config = build(RunConfig, merge(self.values, changes))
            for key in ("init_from", "branch_from"):
                if (
                    getattr(config, key) is not None
                ):  # the budget is that of a model which the parent, not the spec, decides
                    raise UserError(f"{key}: the runs of a comparison begin with initial weights; leave it out")
        except UserError as error:
            raise UserError(f"variant {printable(self.name)}: {error}") from None
        return config

    def rates(self, lr: float, planned: float) -> dict[str, Any]:
        """The learning rates of a run at optim.lr `lr`. The others that the arm sets keep their ratio to it; planned: optim.lr of
        the plan."""
        optim = self.config().optim
        rest = {} if optim.rest_lr is None else {"rest_lr": optim.rest_lr * (lr / planned)}
        roles = {role: {"lr": own.lr * (lr / planned)} for role, own in optim.roles.items() if own.lr is not None}
        return {"lr": lr, **rest, **({"roles": roles} if roles else {})}


def compare_folder(config: CompareConfig) -> Path:
    """The folder of the comparison."""
    return user_path(config.compare_dir or "runs/compare", "compare_dir")


def arms(config: CompareConfig) -> list[Arm]:
    """All arms, the baseline first at each scale. UserError for a spec that makes no sense."""
    shared = shared_values(config)
    check_numbers(config)
    named = variants(config)
    baseline = config.baseline or next(iter(named))
    if baseline not in named:
        raise UserError(f"baseline: there is no variant {printable(repr(baseline))} (variants: {', '.join(named)})")
    order = [baseline, *(name for name in named if name != baseline)]
    found = []
    for scale, name in itertools.product(
        config.scales or [build(RunConfig, shared).model_scale or DEFAULT_SCALE], order
    ):
        changes = dict(named[name])
        rates = learning_rates(changes.pop("learning_rates", None), f"variants.{name}.learning_rates")
        values = merge(merge(shared, changes), {"model_scale": scale})
        arm = Arm(name, scale, values, flat_text(changes), rates or learning_rates(config.learning_rates))
        if arm.config().evaluation.patience:
            raise UserError("evaluation.patience: runs that end early are not of equal compute; leave it out")
        found.append(arm)
    return found


def shared_values(config: CompareConfig) -> dict[str, Any]:
    """The keys of a run that all arms share."""
    refuse_ours(
        config.common, "common", allowed=("max_steps", "model_scale", *(key for key in LENGTHS if key != "max_seconds"))
    )
    return run_values(config.config, config.common)


def run_values(path: str | None, common: dict[str, Any]) -> dict[str, Any]:
    """The keys of the runs: those of the config in `path`, overridden by `common`. UserError if they name a number of parameters."""
    values = load_yaml(path) if path else {}
    values.pop("run_dir", None)  # a config of configs/ names its own
    values.pop("seed", None)
    values = merge(merge(KEPT_CHECKPOINTS, values), common)
    if build(RunConfig, values).parameters is not None:
        raise UserError(f"parameters: name sizes by model_scale, with `scales` (it is set in {path})")
    return values


def variants(config: CompareConfig) -> dict[str, dict[str, Any]]:
    """Name -> the keys that it changes, nested, for every variant with every combination of the grid."""
    listed = {str(name): values or {} for name, values in config.variants.items()} or {"": {}}
    crossed = list(combinations(grid_values(config.grid)))
    if len(listed) * len(crossed) < 2:
        raise UserError("variants: a comparison needs two or more; name them under `variants`, or values under `grid`")
    found: dict[str, dict[str, Any]] = {}
    for (name, values), changes in itertools.product(listed.items(), crossed):
        if not isinstance(values, dict):
            raise UserError(f"variants.{printable(name)}: holds the keys of a run, such as {{model: {{name: gpt2}}}}")
        values = with_changes(values, changes)
        full = " ".join(filter(None, (name, label(changes))))
        refuse_ours({key: value for key, value in values.items() if key != "learning_rates"}, f"variants.{full}")
        if len(full) > GIVEN_LENGTH:  # folders are named by it
            raise UserError(
                f"variants: {printable(full, 80)} has {len(full)} characters, at most {GIVEN_LENGTH} name a variant; give it a shorter name, "
                "or take fewer keys into the grid"
            )
        found[full] = values
    return found


def claims_of(config: CompareConfig) -> list[dict[str, Any]]:
    """The claims of a CompareConfig, as the report reads them. UserError for one that names no order of variants."""
    names, found = variants(config), []
    for words, claim in config.claims.items():
        where = f"claims.{printable(words)}"
        if not isinstance(claim, dict) or set(claim) != {"source", "order"}:
            raise UserError(
                f"{where}: is {{source: TEXT, order: [VARIANT, VARIANT]}}, the best first; a list in it stands for several"
            )
        order = claim["order"] if isinstance(claim["order"], list) else []
        groups = [one if isinstance(one, list) else [one] for one in order]
        flat = [str(name) for group in groups for name in group]
        unknown = next((name for name in flat if name not in names), None)
        if unknown is not None:
            raise UserError(
                f"{where}.order: there is no variant {printable(repr(unknown))} (variants: {', '.join(names)})"
            )
        if len(groups) < 2 or not all(groups) or len(set(flat)) < len(flat):
            raise UserError(f"{where}.order: names two variants or more, each once")
        pairs = [list(map(str, pair)) for two in itertools.pairwise(groups) for pair in itertools.product(*two)]
        found.append({"words": str(words), "source": str(claim["source"]), "pairs": pairs})
    return found


def grid_values(grid: dict[str, Any]) -> dict[str, list[str]]:
    """Dotted key -> its values. UserError for a key that no run has, or a value that occurs twice."""
    lists = {}
    for key, values in flat(grid).items():
        check_key(key, "grid")
        lists[key] = [str(value) for value in (values if isinstance(values, list) else [values])]
        if len(set(lists[key])) < len(lists[key]):
            raise UserError(f"grid.{key}: names a value twice")
    return lists


def refuse_ours(
    values: dict[str, Any], where: str, allowed: tuple[str, ...] = (), ours: Mapping[str, str] = OURS
) -> None:
    """UserError if `values` set a key of `ours`: one that the command sets itself, with the reason."""
    for key in flat(values):
        if key in ours and key not in allowed:
            raise UserError(f"{printable(where)}: leave {key} out; {ours[key]}")


def check_numbers(config: CompareConfig) -> None:
    """UserError for seeds or scales that occur twice, or a tuning seed that is also a test seed."""
    for key in ("seeds", "scales", "learning_rates"):
        values = getattr(config, key)
        shown = [
            str(value) if isinstance(value, int) else f"{value:g}" for value in values or ()
        ]  # in names of folders
        if values is not None and (not values or len(set(shown)) < len(shown)):
            raise UserError(f"{key}: is empty, or names a value twice")
    if any(seed < 0 for seed in config.seeds):
        raise UserError("seeds: must not be negative")
    if config.tuning_seed in config.seeds:
        raise UserError(
            f"tuning_seed: {config.tuning_seed} is also one of `seeds`; a learning rate chosen on a test seed favours the "
            "variant that was lucky there"
        )


def learning_rates(values: Any, key: str = "learning_rates") -> tuple[float, ...] | None:
    """Sorted learning rates of a list from a spec; None for None. UserError if one is not a number above 0."""
    if values is None:
        return None
    rates = tuple(sorted(coerce(list[float], values, key)))
    if not rates or rates[0] <= 0 or len({f"{rate:g}" for rate in rates}) < len(rates):  # folders are named by %g
        raise UserError(f"{printable(key)}: must be numbers above 0 that differ in their first six digits")
    return rates


def flat_text(values: dict[str, Any]) -> dict[str, str]:
    return {
        key: ",".join(map(str, value)) if isinstance(value, list) else str(value) for key, value in flat(values).items()
    }


def folder_name(name: str) -> str:
    """`name` as a part of a file name: letters, digits, dots and hyphens only."""
    return re.sub(r"[^A-Za-z0-9.=]+", "-", name).strip("-.") or "variant"
