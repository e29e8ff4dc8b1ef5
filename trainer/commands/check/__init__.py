"""`check`: tests whether a model keeps the contract of models/base.py, an optimizer that of trainer/optim/rule.py, or an objective
that of trainer/objectives/base.py. suite.py runs the checks. `check coordinates`: what coordinates.py measures of model.mup."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trainer.commands import Verb
from trainer.core.settings import setting


@dataclass
class CheckConfig:
    """`check`: what to test, and with which fields of a model's Config."""

    module: str | None = setting(
        None, "module or .py file that registers models, optimizers or objectives (the flag itself is optional)"
    )
    model: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "name: one model to check, by default all that the module registers; other keys set fields of its Config"
        },
    )


@dataclass
class CoordinatesConfig:
    """`check coordinates`: a decoder, and the sizes at which its activations are compared after some steps."""

    model: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "name: of a decoder, by default llama; other keys set fields of its Config"},
    )
    widths: list[int] = setting((64, 128, 256), "values of d_model; mup's base is the first")
    depths: list[int] = setting(
        (2, 4, 8), "values of n_layers; mup's base is the first; a single one: over the width only"
    )
    head_width: int = setting(16, "channels of a head at every width", low=1)
    optimizer: str = setting("adamw", "optim.name")
    lr: float = setting(2**-7, "optim.lr at the smallest size", above=0)
    steps: int = setting(8, "optimiser steps on one batch of random tokens", low=0)
    seeds: int = setting(3, "runs of each size, with other weights and tokens", low=1)
    out: str = setting("coordinates.png", "picture")


def run(config: CheckConfig) -> None:
    """Run the verb: print one line per promise to stdout; exit with code 1 if a promise is broken."""
    from trainer.commands.check import suite

    suite.run(config)


def run_coordinates(config: CoordinatesConfig) -> None:
    """The verb `check coordinates`."""
    from trainer.commands.check import coordinates

    coordinates.run(config)


VERB = Verb(
    name="check",
    help="whether a model, an optimizer or an objective keeps its contract: one line per promise",
    config=CheckConfig,
    run=run,
    alone=True,
    positional=lambda word, flags: {"module": word},
)
COORDINATES = Verb(
    name="check coordinates",
    help="whether the activations of a decoder stay flat with width and depth under model.mup; a picture",
    config=CoordinatesConfig,
    run=run_coordinates,
    alone=True,
)
