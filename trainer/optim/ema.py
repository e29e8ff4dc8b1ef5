"""A moving average of the weights (optim.ema)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.optim.narrow_state import PIECE, batches, flat


class WeightAverage:
    """average = d average + (1 - d) weights after each update of the weights, with d = min(decay, (1 + t) / (10 + t)).

    t: updates averaged before this one. Without it the initial weights would count for 1 / (1 - decay) steps and more; it is the
    `num_updates` of TensorFlow's tf.train.ExponentialMovingAverage.

    averages: name -> average, which begins as the weights. It is fp32 also where these are bf16: a bf16 average never moves by
    less than 2^-9 to 2^-8 of itself. updates: t, a fp32 scalar on the device.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float, device: torch.device) -> None:
        self.decay = decay
        self.averages = {name: weight.detach().to(torch.float32, copy=True) for name, weight in weights.items()}
        self.updates = torch.zeros((), device=device)

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], finite: Tensor) -> None:
        """After a step. weights: by the same names; finite: as in OptimizerRule.update; at 0.0 nothing changes, and nothing waits."""
        share = (9 / (10 + self.updates)).clamp(min=1 - self.decay) * finite  # 1 - d
        self.updates += finite
        held = list(self.averages.values())
        place = held[0].device  # of offloaded weights: the CPU
        share, size = share.to(place), PIECE[place.type]
        work = torch.empty(min(size, sum(average.numel() for average in held)), device=place)
        rows = [[flat(average), flat(weights[name]), None] for name, average in self.averages.items()]
        for averages, now, _ in batches(rows, size):
            numbers = [average.numel() for average in averages]
            change = list(work[: sum(numbers)].split(numbers))
            torch._foreach_copy_(change, now)
            torch._foreach_sub_(change, averages)
            torch._foreach_mul_(change, share)
            torch._foreach_add_(averages, change)
