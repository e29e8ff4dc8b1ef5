"""Optimizers: the contract and its registry (rule.py), the rules (adamw.py), groups, schedules, and the step (optimizer.py)."""

from trainer.optim import adamw as adamw  # registers it
from trainer.optim.groups import Group, matrices_of, names_by_role, state_bytes_per_parameter, with_rule
from trainer.optim.optimizer import Optimizer
from trainer.optim.rule import DEFAULT_RULE, GroupSettings, OptimizerRule, get_rule, register_optimizer, rule_config

__all__ = [
    "DEFAULT_RULE",
    "Group",
    "GroupSettings",
    "Optimizer",
    "OptimizerRule",
    "get_rule",
    "matrices_of",
    "names_by_role",
    "register_optimizer",
    "rule_config",
    "state_bytes_per_parameter",
    "with_rule",
]
