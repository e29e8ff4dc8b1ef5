"""The optimizer of a run: rules over groups of parameters, as a torch Optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.base import Split
from trainer.optim.groups import Group, part_shapes
from trainer.optim.narrow_state import StochasticRounding, is_narrow, update_in_pieces, update_whole
from trainer.optim.rule import STEP, GroupSettings, OptimizerRule, declared_state, get_rule, rule_config, state_bytes

# (names, update) -> this rank's part of each result of `update`; see Engine.update_matrices
Update = Callable[[dict[str, tuple[Tensor, Tensor]]], dict[str, Tensor]]
Exchange = Callable[[list[str], Update], dict[str, Tensor]]


class Optimizer(torch.optim.Optimizer):
    """Groups with their schedules, each updated by its rule.

    DeepSpeed uses it unchanged: DeepSpeed replaces the parameters with its own flat vectors (in `param_groups` and `state`; state
    of a parameter that is updated whole stays with the parameter), and may call `step` for some groups at a time. A step that is
    not finite changes nothing, and no step waits for the device.

    decay_of: loss of the step before -> weight decay, for groups with loss_driven_decay; narrow: hold state of fp32 parameters
    in bf16; rounding: of this state, None: to nearest; whole: the parameters whose update must see them whole, by `exchange`: name -> how the parameter splits into matrices
    that the rule sees as one each (None: it does not). State of such a matrix is called PART.KEY.
    """

    finite: Tensor
    exchange: Exchange

    def __init__(
        self, groups: list[Group], shapes: dict[str, torch.Size], local: dict[str, nn.Parameter], first_loss: float,
        decay_of: Callable[[Tensor], Tensor], device: torch.device, narrow: bool = False,
        whole: Mapping[str, Split | None] | None = None, rounding: StochasticRounding | None = None,
    ) -> None:  # fmt: skip
        self.groups, self.shapes, self.narrow, self._rounding = groups, shapes, narrow, rounding
        rules = [get_rule(group.rule, group.given) for group in groups]
        self.whole = dict(whole or {})
        self._local = local
        super().__init__(
            [
                {
                    "params": [local[name] for name in group.parameters],
                    "lr": group.lr,
                    "peak_lr": group.lr,
                    "weight_decay": 0.0 if group.loss_driven_decay else group.weight_decay,
                    "loss_driven_decay": group.loss_driven_decay,
                    "rule": rule,
                    "config": rule_config(rule, group.settings.get(group.rule, {}), group.given),
                }
                for group, rule in zip(groups, rules, strict=True)
            ],
            {"foreach": True},  # for zero_grad: without it, one launch for each gradient
        )
        self.group_of = {p: group for group in self.param_groups for p in group["params"]}
        # Of a parameter that is updated whole: the tensor of a group that it lies in, and this rank's piece of it there.
        self._pieces: dict[str, tuple[Tensor, Tensor]] = {name: (local[name], local[name]) for name in self.whole}
        self._by_owner: set[Tensor] = {tensor for tensor, _ in self._pieces.values()}
        self._decay_of = decay_of
        self.decay = decay_of(torch.tensor(first_loss, dtype=torch.float32, device=device))

    def prepare(self, step: int, finite: Tensor) -> None:
        """Set everything that `step` needs. step: 0-based; finite: 1.0, or 0.0 to change nothing, fp32 scalar on the device."""
        for group, settings in zip(self.groups, self.param_groups, strict=True):
            settings["lr"] = group.lr * group.schedule(step)
        self.finite, self.run_step = finite, step
        if self._rounding is not None:
            self._rounding.begin(step)
        held = [p for settings in self.param_groups for p in settings["params"] if p.grad is not None]
        self.allocate(p for p in held if p not in self.state and p not in self._by_owner)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if group["loss_driven_decay"] and group["params"]:
                shrink = 1 - group["lr"] * self.decay * self.finite
                torch._foreach_mul_(group["params"], shrink.to(group["params"][0].device))
        for group in self.param_groups:
            ready = [p for p in group["params"] if p.grad is not None and p not in self._by_owner]
            for alike in _alike(ready):
                gradients = [p.grad for p in alike if p.grad is not None]
                self._update(group, alike, gradients, [self.state[p] for p in alike])
        given = {tensor for group in self.param_groups for tensor in group["params"]}
        names = [name for name, (tensor, _) in self._pieces.items() if tensor in given]
        if names:
            for name, values in self.exchange(names, self._update_whole).items():
                self._pieces[name][1].copy_(values)

    def _update_whole(self, tensors: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """The whole new weights of the parameters that this rank owns, from their (gradient, weight)."""
        weights = {name: weight.clone() for name, (_, weight) in tensors.items()}
        for group in self.param_groups:
            rows: dict[Tensor, tuple[Tensor, dict[str, Tensor]]] = {}
            for name, weight in weights.items():
                if self.group_of[self._local[name]] is group:
                    gradients = self._cut(name, tensors[name][0])
                    states = self._states(name)
                    rows |= {piece: (gradients[part], states[part]) for part, piece in self._cut(name, weight).items()}
            ordered = sorted(rows, key=lambda piece: tuple(piece.shape))  # equal shapes as neighbours, to be stacked
            for alike in _alike(ordered):
                self._update(group, alike, *map(list, zip(*(rows[piece] for piece in alike), strict=True)))
        return weights

    def _cut(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """The matrices of a whole parameter, as views; "" is a parameter that is not split."""
        split = self.whole.get(name)
        return {"": tensor} if split is None else split.parts(tensor)

    def _states(self, name: str) -> dict[str, dict[str, Tensor]]:
        """The state of each matrix of a parameter that this rank owns."""
        held = self.state[self._local[name]]
        return {
            part: {key.removeprefix(start): value for key, value in held.items() if key.startswith(start)}
            for part, start in ((part, prefix(part)) for part in self.parts(name))
        }

    def parts(self, name: str) -> dict[str, torch.Size]:
        """Name -> shape of the matrices that the rule sees of this parameter; "" is a parameter that is not split."""
        return part_shapes(self.shapes[name], self.whole.get(name))

    def _update(
        self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor], states: list[dict[str, Tensor]]
    ) -> None:
        # Offloaded parameters are on the CPU, and the update there waits for this number, as it waits for the gradients.
        finite = self.finite.to(parameters[0].device)
        if STEP in states[0]:
            # A list, because _foreach_add_ would read the value of a single tensor.
            torch._foreach_add_([state[STEP] for state in states], [finite] * len(states))
        settings = GroupSettings(group["lr"], group["weight_decay"], group["config"], group["peak_lr"], self.run_step)
        rule = group["rule"]

        def update(parameters: list[Tensor], gradients: list[Tensor], states: list[dict[str, Tensor]]) -> None:
            rule.update(settings, parameters, gradients, states, finite)

        if rule.in_place and not is_narrow(parameters[0], states[0]):
            update(parameters, gradients, states)
        elif rule.scope == "element":
            update_in_pieces(parameters, gradients, states, update, self._rounding)
        else:
            update_whole(parameters, gradients, states, update, self._rounding)

    def follow(self, loss: Tensor, finite: Tensor) -> None:
        """After the update: set the decay of the next step. loss: global mean of this step, fp32 scalar on the device."""
        self.decay.copy_(torch.where(finite > 0, self._decay_of(loss), self.decay))

    def evaluation_weights(self) -> dict[str, Tensor]:
        """Name -> weights to evaluate with instead of this rank's parameter; only parameters for which they differ."""
        found = {}
        for group, settings in zip(self.groups, self.param_groups, strict=True):
            rule = settings["rule"]
            if not rule.evaluates_other_weights:
                continue  # always so for DeepSpeed's flat vectors, which have no names
            for name, parameter in zip(group.parameters, settings["params"], strict=True):
                if parameter in self.state:  # it has been trained
                    found[name] = rule.evaluation_weights(parameter.detach(), self.state[parameter])
        return found

    @property
    def matrix_lr(self) -> float:
        """Learning rate of the matrices (the first group) at the last step."""
        return self.param_groups[0]["lr"]

    def adopt(self, pieces: Mapping[str, tuple[Tensor, Tensor]]) -> list[Tensor]:
        """DeepSpeed has moved the parameters. pieces: name -> (flat vector, this rank's piece of the parameter in it). Returns the
        vectors that are updated as they are."""
        self.group_of |= {vector: self.group_of[self._local[name]] for name, (vector, _) in pieces.items()}
        self._pieces = {name: pieces[name] for name in self.whole}
        self._by_owner = {vector for vector, _ in self._pieces.values()}
        return list(dict.fromkeys(vector for vector, _ in pieces.values() if vector not in self._by_owner))

    def allocate(self, tensors: Iterable[Tensor]) -> None:
        """Allocate state of zeros for each of `tensors`, as before the first step; a checkpoint can be loaded into it."""
        for tensor in tensors:
            rule = self.group_of[tensor]["rule"]
            self.state[tensor] = self._zeros(tensor, rule, tensor.shape)

    def allocate_whole(self, names: Iterable[str]) -> None:
        """Like `allocate`, for parameters that this rank owns and updates whole."""
        for name in names:
            parameter = self._local[name]
            rule = self.group_of[parameter]["rule"]
            self.state[parameter] = {
                prefix(part) + key: value
                for part, shape in self.parts(name).items()
                for key, value in self._zeros(self._pieces[name][0], rule, shape).items()
            }

    def whole_state(self, name: str) -> dict[str, torch.Size]:
        """Key -> shape of the state of a parameter that is updated whole, also on the ranks that do not own it."""
        rule = self.group_of[self._local[name]]["rule"]
        return {
            prefix(part) + key: size
            for part, shape in self.parts(name).items()
            for key, (size, _) in declared_state(rule, shape, torch.float32).items()
        }

    def _zeros(self, tensor: Tensor, rule: OptimizerRule, shape: torch.Size) -> dict[str, Tensor]:
        dtype = torch.bfloat16 if self.narrow else tensor.dtype
        return {
            key: torch.zeros_like(tensor, dtype=kind)  # with the parameter's strides, also column-major ones
            if size == tensor.shape
            else torch.zeros(size, dtype=kind, device=tensor.device)
            for key, (size, kind) in declared_state(rule, shape, dtype).items()
        }

    def table(self, roles: Mapping[str, list[str]]) -> str:
        """The groups as the steps use them, for the start of the log. roles: role -> names of parameters."""
        lines = []
        for group, settings in zip(self.groups, self.param_groups, strict=True):
            count = sum(self.shapes[name].numel() for name in group.parameters)
            matrices = sum(len(self.parts(name)) for name in group.parameters)
            fused = f" ({matrices} matrices)" if matrices > len(group.parameters) else ""
            held = ", ".join(role for role, names in roles.items() if set(names) & set(group.parameters))
            decay = "by loss" if group.loss_driven_decay else f"{group.weight_decay:g}"
            own = "".join(f"  {key} {value}" for key, value in dataclasses.asdict(settings["config"]).items())
            lines.append(
                f"  {group.name:<22} {len(group.parameters):>4} tensors{fused} {count:>13,} parameters ({held})  "
                f"{group.rule}  state {self._state_bytes(group, settings) / 2**20:,.2f} MiB  lr {group.lr:.6g}{own}  "
                f"weight decay {decay}"
            )
        return "\n".join(lines)

    def _state_bytes(self, group: Group, settings: dict[str, Any]) -> int:
        """Of the whole group, on all ranks together."""
        # zero3 keeps the vectors that it updates, which are fp32, outside the groups.
        dtype = settings["params"][0].dtype if settings["params"] else torch.float32
        rule = settings["rule"]
        return sum(
            state_bytes(rule, shape, torch.bfloat16 if self.narrow else dtype)
            for name in group.parameters
            for shape in self.parts(name).values()
        )


def prefix(part: str) -> str:
    """Of the state of one matrix of a parameter."""
    return f"{part}." if part else ""


def _alike(parameters: list[Tensor]) -> list[list[Tensor]]:
    """The parameters grouped by type and device, as foreach kernels need them."""
    found: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        found.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    return list(found.values())
