"""Optimizers: the contract and its registry (rule.py), the rules (adamw.py, rules/), groups, schedules, and the step (optimizer.py)."""

import importlib
import pkgutil

from trainer.optim import adamw as adamw  # registers it
from trainer.optim import rules
from trainer.optim.groups import (
    Assignment,
    Group,
    Used,
    assign,
    matrices_of,
    names_by_role,
    no_schedule,
    rules_used,
    state_bytes_per_parameter,
    trained_parameters,
)
from trainer.optim.optimizer import Optimizer
from trainer.optim.rule import (
    DEFAULT_RULE,
    GroupSettings,
    OptimizerRule,
    get_rule,
    register_optimizer,
    rule_class,
    rule_config,
    settings_of_run,
)

__all__ = [
    "DEFAULT_RULE",
    "Assignment",
    "Group",
    "GroupSettings",
    "Optimizer",
    "OptimizerRule",
    "Used",
    "assign",
    "get_rule",
    "matrices_of",
    "names_by_role",
    "no_schedule",
    "register_optimizer",
    "rule_class",
    "rule_config",
    "rules_used",
    "settings_of_run",
    "state_bytes_per_parameter",
    "trained_parameters",
]

for _found in pkgutil.iter_modules(rules.__path__):
    importlib.import_module(f"{rules.__name__}.{_found.name}")  # registers its rules
