"""Fused kernels of other packages for the recurrences and the short convolution, and the choice between them and torch.

| package | computes | documents |
|---|---|---|
| mamba-ssm | the state space of Mamba-2 (`ssd`) | kept apart |
| causal-conv1d | the short convolution, with SiLU | kept apart |
| fla-core (flash-linear-attention) | all of these and the delta rules | refused: it needs their lengths in CPU memory, so a step would wait |

Each function here takes what its reference takes and returns what that returns: ssd.ssd, delta_rule.delta_rule,
delta_rule.gated_delta_rule, causal.ShortConvolution. They differ in rounding only: products are of the activations' dtype (TF32 for
fp32), while decays, sums and states are fp32. The compiler breaks its graph at them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.layers import untraced, without_autocast
from models.layers.chunks import wide

LEAST_LENGTH = 16  # tokens below which a fused kernel mostly computes padding: steps of decoding
LEAST_WIDTH, MOST_WIDTH = 16, 256  # channels of a head in fla
CHUNK = 128  # tokens of a chunk in mamba-ssm
BEHIND = 256  # numbers behind the document numbers that causal-conv1d (pull request 117) may read, and does not use
FLA_VERSION = (0, 6)


class Case(NamedTuple):
    """What a choice depends on. widths: channels of a head's keys and values; convolutions: (channels, tokens) of each."""

    device: torch.device
    dtype: torch.dtype
    length: int
    documents: bool
    widths: tuple[int, ...] = ()
    convolutions: Sequence[tuple[int, int]] = ()


class Fused(NamedTuple):
    """call: the kernel, with the signature of its reference; refusal(case): why it cannot compute this, or None."""

    call: Callable[..., Any]
    refusal: Callable[[Case], str | None]


def choose(
    field: str, wanted: str, kernels: Mapping[str, Fused], case: Case
) -> tuple[str, str, Callable[..., Any] | None]:
    """(name, why, function): the kernel `wanted`, or for "auto" the first of `kernels` that can; None for torch.

    field: of the Config, for errors. A sequence too short for any, as in decoding, is torch's whatever is wanted. ValueError if
    a kernel that is named cannot compute this here.
    """
    if wanted == "torch":
        return "torch", "asked for", None
    refusals: list[str] = []
    for name in kernels if wanted == "auto" else (wanted,):
        refusal = kernels[name].refusal(case)
        if refusal is None and case.length >= LEAST_LENGTH:
            why = "; ".join([*refusals, "one fused kernel"]) if wanted == "auto" else "asked for"
            return name, why, untraced(kernels[name].call)
        if refusal is not None and wanted != "auto":
            raise ValueError(f"{field} {name} cannot be used: {refusal}; use auto or torch")
        refusals.append(f"{name}: {refusal or f'fewer than {LEAST_LENGTH} tokens'}")
    return "torch", "; ".join(refusals), None


# -- what a package can do here ------------------------------------------------------------------------------------------


def _device_refusal(case: Case) -> str | None:
    if case.device.type != "cuda":
        return "it needs CUDA"
    if torch.cuda.get_device_capability(case.device) < (8, 0):
        return "it needs compute capability 8.0"
    if case.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it computes in fp32, bf16 and fp16, not {str(case.dtype).removeprefix('torch.')}"
    return None


@functools.cache
def import_failure(module: str, package: str, remedy: str) -> str | None:
    """Why `module` of a pip package cannot be imported, with the remedy, or None."""
    if importlib.util.find_spec(module.split(".")[0]) is None:
        return f"it needs {package}, which is not installed: {remedy}"
    try:
        importlib.import_module(module)
    except Exception as error:  # a package that was built for another torch, CUDA or Triton fails in many ways
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"{package} is installed, but its import fails ({first}): {remedy}"
    return None


def _from_source(package: str) -> str:
    """How to install a package that is compiled for the torch and the CUDA of the machine."""
    return f"pip install --no-build-isolation {package} (it compiles for your torch and CUDA)"


def _mamba_refusal(case: Case) -> str | None:
    return _device_refusal(case) or import_failure(
        "mamba_ssm.ops.triton.ssd_combined", "mamba-ssm", _from_source("mamba-ssm")
    )


def _causal_conv1d_refusal(case: Case) -> str | None:
    if refusal := _device_refusal(case):
        return refusal
    for channels, tokens in case.convolutions:
        if not 2 <= tokens <= 4:
            return f"it computes convolutions of 2 to 4 tokens, not {tokens}"
        if channels % 8:
            return f"it needs a multiple of 8 channels, not {channels}"
    return import_failure("causal_conv1d", "causal-conv1d", _from_source("causal-conv1d"))


def _fla_refusal(case: Case, module: str = "fla.ops") -> str | None:
    if refusal := _device_refusal(case):
        return refusal
    if case.documents:
        return "it needs the documents' lengths in CPU memory, for which each step would wait"
    if odd := [width for width in case.widths if not LEAST_WIDTH <= width <= MOST_WIDTH]:
        return f"it computes heads of {LEAST_WIDTH} to {MOST_WIDTH} channels, not {odd[0]}"
    remedy = "pip install 'crescendo-lm[fla]'"
    if (found := _fla_version()) and found < FLA_VERSION:
        return f"it needs fla-core >= {'.'.join(map(str, FLA_VERSION))}: {remedy}"
    return import_failure(module, "fla-core", remedy)


def _fla_half_refusal(case: Case) -> str | None:
    """Of the kernel for RWKV-7, which warns in fp32 that some GPUs compute it wrongly."""
    refusal = _fla_refusal(case)
    return "its authors do not support fp32" if refusal is None and case.dtype == torch.float32 else refusal


