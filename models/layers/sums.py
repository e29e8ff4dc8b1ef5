"""Running sums that CUDA also computes under deterministic algorithms."""

from __future__ import annotations

import torch
from torch import Tensor


def running_sum(x: Tensor, dim: int) -> Tensor:
    """x.cumsum(dim). Under deterministic algorithms on CUDA it uses sum_by_doubling, because torch's cumsum raises there."""
    return sum_by_doubling(x, dim) if x.is_cuda and torch.are_deterministic_algorithms_enabled() else x.cumsum(dim)


def sum_by_doubling(x: Tensor, dim: int) -> Tensor:
    """x.cumsum(dim) in ceil(log2 T) additions of a shifted copy, T = x.shape[dim]; the shift doubles each time."""
    shift, length = 1, x.shape[dim]
    while shift < length:
        first, rest = x.split((shift, length - shift), dim)
        x = torch.cat((first, rest + x.narrow(dim, 0, length - shift)), dim)
        shift *= 2
    return x
