"""What a caveat is, and the words that the rules of evidence share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from trainer.commands.report.load import Run
from trainer.commands.report.study import Arm, Study
from trainer.core.text import printable

SHOWN = 6  # names in a sentence
NAME_LENGTH = 120  # characters of each
LEAST_SEEDS = 3  # two runs cannot show how much runs differ by chance
FEW_SEEDS = f"a claim needs {LEAST_SEEDS} or more seeds of both arms"


@dataclass(frozen=True)
class Caveat:
    """A sentence that limits what the table shows.

    rule: the name of the function that found it; arms: (name, scale) of those concerned, () for all
    blocks: why no claim can be made of these arms; "" if one can
    """

    rule: str
    text: str
    arms: tuple[tuple[str, float], ...] = ()
    blocks: str = ""

    def stops(self, arm: Arm, baseline: Arm | None) -> bool:
        """Whether it forbids a claim about `arm` against `baseline`."""
        concerned = {(one.name, one.scale) for one in (arm, baseline) if one is not None}
        return bool(self.blocks) and (not self.arms or bool(concerned & set(self.arms)))


def metric_of(study: Study) -> str:
    """What decides: `loss` (nats per token), or `bits` (per byte) if the tokenizers differ."""
    return "bits" if len(distinct(study.test_runs, tokenizer_of)) > 1 else "loss"


def listed(names: Iterable[Any]) -> str:
    """Names in a sentence; of many only the first."""
    names = list(dict.fromkeys(printable(name, NAME_LENGTH) for name in names))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def label(study: Study, arm: Arm) -> str:
    """The arm's name; with its scale if the study has several."""
    return arm.name if len(study.scales) == 1 else f"{arm.name} at scale {arm.scale:g}"


def keys_of(arms: Iterable[Arm]) -> tuple[tuple[str, float], ...]:
    return tuple((arm.name, arm.scale) for arm in arms)


def distinct(runs: Iterable[Run], value: Callable[[Run], Any]) -> dict[str, Any]:
    """The different known values among runs, by their text."""
    values = (value(run) for run in runs)
    return {repr(one): one for one in values if one is not None}


def tokenizer_of(run: Run) -> str | None:
    tokenizer = run.data.get("tokenizer")
    return str(tokenizer.get("sha256")) if isinstance(tokenizer, dict) else None


def differing(runs: list[Run], keys: Iterable[str]) -> list[str]:
    """The keys of which runs have different values, each with its values."""
    found = []
    for key in keys:
        values = {repr(run.get(key)): run.get(key) for run in runs if run.get(key) is not None}
        if len(values) > 1:
            found.append(f"{key} ({listed(values.values())})")
    return found
