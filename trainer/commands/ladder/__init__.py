"""`ladder`: trains small models, fits how their loss falls, predicts a larger one, and then trains that one. README.md is the guide.

spec.py: what the user asks for; fit.py: laws of losses; rates.py: optimum of a sweep and its law; command.py:
what the verb does, in order; page.py: ladder.md and ladder.png; laws_file.py: laws.yaml, which a plan can use.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trainer.commands import Values, Verb
from trainer.core.settings import build, load_yaml, setting


@dataclass
class LadderConfig:
    """`ladder`: which sizes and how many tokens, what is predicted, and how the runs run."""

    ladder_dir: str | None = setting(None, "folder of the ladder; auto: runs/ladder-NAME, NAME of the spec's file")
    config: str | None = setting(None, "a run's config that all runs share; the keys of `common` override it")
    common: dict[str, Any] = field(default_factory=dict, metadata={"help": "keys of a run that all runs share"})
    scales: list[float] = setting(
        (), "values of model_scale that the law is fitted to, three or more; of --check, two or more"
    )
    tokens_per_parameter: list[float] = setting(
        (5.0, 10.0, 20.0), "training tokens for each parameter outside embeddings and head; three or more for L(N, D)"
    )
    held_out_scale: float | None = setting(
        None,
        "model_scale whose loss is predicted before it is trained; auto: the next in the series of `scales`",
        above=0,
    )
    held_out_tokens: float | None = setting(
        None, "tokens_per_parameter of the held-out run; auto: the middle one", above=0
    )
    seeds: list[int] = setting(
        (1,), "seeds of each size and length, or of each value of --check; their mean is one point"
    )
    check: Literal["none", "lr", "batch"] = setting(
        "none",
        "lr, batch: sweep the learning rate, or tokens_per_step, at each scale, and compare the rule with the optimum; no losses are fitted",
    )
    most_values: int = setting(8, "check lr, batch: most learning rates, or batches, of one size", low=3)
    jobs: int | None = setting(None, "runs at a time; auto: one per GPU, one on a CPU", low=1)
    price: float | None = setting(None, "--estimate: price of one device for one hour, in any currency", above=0)
    estimate: bool = setting(False, "measure the speed of each size, print what the ladder will cost, and stop")


def spec_file(word: str, flags: Values) -> Values:
    """The spec in a file, which also gives the ladder its folder: runs/ladder-NAME for NAME.yaml or ladder-NAME.yaml."""
    return {"ladder_dir": str(Path("runs") / f"ladder-{Path(word).stem.removeprefix('ladder-')}"), **load_yaml(word)}


def read(values: Values) -> LadderConfig:
    """The spec. What belongs to runs stays text: the type of its key decides later what it means, as in a run's config."""
    config = build(LadderConfig, values)
    config.common = values.get("common") or {}
    return config


def run(config: LadderConfig) -> None:
    """The verb `ladder`."""
    from trainer.commands.ladder.command import ladder

    ladder(config)


VERB = Verb(
    name="ladder",
    help="fit the loss of the small models of SPEC.yaml, predict a larger one, and check it; check the rules of learning rate and batch",
    config=LadderConfig,
    run=run,
    alone=True,
    positional=spec_file,
    read=read,
    interrupted="interrupted; the same command goes on",
)
