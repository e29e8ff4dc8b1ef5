"""Orthogonal matrices by Newton-Schulz iterations: U V^T, about, of a matrix U S V^T, by products alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Coefficients(NamedTuple):
    """Of the polynomials a x + b x^3 + c x^5 that are applied to the singular values, one after the other; the last repeats.

    steps: how many are usual; slack: the matrix is divided by so much more than its norm, so that rounding leaves every
    singular value below 1.
    """

    polynomials: tuple[tuple[float, float, float], ...]
    steps: int
    slack: float = 1.0

    def take(self, steps: int | None) -> list[tuple[float, float, float]]:
        wanted = self.steps if steps is None else steps
        return [self.polynomials[min(i, len(self.polynomials) - 1)] for i in range(wanted)]


def polar_express() -> tuple[tuple[float, float, float], ...]:
    """The polynomials of arXiv 2505.16932, Algorithm 1: the best for singular values from 0.001 on. All but the last take x / 1.01,
    as there, against rounding in bf16."""
    best = (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
        (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
        (1.875, -1.25, 0.375),
    )
    return (*((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in best[:-1]), best[-1])


COEFFICIENTS = {
    "ns5": Coefficients(((3.4445, -4.7750, 2.0315),), steps=5),  # Keller Jordan's
    "polar_express": Coefficients(polar_express(), steps=6, slack=1.01),
}
SMALLEST = 1e-7  # a norm below it counts as this one


def iteration_dtype(matrices: Tensor) -> torch.dtype:
    """bf16 on a GPU, whose bf16 products are several times as fast; the iterations tolerate its rounding. Else their own."""
    return torch.bfloat16 if matrices.is_cuda else matrices.dtype


def orthogonalised(matrices: Tensor, coefficients: Coefficients, steps: int | None = None) -> Tensor:
    """matrices [k, m, n] with all singular values moved towards 1, in their own type. Zeros stay zeros."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices  # the products x x^T are then smaller
    x = x.to(iteration_dtype(x))
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)  # at least the largest singular value
    x = x / (norm * coefficients.slack).clamp(min=SMALLEST)
    for a, b, c in coefficients.take(steps):
        gram = x @ x.mT  # [k, r, r], r = min(m, n)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
