"""Classes of torch.optim as rules: `torch:NAME`.

The class computes each step, on parameters and states that the trainer holds. A trial step on tiny tensors tells which states it
has. Adam, AdamW and SGD run fused and are told of a step that is not finite. For the others such a step is undone: each step
copies parameters and states, a piece at a time, and selects between copy and result: some three more passes over both.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from trainer.core.errors import UserError
from trainer.core.settings import setting
from trainer.optim.foreach import States
from trainer.optim.rule import STEP, TORCH, Declared, GroupSettings, OptimizerRule, Scope
from trainer.runtime.compat import private

# Classes that update each number by itself and whose state, besides the count of steps, has the parameter's shape.
ELEMENT = {"Adadelta", "Adam", "AdamW", "Adamax", "RAdam", "RMSprop", "Rprop", "SGD"}
MATRIX = {"Muon"}
TOLD_OF_FINITE = {"Adam", "AdamW", "SGD"}  # by found_inf, which their fused kernels take
# The trainer gives these itself.
OURS = {"self", "params", "lr", "weight_decay", "foreach", "fused", "capturable", "differentiable", "maximize"}

# State that does not begin as zeros: its value in the first step, from (group, parameter, gradient).
Initial = Callable[[GroupSettings, Tensor, Tensor], Any]
INITIAL: dict[tuple[str, str], Initial] = {
    ("ASGD", "eta"): lambda group, parameter, gradient: group.lr,
    ("ASGD", "mu"): lambda group, parameter, gradient: 1.0,
    ("NAdam", "mu_product"): lambda group, parameter, gradient: 1.0,
    ("Rprop", "step_size"): lambda group, parameter, gradient: group.lr,
    # So that the step sets it to the gradient, whatever the dampening.
    ("SGD", "momentum_buffer"): lambda group, parameter, gradient: (
        (gradient + group.weight_decay * parameter) * (group.config.dampening / group.config.momentum)
    ),
}


class TorchRule(OptimizerRule):
    """A class of torch.optim. Its Config has the arguments of the constructor; what decay does is up to the class. If it has none,
    decay is decoupled."""

    torch_class: ClassVar[Any]

    def state(self, shape: torch.Size, dtype: torch.dtype) -> Declared:
        values = dataclasses.asdict(self.config).items()
        rule: Any = type(self)  # mypy takes the class for its instance
        kinds = states_of(
            rule, tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in values)
        )
        own = {key: (shape, dtype) if whole else (torch.Size(), torch.float32) for key, whole in kinds.items()}
        return {STEP: (torch.Size(), torch.float32), **own}

    def update(
        self,
        group: GroupSettings,
        parameters: list[Tensor],
        gradients: list[Tensor],
        states: States,
        finite: Tensor,
    ) -> None:
        name = self.torch_class.__name__
        own = [key for key in states[0] if key != STEP]
        for key in own:
            if (name, key) in INITIAL:
                begin_(states, key, INITIAL[name, key], group, parameters, gradients, finite)
        held = [parameters, *([state[key] for state in states] for key in own)]
        told = name in TOLD_OF_FINITE
        before = [] if told else [[tensor.clone() for tensor in tensors] for tensors in held]
        decays = "weight_decay" in arguments_of(self.torch_class)
        if group.weight_decay and not decays:
            torch._foreach_mul_(parameters, 1 - group.lr * group.weight_decay * finite)

        optimizer = construct(self.torch_class, group.config, parameters, group.lr, group.weight_decay)
        for parameter, gradient, state in zip(parameters, gradients, states, strict=True):
            parameter.grad = gradient
            # The class counts the step itself.
            optimizer.state[parameter] = {**state, STEP: state[STEP] - finite}
        if told:
            optimizer.found_inf = 1 - finite
        optimizer.step()
        for tensors, copies in zip(held, before, strict=False):
            for tensor, copy in zip(tensors, copies, strict=True):
                tensor.copy_(torch.where(finite > 0, tensor, copy))


def begin_(
    states: States,
    key: str,
    initial: Initial,
    group: GroupSettings,
    parameters: list[Tensor],
    gradients: list[Tensor],
    finite: Tensor,
) -> None:
    """Set a state to its initial value, if this is the first step of its parameter."""
    for parameter, gradient, state in zip(parameters, gradients, states, strict=True):
        first = (state[STEP] == 1) & (finite > 0)
        state[key].copy_(torch.where(first, initial(group, parameter, gradient), state[key]))


@functools.lru_cache
def torch_rule(name: str) -> type[TorchRule]:
    """The rule of torch.optim.NAME. Raises UserError if there is no such class, or if it cannot be a rule."""
    found = getattr(torch.optim, name, None)
    if not (inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)) or found is torch.optim.Optimizer:
        known = [key for key, value in vars(torch.optim).items() if inspect.isclass(value) and not key.startswith("_")]
        raise UserError(f"optim.name: torch.optim has no optimizer {name!r} (it has: {', '.join(sorted(known))})")
    scope: Scope = "element" if name in ELEMENT else "matrix" if name in MATRIX else "tensor"
    members = {"torch_class": found, "Config": config_of(found), "scope": scope, "in_place": name in TOLD_OF_FINITE}
    members["entrywise"] = name == "AdamW"
    rule: Any = type(name, (TorchRule,), members)
    refuse_what_no_rule_can_do(found, rule.Config())
    return rule


def arguments_of(cls: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(cls.__init__).parameters)


def config_of(cls: Any) -> type:
    """A dataclass of the constructor's arguments, but those that the trainer gives. Numbers are floats unless annotated as int."""
    fields: list[Any] = []
    for name, argument in arguments_of(cls).items():
        if name in OURS:
            continue
        default = argument.default
        kind: Any = type(default)
        if isinstance(default, (tuple, list)):
            kind = list[float]
        elif default is None:
            kind = str | None
        elif kind is int and str(argument.annotation) not in ("int", "<class 'int'>"):
            default, kind = float(default), float
        fields.append((name, kind, setting(default, f"argument of torch.optim.{cls.__name__}")))
    return dataclasses.make_dataclass(f"{cls.__name__}Config", fields)


