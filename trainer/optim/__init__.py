"""Parameter groups, their schedules and the optimiser step, by recipe. Schedules are functions of the step, never state.

The recipe `hlb` is hlb-gpt's (0.4.1) but for what follows:

- Decay of the first step: 16 b^-ln(V), as if the loss was that of no knowledge. hlb-gpt's matrices decay by 16, the value its
  optimiser is made with, at 2 % of lr: each loses a thousandth (8e-4 at model_scale 1), once.
- The norm of a gradient counts for the size of the batch one step later (`trainer/scaling.py`): hlb-gpt waits for it.
- Decay follows the mean loss of the step over all its microbatches and devices; hlb-gpt's that of the last microbatch.
- Embedding gradients are divided by the counts of the whole step; hlb-gpt's by those of each microbatch
  (optim.embedding_frequency microbatch).
- The multiplier of the batch is bounded (batch.n_max), and its draws follow from the seed and the step.
- Weights, moments and sums of gradients are fp32, distances exact; hlb-gpt's bf16 throughout (precision pure_bf16,
  model.position_bias_quantised).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.optim.adamw import GuardedAdamW
from trainer.scaling import weight_decay_base


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


def schedule_change(config: Any, before: Any, step: int) -> str:
    """What another max_steps does to the learning rate of a run that goes on after `step`; "" where it does nothing.

    config: resolved; before: max_steps of the run until now.
    """
    optim, now = config.optim, config.max_steps
    if optim.recipe == "hlb" or before == now or not isinstance(before, int):
        return ""
    old, new = (
        optim.lr * warmup_cosine(step, optim.warmup_steps, total, optim.final_lr_fraction) for total in (before, now)
    )
    return (
        f"max_steps: {now:,} in the place of {before:,}: the cosine ends there, so the learning rate of step {step + 1:,} is "
        f"{new:.3g}, not {old:.3g}, and {optim.lr * optim.final_lr_fraction:.3g} at step {now:,}"
    )


def hlb_groups(model: Any, optim: Any) -> list[Group]:
    """The four groups of hlb-gpt, by role.

    A matrix that is both embedding and head is the head's: 32 lr is for rows that are only looked up; as a head they diverge.
    """
    by_role = names_by_role(model)
    if model.tied_embedding():
        shared = model.token_embedding().weight
        tied = [name for name in by_role["embedding"] if model.get_parameter(name) is shared]
        by_role["embedding"] = [name for name in by_role["embedding"] if name not in tied]
        by_role["head"] += tied

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


def plain_groups(shapes: dict[str, torch.Size], optim: Any, total: int) -> list[Group]:
    """AdamW with warm-up and cosine; only parameters of two or more dimensions decay."""

    def schedule(step: int) -> float:
        return warmup_cosine(step, optim.warmup_steps, total, optim.final_lr_fraction)

    decayed = [name for name, shape in shapes.items() if len(shape) >= 2]
    rest = [name for name, shape in shapes.items() if len(shape) < 2]
    groups = [
        Group("decayed", decayed, optim.lr, schedule, (0.9, 0.95), 1e-8, optim.weight_decay, optim.loss_driven_decay),
        Group("not decayed", rest, optim.lr, schedule, (0.9, 0.95), 1e-8),
    ]
    return [group for group in groups if group.parameters]


def names_by_role(model: Any) -> dict[str, list[str]]:
    """Role -> names of parameters. Raises ValueError unless every parameter stands under exactly one known role."""
    named = [name for name, _ in model.named_parameters()]
    by_role: dict[str, list[str]] = {role: [] for role in model.roles}
    seen: list[str] = []
    for role, names in model.parameter_groups().items():
        if role not in by_role:
            raise ValueError(f"unknown parameter role {role!r} (allowed: {', '.join(model.roles)})")
        by_role[role] = list(names)
        seen += names
    if sorted(seen) != sorted(named):
        odd = sorted(set(seen) ^ set(named)) or sorted({name for name in seen if seen.count(name) > 1})
        raise ValueError(f"parameters without a role, or with two: {', '.join(odd)}")
    return by_role


class Optimizer:
    """GuardedAdamW over groups, with their schedules. hlb's weight decay of a step follows the loss of the step before.

    narrow: hold the moments of fp32 parameters in bf16.
    """

    def __init__(
        self, groups: list[Group], shapes: dict[str, torch.Size], local: dict[str, nn.Parameter], first_loss: float,
        device: torch.device, narrow: bool = False,
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
        n_parameters = sum(shape.numel() for shape in shapes.values())
        self._log_base = math.log(weight_decay_base(n_parameters))
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


def build_optimizer(
    plan: Any, model: Any, shapes: dict[str, torch.Size], local: dict[str, nn.Parameter], device: torch.device
) -> Optimizer:
    """The optimiser of a plan's recipe. shapes: of the whole parameters; local: what this rank updates, by name."""
    config = plan.config
    if config.optim.recipe == "hlb":
        groups = hlb_groups(model, config.optim)
    else:
        groups = plain_groups(shapes, config.optim, config.max_steps)
    # Moments of bf16 parameters are bf16 as they are.
    narrow = config.optim.state_precision == "bf16" and config.precision != "pure_bf16"
    return Optimizer(groups, shapes, local, math.log(plan.model_config.vocab_size), device, narrow)
