"""Merging the weights of several models into one: how one tensor of the result follows from that tensor of each model.

All arithmetic is fp32, tensor by tensor. The models must have the same architecture; they should have a common ancestor, because
the weights of independent runs lie in different basins, and a point between them is no good model (arXiv 1912.05671).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

MERGED = "merged"  # key of a manifest: how the weights came about, where no training made them
NEARLY_PARALLEL = 0.9995  # |cos| above which slerp is a straight line: there sin(angle) has few digits left

Merge = Callable[[Sequence[Tensor]], Tensor]  # the tensor of each model, fp32 -> merged


def linear(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted mean ("model soup", arXiv 2203.05482)."""
    return sum(tensor * weight for tensor, weight in zip(tensors, weights, strict=True)) / sum(weights)  # type: ignore[return-value]


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Spherical linear interpolation from a (t = 0) to b (t = 1), of the whole tensors as vectors.

    Where they are nearly parallel or opposite, or one is zero, no arc is defined: then it is the linear interpolation.
    """
    lengths = a.norm() * b.norm()
    cos = float((a * b).sum() / lengths) if lengths > 0 else 1.0
    if abs(cos) > NEARLY_PARALLEL:
        return a.lerp(b, t)
    angle = torch.arccos(torch.tensor(cos, dtype=torch.float64))
    shares = torch.sin(torch.tensor([1 - t, t], dtype=torch.float64) * angle) / torch.sin(angle)
    return a * float(shares[0]) + b * float(shares[1])


def task_arithmetic(tensors: Sequence[Tensor], base: Tensor, weights: Sequence[float], scale: float) -> Tensor:
    """base + scale * the weighted sum of what each model changed (arXiv 2212.04089). A negative weight unlearns a task."""
    changes = (tensor - base for tensor in tensors)
    return base + scale * sum(change * weight for change, weight in zip(changes, weights, strict=True))


def ties(tensors: Sequence[Tensor], base: Tensor, weights: Sequence[float], scale: float, density: float) -> Tensor:
    """TIES (arXiv 2306.01708): of what each model changed keep the largest entries, elect the sign of their weighted sum, and add
    scale * the weighted mean of those that have it to the base.

    density: share of the entries of each tensor that is kept; the paper keeps a share of all entries of a model together.
    """
    kept = torch.stack([largest(tensor - base, density) for tensor in tensors])  # [models, ...]
    shares = torch.tensor(weights).reshape(-1, *[1] * base.dim())
    elected = (kept * shares).sum(0).sign()
    agreeing = shares * ((kept.sign() == elected) & (kept != 0))
    total = agreeing.sum(0)
    return base + scale * torch.where(total > 0, (kept * agreeing).sum(0) / total.clamp(min=1e-30), 0)


def largest(change: Tensor, density: float) -> Tensor:
    """`change` with 0 instead of all but its `density` largest entries by magnitude; at least one is kept, and equal ones together."""
    count = max(1, round(density * change.numel()))
    least = change.abs().flatten().kthvalue(change.numel() - count + 1).values
    return change.where(change.abs() >= least, 0)


def merged(
    merge: Merge, models: Sequence[Iterable[tuple[str, Tensor]]], projections: dict[str, Callable[[Tensor], None]]
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the merged model, in the types of the first one.

    models: what `Weights.each` gives, so all have the same names in the same order; a tensor that is not of floating point is that
    of the first model. projections: by name of a parameter, applied to the result.
    """
    for entries in zip(*models, strict=True):
        name, first = entries[0]
        if not first.is_floating_point():
            yield name, first
            continue
        result = merge([tensor.float() for _, tensor in entries])
        if name in projections:
            projections[name](result)
        yield name, result.to(first.dtype)
