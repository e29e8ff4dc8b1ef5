"""Causal attention over heads, computed by one of several kernels, and the choice of the kernel.

All kernels compute softmax_j( cap(scale q_i k_j) + bias_i - bias_j ) v_j over the keys j that query i sees, softmax in fp32:

    q [B, H, Tq, D], k [B, G, Tk, D], v [B, G, Tk, Dv] -> [B, H, Tq, Dv] in the dtype of v

- Query head h reads key head h // (H / G): grouped-query attention (arXiv 2305.13245).
- The queries are the last Tq of the Tk positions, so causality is aligned to the bottom right.
- cap(s) = softcap tanh(s / softcap), before the mask (Gemma 2, arXiv 2408.00118); softcap 0: none.
- attention_bias: None, or fp32 [1 or B, H, Tk]. -slope j gives ALiBi (arXiv 2108.12409); the running sum of the log forget
  gates gives forgetting attention (arXiv 2503.02130). Gradients flow into it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    current_flash_attention_impl,
    sdpa_kernel,
)
from torch.nn.attention.flex_attention import BlockMask

from models.layers import flex

FLASH_MAX_WIDTH = 256
FLASH_MIN_VERSION = (2, 6)  # the first with a soft-cap
CUDNN_MAX_WIDTH = 128


class AttentionMask(NamedTuple):
    """What each query sees. At most one field is set; with none, a query sees everything up to itself; with `window`, the last
    `window` tokens of that."""

    window: int = 0
    mask: Tensor | None = None  # [Tq, Tk] or [B, 1, Tq, Tk] bool
    blocks: BlockMask | None = None


def make_attention_mask(
    kernel: str, start: int, length: int, window: int, documents: Tensor | None, device: torch.device
) -> AttentionMask:
    """The mask of `length` queries after `start` cached tokens; make one per forward pass and window size.

    window: a query sees itself and the window - 1 tokens before it; 0: all tokens before it.
    documents: [B, length] or None; must be None if start > 0.
    """
    if window >= start + length:
        window = 0
    makers = {"flex": _flex_mask, "flash": _flash_mask}
    return makers.get(kernel, _dense_mask)(start, length, window, documents, device)


def _dense_mask(start: int, length: int, window: int, documents: Tensor | None, device: torch.device) -> AttentionMask:
    """For torch and sdpa: a mask tensor only if neither plain causality nor blocks of the window's size suffice."""
    in_blocks = start == 0 and length > 2 * window > 0
    sees_all = window == 0 and (start == 0 or length == 1)
    if documents is None and (in_blocks or sees_all):
        return AttentionMask(window)
    visible = _band(length, start + length, window, device)
    if documents is not None:
        visible = (visible & (documents[:, :, None] == documents[:, None, :]))[:, None]
    return AttentionMask(mask=visible)


def _flex_mask(start: int, length: int, window: int, documents: Tensor | None, device: torch.device) -> AttentionMask:
    if start > 0:
        raise ValueError("attention_kernel flex cannot follow cached tokens; use torch or sdpa")
    if documents is not None:
        return AttentionMask(blocks=flex.document_blocks(documents, window))
    return AttentionMask(
        blocks=flex.window_blocks(length, window, device) if window else flex.causal_blocks(length, device)
    )


def _flash_mask(start: int, length: int, window: int, documents: Tensor | None, device: torch.device) -> AttentionMask:
    if documents is not None:
        raise ValueError("attention_kernel flash cannot keep documents apart; use flex, sdpa or torch")
    return AttentionMask(window)


def _band(n_queries: int, n_keys: int, window: int, device: torch.device) -> Tensor:
    """[Tq, Tk] bool: causal, aligned to the bottom right, and within the window if it is not 0."""
    j = torch.arange(n_keys, device=device)
    i = j[n_keys - n_queries :, None]
    return (j <= i) & (i - j < window) if window else j <= i


# -- kernels ---------------------------------------------------------------------------------------------------------


