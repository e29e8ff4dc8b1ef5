"""`check`: tests whether a model keeps the contract of models/base.py, an optimizer that of trainer/optim/rule.py, or an objective
that of trainer/objectives/base.py. suite.py runs the checks."""

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


def run(config: CheckConfig) -> None:
    """Run the verb: print one line per promise to stdout; exit with code 1 if a promise is broken."""
    from trainer.commands.check import suite

    suite.run(config)


VERB = Verb(
    name="check",
    help="whether a model, an optimizer or an objective keeps its contract: one line per promise",
    config=CheckConfig,
    run=run,
    alone=True,
    positional=lambda word, flags: {"module": word},
)
