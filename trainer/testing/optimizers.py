"""Checks of an optimizer's rule: its state, its step, and what the trainer may do to both."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.optim import Group, Optimizer, OptimizerRule
from trainer.optim.rule import STEP, settings_of_run
from trainer.testing.subject import Check, Failed, Skipped, require, require_close

SHAPES = {"wide": (12, 40), "tall": (40, 12), "row": (24,)}
STEPS = 3
RATES = (0.1, 0.01, 0.001)  # learning rates to try: each rule needs its own scale


@dataclass
class RuleSubject:
    """The rule that is checked. lacks: as in Subject."""

    name: str
    rule_class: type[OptimizerRule]
    settings: dict[str, Any] = field(default_factory=dict)
    lacks: str = ""

    @property
    def plugin_class(self) -> type:
        return self.rule_class

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shapes of the parameters that it is tested on."""
        matrices_only = self.rule_class.scope == "matrix"
        return {name: torch.Size(shape) for name, shape in SHAPES.items() if len(shape) == 2 or not matrices_only}


class Trial:
    """Some parameters and their optimizer, as the trainer makes it."""

    def __init__(self, subject: RuleSubject, parameters: dict[str, Tensor] | None = None, lr: float = 0.01) -> None:
        draw = torch.Generator().manual_seed(0)
        if parameters is None:
            parameters = {name: torch.randn(shape, generator=draw) for name, shape in subject.shapes.items()}
        self.parameters = {name: nn.Parameter(value.clone()) for name, value in parameters.items()}
        shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        whole = dict.fromkeys(shapes) if subject.rule_class.scope == "matrix" else {}
        run = settings_of_run(subject.name, subject.settings, total_steps=100, warmup_steps=0)
        given = {**subject.settings, **run}
        group = Group("all", list(shapes), lr, lambda step: 1.0, weight_decay=0.1, rule=subject.name, given=given)
        self.optimizer = Optimizer(
            [group], shapes, self.parameters, 1.0, torch.zeros_like, torch.device("cpu"), whole=whole
        )
        self.optimizer.exchange = self.exchange
        self.optimizer.allocate(self.parameters.values())
        self.steps = 0

    def exchange(self, names: list[str], update: Any) -> dict[str, Tensor]:
        """As an engine does it on one device."""
        return update({name: (self.parameters[name].grad, self.parameters[name].detach()) for name in names})

    def step(self, gradients: dict[str, Tensor], finite: float = 1.0) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad = gradients[name].clone()
        self.optimizer.prepare(self.steps, torch.tensor(finite))
        self.optimizer.step()
        self.steps += 1

    def state(self) -> dict[str, Tensor]:
        """The state by PARAMETER.KEY."""
        return {
            f"{name}.{key}": value
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state[parameter].items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """Copies of all parameters and their state."""
        return {name: value.detach().clone() for name, value in (self.parameters | self.state()).items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in (self.parameters | self.state()).items():
                value.copy_(tensors[name])


def gradients_of(trial: Trial, seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(parameter.shape, generator=draw) for name, parameter in trial.parameters.items()}


def require_equal(found: dict[str, Tensor], expected: dict[str, Tensor], told: str) -> None:
    for name, tensor in found.items():
        require(torch.equal(tensor, expected[name]), f"{told}: {name} differs")


def state_is_what_is_declared(subject: RuleSubject) -> None:
    trial = Trial(subject)
    rule = trial.optimizer.param_groups[0]["rule"]
    before, own = trial.tensors(), copy.copy(vars(rule))
    for step in range(STEPS):
        trial.step(gradients_of(trial, step))
    after = trial.tensors()
    require(
        after.keys() == before.keys(), f"`update` changes which state there is: {sorted(after.keys() ^ before.keys())}"
    )
    for name, value in trial.state().items():
        then = before[name]
        require((value.shape, value.dtype) == (then.shape, then.dtype), f"{name} becomes {value.dtype} {value.shape}")
        require(value.isfinite().all(), f"{name} is not finite")
        require(not torch.equal(value, then), f"state {name} is declared, but {STEPS} steps do not change it")
    changed = [key for key in vars(rule) if key not in own or own[key] is not vars(rule)[key]]
    require(
        not changed, f"the rule itself keeps {', '.join(changed)}, which no checkpoint holds; declare it in `state`"
    )
    for name in trial.parameters:
        require(not torch.equal(after[name], before[name]), f"{STEPS} steps do not change the parameter {name}")


def state_carries_a_run(subject: RuleSubject) -> None:
    trial, resumed = Trial(subject), Trial(subject)
    for step in range(STEPS):
        trial.step(gradients_of(trial, step))
    resumed.load(trial.tensors())
    resumed.steps = trial.steps
    for one in (trial, resumed):
        one.step(gradients_of(one, STEPS))
    require_equal(resumed.tensors(), trial.tensors(), "the step after loading differs from the original")


def nothing_that_is_not_finite_counts(subject: RuleSubject) -> None:
    trial = Trial(subject)
    trial.step(gradients_of(trial, 0))
    before = trial.tensors()
    for bad in (float("nan"), float("inf")):
        trial.step({name: torch.full_like(p, bad) for name, p in trial.parameters.items()}, finite=0.0)
        require_equal(trial.tensors(), before, f"a step with gradients of {bad} changes something")
    # As when the loss is not finite but the gradients are.
    trial.step(gradients_of(trial, 1), finite=0.0)
    require_equal(trial.tensors(), before, "a step with finite = 0 changes something")


def a_quadratic_is_minimised(subject: RuleSubject) -> None:
    ratios = {}
    for lr in RATES:
        trial = Trial(subject, lr=lr)
        first = loss = quadratic(trial)
        for _ in range(100):
            trial.step({name: p.detach() for name, p in trial.parameters.items()})
            loss = min(loss, quadratic(trial))
        ratios[lr] = loss / first
    told = ", ".join(f"{ratio:.2f} with lr {lr:g}" for lr, ratio in ratios.items())
    require(min(ratios.values()) < 0.5, f"in 100 steps |w|^2 / 2 falls only to these shares of its start: {told}")


def quadratic(trial: Trial) -> float:
    return sum(parameter.detach().square().sum().item() for parameter in trial.parameters.values()) / 2


def shards_are_updated_alike(subject: RuleSubject) -> None:
    if subject.rule_class.scope != "element":
        raise Skipped(f"a rule of scope {subject.rule_class.scope} gets no shards")
    whole = Trial(subject)
    cut = Trial(subject, {name: part for full, p in whole.parameters.items() for name, part in halves(full, p).items()})
    for step in range(STEPS):
        gradients = gradients_of(whole, step)
        whole.step(gradients)
        cut.step({name: part for full, g in gradients.items() for name, part in halves(full, g).items()})
    for full, parameter in whole.parameters.items():
        joined = torch.cat([cut.parameters[name].detach() for name in halves(full, parameter)])
        require_close(joined, parameter.detach().flatten(), f"{full} in two pieces and whole", 1e-6)


def halves(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Two pieces of the flattened tensor, of unequal size."""
    flat = tensor.detach().flatten()
    at = len(flat) // 3
    return {f"{name}, first": flat[:at], f"{name}, second": flat[at:]}


class _Watched(TorchDispatchMode):
    """Fails if Python reads the value of a tensor."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            raise Failed(
                "`update` reads a tensor's value in Python (as .item(), float() or `if` do): it would wait for a GPU"
            )
        return function(*args, **(kwargs or {}))


def no_step_waits_for_the_device(subject: RuleSubject) -> None:
    trial = Trial(subject)
    with _Watched():
        trial.step(gradients_of(trial, 0))


def bf16_state_is_enough(subject: RuleSubject) -> None:
    trial = Trial(subject)
    shape = torch.Size((12, 40))
    declared = trial.optimizer.param_groups[0]["rule"].state(shape, torch.bfloat16)
    narrow = [key for key, (_, dtype) in declared.items() if dtype == torch.bfloat16]
    wide = [key for key, (size, dtype) in declared.items() if size == shape and dtype != torch.bfloat16 and key != STEP]
    require(not wide, f"`state` ignores the type that it is given for {', '.join(wide)}")
    if not narrow:
        raise Skipped("it has no state of the parameter's shape")


CHECKS = [
    Check("state", "it declares all of its state", state_is_what_is_declared, True),
    Check("resume", "state that is saved and loaded gives the same next step", state_carries_a_run),
    Check("finite", "a step that is not finite changes nothing", nothing_that_is_not_finite_counts),
    Check("quadratic", "it decreases a quadratic", a_quadratic_is_minimised),
    Check("shards", "shards of a parameter are updated like the whole", shards_are_updated_alike),
    Check("narrow", "its state can be held in bf16", bf16_state_is_enough),
    Check("wait", "no step waits for the device", no_step_waits_for_the_device),
]
