"""Building blocks that the architectures share."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


@torch.no_grad()
def normal_(parameter: Tensor, std: float, generator: torch.Generator | None = None) -> None:
    """Fill `parameter`, of any dtype, device and sharding, with N(0, std^2) from `generator` (a CPU generator).

    The whole tensor is drawn in fp32 on the CPU, and each rank keeps its own shard. So one seed gives the same weights
    on every device and under every sharding.
    """
    fill_(parameter, torch.randn(parameter.shape, generator=generator, device="cpu", dtype=torch.float32) * std)


@torch.no_grad()
def uniform_(parameter: Tensor, bound: float, generator: torch.Generator | None = None) -> None:
    """As `normal_`, uniform in [-bound, bound]."""
    values = torch.rand(parameter.shape, generator=generator, device="cpu", dtype=torch.float32)
    fill_(parameter, (2 * values - 1) * bound)


@torch.no_grad()
def truncated_normal_(parameter: Tensor, std: float, generator: torch.Generator | None = None) -> None:
    """As `normal_`, but truncated at three standard deviations from 0."""
    values = torch.empty(parameter.shape, device="cpu", dtype=torch.float32)
    fill_(parameter, torch.nn.init.trunc_normal_(values, std=std, a=-3 * std, b=3 * std, generator=generator))


@torch.no_grad()
def fill_(parameter: Tensor, values: Tensor) -> None:
    """Copy the whole tensor `values`, which every rank has, into a parameter of any dtype, device and sharding, without communication."""
    if isinstance(parameter, DTensor):
        values = distribute_tensor(
            values.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    parameter.copy_(values)


def compute_dtype(weight: Tensor, device: torch.device) -> torch.dtype:
    """The dtype of a product with `weight` on `device`: autocast's dtype if autocast is on, else that of the weight."""
    return autocast_dtype(device.type) or weight.dtype


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast computes in; None if it is off. The meta device has no autocast."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """A context that switches autocast off on any device. (torch's own context raises on the meta device.)"""
    return contextlib.nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


@functools.cache
def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which the compiler does not trace. Not a decorator of kernels: torch.compiler.disable imports the
    compiler, which would take a second in every process that loads the models."""
    return torch.compiler.disable(function)
