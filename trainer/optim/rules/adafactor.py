"""Adafactor (arXiv 1804.04235): second moments of a matrix by its rows and columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.core.settings import setting
from trainer.optim.foreach import States, cleared, counts
from trainer.optim.rule import STEP, Declared, GroupSettings, OptimizerRule, register_optimizer


@dataclass
class AdafactorConfig:
    beta2_decay: float = setting(-0.8, "the mean of squares forgets t^beta2_decay of itself at step t", high=0)
    eps: float = setting(1e-3, "smallest root mean square of a parameter, to which its step is proportional", above=0)
    clip: float = setting(1.0, "largest root mean square of an update before its step size", above=0)


@register_optimizer("adafactor")
class Adafactor(OptimizerRule):
    """Adafactor (arXiv 1804.04235): second moments of a matrix by its rows and columns. Update: g over the root of the estimated mean of g^2, scaled down to a root mean square of `clip`, times min(lr, t^-0.5) and
    the parameter's own root mean square. No momentum. Decay is decoupled.

    The same as torch.optim.Adafactor, whose min(lr, t^-0.5) has lr where the paper has 0.01. A parameter with fewer than two
    dimensions keeps its whole second moment. Reductions are made parameter by parameter: foreach has none over rows.
    """

    Config = AdafactorConfig
    scope = "tensor"

    def default_lr(self, adamw: float) -> tuple[float, str] | None:
        return 0.01, "the paper's step relative to the weights, at any size (arXiv 1804.04235)"

    def state(self, shape: torch.Size, dtype: torch.dtype) -> Declared:
        step = {STEP: (torch.Size(), torch.float32)}
        if len(shape) < 2:
            return {**step, "variance": (shape, dtype)}
        rows, columns = torch.Size([*shape[:-1], 1]), torch.Size([*shape[:-2], 1, shape[-1]])
        return {
            **step,
            "row_var": (rows, dtype if rows == shape else torch.float32),
            "col_var": (columns, dtype if columns == shape else torch.float32),
        }

    def update(
        self,
        group: GroupSettings,
        parameters: list[Tensor],
        gradients: list[Tensor],
        states: States,
        finite: Tensor,
    ) -> None:
        own, steps = group.config, counts(states)
        weights = (steps**own.beta2_decay * finite).float()  # of the newest squares [n]
        rates = (steps**-0.5).clamp(max=group.lr).float() * finite  # [n]
        gradients = cleared(gradients, finite)
        kept = 1 - group.lr * group.weight_decay * finite
        for parameter, gradient, state, weight, rate in zip(parameters, gradients, states, weights, rates, strict=True):
            squares = estimate_(state, gradient, weight)
            # Squares smaller than those of torch.finfo's eps count as such.
            update = gradient * squares.clamp_(min=torch.finfo(parameter.dtype).eps ** 2).rsqrt_()
            size = rate * root_mean_square(parameter).clamp(min=own.eps)
            parameter.mul_(kept).sub_(update * (size / (root_mean_square(update) / own.clip).clamp(min=1)))


def estimate_(state: dict[str, Tensor], gradient: Tensor, weight: Tensor) -> Tensor:
    """Add the gradient's squares to the means in `state`. Returns the estimate for each number, of the gradient's shape."""
    if "variance" in state:
        state["variance"].lerp_(gradient.square(), weight.to(gradient.dtype))
        return state["variance"].clone()
    rows, columns = state["row_var"], state["col_var"]
    rows.lerp_(gradient.square().mean(-1, keepdim=True, dtype=rows.dtype), weight.to(rows.dtype))
    columns.lerp_(gradient.square().mean(-2, keepdim=True, dtype=columns.dtype), weight.to(columns.dtype))
    return rows * columns / rows.mean(-2, keepdim=True).clamp(min=torch.finfo(gradient.dtype).eps)


def root_mean_square(tensor: Tensor) -> Tensor:
    """A scalar in fp32, or in the tensor's type if that is wider."""
    return torch.linalg.vector_norm(tensor) / max(1, tensor.numel()) ** 0.5
