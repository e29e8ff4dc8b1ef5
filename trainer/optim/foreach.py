"""What rules share: operations on lists of tensors that change nothing if a step is not finite.

`finite` is 1.0 or 0.0 on the device, as in OptimizerRule.update. In foreach operations a factor that is a scalar tensor costs no
wait. A list of scalar tensors, one for each parameter, is used where steps are counted parameter by parameter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.optim.rule import STEP

States = list[dict[str, Tensor]]
Tensors = tuple[Tensor, ...] | list[Tensor]

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number


def cleared(gradients: list[Tensor], finite: Tensor) -> list[Tensor]:
    """Copies of the gradients; zeros if `finite` is 0. Their bits are multiplied as integers, because 0 * NaN would be NaN."""
    first = gradients[0]
    kind = INTEGERS[first.itemsize]
    bits = torch._foreach_mul([gradient.view(kind) for gradient in gradients], finite.to(kind))
    return [number.view(first.dtype) for number in bits]


def average_(means: Tensors, values: Tensors, beta: float, finite: Tensor) -> None:
    """means = beta means + (1 - beta) values. values: zeros if `finite` is 0."""
    torch._foreach_mul_(means, 1 - (1 - beta) * finite)
    torch._foreach_add_(means, values, alpha=1 - beta)


def average_squares_(means: Tensors, values: Tensors, beta: float, finite: Tensor) -> None:
    """means = beta means + (1 - beta) values^2. values: zeros if `finite` is 0."""
    torch._foreach_mul_(means, 1 - (1 - beta) * finite)
    torch._foreach_addcmul_(means, values, values, value=1 - beta)


def moments_(
    states: States, values: Tensors, beta1: float, beta2: float, finite: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Adam's means of values and of their squares, brought up to date: (exp_avg, exp_avg_sq). values: zeros if `finite` is 0."""
    means, squares = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
    average_(means, values, beta1, finite)
    average_squares_(squares, values, beta2, finite)
    return means, squares


def counts(states: States) -> Tensor:
    """Steps of each parameter [n], in fp64. At least 1, also if no step was finite yet, so that 1 - beta^t is not 0."""
    return torch.stack([state[STEP] for state in states]).double().clamp_(min=1)


def scalars(values: Tensor) -> list[Tensor]:
    """values [n] as n scalars in fp32."""
    return list(values.float().unbind())


def norms(tensors: Tensors, order: int) -> Tensor:
    """The norm of each tensor [n], in fp32 or wider."""
    return torch.stack(torch._foreach_norm(tensors, order, torch.promote_types(tensors[0].dtype, torch.float32)))


def roots(squares: Tensors, steps: Tensor, beta: float, eps: float) -> Tensors:
    """Adam's divisor: sqrt(squares / (1 - beta^t)) + eps. steps [n]: t of each."""
    found = torch._foreach_sqrt(squares)
    torch._foreach_div_(found, scalars((1 - beta**steps).sqrt()))
    torch._foreach_add_(found, eps)
    return found


def adam_directions(means: Tensors, squares: Tensors, steps: Tensor, beta1: float, beta2: float, eps: float) -> Tensors:
    """Adam's update before lr: means / (1 - beta1^t) over `roots`."""
    found = torch._foreach_div(means, scalars(1 - beta1**steps))
    torch._foreach_div_(found, roots(squares, steps, beta2, eps))
    return found


def descend_(parameters: Tensors, directions: Tensors, lr: Tensor, weight_decay: float) -> None:
    """parameters = (1 - lr decay) parameters - lr directions. lr: 0 if the step is not finite. Overwrites `directions`."""
    if weight_decay:
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)
    torch._foreach_mul_(directions, lr)
    torch._foreach_sub_(parameters, directions)
