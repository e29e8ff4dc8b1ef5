"""Optimizers: the contract and its registry (rule.py), the rules (adamw.py), groups, schedules, and the step (optimizer.py)."""

from trainer.optim.adamw import AdamW
from trainer.optim.groups import Group, matrices_of, names_by_role, with_rule
from trainer.optim.optimizer import Optimizer
from trainer.optim.rule import GroupSettings, OptimizerRule, get_rule, register_optimizer, rule_config, state_bytes

__all__ = [
    "AdamW",
    "Group",
    "GroupSettings",
    "Optimizer",
    "OptimizerRule",
    "get_rule",
    "matrices_of",
    "names_by_role",
    "register_optimizer",
    "rule_config",
    "state_bytes",
    "with_rule",
]