def _fla_convolution_refusal(case: Case) -> str | None:
    return _fla_refusal(case._replace(widths=()), "fla.modules.causal_conv1d")


@functools.cache
def _fla_version() -> tuple[int, ...]:
    """(major, minor) of the installed fla-core; () if it is not installed."""
    try:
        return tuple(map(int, importlib.metadata.version("fla-core").split(".")[:2]))
    except importlib.metadata.PackageNotFoundError:
        return ()


# -- kernels -------------------------------------------------------------------------------------------------------------


def ssd_of_mamba_ssm(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor | None = None,
    documents: Tensor | None = None,
    keep_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """ssd.ssd: x [B, T, H, P], dt [B, T, H], A [H], B and C [B, T, G, N]."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    with without_autocast(x.device.type):
        y, last = mamba_chunk_scan_combined(
            x,
            wide(dt),
            wide(A),
            B.to(x.dtype),
            C.to(x.dtype),
            CHUNK,
            initial_states=None if state is None else wide(state),
            seq_idx=None if documents is None else documents.int(),
            return_final_states=True,
        )
    return y, wide(last) if keep_state else None


def ssd_of_fla(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor | None = None,
    documents: Tensor | None = None,
    keep_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """ssd.ssd as gated linear attention: C are the queries, B the keys, dt x the values. B and C are repeated for every head."""
    _refuse_documents(documents)
    from fla.ops.simple_gla import chunk_simple_gla

    with without_autocast(x.device.type):
        B, C = (t.to(x.dtype).repeat_interleave(x.shape[2] // t.shape[2], dim=2) for t in (B, C))  # [B, T, H, N]
        values = (wide(x) * wide(dt).unsqueeze(-1)).to(x.dtype)
        decays = wide(dt) * wide(A)
        y, last = chunk_simple_gla(
            C, B, values, g=decays, scale=1.0, initial_state=_keys_first(state), output_final_state=keep_state
        )
    return y, _values_first(last)


def delta_rule_of_fla(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    documents: Tensor | None = None,
    keep_state: bool = True,
    least_log_w: float = -math.inf,
) -> tuple[Tensor, Tensor | None]:
    """delta_rule.delta_rule with one decay per channel; all are [B, T, H, K or V]. Products are in the dtype of r."""
    _refuse_documents(documents)
    from fla.ops.rwkv7 import chunk_rwkv7

    with without_autocast(r.device.type):
        o, last = chunk_rwkv7(
            r,
            wide(log_w),
            *(x.to(r.dtype) for x in (k, v, a, b)),
            scale=1.0,
            initial_state=_keys_first(state),
            output_final_state=keep_state,
            lower_bound=least_log_w if math.isfinite(least_log_w) else None,
        )
    return o.to(v.dtype), _values_first(last)


def gated_delta_rule_of_fla(
    q: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    documents: Tensor | None = None,
    keep_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """delta_rule.gated_delta_rule: log_w [B, T, H, 1], or [B, T, H, K] (KDA); beta [B, T, H, 1]. Products are in the dtype of v."""
    _refuse_documents(documents)
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.kda import chunk_kda

    by_head = log_w.shape[-1] == 1
    with without_autocast(v.device.type):
        o, last = (chunk_gated_delta_rule if by_head else chunk_kda)(
            q.to(v.dtype),
            k.to(v.dtype),
            v,
            wide(log_w.squeeze(-1) if by_head else log_w),
            wide(beta.squeeze(-1)),
            scale=1.0,
            initial_state=_keys_first(state),
            output_final_state=keep_state,
        )
    return wide(o), _values_first(last)


def _refuse_documents(documents: Tensor | None) -> None:
    if documents is not None:
        raise ValueError("kernels of fla do not keep documents apart")


def _keys_first(state: Tensor | None) -> Tensor | None:
    """[B, H, V, K] -> [B, H, K, V], as fla has it, in fp32."""
    return None if state is None else wide(state).transpose(-1, -2).contiguous()


def _values_first(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.transpose(-1, -2)


def convolution_of_causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, documents: Tensor | None, silu: bool
) -> Tensor:
    """causal.ShortConvolution: x [B, T, C], weight [C, taps]."""
    from causal_conv1d import causal_conv1d_fn

    if x.stride(-1) != 1 or x.stride(0) % 8 or x.stride(1) % 8:
        x = x.contiguous()
    numbers = documents
    if documents is not None:
        numbers = F.pad(documents.int().flatten(), (0, BEHIND))[: documents.numel()].view(documents.shape)
    y = causal_conv1d_fn(x.mT, weight, bias, seq_idx=numbers, activation="silu" if silu else None)
    return y.mT


def convolution_of_fla(x: Tensor, weight: Tensor, bias: Tensor | None, documents: Tensor | None, silu: bool) -> Tensor:
    """causal.ShortConvolution: x [B, T, C], weight [C, taps]."""
    _refuse_documents(documents)
    from fla.modules.causal_conv1d import causal_conv1d

    return causal_conv1d(x, weight, bias, activation="silu" if silu else None)[0]


SSD = {"mamba-ssm": Fused(ssd_of_mamba_ssm, _mamba_refusal), "fla": Fused(ssd_of_fla, _fla_refusal)}
DELTA_RULE = {"fla": Fused(delta_rule_of_fla, _fla_half_refusal)}
GATED_DELTA_RULE = {"fla": Fused(gated_delta_rule_of_fla, _fla_refusal)}
CONVOLUTION = {
    "causal-conv1d": Fused(convolution_of_causal_conv1d, _causal_conv1d_refusal),
    "fla": Fused(convolution_of_fla, _fla_convolution_refusal),
}
