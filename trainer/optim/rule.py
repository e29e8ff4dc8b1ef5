"""The contract of an optimizer: one class, its own Config, one decorator.

    @register_optimizer("signum")
    class Signum(OptimizerRule):
        Config = SignumConfig                       # a dataclass; set by optim.settings.FIELD
        scope = "element"

        def state(self, shape, dtype):
            return {"momentum": (shape, dtype)}

        def update(self, group, parameters, gradients, states, finite):
            ...                                     # in place

`python -m trainer check FILE.py` tests whether a rule keeps the contract.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from trainer.core.errors import UserError
from trainer.core.settings import build

Scope = Literal["element", "tensor", "matrix"]
Declared = dict[str, tuple[torch.Size, torch.dtype]]
STEP = "step"  # the state that counts a parameter's steps
TORCH = "torch:"  # before the name of a class of torch.optim
DEFAULT_RULE = "adamw"  # also updates what a rule of scope matrix does not


@dataclass(frozen=True)
class GroupSettings:
    """What the parameters of one group share in a step. lr: with the schedule applied; config: the rule's Config; peak_lr: lr
    without the schedule; step: 0-based step of the run, the same on every rank."""

    lr: float
    weight_decay: float
    config: Any
    peak_lr: float
    step: int = 0


class OptimizerRule:
    """How gradients change parameters.

    scope: what `update` must see whole. element: nothing; each number is updated independently, so the trainer may pass any
    piece of a parameter (FSDP's shards, ZeRO's flat vectors). tensor: each parameter. matrix: like tensor, but only one rank
    updates each matrix, because an update is costly, and a parameter that fuses matrices comes as these; AdamW updates the rest.

    in_place: whether `update` needs no memory on the way, such as a fused kernel. Others get a part of the numbers at a time.
    own_schedule: whether the rule needs no schedule of lr; then lr stays at its peak. entrywise: whether each number of an update has
    about the size lr, whatever that of the gradients (Adam, signs), and decay is decoupled: see `width_rule`. config: Config with the fields that the user
    sets; it decides which state there is. (A recipe may set further fields for a group: see GroupSettings.)

    Two fields of Config, if their default is None, stand for those of the run: total_steps for max_steps, warmup_steps for
    optim.warmup_steps. A run that goes on keeps them, even with another max_steps.
    """

    Config: ClassVar[type]
    scope: ClassVar[Scope] = "element"
    in_place: ClassVar[bool] = False
    own_schedule: ClassVar[bool] = False
    entrywise: ClassVar[bool] = False
    config: Any

    def state(self, shape: torch.Size, dtype: torch.dtype) -> Declared:
        """Name -> (shape, type) of the state of a parameter of this shape. All state begins as zeros.

        dtype: the type for state of the parameter's shape: the parameter's own, or bf16 if optim.state_precision says so.
        A state "step" of shape () counts the steps of this parameter; the trainer increments it before `update`. With scope
        element every other state has the parameter's shape. Checkpoints hold the state under these names, and the memory
        plan counts it.
        """
        raise NotImplementedError

    def update(
        self,
        group: GroupSettings,
        parameters: list[Tensor],
        gradients: list[Tensor],
        states: list[dict[str, Tensor]],
        finite: Tensor,
    ) -> None:
        """One step, in place, of parameters that share a type and a device. All states except "step" have the same type.

        finite: fp32 scalar on their device: 1.0, or 0.0 if loss or gradient is not finite. If it is 0.0, no parameter and no
        state may change. Do not read it, since Python would wait for the device: multiply by it, or use torch.where.
        """
        raise NotImplementedError

    def default_lr(self, adamw: float) -> tuple[float, str] | None:
        """(learning rate, its source) where the recipe, for this model and size, gives AdamW the rate `adamw`; None: no rate of
        its own is known, so that it takes AdamW's."""
        return None

    def width_rule(self) -> tuple[float, str] | None:
        """For model.mup: (the power of the width with which the learning rate of hidden matrices changes, its source); None: none is
        known."""
        return (-1.0, "2203.03466, and 2308.01814 for all entrywise rules") if self.entrywise else None

    def evaluation_weights(self, parameter: Tensor, state: dict[str, Tensor]) -> Tensor:
        """The weights of this parameter (or shard) to validate, generate and export with: averages, for example.

        Only rules of scope element may define it. Checkpoints hold both, and training continues with the parameter.
        """
        return parameter

    def narrow_refusal(self) -> str:
        """Why the state cannot be bf16, rounded to nearest, and what to use instead; "" if it can.

        A bf16 number that is rounded to nearest never falls if a step takes off less than 2^-9 to 2^-8 of it: see AdamW.
        """
        values = dataclasses.asdict(self.config)
        betas = [(key, beta) for key in values if key.startswith("beta") for beta in _numbers(values[key])]
        slow = [f"optim.settings.{key} {beta:g}" for key, beta in betas if 1 - beta < 2**-8]
        return f"a bf16 average never falls with {', '.join(slow)}; use at most {1 - 2**-8:.4f}" if slow else ""

    @property
    def evaluates_other_weights(self) -> bool:
        return type(self).evaluation_weights is not OptimizerRule.evaluation_weights