def construct(cls: Any, config: Any, parameters: list[Tensor], lr: float, weight_decay: float) -> Any:
    """The optimizer. Raises UserError if the class refuses a value."""
    known, device = arguments_of(cls), parameters[0].device
    given = {
        key: tuple(value) if isinstance(value, list) else value for key, value in dataclasses.asdict(config).items()
    }
    given |= {"lr": lr, "weight_decay": weight_decay} if "weight_decay" in known else {"lr": lr}
    if cls.__name__ in TOLD_OF_FINITE:
        given["fused"] = True
    elif "capturable" in known:
        given["capturable"] = device.type != "cpu"  # else it would read counts of steps, and wait for the device
    try:
        return cls(parameters, **given)
    except ValueError as error:
        raise UserError(f"optim.settings: torch.optim.{cls.__name__}: {error}") from None


@functools.lru_cache
def states_of(rule: type[TorchRule], settings: tuple[tuple[str, Any], ...]) -> dict[str, bool]:
    """Key -> whether this state has the parameter's shape; else it is a scalar. The count of steps is left out.

    Raises UserError if the rule cannot hold the state, or if its first step is not that of the class.
    """
    told = f"optim.name: {TORCH}{rule.__name__}"
    own = rule()
    own.config = rule.Config(**{key: list(value) if isinstance(value, tuple) else value for key, value in settings})
    theirs, state = trial_step(rule.torch_class, own.config)
    held = {key: value for key, value in state.items() if key != STEP and value is not None}
    odd = [key for key, value in held.items() if not isinstance(value, Tensor) or value.shape not in ((), TRIAL)]
    if odd:
        raise UserError(f"{told} has state of a shape that the trainer cannot tell: {', '.join(odd)}")
    ours, zeros = torch.ones(TRIAL), {key: torch.zeros_like(value) for key, value in held.items()}
    group = GroupSettings(TRIAL_LR, 0.0, own.config, TRIAL_LR)
    own.update(group, [ours], [torch.ones(TRIAL)], [{STEP: torch.tensor(1.0), **zeros}], torch.tensor(1.0))
    if not torch.allclose(ours, theirs):
        raise UserError(f"{told} has state that does not begin as zeros, and the trainer does not know its first value")
    return {key: value.shape == TRIAL for key, value in held.items()}


TRIAL, TRIAL_LR = torch.Size((2, 3)), 0.1


@torch.no_grad()
def trial_step(cls: Any, config: Any) -> tuple[Tensor, dict[str, Any]]:
    """(a tiny parameter of ones after one step, its state)."""
    parameter = torch.ones(TRIAL)
    optimizer = construct(cls, config, [parameter], TRIAL_LR, 0.0)
    parameter.grad = torch.ones(TRIAL)
    optimizer.step()
    return parameter, optimizer.state[parameter]


def refuse_what_no_rule_can_do(cls: Any, config: Any) -> None:
    """UserError if the class needs a closure or sparse gradients, or reads values of tensors."""
    told = f"optim.name: {TORCH}{cls.__name__}"
    if inspect.signature(cls.step).parameters["closure"].default is inspect.Parameter.empty:
        raise UserError(
            f"{told} needs a closure that computes the loss again, which a step of the trainer does not have"
        )
    reads = False

    class Watching(private("TorchDispatchMode")):  # type: ignore[misc]
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal reads
            reads |= function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    try:
        with Watching():
            trial_step(cls, config)
    except RuntimeError as error:
        raise UserError(f"{told} does not take the gradients of the trainer: {str(error).splitlines()[0]}") from None
    if reads and "capturable" not in arguments_of(cls):
        raise UserError(f"{told} reads values of tensors in Python, so each step would wait for the device")
