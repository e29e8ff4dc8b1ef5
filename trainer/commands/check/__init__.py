"""`check`: whether a model keeps the contract of models/base.py, or an optimizer that of trainer/optim/rule.py. suite.py makes the checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trainer.commands import Verb
from trainer.core.settings import setting


@dataclass
class CheckConfig:
    """`check`: whether a model keeps the contract of models/base.py, or an optimizer that of trainer/optim/rule.py."""

    module: str | None = setting(
        None, "module or .py file that registers models or optimizers (may stand without its flag)"
    )
    model: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "name of one model, by default all that the module registers; other keys set fields of its Config"
        },
    )


def run(config: CheckConfig) -> None:
    """The verb: a line for each promise on stdout; exit code 1 where one is broken."""
    from trainer.commands.check import suite

    suite.run(config)


VERB = Verb(
    name="check",
    help="whether a model or an optimizer keeps its contract: one line per promise",
    config=CheckConfig,
    run=run,
    alone=True,
    positional=lambda word, flags: {"module": word},
)