def _numbers(value: Any) -> list[float]:
    return [number for number in (value if isinstance(value, list) else [value]) if isinstance(number, float)]


_REGISTRY: dict[str, type[OptimizerRule]] = {}


def register_optimizer(name: str) -> Callable[[type[OptimizerRule]], type[OptimizerRule]]:
    """Class decorator: register a rule as optim.name `name`. Raises TypeError for a missing or wrong member, ValueError if the name
    is taken."""

    def add(cls: type[OptimizerRule]) -> type[OptimizerRule]:
        missing = [member for member in ("state", "update") if getattr(cls, member) is getattr(OptimizerRule, member)]
        missing += [] if hasattr(cls, "Config") else ["Config"]
        if missing:
            raise TypeError(
                f"{cls.__name__} must define {', '.join(missing)}: see OptimizerRule in trainer/optim/rule.py"
            )
        if cls.scope not in ("element", "tensor", "matrix"):
            raise TypeError(f"{cls.__name__}.scope is {cls.scope!r}; use element, tensor or matrix")
        if cls.scope != "element" and cls.evaluation_weights is not OptimizerRule.evaluation_weights:
            raise TypeError(f"{cls.__name__} defines evaluation_weights, which needs scope element")
        taken = _REGISTRY.get(name, cls)
        # A plug-in's file may be imported twice, under two names.
        if (
            taken.__qualname__ != cls.__qualname__
            or (taken.__module__ + ".").startswith("trainer.")
            and taken is not cls
        ):
            raise ValueError(f"optimizer name {name!r} is taken by {taken.__module__}")
        _REGISTRY[name] = cls
        return cls

    return add


def registered_rules() -> dict[str, type[OptimizerRule]]:
    """Name -> class."""
    return dict(_REGISTRY)


def rule_class(name: str) -> type[OptimizerRule]:
    """The rule registered under `name`, or that of torch:NAME. Raises UserError if there is none."""
    if name.startswith(TORCH):
        from trainer.optim.torch_rules import torch_rule

        return torch_rule(name.removeprefix(TORCH))
    if name not in _REGISTRY:
        raise UserError(
            f"optim.name: {name!r} is not known (allowed: {', '.join(sorted(_REGISTRY))}, {TORCH}NAME for a class of "
            "torch.optim); --plugin FILE.py for one of your own"
        )
    return _REGISTRY[name]


def get_rule(name: str, given: dict[str, Any] | None = None) -> OptimizerRule:
    """The rule called `name`. given: the fields of its Config that the user sets. Raises UserError for a wrong name or field."""
    rule = rule_class(name)()
    rule.config = rule_config(rule, {}, given or {})
    return rule


def settings_of_run(name: str, given: dict[str, Any], total_steps: int, warmup_steps: int) -> dict[str, int]:
    """The fields of the rule's Config that stand for those of the run and that the user leaves open: see OptimizerRule."""
    config = get_rule(name, given).config
    run = {"total_steps": total_steps, "warmup_steps": warmup_steps}
    return {key: value for key, value in run.items() if getattr(config, key, 0) is None}


def rule_config(rule: OptimizerRule, recipe: dict[str, Any], given: dict[str, Any]) -> Any:
    """The rule's Config: its defaults, overridden by the recipe's values, then by the user's. Raises UserError for a bad key."""
    return build(rule.Config, {**recipe, **given}, "optim.settings.")


def declared_state(rule: OptimizerRule, shape: torch.Size, dtype: torch.dtype) -> Declared:
    """`rule.state`, checked. Raises UserError if a rule of scope element has state that cannot be cut like its parameter."""
    declared = rule.state(shape, dtype)
    for name, (its_shape, _) in declared.items():
        if name == STEP and its_shape == ():
            continue
        if rule.scope == "element" and its_shape != shape:
            raise UserError(
                f"optimizer {type(rule).__name__}: state {name!r} of a parameter of shape {tuple(shape)} has shape "
                f"{tuple(its_shape)}; a rule of scope element must keep state of the parameter's shape; other state needs scope tensor"
            )
    return declared


def state_bytes(rule: OptimizerRule, shape: torch.Size, dtype: torch.dtype) -> int:
    """Bytes of the state of a parameter of this shape, without the count of its steps."""
    sizes = [(size, kind) for name, (size, kind) in declared_state(rule, shape, dtype).items() if name != STEP]
    return sum(torch.Size(size).numel() * kind.itemsize for size, kind in sizes)
