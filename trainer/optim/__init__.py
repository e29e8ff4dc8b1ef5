"""Parameter groups and the optimiser step. Which groups there are, a recipe says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.optim.adamw import GuardedAdamW


@dataclass(frozen=True)
class Group:
    """Parameters, by name, that share hyperparameters. schedule: 0-based step -> multiplier of lr."""

    name: str
    parameters: list[str]
    lr: float
    schedule: Callable[[int], float]
    betas: tuple[float, float]
    eps: float
    weight_decay: float = 0.0
    loss_driven_decay: bool = False


def names_by_role(model: Any) -> dict[str, list[str]]:
    """Role -> names of parameters. Raises ValueError unless every parameter stands under exactly one known role."""
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


class Optimizer:
    """GuardedAdamW over groups, with their schedules. hlb's weight decay of a step follows the loss of the step before.

    decay_base: b of the decay 16 b^-loss (see recipes/hlb.py); narrow: hold the moments of fp32 parameters in bf16.
    """

    def __init__(
        self, groups: list[Group], shapes: dict[str, torch.Size], local: dict[str, nn.Parameter], first_loss: float,
        decay_base: float, device: torch.device, narrow: bool = False,
    ) -> None:  # fmt: skip
        self.groups, self.shapes = groups, shapes
        self.adamw = GuardedAdamW(
            [
                {
                    "params": [local[name] for name in group.parameters],
                    "lr": group.lr,
                    "betas": group.betas,
                    "eps": group.eps,
                    "weight_decay": 0.0 if group.loss_driven_decay else group.weight_decay,
                    "loss_driven_decay": group.loss_driven_decay,
                }
                for group in groups
            ],
            narrow,
        )
        self._log_base = math.log(decay_base)
        self.decay = self._decay_of(torch.tensor(first_loss, dtype=torch.float32, device=device))

    def _decay_of(self, loss: Tensor) -> Tensor:
        return 16 * torch.exp(-(loss + 1e-8) * self._log_base)

    def prepare(self, step: int, finite: Tensor) -> None:
        """Everything `adamw.step` needs. step: 0-based; finite: 1.0, or 0.0 to change nothing, fp32 scalar on the device."""
        for group, settings in zip(self.groups, self.adamw.param_groups, strict=True):
            settings["lr"] = group.lr * group.schedule(step)
        self.adamw.finite, self.adamw.decay = finite, self.decay
        held = [p for settings in self.adamw.param_groups for p in settings["params"] if p.grad is not None]
        self.allocate(p for p in held if p not in self.adamw.state)

    def follow(self, loss: Tensor, finite: Tensor) -> None:
        """After the update: the decay of the next step. loss: global mean of this one, fp32 scalar on the device."""
        self.decay.copy_(torch.where(finite > 0, self._decay_of(loss), self.decay))

    @property
    def matrix_lr(self) -> float:
        """Learning rate of the matrices (the first group) at the last step."""
        return self.adamw.param_groups[0]["lr"]

    def allocate(self, tensors: Iterable[Tensor]) -> None:
        """Moments of zero and no steps for each of `tensors`, as before the first step, to load a checkpoint into."""
        dtype = torch.bfloat16 if self.adamw.narrow else None  # None: the tensor's own
        for tensor in tensors:
            self.adamw.state[tensor] = {
                "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
                "exp_avg": torch.zeros_like(tensor, dtype=dtype),
                "exp_avg_sq": torch.zeros_like(tensor, dtype=dtype),
            }

    def table(self) -> str:
        """The resolved groups, for the start of the log."""
        lines = []
        for group in self.groups:
            count = sum(self.shapes[name].numel() for name in group.parameters)
            decay = "by loss" if group.loss_driven_decay else f"{group.weight_decay:g}"
            lines.append(
                f"  {group.name:<22} {len(group.parameters):>4} tensors {count:>13,} parameters  lr {group.lr:.6g}  "
                f"betas {group.betas}  eps {group.eps:g}  weight decay {decay}"
            )
        return "\n".join(lines)
