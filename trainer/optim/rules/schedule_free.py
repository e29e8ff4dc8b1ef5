"""Schedule-free AdamW (arXiv 2405.15682)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.core.settings import setting
from trainer.optim.foreach import States, average_squares_, cleared, counts, roots, scalars
from trainer.optim.rule import STEP, Declared, GroupSettings, OptimizerRule, register_optimizer


@dataclass
class ScheduleFreeConfig:
    beta1: float = setting(0.9, "share of the average x in the weights y that are trained", above=0, high=0.99999)
    beta2: float = setting(0.999, "decay of the mean of squared gradients", low=0, high=0.99999)
    eps: float = setting(1e-8, "added to the root of the mean of squares", above=0)
    warmup_steps: int | None = setting(None, "steps of linear warm-up; auto: optim.warmup_steps", low=0)


@register_optimizer("schedule-free")
class ScheduleFree(OptimizerRule):
    """Schedule-free AdamW (arXiv 2405.15682): AdamW that needs no schedule: it evaluates with an average x of its steps z, and takes gradients at y between both.

    z = z - lr_t u, u = g / (sqrt(v / (1 - beta2^t)) + eps) + decay y; x = (1 - c_t) x + c_t z; y = (1 - beta1) z + beta1 x.
    c_t = lr_t^2 over the sum of these squares so far, where lr_t is lr with linear warm-up, as in the authors' code. The
    parameter is y. State is z - y, which is small, begins as zero, and follows if something else changes y (hlb's decay, nGPT's
    projection).
    """

    Config = ScheduleFreeConfig
    own_schedule = True
    entrywise = True

    def default_lr(self, adamw: float) -> tuple[float, str] | None:
        return max(adamw, min(2 * adamw, 2.5e-3)), (
            "2 x AdamW's but at most 2.5e-3, the default of the authors' code, who find 1 to 10 times what AdamW has with a "
            "schedule (their README, arXiv 2405.15682), and never below AdamW's"
        )

    def state(self, shape: torch.Size, dtype: torch.dtype) -> Declared:
        return {STEP: (torch.Size(), torch.float32), "z_minus_y": (shape, dtype), "exp_avg_sq": (shape, dtype)}

    def update(
        self,
        group: GroupSettings,
        parameters: list[Tensor],
        gradients: list[Tensor],
        states: States,
        finite: Tensor,
    ) -> None:
        own, steps = group.config, counts(states)
        directions = cleared(gradients, finite)
        ahead, squares = [state["z_minus_y"] for state in states], [state["exp_avg_sq"] for state in states]
        average_squares_(squares, directions, own.beta2, finite)
        torch._foreach_div_(directions, roots(squares, steps, own.beta2, own.eps))
        if group.weight_decay:
            torch._foreach_add_(directions, parameters, alpha=group.weight_decay)

        share = average_share(steps, own.warmup_steps or 0)  # c_t [n]
        lr = group.lr * (steps / max(1, own.warmup_steps or 0)).clamp(max=1) * finite
        # y + c_t (z - y) - lr (1 - beta1 (1 - c_t)) u
        torch._foreach_add_(parameters, torch._foreach_mul(ahead, scalars(share * finite)))
        pulled = torch._foreach_mul(directions, scalars(lr * (1 - own.beta1 * (1 - share))))
        torch._foreach_sub_(parameters, pulled)
        # The new z - y is (1 - c_t) (z - y - lr beta1 u).
        torch._foreach_mul_(directions, scalars(lr * own.beta1))
        torch._foreach_sub_(ahead, directions)
        torch._foreach_mul_(ahead, scalars(1 - share * finite))

    def evaluation_weights(self, parameter: Tensor, state: dict[str, Tensor]) -> Tensor:
        """x = y - (1 / beta1 - 1) (z - y)."""
        return parameter - (1 / self.config.beta1 - 1) * state["z_minus_y"]

    def narrow_refusal(self) -> str:
        return "in bf16, z - y stands still after some hundred steps; use fp32"


def average_share(steps: Tensor, warmup: int) -> Tensor:
    """c_t [n] at 1-based `steps` [n]: t^2 over 1 + 4 + ... + t^2 during the warm-up; then each step counts as its last one."""
    warmup = max(1, warmup)
    rising = 6 * steps / ((steps + 1) * (2 * steps + 1))
    return torch.where(steps <= warmup, rising, 1 / ((warmup + 1) * (2 * warmup + 1) / (6 * warmup) + steps - warmup))
