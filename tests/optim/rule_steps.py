"""Steps of a rule on small tensors in fp64, as the trainer makes them, for tests that compute the same by hand."""

from typing import Any

import torch
from torch import Tensor

from trainer.optim.rule import STEP, GroupSettings, get_rule

# lr reaches a rule's foreach operations as an fp32 scalar: 2^-24 relative, and a few such factors.
SAME = 1e-6


class Steps:
    """parameters: fp64 copies of the given tensors; states: of each. settings: of the rule's Config."""

    def __init__(
        self, rule: str, parameters: list[Tensor], lr: float = 0.1, weight_decay: float = 0.0, **settings: Any
    ):
        self.rule = get_rule(rule, settings)
        self.group = GroupSettings(lr, weight_decay, self.rule.config, lr)
        self.parameters = [parameter.detach().double().clone() for parameter in parameters]
        self.states = [
            {key: torch.zeros(shape, dtype=kind) for key, (shape, kind) in self.rule.state(p.shape, p.dtype).items()}
            for p in self.parameters
        ]

    def take(self, gradients: list[Tensor], finite: float = 1.0) -> list[Tensor]:
        """One step. Returns copies of the parameters."""
        for state in self.states:
            if STEP in state:
                state[STEP] += finite
        given = [gradient.double().clone() for gradient in gradients]
        self.rule.update(self.group, self.parameters, given, self.states, torch.tensor(finite))
        return [parameter.clone() for parameter in self.parameters]


def drawn(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]


SHAPES = ((4, 3), (5,))


def against_torch(rule: str, reference: Any, steps: int = 4, tolerance: float = SAME, **options: Any) -> None:
    """`rule` makes the steps of a torch optimizer. reference: (parameters) -> optimizer."""
    start = drawn(*SHAPES)
    ours, theirs = Steps(rule, start, **options), [p.clone().requires_grad_() for p in start]
    optimizer = reference(theirs)
    for number in range(steps):
        gradients = drawn(*SHAPES, seed=1 + number)
        found = ours.take(gradients)
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        for mine, yours in zip(found, theirs, strict=True):
            torch.testing.assert_close(mine, yours.detach(), rtol=tolerance, atol=tolerance)
