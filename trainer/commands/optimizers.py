"""`optimizers`: lists the optimizers that optim.name takes, or the fields of one."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.commands import Values, Verb
from trainer.core.settings import help_text, setting
from trainer.core.text import printable_lines

if TYPE_CHECKING:
    from trainer.optim import OptimizerRule


@dataclass
class OptimizersConfig:
    """`optimizers`: which one to describe."""

    name: str | None = setting(
        None, "describe the fields of this optimizer (the flag itself is optional); auto: list all"
    )


def run(config: OptimizersConfig, as_json: bool = False) -> None:
    """Run the verb: print a table of all optimizers, or the fields of one."""
    text = listed(as_json) if config.name is None else described(config.name)
    sys.stdout.write(printable_lines(text) + "\n")


def listed(as_json: bool) -> str:
    """Every registered optimizer: what its update must see whole, its state, and what it is."""
    import torch

    from trainer.optim import get_rule
    from trainer.optim.rule import registered_rules, state_bytes

    shape = torch.Size((1024, 1024))
    rows = []
    for name in sorted(registered_rules()):
        rule = get_rule(name)
        size = state_bytes(rule, shape, torch.float32) / shape.numel()
        row = {"name": name, "scope": rule.scope, "state_bytes": round(size, 2), "what": first_sentence(rule)}
        rows.append({**row, "learning_rate": rate_source(rule, name)})
    if as_json:
        return json.dumps(rows, indent=1)
    lines = [f"{'optim.name':<15} {'sees whole':<11} {'bytes':>5}  what it is"]
    lines += [f"{row['name']:<15} {row['scope']:<11} {row['state_bytes']:>5g}  {row['what']}" for row in rows]
    lines += ["", f"{'optim.name':<15} optim.lr, if it is not set"]
    lines += [f"{row['name']:<15} {row['learning_rate']}" for row in rows]
    notes = [
        "sees whole: element: nothing; tensor: each parameter; matrix: each matrix, while adamw updates the rest",
        "bytes: of fp32 state for each parameter, in a matrix of 1,024 x 1,024",
        "AdamW's lr follows from the recipe, the model and model_scale; `plan` prints it",
        "torch:NAME takes a class of torch.optim; `optimizers NAME` lists the fields of one; --plugin FILE.py adds your own",
    ]
    return "\n".join([*lines, "", *notes])


def rate_source(rule: OptimizerRule, name: str) -> str:
    """Where the default of optim.lr comes from."""
    from trainer.optim import DEFAULT_RULE

    found = rule.default_lr(1.0)  # in units of AdamW's
    if found is None:
        return "that of the recipe" if name == DEFAULT_RULE else "AdamW's; no rate of its own is published"
    follows = rule.default_lr(2.0) != found
    return found[1] if follows else f"{found[0]:g}: {found[1]}"


def first_sentence(rule: object) -> str:
    """The first sentence of the rule's docstring, in one line."""
    text = " ".join((type(rule).__doc__ or "no description").split())
    return text.split(". ")[0].rstrip(".")


def described(name: str) -> str:
    """The fields of an optimizer's Config. UserError for an unknown name."""
    from trainer.optim import get_rule

    rule = get_rule(name)
    about = " ".join((type(rule).__doc__ or "").split())
    return f"{name}: {about}\n\nset as --optim.settings.FIELD:\n{help_text(type(rule).Config)}"


def named(word: str, flags: Values) -> Values:
    return {"name": word}


VERB = Verb(
    name="optimizers",
    help="the optimizers that optim.name takes, and the fields of one",
    config=OptimizersConfig,
    run=run,
    alone=True,
    json=True,
    positional=named,
)
