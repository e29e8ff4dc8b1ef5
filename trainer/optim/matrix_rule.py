"""The base of rules that make an update [m, n] of each matrix [m, n]: equal shapes are computed together, stacked to [k, m, n]."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from trainer.optim.foreach import cleared
from trainer.optim.rule import STEP, GroupSettings, OptimizerRule, Scope


class MatrixRule(OptimizerRule):
    """Defines `update` by `direction`: weights become (1 - lr decay) weights - lr direction."""

    scope: ClassVar[Scope] = "matrix"

    def direction(self, group: GroupSettings, gradient: Tensor, state: dict[str, Tensor], finite: Tensor) -> Tensor:
        """The update [k, m, n] of k matrices, before lr.

        gradient: [k, m, n], zeros if `finite` is 0; state: stacked in the same way, fp32 or wider. Its entries are replaced or
        changed in place, but not if `finite` is 0.
        """
        raise NotImplementedError

    def decaying(self, config: Any, state: dict[str, Tensor], weight: Tensor, direction: Tensor) -> Tensor | float:
        """1 for the weights that decay and 0 for the others, as [k, m, n] or one number."""
        return 1.0

    def update(
        self,
        group: GroupSettings,
        parameters: list[Tensor],
        gradients: list[Tensor],
        states: list[dict[str, Tensor]],
        finite: Tensor,
    ) -> None:
        for places in stacks(parameters):
            held = [states[place] for place in places]
            state = {key: stacked([one[key] for one in held]) for key in held[0]}
            [gradient] = cleared([stacked([gradients[place] for place in places])], finite)
            works = finite.to(gradient.dtype)
            lr = group.lr * works
            direction = self.direction(group, gradient, state, works)
            for key, values in state.items():
                if key != STEP:
                    put([one[key] for one in held], values)
            weights = [parameters[place] for place in places]
            weight = stacked(weights)
            if group.weight_decay:
                weight.mul_(1 - lr * group.weight_decay * self.decaying(group.config, state, weight, direction))
            put(weights, weight.sub_(lr * direction))


def stacks(matrices: list[Tensor]) -> Iterator[list[int]]:
    """Positions of the matrices of each shape. (The trainer gives a part of the numbers at a time, equal shapes as neighbours.)"""
    by_shape: dict[torch.Size, list[int]] = {}
    for place, matrix in enumerate(matrices):
        by_shape.setdefault(matrix.shape, []).append(place)
    yield from by_shape.values()


def stacked(tensors: list[Tensor]) -> Tensor:
    """[k, ...] in fp32 or wider: a view of a single tensor that already is, otherwise a copy."""
    stack = tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)
    return stack.to(torch.promote_types(stack.dtype, torch.float32))


def put(tensors: list[Tensor], values: Tensor) -> None:
    """Copy values [k, ...] into tensors, unless they are views of them."""
    if values.data_ptr() != tensors[0].data_ptr():
        torch._foreach_copy_(tensors, list(values))
