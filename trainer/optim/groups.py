"""Parameter groups. A recipe decides which groups there are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from models.base import Split
from trainer.optim.rule import DEFAULT_RULE, get_rule, rule_class, state_bytes


def no_schedule(step: int) -> float:
    """1 at every step, for optimizers that need no schedule."""
    return 1.0


@dataclass(frozen=True)
class Group:
    """Parameters, by name, that share settings. schedule: 0-based step -> multiplier of lr; settings: name of a rule -> the fields
    of its Config that the recipe sets."""

    name: str
    parameters: list[str]
    lr: float
    schedule: Callable[[int], float]
    weight_decay: float = 0.0
    loss_driven_decay: bool = False
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    rule: str = DEFAULT_RULE


def names_by_role(model: Any) -> dict[str, list[str]]:
    """Role -> names of parameters. Raises ValueError unless every parameter has exactly one known role."""
    named = [name for name, _ in model.named_parameters()]
    by_role: dict[str, list[str]] = {role: [] for role in model.roles}
    seen: list[str] = []
    for role, names in model.names_by_role().items():
        if role not in by_role:
            known = ", ".join((*model.roles, *model.further_roles))
            raise ValueError(f"unknown parameter role {role!r} (allowed: {known})")
        by_role[role] = list(names)
        seen += names
    if sorted(seen) != sorted(named):
        odd = sorted(set(seen) ^ set(named)) or sorted({name for name in seen if seen.count(name) > 1})
        raise ValueError(f"parameters without a role, or with two: {', '.join(odd)}")
    return by_role


def matrices_of(model: Any, shapes: Mapping[str, torch.Size]) -> dict[str, Split | None]:
    """Name of each parameter that a rule of scope matrix updates -> how it splits into matrices (None: it is one).

    shapes: of the whole parameters, which `model` may hold in parts.
    These parameters have two dimensions and the role `matrix`. A row or a column is no matrix: it has no directions to weigh.
    """
    fused = model.fused_matrices()
    found = {}
    for name in names_by_role(model)["matrix"]:
        parts = part_shapes(shapes[name], fused.get(name)).values()
        if all(len(shape) == 2 and min(shape) > 1 for shape in parts):
            found[name] = fused.get(name)
    return found


def part_shapes(shape: torch.Size, split: Split | None) -> dict[str, torch.Size]:
    """Name -> shape of each matrix of a parameter of this shape; "" names a parameter that is not split."""
    if split is None:
        return {"": shape}
    return {name: part.shape for name, part in split.parts(torch.empty(shape, device="meta")).items()}


def state_bytes_per_parameter(rule: str, model: Any, narrow: bool, given: dict[str, Any] | None = None) -> float:
    """Mean bytes of optimizer state per parameter of `model`, which may have no storage. narrow: bf16 state, otherwise fp32;
    given: the fields of the rule's Config that the user sets."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    chosen, rest = get_rule(rule, given), get_rule(DEFAULT_RULE)
    own = matrices_of(model, shapes) if chosen.scope == "matrix" else dict.fromkeys(shapes)
    dtype = torch.bfloat16 if narrow else torch.float32
    total = sum(
        state_bytes(chosen if name in own else rest, part, dtype)
        for name, shape in shapes.items()
        for part in part_shapes(shape, own.get(name)).values()
    )
    return total / sum(shape.numel() for shape in shapes.values())


def with_rule(
    groups: list[Group], rule: str, names: Collection[str] | None = None, rest_lr: float = 1.0
) -> list[Group]:
    """The groups, now updated by `rule`. With `names`, only these parameters change their rule; the rest of a group keeps its own,
    with rest_lr times its learning rate."""
    own, split = rule_class(rule).own_schedule, []
    for group in groups:
        chosen = [name for name in group.parameters if names is None or name in names]
        rest = [name for name in group.parameters if name not in chosen]
        if chosen:
            split.append(replace(group, parameters=chosen, rule=rule, schedule=no_schedule if own else group.schedule))
        if rest:
            name = f"{group.name}, rest" if chosen else group.name
            split.append(replace(group, name=name, parameters=rest, lr=group.lr * rest_lr))
    return split
