"""`compare`: trains variants with equal compute, seeds and tuned learning rates, and reports them. README.md is the guide.

spec.py: what the user asks for; budget.py: how long each arm trains; learning_rates.py: how an arm's learning rate is chosen;
experiment.py: the folder, its runs and their states; queue.py: runs them on this machine; estimate.py: what it will cost.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trainer.commands import Values, Verb
from trainer.core.settings import build, load_yaml, setting


@dataclass
class CompareConfig:
    """`compare`: the variants, what is equal between them, and how they run."""

    compare_dir: str | None = setting(
        None, "folder of the comparison; auto: runs/compare-NAME, NAME of the spec's file"
    )
    config: str | None = setting(None, "a run's config that all variants share; the keys of `common` override it")
    common: dict[str, Any] = field(default_factory=dict, metadata={"help": "keys of a run that all variants share"})
    variants: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "name -> the keys of a run that this variant changes"}
    )
    grid: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "dotted key -> list of values; every variant with every combination"}
    )
    baseline: str | None = setting(None, "the variant that the others are compared with; auto: the first")
    scales: list[float] | None = setting(None, "values of model_scale, each compared by itself; auto: the run's")
    budget: Literal["tokens", "parameters", "flops", "seconds"] = setting(
        "tokens",
        "what the variants have in common: as many tokens, FLOPs or seconds of training as the baseline in its max_steps; "
        "parameters: tokens, and sizes within 3 %",
    )
    claims: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "what others claim -> {source: TEXT, order: [variants, the best first]}; the report judges it"
        },
    )
    seeds: list[int] = setting((1, 2, 3), "seeds of the runs that are compared; the same for all variants")
    tuning_seed: int = setting(0, "seed of the runs that choose the learning rates; none of `seeds`", low=0)
    learning_rates: list[float] | None = setting(
        None, "values of optim.lr to start the sweep with; auto: half, once and twice the one that `plan` infers"
    )
    most_learning_rates: int = setting(
        6, "most learning rates that one variant tries; below 3: the one that `plan` infers, not tuned", low=1
    )
    jobs: int | None = setting(None, "runs at a time; auto: one per GPU, one on a CPU", low=1)
    price: float | None = setting(None, "--estimate: price of one device for one hour, in any currency", above=0)
    estimate: bool = setting(False, "measure the speed of each variant, print what the comparison will cost, and stop")
    elements: Literal["none", "all", "new"] = setting(
        "none",
        "all: train nothing, write the runs that can start now for launch/array.sh; new: those never written before",
    )


def spec_file(word: str, flags: Values) -> Values:
    """The spec in a file, which also gives the comparison its folder: runs/compare-NAME for NAME.yaml or compare-NAME.yaml."""
    return {"compare_dir": str(Path("runs") / f"compare-{Path(word).stem.removeprefix('compare-')}"), **load_yaml(word)}


def read(values: Values) -> CompareConfig:
    """The spec. What belongs to runs stays text: the type of its key decides later what it means, as in a run's config."""
    config = build(CompareConfig, values)
    for key in ("common", "variants", "grid", "claims"):
        setattr(config, key, values.get(key) or {})
    return config


def run(config: CompareConfig) -> None:
    """The verb `compare`."""
    from trainer.commands.compare.command import compare

    compare(config)


VERB = Verb(
    name="compare",
    help="train variants with equal compute, tuned learning rates and seeds, and report the differences",
    config=CompareConfig,
    run=run,
    alone=True,
    positional=spec_file,
    read=read,
    interrupted="interrupted; the same command goes on",
)
