"""Parameter groups. A recipe decides which groups there are; optim.name and optim.roles, which rule updates their parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from models.base import Split
from trainer.core.config import OptimConfig, RoleConfig
from trainer.optim.rule import DEFAULT_RULE, OptimizerRule, get_rule, rule_class, state_bytes


def no_schedule(step: int) -> float:
    """1 at every step, for optimizers that need no schedule."""
    return 1.0


@dataclass(frozen=True)
class Group:
    """Parameters, by name, that share settings. schedule: 0-based step -> multiplier of lr; settings: name of a rule -> the fields
    of its Config that the recipe sets; given: those of `rule` that the user sets; role: the entry of optim.roles, "" if none.
    width_factor, why: what model.mup has multiplied lr by, and all that it has changed, "" for nothing."""

    name: str
    parameters: list[str]
    lr: float
    schedule: Callable[[int], float]
    weight_decay: float = 0.0
    loss_driven_decay: bool = False
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    rule: str = DEFAULT_RULE
    given: dict[str, Any] = field(default_factory=dict)
    role: str = ""
    width_factor: float = 1.0
    why: str = ""


def names_by_role(model: Any) -> dict[str, list[str]]:
    """Role -> names of the trained parameters. Raises ValueError unless every parameter has exactly one known role."""
    named = [name for name, _ in model.named_parameters()]
    trained = trained_parameters(model)
    by_role: dict[str, list[str]] = {role: [] for role in model.roles}
    seen: list[str] = []
    for role, names in model.names_by_role().items():
        if role not in by_role:
            known = ", ".join((*model.roles, *model.further_roles))
            raise ValueError(f"unknown parameter role {role!r} (allowed: {known})")
        by_role[role] = [name for name in names if name in trained]
        seen += names
    if sorted(seen) != sorted(named):
        odd = sorted(set(seen) ^ set(named)) or sorted({name for name in seen if seen.count(name) > 1})
        raise ValueError(f"parameters without a role, or with two: {', '.join(odd)}")
    return by_role


def matrices_of(model: Any, shapes: Mapping[str, torch.Size] | None = None) -> dict[str, Split | None]:
    """Name of each parameter that a rule of scope matrix updates -> how it splits into matrices (None: it is one).

    These parameters have two dimensions and the role `matrix`. A row or a column is no matrix: it has no directions to weigh.
    shapes: of the whole parameters, which `model` may hold in parts.
    """
    shapes, fused = shapes or shapes_of(model), model.fused_matrices()
    found = {}
    for name in names_by_role(model)["matrix"]:
        parts = part_shapes(shapes[name], fused.get(name)).values()
        if all(len(shape) == 2 and min(shape) > 1 for shape in parts):
            found[name] = fused.get(name)
    return found


def shapes_of(model: Any) -> dict[str, torch.Size]:
    """Name -> shape of each trained parameter."""
    return {name: parameter.shape for name, parameter in trained_parameters(model).items()}


def trained_parameters(model: Any) -> dict[str, Any]:
    """Those that need a gradient. The others are frozen: no gradient, no state, no weight decay."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def part_shapes(shape: torch.Size, split: Split | None) -> dict[str, torch.Size]:
    """Name -> shape of each matrix of a parameter of this shape; "" names a parameter that is not split."""
    if split is None:
        return {"": shape}
    return {name: part.shape for name, part in split.parts(torch.empty(shape, device="meta")).items()}


class Assignment(NamedTuple):
    """The rule of some parameters, and where it comes from.

    role: their entry of optim.roles, "" if none; rest: a rule of scope matrix is asked for, which cannot update these; own: the
    entry's name, settings and lr are for these (not for rows, of which a rule of scope matrix makes a rest).
    """

    rule: str
    role: str
    rest: bool
    own: bool

    def given(self, optim: OptimConfig) -> dict[str, Any]:
        """The fields of the rule's Config that the user sets."""
        general = optim.settings if self.rule == optim.name else {}
        return {**general, **optim.roles[self.role].settings} if self.own and self.role else general


def assign(model: Any, optim: OptimConfig, shapes: Mapping[str, torch.Size] | None = None) -> dict[str, Assignment]:
    """Name of each trained parameter -> its rule. shapes: see matrices_of."""
    matrices, trained, found = matrices_of(model, shapes), trained_parameters(model), {}
    rest = optim.name if rule_class(optim.name).scope != "matrix" else DEFAULT_RULE
    for role, names in model.parameter_groups().items():
        treated_as = model.further_roles.get(role, role)
        entry = next((key for key in (role, treated_as) if key in optim.roles), "")
        asked = optim.roles.get(entry, RoleConfig()).name or optim.name
        for name in (name for name in names if name in trained):
            left = rule_class(asked).scope == "matrix" and name not in matrices
            own = entry == "" or not (left and treated_as == "matrix")
            found[name] = Assignment(rest if left else asked, entry, left, own)
    return found


class Used(NamedTuple):
    """A rule of a run. section: where the config names it, "optim" or "optim.roles.ROLE"."""

    section: str
    name: str
    rule: OptimizerRule


def rules_used(model: Any, optim: OptimConfig) -> list[Used]:
    """The rules, with their settings, that update parameters of `model`. Raises UserError for a wrong name or field."""
    found = []
    for how in dict.fromkeys(assign(model, optim).values()):
        named = how.own and how.role and optim.roles[how.role].name is not None
        section = f"optim.roles.{how.role}" if named else "optim"
        found.append(Used(section, how.rule, get_rule(how.rule, how.given(optim))))
    return found


def state_bytes_per_parameter(model: Any, optim: OptimConfig, narrow: bool) -> float:
    """Mean bytes of optimizer state per trained parameter of `model`, which may have no storage. narrow: bf16 state, otherwise fp32."""
    dtype = torch.bfloat16 if narrow else torch.float32
    shapes, matrices, assigned = shapes_of(model), matrices_of(model), assign(model, optim)
    rules = {how: get_rule(how.rule, how.given(optim)) for how in set(assigned.values())}
    total = 0
    for name, shape in shapes.items():
        rule = rules[assigned[name]]
        split = matrices.get(name) if rule.scope == "matrix" else None
        total += sum(state_bytes(rule, part, dtype) for part in part_shapes(shape, split).values())
    return total / sum(shape.numel() for shape in shapes.values())
