"""Muon (Keller Jordan's, and arXiv 2502.16982) and AdaMuon (arXiv 2507.11005): momentum with orthogonal updates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trainer.core.settings import setting
from trainer.optim.matrix_rule import MatrixRule
from trainer.optim.newton_schulz import COEFFICIENTS, orthogonalised
from trainer.optim.rule import Declared, GroupSettings, register_optimizer

Scale = Literal["match_rms", "spectral", "none"]
TINY = 1e-10  # added to divisors


def scale_factor(scale: Scale, m: int, n: int) -> float:
    """What the update of an [m, n] matrix is multiplied by.

    match_rms: 0.2 sqrt(max(m, n)), which gives an orthogonal update the root mean square 0.2 of AdamW's (arXiv 2502.16982).
    spectral: sqrt(max(1, m / n)), which gives outputs of equal change whatever the shape (Keller Jordan's).
    """
    return {"match_rms": 0.2 * math.sqrt(max(m, n)), "spectral": math.sqrt(max(1.0, m / n)), "none": 1.0}[scale]


def momentum_of(config: Any, gradient: Tensor, momentum: Tensor, finite: Tensor) -> Tensor:
    """Update the running mean `momentum` in place. Returns it, or with config.nesterov a step ahead of it."""
    momentum.lerp_(gradient, (1 - config.momentum) * finite)
    return gradient.lerp(momentum, config.momentum) if config.nesterov else momentum


def norm(matrices: Tensor) -> Tensor:
    """[k, 1, 1]"""
    return torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)


@dataclass
class MuonConfig:
    momentum: float = setting(0.95, "decay of the mean of gradients", low=0, high=0.99999)
    nesterov: bool = setting(True, "mix the gradient once more into the momentum")
    coefficients: Literal["ns5", "polar_express"] = setting(
        "ns5", "Newton-Schulz polynomials: Keller Jordan's one, or those of arXiv 2505.16932"
    )
    steps: int | None = setting(None, "Newton-Schulz steps; auto: 5 of ns5, 6 of polar_express", low=1, high=20)
    scale: Scale = setting(
        "match_rms", "factor of the update: match_rms 0.2 sqrt(max(m, n)), spectral sqrt(max(1, m/n)), or none"
    )
    normuon: bool = setting(False, "NorMuon (arXiv 2510.05491): divide each row by its running root mean square")
    beta2: float = setting(0.95, "normuon: decay of the mean of squares", low=0, high=0.99999)
    cautious_decay: bool = setting(
        False,
        "weight decay only where it agrees with the update (arXiv 2510.12402); not the decay that follows the loss",
    )


@register_optimizer("muon")
class Muon(MatrixRule):
    """Muon (arXiv 2502.16982): orthogonal momentum, all directions of a matrix learn equally fast.

    Momentum is a mean of gradients, as in torch.optim.Muon (a sum in the papers: the orthogonal matrix is the same). With
    `normuon` rows are divided by the running root mean square v of their numbers, then the update gets its norm back, as in the
    author's code; the paper sets the root mean square of the update to 0.2, the same with match_rms and an orthogonal matrix.
    """

    Config = MuonConfig

    def state(self, shape: torch.Size, dtype: torch.dtype) -> Declared:
        rows: Declared = {"v": (shape[:1], torch.promote_types(dtype, torch.float32))} if self.config.normuon else {}
        return {"momentum": (shape, dtype), **rows}

    def default_lr(self, adamw: float) -> tuple[float, str] | None:
        if self.config.scale == "match_rms":
            return adamw, "AdamW's, for match_rms gives updates AdamW's size (arXiv 2502.16982)"
        return 0.02, f"Keller Jordan's, for scale {self.config.scale}"

    def width_rule(self) -> tuple[float, str] | None:
        """An update's spectral norm must be that of the outputs' change over the inputs', sqrt(m / n): constant for fixed m / n."""
        powers = {"spectral": 0.0, "match_rms": -0.5}  # match_rms is 0.2 sqrt(max(m, n)), which grows with the width
        power, source = powers.get(self.config.scale), "spectral condition, 2310.17813"
        return None if power is None else (power, f"scale {self.config.scale}: {source}")

    def direction(self, group: GroupSettings, gradient: Tensor, state: dict[str, Tensor], finite: Tensor) -> Tensor:
        own = group.config
        ahead = momentum_of(own, gradient, state["momentum"], finite)
        update = orthogonalised(ahead, COEFFICIENTS[own.coefficients], own.steps)
        if own.normuon:
            v = state["v"].lerp_(update.square().mean(-1), (1 - own.beta2) * finite)  # [k, m]
            divided = update / (v.sqrt().unsqueeze(-1) + TINY)
            update = divided * (norm(update) / (norm(divided) + TINY))
        return update * scale_factor(own.scale, *update.shape[-2:])

    def decaying(
        self, config: MuonConfig, state: dict[str, Tensor], weight: Tensor, direction: Tensor
    ) -> Tensor | float:
        return (weight * direction >= 0).to(weight.dtype) if config.cautious_decay else 1.0


@dataclass
class AdaMuonConfig:
    momentum: float = setting(0.95, "decay of the mean of gradients", low=0, high=0.99999)
    nesterov: bool = setting(True, "mix the gradient once more into the momentum")
    beta2: float = setting(0.95, "decay of the mean of squares", low=0, high=0.99999)
    eps: float = setting(1e-8, "added to the root of the mean of squares", low=0)
    coefficients: Literal["ns5", "polar_express"] = setting("ns5", "Newton-Schulz polynomials, as of muon")
    steps: int | None = setting(None, "Newton-Schulz steps; auto: 5 of ns5, 6 of polar_express", low=1, high=20)


@register_optimizer("adamuon")
class AdaMuon(MatrixRule):
    """AdaMuon (arXiv 2507.11005): Muon of the momentum's signs, divided by the root mean square of each number.

    The update's root mean square is 0.2.
    As in the revised paper. The author's first code takes the momentum itself, not its signs. It also corrects the mean of
    squares for its start, a factor of the whole matrix, which the last step here removes anyway.
    """

    Config = AdaMuonConfig

    def default_lr(self, adamw: float) -> tuple[float, str] | None:
        return adamw, "AdamW's, for its updates have AdamW's size (arXiv 2507.11005)"

    def state(self, shape: torch.Size, dtype: torch.dtype) -> Declared:
        return {"momentum": (shape, dtype), "v": (shape, dtype)}

    def direction(self, group: GroupSettings, gradient: Tensor, state: dict[str, Tensor], finite: Tensor) -> Tensor:
        own = group.config
        ahead = momentum_of(own, gradient, state["momentum"], finite)
        update = orthogonalised(ahead.sign(), COEFFICIENTS[own.coefficients], own.steps)
        v = state["v"].lerp_(update.square(), (1 - own.beta2) * finite)
        update = update / (v.sqrt() + own.eps)
        return update * (0.2 * math.sqrt(update[0].numel()) / (norm(update) + TINY))
