"""Parameter groups, their schedules and the optimiser step, by recipe. Schedules are functions of the step, never state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.scaling import weight_decay_base


@dataclass(frozen=True)
class Group:
    """Parameters that share hyperparameters. schedule: 0-based step -> multiplier of lr."""

    name: str
    parameters: list[nn.Parameter]
    lr: float
    schedule: Callable[[int], float]
    betas: tuple[float, float]
    eps: float
    weight_decay: float = 0.0
    loss_driven_decay: bool = False


def power_decay(step: int, warmup: int = 100) -> float:
    """hlb's P: linear from 0.02 to 1 over `warmup` steps, then (steps since)^-0.08."""
    return 0.02 + 0.98 * step / warmup if step < warmup else (step - warmup + 1) ** -0.08


def output_decay(step: int) -> float:
    """hlb's Q, for the output head: (step + 1)^-0.2, no warm-up."""
    return (step + 1) ** -0.2


def exponential_decay(step: int) -> float:
    """hlb's schedule of the position bias: 0.995^step."""
    return 0.995**step


def warmup_cosine(step: int, warmup: int, total: int, final: float = 0.1) -> float:
    """Linear warm-up ((step + 1) / warmup), then a cosine from 1 down to `final` at `total`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def hlb_groups(model: Any, optim: Any) -> list[Group]:
    """The four groups of hlb-gpt, by role."""
    by_role = parameters_by_role(model)

    def power(step: int) -> float:
        return power_decay(step, optim.warmup_steps)

    slow = by_role["norm"] + by_role["bias"] + by_role["embedding"]
    groups = [
        Group(
            "matrix",
            by_role["matrix"],
            optim.lr,
            power,
            (0.9, 0.95),
            1e-9,
            weight_decay=optim.weight_decay,
            loss_driven_decay=optim.loss_driven_decay,
        ),
        Group("position", by_role["position"], 100 * optim.lr, exponential_decay, (0.9, 0.95), 1e-9),
        Group("norm, bias, embedding", slow, 32 * optim.lr, power, (0.9, 0.95), 1e-9),
        Group("head", by_role["head"], 2 * optim.lr, output_decay, (0.6, 0.95), 1e-9),
    ]
    return [group for group in groups if group.parameters]


def plain_groups(model: Any, optim: Any, total: int) -> list[Group]:
    """AdamW with warm-up and cosine; only parameters of two or more dimensions decay."""

    def schedule(step: int) -> float:
        return warmup_cosine(step, optim.warmup_steps, total, optim.final_lr_fraction)

    parameters = list(model.parameters())
    decayed = [p for p in parameters if p.dim() >= 2]
    rest = [p for p in parameters if p.dim() < 2]
    groups = [
        Group("decayed", decayed, optim.lr, schedule, (0.9, 0.95), 1e-8, optim.weight_decay, optim.loss_driven_decay),
        Group("not decayed", rest, optim.lr, schedule, (0.9, 0.95), 1e-8),
    ]
    return [group for group in groups if group.parameters]


def parameters_by_role(model: Any) -> dict[str, list[nn.Parameter]]:
    """Role -> parameters. Raises ValueError unless every parameter stands under exactly one known role."""
    named = dict(model.named_parameters())
    by_role: dict[str, list[nn.Parameter]] = {role: [] for role in model.roles}
    seen: list[str] = []
    for role, names in model.parameter_groups().items():
        if role not in by_role:
            raise ValueError(f"unknown parameter role {role!r} (allowed: {', '.join(model.roles)})")
        by_role[role] = [named[name] for name in names]
        seen += names
    if sorted(seen) != sorted(named):
        odd = sorted(set(seen) ^ set(named)) or sorted({name for name in seen if seen.count(name) > 1})
        raise ValueError(f"parameters without a role, or with two: {', '.join(odd)}")
    return by_role


class Optimizer:
    """AdamW over groups, with their schedules, and two guards that never wait for the device:

    a step whose loss or gradient is not finite changes neither weights nor moments, and hlb's loss-driven weight decay
    lives in a tensor on the device (the decay of a step follows the loss of the step before).
    """

    def __init__(self, groups: list[Group], n_parameters: int, first_loss: float, device: torch.device) -> None:
        self.groups = groups
        self.adamw = torch.optim.AdamW(
            [
                {
                    "params": group.parameters,
                    "lr": group.lr,
                    "betas": group.betas,
                    "eps": group.eps,
                    "weight_decay": 0.0 if group.loss_driven_decay else group.weight_decay,
                }
                for group in groups
            ],
            fused=True,
        )
        self._log_base = math.log(weight_decay_base(n_parameters))
        self.decay = self._decay_of(torch.tensor(first_loss, dtype=torch.float32, device=device))

    def _decay_of(self, loss: Tensor) -> Tensor:
        return 16 * torch.exp(-(loss + 1e-8) * self._log_base)

    @torch.no_grad()
    def step(self, step: int, loss: Tensor, finite: Tensor) -> None:
        """One update. step: 0-based; loss: global mean loss, fp32 scalar on the device; finite: 1.0, or 0.0 to change nothing."""
        for group, settings in zip(self.groups, self.adamw.param_groups, strict=True):
            settings["lr"] = group.lr * group.schedule(step)
            if group.loss_driven_decay:
                shrink = 1 - settings["lr"] * self.decay * finite
                torch._foreach_mul_([*group.parameters], shrink)
        self.adamw.found_inf = 1 - finite  # type: ignore[attr-defined]  # the fused kernel reads it on the device
        self.adamw.step()
        self.decay = torch.where(finite > 0, self._decay_of(loss), self.decay)

    @property
    def matrix_lr(self) -> float:
        """Learning rate of the matrices (the first group) at the last step."""
        return self.adamw.param_groups[0]["lr"]

    def clear_gradients(self) -> None:
        self.adamw.zero_grad(set_to_none=True)

    def table(self) -> str:
        """The resolved groups, for the start of the log."""
        lines = []
        for group in self.groups:
            count = sum(parameter.numel() for parameter in group.parameters)
            decay = "by loss" if group.loss_driven_decay else f"{group.weight_decay:g}"
            lines.append(
                f"  {group.name:<22} {len(group.parameters):>4} tensors {count:>13,} parameters  lr {group.lr:.6g}  "
                f"betas {group.betas}  eps {group.eps:g}  weight decay {decay}"
            )
        return "\n".join(lines)

    def tensors(self, names: dict[Any, str]) -> dict[str, Tensor]:
        """All state as NAME.KEY -> tensor, for a checkpoint."""
        return {
            f"{names[parameter]}.{key}": value
            for parameter, state in self.adamw.state.items()
            for key, value in state.items()
        }

    def load_tensors(self, tensors: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> None:
        """Put back what `tensors` gave."""
        for full, value in tensors.items():
            name, _, key = full.rpartition(".")
            self.adamw.state[parameters[name]][key] = value


def build_optimizer(plan: Any, model: Any, device: torch.device) -> Optimizer:
    """The optimiser of a plan's recipe over the parameters of `model`."""
    config = plan.config
    if config.optim.recipe == "hlb":
        groups = hlb_groups(model, config.optim)
    else:
        groups = plain_groups(model, config.optim, config.max_steps)
    return Optimizer(groups, plan.parameters, math.log(plan.model_config.vocab_size), device)
