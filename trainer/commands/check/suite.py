"""`check`: tests whether a model, an optimizer or an objective (built in or from a plug-in) keeps its contract, promise by promise."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from models.base import get_model, load_models, model_names
from models.materialise import Unset
from trainer.commands.check import CheckConfig
from trainer.commands.plugins import import_plugin
from trainer.core.errors import UserError
from trainer.core.settings import coerced
from trainer.core.text import printable
from trainer.objectives import load_objectives
from trainer.objectives.base import REGISTRY as OBJECTIVES
from trainer.optim.rule import OptimizerRule, registered_rules
from trainer.testing import numbers, objectives, optimizers, sizes, strategies
from trainer.testing.optimizers import RuleSubject
from trainer.testing.subject import Check, Failed, Skipped, Subject

OBJECTIVES_ON = "gpt2"  # the model that objectives are checked on
KINDS = ("ok", "FAILED", "skipped")


def run(config: CheckConfig) -> None:
    """Run the verb: print one line per promise to stdout; exit with code 1 if a promise is broken."""
    models, rules, found = names_of(config)
    subjects = {name: subject_of(name, config.model) for name in models}
    torch.set_num_threads(1)  # the models are small
    outcomes = {name: report(RuleSubject(name, rule), optimizers.CHECKS) for name, rule in rules.items()}
    outcomes |= {name: report(subject, [*sizes.CHECKS, *numbers.CHECKS]) for name, subject in subjects.items()}
    for name in found:
        key = f"objective {name}"
        subjects[key] = Subject(OBJECTIVES_ON, get_model(OBJECTIVES_ON), objective={"name": name}, weighted=True)
        outcomes[key] = report(subjects[key], objectives.CHECKS, f"(objective {name})")
    if subjects:
        with strategies.group_of_one():  # made once: DeepSpeed does not work with a second group
            for key, subject in subjects.items():
                objective = "" if key in models else f"on {key} "
                outcomes[key] += report(subject, strategies.CHECKS, f"{objective}in training")
    for name, found in outcomes.items():
        sys.stdout.write(f"{name}: " + ", ".join(f"{found.count(kind)} {kind}" for kind in KINDS) + "\n")
    sys.stdout.flush()
    if any("FAILED" in found for found in outcomes.values()):
        raise SystemExit(1)


def names_of(config: CheckConfig) -> tuple[list[str], dict[str, type[OptimizerRule]], list[str]]:
    """Returns (models, optimizers by name, objectives) to check: the model of --model.name, otherwise all that the plug-in
    registers. Raises UserError if it registers nothing."""
    load_models()
    load_objectives()
    rules_before = registered_rules()
    before = {name: get_model(name) for name in model_names()}
    before_objectives = dict(OBJECTIVES)
    module = import_plugin(config.module).__name__ if config.module else ""
    wanted = config.model.get("name")
    if wanted is not None:
        if wanted not in model_names():
            raise UserError(f"model.name: {wanted!r} is not known (allowed: {', '.join(model_names())})")
        return [str(wanted)], {}, []
    if not module:
        raise UserError(
            "check: name a module or a .py file that registers models, optimizers or objectives, or a model with --model.name"
        )

    def own(found: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
        return {
            name: cls
            for name, cls in found.items()
            if earlier.get(name) is not cls or f"{cls.__module__}.".startswith(f"{module}.")
        }

    models = own({name: get_model(name) for name in model_names()}, before)
    rules, found = own(registered_rules(), rules_before), own(OBJECTIVES, before_objectives)
    if not (models or rules or found):
        raise UserError(
            f"check: {config.module} registers no model, no optimizer and no objective; see `register` in models/base.py, "
            "`register_optimizer` in trainer/optim/rule.py and `register_objective` in trainer/objectives/base.py"
        )
    return list(models), rules, list(found)


def subject_of(name: str, options: dict[str, Any]) -> Subject:
    model_class = get_model(name)
    choices = {key: value for key, value in options.items() if key != "name"}
    return Subject(name, model_class, coerced(model_class.Config, choices, "model."))


def report(subject: Subject | RuleSubject, checks: list[Check], where: str = "") -> list[str]:
    """Run the checks and print a line for each; returns their outcomes, each one of KINDS."""
    plugin = subject.plugin_class
    sys.stdout.write(f"{subject.name} {where or f'({plugin.__module__}.{plugin.__qualname__})'}\n")
    outcomes = []
    for check in checks:
        kind, why = outcome(subject, check)
        sys.stdout.write(f"  {kind:<8} {check.promise}" + (f": {printable(why)}" if why else "") + "\n")
        sys.stdout.flush()
        outcomes.append(kind)
        if check.needed and kind == "FAILED":
            subject.lacks = check.promise
    return outcomes


def outcome(subject: Subject | RuleSubject, check: Check) -> tuple[str, str]:
    """Run one check; returns (one of KINDS, the reason)."""
    if subject.lacks:
        return "skipped", f"not tried, because this failed: {subject.lacks}"
    try:
        check.run(subject)
    except Skipped as error:
        return "skipped", str(error)
    except (Failed, UserError, Unset) as error:
        return "FAILED", str(error)
    except Exception as error:
        return "FAILED", f"{type(error).__name__}: {error}{place(error, subject.plugin_class)}"
    return "ok", ""


def place(error: Exception, plugin: type) -> str:
    """Where the plug-in's own file raised the error, as " (FILE, line N)"; "" if no frame is in that file."""
    file = getattr(sys.modules.get(plugin.__module__), "__file__", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" ({Path(file).name}, line {lines[-1]})" if file and lines else ""
