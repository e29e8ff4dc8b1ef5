"""The gradient noise scale (log.noise_scale): about the batch beyond which more tokens in a step help little."""

from __future__ import annotations

import torch
from torch import Tensor

DECAY = 0.99  # of the averages, in each step: they look back about 100 steps


class NoiseScale:
    """The simple noise scale tr(Sigma) / |G|^2 in tokens (arXiv 1812.06162, appendix A.1). G: the true gradient; Sigma: covariance
    of a token's gradient.

    averages: fp32 [2] on the device, moving averages of the estimates of |G|^2 and of tr(Sigma). They begin with zeros, so both
    are too small by the same factor, 1 - DECAY^steps, and their ratio is not.
    """

    def __init__(self, device: torch.device) -> None:
        self.averages = torch.zeros(2, device=device)

    def add(self, part: Tensor, tokens: Tensor, whole: Tensor, count: int | Tensor, finite: Tensor) -> None:
        """Take a step into the averages, unless it or an estimate is not finite. Nothing here waits for the device.

        part: norm of the gradient of the first `tokens` tokens that count, of a loss that was divided by `count`; whole: norm of
        the gradient of all `count` tokens; finite: 1.0 or 0.0. Scalars on the device, fp32.
        """
        small, big = (part * count / tokens).square(), whole.square()
        square = (count * big - tokens * small) / (count - tokens)
        trace = (small - big) / (1 / tokens - 1 / count)
        estimates = torch.stack([square, trace])
        fits = estimates.isfinite().all() & (finite > 0)
        self.averages = torch.where(fits, self.averages.lerp(estimates, 1 - DECAY), self.averages)
