"""Objectives: what a batch holds, its loss, and what the loss is divided by.

An objective is one file: a Config, a class and a decorator.

    @register_objective("mine")
    class Mine(Objective):
        Config = MineConfig

        def forward(self, model, batch):
            return Loss(sum, self.count(batch))

`--plugin FILE.py --objective.name mine` trains with it; `python -m trainer check FILE.py` checks the contract of base.py.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from models.base import load_entry_points
from trainer.core.errors import UserError
from trainer.core.settings import coerced
from trainer.objectives.base import REGISTRY, Loss, Objective, register_objective
from trainer.objectives.frozen import FrozenModel, FrozenSpec

__all__ = [
    "FrozenModel",
    "FrozenSpec",
    "Loss",
    "Objective",
    "build_objective",
    "load_objectives",
    "register_objective",
    "resolve_objective",
]

DEFAULT_OBJECTIVE = {"name": "next_token"}


def load_objectives() -> None:
    """Import the modules of this folder, and those that installed packages name in the entry point group `crescendo.objectives`."""
    for found in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{found.name}")
    load_entry_points("crescendo.objectives")


def resolve_objective(options: dict[str, Any]) -> dict[str, Any]:
    """The section `objective` of a config with all fields of the objective's own Config. Raises UserError for a wrong key or value."""
    load_objectives()
    name = options.get("name", DEFAULT_OBJECTIVE["name"])
    if name not in REGISTRY:
        raise UserError(
            f"objective.name: {name!r} is not known (allowed: {', '.join(sorted(REGISTRY))}; --plugin FILE.py for one of your own)"
        )
    given = {key: value for key, value in options.items() if key != "name"}
    cls = REGISTRY[name].Config
    try:
        config = cls(**coerced(cls, given, "objective."))
    except ValueError as error:
        raise UserError(f"objective {name}: {error}") from None
    return {"name": name, **dataclasses.asdict(config)}


def build_objective(options: Mapping[str, Any], frozen: Mapping[str, Any] = MappingProxyType({})) -> Objective:
    """The objective of a resolved section. Raises UserError if it holds parameters or buffers: no engine trains or moves them.

    frozen: the modules that its `frozen_models` asks for, where they exist already."""
    load_objectives()  # a rank that did not make the plan has not loaded them yet
    name, fields = options["name"], {key: value for key, value in options.items() if key != "name"}
    cls = REGISTRY[name]
    objective = cls(cls.Config(**fields))
    held = [key for key, _ in (*objective.named_parameters(), *objective.named_buffers())]
    if held:
        raise UserError(f"objective {name}: holds {', '.join(held)}; parameters and buffers belong to the model")
    objective.frozen = {key: FrozenModel(module) for key, module in frozen.items()}
    return objective
