"""`check`: whether a model keeps the contract of `models/base.py`, and an objective that of `trainer/objectives/base.py`, also
a stranger's, promise by promise."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from models.base import Unset, get_model, load_models, model_names
from trainer.commands.plugins import import_plugin
from trainer.core.config import CheckConfig
from trainer.core.errors import UserError
from trainer.core.settings import coerced
from trainer.core.text import printable
from trainer.objectives import load_objectives
from trainer.objectives.base import REGISTRY
from trainer.testing import numbers, objectives, sizes, strategies
from trainer.testing.subject import Check, Failed, Skipped, Subject

OBJECTIVES_ON = "gpt2"  # the model that objectives are checked on
KINDS = ("ok", "FAILED", "skipped")


def run(config: CheckConfig) -> None:
    """The verb: a line for each promise on stdout; exit code 1 where one is not kept."""
    models, objectives_found = names_of(config)
    subjects = {name: subject_of(name, config.model) for name in models}
    torch.set_num_threads(1)  # the models are small
    outcomes = {name: report(subject, [*sizes.CHECKS, *numbers.CHECKS]) for name, subject in subjects.items()}
    for name in objectives_found:
        key = f"objective {name}"
        subjects[key] = Subject(OBJECTIVES_ON, get_model(OBJECTIVES_ON), objective={"name": name}, weighted=True)
        outcomes[key] = report(subjects[key], objectives.CHECKS, f"(objective {name})")
    with strategies.group_of_one():  # made once: DeepSpeed bears no second
        for key, subject in subjects.items():
            objective = "" if key in models else f"on {key} "
            outcomes[key] += report(subject, strategies.CHECKS, f"{objective}in training")
    for name, found in outcomes.items():
        sys.stdout.write(f"{name}: " + ", ".join(f"{found.count(kind)} {kind}" for kind in KINDS) + "\n")
    sys.stdout.flush()
    if any("FAILED" in found for found in outcomes.values()):
        raise SystemExit(1)


def names_of(config: CheckConfig) -> tuple[list[str], list[str]]:
    """(models, objectives) to check: the model of --model.name, else what the plug-in registers. UserError where that is nothing."""
    load_models()
    load_objectives()
    before = {name: get_model(name) for name in model_names()}
    before_objectives = dict(REGISTRY)
    module = import_plugin(config.module).__name__ if config.module else ""
    wanted = config.model.get("name")
    if wanted is not None:
        if wanted not in model_names():
            raise UserError(f"model.name: {wanted!r} is not known (allowed: {', '.join(model_names())})")
        return [str(wanted)], []
    if not module:
        raise UserError(
            "check: name a module or a .py file that registers models or objectives, or a model with --model.name"
        )

    def own(found: dict[str, Any], earlier: dict[str, Any]) -> list[str]:
        return [
            name
            for name, cls in found.items()
            if earlier.get(name) is not cls or f"{cls.__module__}.".startswith(f"{module}.")
        ]

    models = own({name: get_model(name) for name in model_names()}, before)
    found = own(REGISTRY, before_objectives)
    if not models and not found:
        raise UserError(
            f"check: {config.module} registers no model and no objective; see `register` in models/base.py and "
            "`register_objective` in trainer/objectives/base.py"
        )
    return models, found


def subject_of(name: str, options: dict[str, Any]) -> Subject:
    model_class = get_model(name)
    choices = {key: value for key, value in options.items() if key != "name"}
    return Subject(name, model_class, coerced(model_class.Config, choices, "model."))


def report(subject: Subject, checks: list[Check], where: str = "") -> list[str]:
    """Make the checks and write their lines; returns for each one of KINDS."""
    model_class = subject.model_class
    sys.stdout.write(f"{subject.name} {where or f'({model_class.__module__}.{model_class.__qualname__})'}\n")
    outcomes = []
    for check in checks:
        kind, why = outcome(subject, check)
        sys.stdout.write(f"  {kind:<8} {check.promise}" + (f": {printable(why)}" if why else "") + "\n")
        sys.stdout.flush()
        outcomes.append(kind)
        if check.needed and kind == "FAILED":
            subject.lacks = check.promise
    return outcomes


def outcome(subject: Subject, check: Check) -> tuple[str, str]:
    """(one of KINDS, why) of a check."""
    if subject.lacks:
        return "skipped", f"not tried until {subject.lacks}"
    try:
        check.run(subject)
    except Skipped as error:
        return "skipped", str(error)
    except (Failed, UserError, Unset) as error:
        return "FAILED", str(error)
    except Exception as error:
        return "FAILED", f"{type(error).__name__}: {error}{place(error, subject.model_class)}"
    return "ok", ""


def place(error: Exception, model_class: Any) -> str:
    """The line of the model's own file in which it failed, as " (FILE, line N)"; "" where it failed elsewhere."""
    file = getattr(sys.modules.get(model_class.__module__), "__file__", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" ({Path(file).name}, line {lines[-1]})" if file and lines else ""