def attend_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: AttentionMask,
    *,
    scale: float,
    softcap: float = 0.0,
    attention_bias: Tensor | None = None,
) -> Tensor:
    """The reference, which supports everything: plain products in the dtype of q, k and v, everything between them in fp32."""
    if attention_mask.window:
        return _attend_in_blocks(
            attend_torch, q, k, v, attention_mask.window, scale=scale, softcap=softcap, attention_bias=attention_bias
        )
    n_queries, n_keys = q.shape[2], k.shape[2]
    # The query heads that share a key head become rows of one matrix, so keys and values are not repeated.
    scores = _rows_by_key_head(q, k) @ k.mT  # [B, G, H/G Tq, Tk]
    scores = scores.view(*q.shape[:3], n_keys).float() * scale  # [B, H, Tq, Tk]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_bias is not None:
        scores = scores + _pairwise_bias(attention_bias, n_queries)
    visible = _band(n_queries, n_keys, 0, q.device) if attention_mask.mask is None else attention_mask.mask
    weights = scores.masked_fill(~visible, -math.inf).softmax(dim=-1).to(v.dtype)  # [B, H, Tq, Tk]
    return (_rows_by_key_head(weights, v) @ v).view(*q.shape[:3], v.shape[-1])


def _rows_by_key_head(x: Tensor, k: Tensor) -> Tensor:
    """[B, H, Tq, C] -> [B, G, H/G Tq, C] with the G heads of k."""
    batch_size, n_heads, n_queries, width = x.shape
    return x.reshape(batch_size, k.shape[1], n_heads // k.shape[1] * n_queries, width)


def _pairwise_bias(attention_bias: Tensor, n_queries: int) -> Tensor:
    """bias_i - bias_j, [1 or B, H, Tq, Tk] fp32.

    bias_i has no effect on the softmax over j, so its gradient is exactly 0. It is subtracted to keep the numbers small and precise.
    """
    own = attention_bias.detach()[..., attention_bias.shape[-1] - n_queries :]
    return own[..., :, None] - attention_bias[..., None, :]


def attend_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: AttentionMask,
    *,
    scale: float,
    softcap: float = 0.0,
    attention_bias: Tensor | None = None,
) -> Tensor:
    """torch's scaled_dot_product_attention. ValueError for a soft-cap, which it does not have.

    attention_bias becomes a [Tq, Tk] bias per head in the dtype of q. No fused kernel can train with it: only for tests in fp32.
    """
    if softcap:
        raise ValueError("attention_kernel sdpa has no soft-cap; use torch, flex or flash")
    if attention_mask.window:
        return _attend_in_blocks(
            attend_sdpa, q, k, v, attention_mask.window, scale=scale, attention_bias=attention_bias
        )
    n_queries, n_keys, value_dim = q.shape[2], k.shape[2], v.shape[-1]
    mask = attention_mask.mask
    if mask is None and n_queries not in (1, n_keys):  # is_causal would be aligned to the top left
        raise ValueError(f"attention_kernel sdpa needs a mask for {n_queries} queries of {n_keys} keys")
    is_causal = mask is None and _holds(n_queries > 1)
    if attention_bias is not None:
        visible = _band(n_queries, n_keys, 0, q.device) if mask is None else mask
        mask = _pairwise_bias(attention_bias, n_queries).masked_fill(~visible, -math.inf).to(q.dtype)
        is_causal = False
    width = max(q.shape[-1], value_dim)  # flash needs one width; zero channels do not change the scores
    q, k, v = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    k, v = _repeat_unless_fused(q, k, v, mask)
    shared = _holds(q.shape[1] != k.shape[1])
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=shared)
    return out[..., :value_dim]


def _holds(comparison: bool) -> bool:
    """A real bool, also when the compiler compares symbols, because torch's attention functions do not accept symbolic bools."""
    return True if comparison else False


