"""SOAP (arXiv 2409.11321) and PaLM-SOAP: Adam in the eigenbasis of Shampoo's preconditioners."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trainer.core.settings import setting
from trainer.optim.matrix_rule import MatrixRule
from trainer.optim.rule import STEP, Declared, GroupSettings, register_optimizer

SIDES = {"L": -2, "R": -1}  # preconditioner -> the dimension of the gradient [k, m, n] that it belongs to


@dataclass
class SoapConfig:
    beta1: float = setting(0.95, "decay of the mean of gradients", low=0, high=0.99999)
    beta2: float = setting(0.95, "decay of the mean of squares and of the preconditioners", low=0, high=0.99999)
    eps: float = setting(1e-8, "added to the root of the mean of squares", low=0)
    frequency: int = setting(10, "steps between changes of the basis", low=1)
    max_precond_dim: int = setting(10_000, "a longer side of a matrix is not rotated", low=1)


@register_optimizer("soap")
class Soap(MatrixRule):
    """SOAP (arXiv 2409.11321): Adam in the eigenbasis of Shampoo's preconditioners.

    L and R are running means of G G^T and G^T G, Q_L and Q_R their eigenvectors. Adam runs on the rotated gradient Q_L^T G Q_R.

    The first step sets the basis (by eigh, for which the host waits this once) and changes no weight. Each `frequency` steps of
    the run one step of power iteration and QR follows; the mean of squares is reordered with the basis. All matrices turn in the
    same step: which steps are a matrix's must not depend on the rank that owns it. A parameter whose first finite step is not the
    run's begins with the identity as its basis, since the host does not know of it. On a GPU products are in TF32, like all
    fp32 products of a run. eps is added after the correction for the start, as in Adam; the author's code adds it before.
    """

    Config: ClassVar[type] = SoapConfig

    def state(self, shape: torch.Size, dtype: torch.dtype) -> Declared:
        """L, R, Q_L and Q_R are never bf16: eigenvectors must stay orthogonal."""
        declared: Declared = {STEP: (torch.Size(), torch.float32), "m": (shape, dtype), "v": (shape, dtype)}
        for side, dimension in SIDES.items():
            length = shape[dimension]
            if length <= self.config.max_precond_dim:
                square = torch.Size((length, length)), torch.promote_types(dtype, torch.float32)
                declared |= {side: square, f"Q_{side}": square}
        return declared

    def decays(self, config: Any, steps: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """(beta2 of a mean that has taken `steps` [k] steps with this one, 1 - the weight of its zeros at the start)."""
        return config.beta2, 1 - config.beta2**steps

    def direction(self, group: GroupSettings, gradient: Tensor, state: dict[str, Tensor], finite: Tensor) -> Tensor:
        own = group.config
        seen = state[STEP].view(-1, 1, 1).to(gradient.dtype)  # gradients, with this one
        started = (seen > 1).to(gradient.dtype)
        moves = started * finite
        updates = (seen - 1).clamp(min=1)
        m, v = state["m"], state["v"]
        m.lerp_(gradient, (1 - own.beta1) * moves)
        rotated = rotate(gradient, state)
        beta2, filled = self.decays(own, updates)
        v.lerp_(rotated.square(), (1 - beta2) * moves)
        adam = rotate(m, state) / (1 - own.beta1**updates) / ((v / filled).sqrt() + own.eps)
        direction = started * rotate(adam, state, back=True)
        self.precondition(group, gradient, state, seen, finite)
        return direction

    def decaying(self, config: Any, state: dict[str, Tensor], weight: Tensor, direction: Tensor) -> Tensor | float:
        return (state[STEP].view(-1, 1, 1) > 1).to(weight.dtype)

    def precondition(
        self, group: GroupSettings, gradient: Tensor, state: dict[str, Tensor], seen: Tensor, finite: Tensor
    ) -> None:
        """Update L and R; every `frequency` steps, and in the first, also the basis."""
        beta2, _ = self.decays(group.config, seen.clamp(min=1))
        first = (seen == 1) & (finite > 0)
        for side, dimension in SIDES.items():
            if side not in state:
                continue
            product = gradient @ gradient.mT if side == "L" else gradient.mT @ gradient
            state[side].lerp_(product, (1 - beta2) * finite)
            basis = state[f"Q_{side}"]
            basis.diagonal(dim1=-2, dim2=-1).add_(first.squeeze(-1))  # it was 0 and is now the identity
            if group.step % group.config.frequency:
                continue
            order, turned = next_basis(state[side], basis)
            if group.step == 0:
                turned = torch.where(first, torch.linalg.eigh(state[side])[1].flip(-1), turned)
            state[f"Q_{side}"] = torch.where(finite > 0, turned, basis)
            reordered = state["v"].gather(dimension, along(order, dimension).expand_as(state["v"]))
            state["v"] = torch.where(finite > 0, reordered, state["v"])


@dataclass
class PalmSoapConfig:
    beta1: float = setting(0.9, "decay of the mean of gradients", low=0, high=0.99999)
    decay_exponent: float = setting(0.8, "beta2 is 1 - t^-this at step t", above=0, high=1)
    eps: float = setting(1e-8, "added to the root of the mean of squares", low=0)
    frequency: int = setting(2, "steps between changes of the basis", low=1)
    max_precond_dim: int = setting(2048, "a longer side of a matrix is not rotated", low=1)


@register_optimizer("palm-soap")
class PalmSoap(Soap):
    """PaLM-SOAP: SOAP with the beta2 of PaLM (arXiv 2204.02311): 1 - t^-0.8, so that means over few steps forget fast.

    The first beta2 is 0, so the means need no correction for their start. HeavyBall, which had this rule as PaLMForeachSOAP,
    corrected them all the same, and with a weight decay its weights grew.
    """

    Config = PalmSoapConfig

    def decays(self, config: Any, steps: Tensor) -> tuple[Tensor | float, Tensor | float]:
        return 1 - steps**-config.decay_exponent, 1.0


def rotate(matrices: Tensor, state: dict[str, Tensor], back: bool = False) -> Tensor:
    """Q_L^T G Q_R of matrices G [k, m, n], or Q_L G Q_R^T; a side without a basis stays."""
    if "Q_L" in state:
        matrices = (state["Q_L"] if back else state["Q_L"].mT) @ matrices
    if "Q_R" in state:
        matrices = matrices @ (state["Q_R"].mT if back else state["Q_R"])
    return matrices


def next_basis(mean: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """(order of the old eigenvectors by falling eigenvalue [k, m], new eigenvectors [k, m, m]), by a power iteration and QR."""
    product = mean @ basis
    order = torch.argsort((basis * product).sum(-2), dim=-1, descending=True, stable=True)
    return order, torch.linalg.qr(product.gather(-1, along(order, -1).expand_as(product)))[0]


def along(order: Tensor, dimension: int) -> Tensor:
    """Indices [k, m] as an index of that dimension of [k, m, n]: [k, m, 1] or [k, 1, m]."""
    return order.unsqueeze(-1 if dimension == -2 else -2)
