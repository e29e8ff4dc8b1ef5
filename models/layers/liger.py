"""Liger's Triton kernels (arXiv 2410.10989) that compute the same as the decoder: RMSNorm, SwiGLU, and head with loss.

Liger's GEGLU uses the tanh GELU, and its LayerNorm and DyT round at other places, so torch computes these three. The compiler
does not trace them, because traced Liger kernels are reported to be wrong (RMSNorm) or slower than the compiler's
own (SwiGLU, github.com/linkedin/Liger-Kernel/issues/1330). It breaks its graph at them, and does not compile blocks that
recompute them.
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
from typing import Any

import torch
from torch import Tensor

from models.base import IGNORE
from models.layers import untraced
from models.layers.linear_cross_entropy import divisor
from models.layers.mlp import ACTIVATIONS
from models.layers.norms import RMSNorm

MIN_VERSION = (0, 8, 4)  # in older versions, soft-capped losses counted the padding columns of the last block


def take_over(model: Any, config: Any) -> list[str]:
    """Let Liger compute all RMSNorms and SwiGLUs in `model`; returns the names of the parts that Liger computes.

    If "loss" is among them, the caller must use `untraced(linear_cross_entropy)`.
    """
    taken = {}
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.compute = taken["RMSNorm"] = untraced(rms_norm)
        elif getattr(module, "activation", None) is ACTIVATIONS["swiglu"].apply:
            module.activation = taken["SwiGLU"] = untraced(swiglu)
    return [*sorted(taken), *(["loss"] if _loss_refusal(config) is None else [])]


def describe(taken: list[str], config: Any, device: torch.device) -> str:
    """Which kernels compute everything except attention, and why; "" if there was no choice. ValueError as in `require`."""
    if config.kernels == "liger":
        require(device)
        refusal = _loss_refusal(config)
        why = "asked for; the compiler stops at them, and at recomputed blocks"
        others = f"{', '.join(taken)}: liger ({why})" if taken else ""
        return "; ".join(filter(None, (others, f"loss: not liger ({refusal})" if refusal else "")))
    if config.kernels == "auto" and _refusal(device) is None:
        return "norms, MLP: torch (the compiler fuses them; liger only if asked for)"
    return ""


def _loss_refusal(config: Any) -> str | None:
    if config.n_predict > 1:
        return "liger weighs no rows, as n_predict does"
    if config.z_loss:
        return "liger tells the share of z_loss in half precision"
    return "liger predicts padding, which unpadded_vocab forbids" if config.unpadded_vocab else None


def _refusal(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "it needs CUDA"
    return (
        None if _version() >= MIN_VERSION else f"it needs liger-kernel >= {'.'.join(map(str, MIN_VERSION))} installed"
    )


def require(device: torch.device) -> None:
    """ValueError unless Liger can compute on `device`."""
    refusal = _refusal(device)
    if refusal is not None:
        raise ValueError(f"kernels liger cannot be used: {refusal}; use auto or torch")


@functools.cache
def _version() -> tuple[int, ...]:
    """Version of the installed liger-kernel; () if it is not installed."""
    try:
        return tuple(
            int(part) for part in importlib.metadata.version("liger-kernel").split(".")[:3] if part.isdecimal()
        )
    except importlib.metadata.PackageNotFoundError:
        return ()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `norms.rms_norm`: statistics in fp32, rounded to the dtype of x before the gain."""
    require(x.device)
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # Not in place: that would overwrite a gradient that the residual stream still needs.
    return LigerRMSNormFunction.apply(x, weight.to(x.dtype), eps, 0.0, "llama", False)


def swiglu(x: Tensor) -> Tensor:
    """[..., 2 hidden], with the gate first -> [..., hidden]."""
    require(x.device)
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    # Flattened, because Liger returns the gradient as rows for every shape of x.
    return LigerFusedGateUpSiLUMulFunction.apply(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean", *, softcap: float | None = None
) -> Tensor:
    """As `linear_cross_entropy.linear_cross_entropy`, but it waits for the GPU to count the targets.

    If the weight needs a gradient, x must need one too. A second backward pass would give wrong gradients.
    """
    require(x.device)
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    divide_by = divisor(targets, reduction)
    # No bias, class weights or label smoothing; the weight's gradient is added up in fp32.
    forms = None, None, IGNORE, 0.0, 0.0, "sum", softcap, False, torch.float32
    total = LigerFusedLinearCrossEntropyFunction.apply(x.flatten(0, -2), weight, targets.flatten(), *forms)[0]
    if divide_by is None:
        return total
    return (total / divide_by.clamp(min=1)).masked_fill(divide_by == 0, math.nan)