def _repeat_unless_fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values, repeated to H heads if a GPU's fused kernel could not share them.

    Of the kernels inside sdpa, only flash can share them on every GPU, in half precision without a mask. The memory-efficient
    kernel cannot, and the plain kernel that torch would use instead holds [Tq, Tk] scores.
    """
    shared = q.shape[1] // k.shape[1]
    flash = mask is None and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= FLASH_MAX_WIDTH
    if shared == 1 or flash or not q.is_cuda:
        return k, v
    return k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)


def _attend_in_blocks(
    kernel: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    *,
    attention_bias: Tensor | None,
    **options,
) -> Tensor:
    """Attention within a window in O(T window), Tq = Tk = T: a block of `window` queries sees its own and the previous block.

    The first block is plainly causal; all other blocks share one [window, 2 window] mask.
    """
    batch_size, _, length, _ = q.shape
    head = slice(None), slice(None), slice(window)
    first = kernel(
        q[head],
        k[head],
        v[head],
        AttentionMask(),
        attention_bias=None if attention_bias is None else attention_bias[head],
        **options,
    )
    padding = -length % window  # padded queries see themselves, so no row is empty; no other query sees padded keys
    q, k, v = (F.pad(x, (0, 0, 0, padding)) for x in (q, k, v))
    k, v = (_batch_of_blocks(x, 2 * window, window) for x in (k, v))
    q = _batch_of_blocks(q[:, :, window:], window, window)
    if attention_bias is not None:
        attention_bias = F.pad(attention_bias, (0, padding)).expand(batch_size, -1, -1).unsqueeze(-1)
        attention_bias = _batch_of_blocks(attention_bias, 2 * window, window).squeeze(-1)
    attention_mask = AttentionMask(mask=_band(window, 2 * window, window, q.device))
    rest = kernel(q, k, v, attention_mask, attention_bias=attention_bias, **options)  # [B n, H, window, Dv]
    rest = rest.unflatten(0, (batch_size, -1)).transpose(1, 2).flatten(2, 3)  # [B, H, n window, Dv]
    return torch.cat((first, rest[:, :, : length - window]), dim=2)


def _batch_of_blocks(x: Tensor, size: int, step: int) -> Tensor:
    """[B, H, T, C] -> [B n, H, size, C]: all slices of `size` tokens that begin at multiples of `step`."""
    return x.unfold(2, size, step).permute(0, 2, 1, 4, 3).flatten(0, 1)


def attend_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: AttentionMask,
    *,
    scale: float,
    softcap: float = 0.0,
    attention_bias: Tensor | None = None,
) -> Tensor:
    """FlexAttention, one compiled kernel on CUDA (elsewhere eager, for tests). The number of queries and keys must be equal."""
    if attention_bias is not None:
        # One copy for each row: the kernel sums the gradient with atomics, which are slow if rows share an address.
        attention_bias = attention_bias.expand(q.shape[0], -1, -1).contiguous()
        own = attention_bias.detach()  # see _pairwise_bias

    # A tensor, because a second float breaks the compiler.
    cap = torch.full((), softcap, device=q.device) if softcap else None

    def change(score: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if cap is not None:
            score = cap * torch.tanh(score / cap)
        return score if attention_bias is None else score + (own[batch, head, i] - attention_bias[batch, head, j])

    score_mod = change if softcap or attention_bias is not None else None
    shared = _holds(q.shape[1] != k.shape[1])
    return flex.attention(
        q, k, v, score_mod=score_mod, block_mask=attention_mask.blocks, scale=scale, enable_gqa=shared
    )


def attend_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: AttentionMask,
    *,
    scale: float,
    softcap: float = 0.0,
    attention_bias: Tensor | None = None,
) -> Tensor:
    """flash-attn (arXiv 2307.08691); its causal mask is aligned to the bottom right. ValueError for an attention_bias."""
    if attention_bias is not None:
        raise ValueError("attention_kernel flash takes no attention bias; use flex or torch")
    from flash_attn import flash_attn_func

    out = flash_attn_func(
        *(x.transpose(1, 2) for x in (q, k, v)),  # [B, T, heads, D]
        softmax_scale=scale,
        causal=True,
        window_size=(attention_mask.window - 1, 0) if attention_mask.window else (-1, -1),
        softcap=softcap,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return out.transpose(1, 2)


def attend_cudnn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: AttentionMask,
    *,
    scale: float,
    softcap: float = 0.0,
    attention_bias: Tensor | None = None,
) -> Tensor:
    """cuDNN's fused kernel inside scaled_dot_product_attention, plain causal attention only. (`sdpa` lets torch choose.)"""
    if attention_mask != AttentionMask() or softcap or attention_bias is not None:
        raise ValueError("attention_kernel cudnn computes plain causal attention only; use sdpa, flex or torch")
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return attend_sdpa(q, k, v, attention_mask, scale=scale)


def attend_flash3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: AttentionMask,
    *,
    scale: float,
    softcap: float = 0.0,
    attention_bias: Tensor | None = None,
) -> Tensor:
    """FlashAttention-3 (arXiv 2407.08608) inside scaled_dot_product_attention, plain causal attention only. `choose_kernel` has put
    it in the place of torch's own flash kernel."""
    if attention_mask != AttentionMask() or softcap or attention_bias is not None:
        raise ValueError("attention_kernel flash3 computes plain causal attention only; use flash, flex or torch")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return attend_sdpa(q, k, v, attention_mask, scale=scale)


KERNELS: dict[str, Callable[..., Tensor]] = {
    "torch": attend_torch,
    "sdpa": attend_sdpa,
    "cudnn": attend_cudnn,
    "flex": attend_flex,
    "flash": attend_flash,
    "flash3": attend_flash3,
}


# -- the choice ------------------------------------------------------------------------------------------------------


class _Case(NamedTuple):
    head_dim: int
    value_dim: int
    softcap: float
    attention_bias: bool
    window: bool
    documents: bool
    cached: bool
    length: int
    dtype: torch.dtype
    device: torch.device


def choose_kernel(
    wanted: str,
    *,
    head_dim: int,
    value_dim: int,
    softcap: float,
    attention_bias: bool,
    window: bool,
    documents: bool,
    cached: bool,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[str, str]:
    """(name of the kernel, why): `wanted` if it is possible; for "auto" the fastest possible kernel.

    window: some query has more tokens before it than the window holds. cached: there are keys of earlier tokens.
    length: number of queries. dtype: of q, k and v. When decoding, sdpa or torch replaces cudnn, flex, flash and flash3 even if
    they are named; the same holds for flex on short sequences. ValueError for an unknown name, and for a kernel that can never do
    this. Once flash3 was chosen, the whole process uses it wherever sdpa would use torch's own flash kernel.
    """
    case = _Case(head_dim, value_dim, softcap, attention_bias, window, documents, cached, length, dtype, device)
    if wanted == "auto":
        return _fastest(case)
    if wanted not in KERNELS:
        raise ValueError(f"attention_kernel must be one of auto, {', '.join(KERNELS)}, not {wanted!r}")
    refusal = _REFUSALS[wanted](case)
    if refusal is not None:
        able = [name for name in KERNELS if _REFUSALS[name](case) is None]
        raise ValueError(f"attention_kernel {wanted} cannot be used: {refusal}; use auto, {' or '.join(able)}")
    passing = _passing_refusal(wanted, case)
    return (_unfused(case), f"{wanted}: {passing}") if passing else (wanted, "asked for")


def _fastest(case: _Case) -> tuple[str, str]:
    if not (case.softcap or case.attention_bias or case.window or case.documents):
        return "sdpa", "plain causal attention"
    refusals: list[str] = []
    for name in ("flash", "flex"):
        refusal = _REFUSALS[name](case) or _passing_refusal(name, case)
        if refusal is None:
            return name, "; ".join([*refusals, "no [T, T] tensors"])
        refusals.append(f"{name}: {refusal}")
    if case.softcap or case.attention_bias:
        refusals.append("sdpa: " + ("no soft-cap" if case.softcap else "no fused kernel takes a bias in fp32"))
    return _unfused(case), "; ".join(refusals)


def _unfused(case: _Case) -> str:
    return "torch" if case.softcap or case.attention_bias else "sdpa"


def _sdpa_refusal(case: _Case) -> str | None:
    if case.softcap:
        return "it has no soft-cap"
    if case.attention_bias and case.dtype.itemsize < 4:
        return "it takes position biases and forget gates in the dtype of the queries, which must not be half precision"
    return None


def _cudnn_refusal(case: _Case) -> str | None:
    if case.device.type != "cuda":
        return "it needs CUDA"
    if torch.cuda.get_device_capability(case.device) < (8, 0):
        return "it needs compute capability 8.0"
    if case.dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in fp16 and bf16, not {str(case.dtype).removeprefix('torch.')}"
    if case.softcap or case.attention_bias or case.window or case.documents:
        return "it computes plain causal attention only"
    if case.head_dim != case.value_dim or case.head_dim > CUDNN_MAX_WIDTH:
        return f"keys and values must have the same width, at most {CUDNN_MAX_WIDTH}"
    return None


def _flex_refusal(case: _Case) -> str | None:
    if refusal := flex.device_refusal(case.device):
        return refusal
    if refusal := flex.width_refusal(case.head_dim, case.value_dim, case.dtype):
        return refusal
    if case.attention_bias and torch.are_deterministic_algorithms_enabled():
        return "it sums the gradients of forget gates in no fixed order"
    return None


def _flash_refusal(case: _Case) -> str | None:
    if case.device.type != "cuda":
        return "it needs CUDA"
    if _flash_version() < FLASH_MIN_VERSION or torch.cuda.get_device_capability(case.device) < (8, 0):
        return "it needs flash-attn >= 2.6 installed and compute capability 8.0"
    if case.dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in fp16 and bf16, not {str(case.dtype).removeprefix('torch.')}"
    if case.attention_bias or case.documents:
        return "it takes no " + ("position biases or forget gates" if case.attention_bias else "documents")
    if case.head_dim != case.value_dim or case.head_dim > FLASH_MAX_WIDTH:
        return f"keys and values must have the same width, at most {FLASH_MAX_WIDTH}"
    return None


def _flash3_refusal(case: _Case) -> str | None:
    if case.device.type != "cuda":
        return "it needs CUDA"
    if torch.cuda.get_device_capability(case.device) != (9, 0):
        return "it needs compute capability 9.0 (H100, H200)"
    if case.dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in fp16 and bf16, not {str(case.dtype).removeprefix('torch.')}"
    if case.softcap or case.attention_bias or case.window or case.documents:
        return "inside torch it computes plain causal attention only"
    if case.head_dim != case.value_dim or case.head_dim > FLASH_MAX_WIDTH:
        return f"keys and values must have the same width, at most {FLASH_MAX_WIDTH}"
    if importlib.util.find_spec("flash_attn_interface") is None:
        return "it needs the package flash-attn-3 (the module flash_attn_interface)"
    return _flash3_failure()


def _flash3_failure() -> str | None:
    """Makes FlashAttention-3 the flash kernel of scaled_dot_product_attention in this process; what prevents this, or None."""
    if current_flash_attention_impl() == "FA3":
        return None
    try:
        activate_flash_attention_impl("FA3")
    # The package is for another torch or CUDA, has no backward pass, or torch no longer knows this name.
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return f"torch cannot load it ({str(error).splitlines()[0]})"
    return None


_REFUSALS: dict[str, Callable[[_Case], str | None]] = {
    "torch": lambda case: None,
    "sdpa": _sdpa_refusal,
    "cudnn": _cudnn_refusal,
    "flex": _flex_refusal,
    "flash": _flash_refusal,
    "flash3": _flash3_refusal,
}


def _passing_refusal(name: str, case: _Case) -> str | None:
    """Why an otherwise possible kernel does not suit these lengths."""
    if name in ("cudnn", "flex", "flash", "flash3") and case.cached:
        return "decoding"
    return f"fewer than {flex.MIN_LENGTH} tokens" if name == "flex" and case.length < flex.MIN_LENGTH else None


@functools.cache
def _flash_version() -> tuple[int, ...]:
    """(major, minor) of the installed flash-attn; () if it is not installed."""
    try:
        return tuple(map(int, importlib.metadata.version("flash-attn").split(".")[:2]))
    except importlib.metadata.PackageNotFoundError:
        return ()
