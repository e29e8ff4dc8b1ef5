"""torch's FlexAttention (arXiv 2412.05496): where it runs, its block masks, and an operator that replaces it in memory plans."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from models.layers.compat import raise_recompile_limit

MIN_LENGTH = 128  # FlexAttention works on blocks of 128 x 128
MIN_WIDTH = 16  # Triton cannot multiply narrower tiles
MAX_WIDTH = 256  # channels of a head; wider heads exceed the shared memory of a multiprocessor
MAX_WIDTH_FP32 = 128
MAX_VALUE_WIDTH = (
    128  # for values wider than queries, because only the width of queries decides the tiles of the backward pass
)

_planning = False


@contextlib.contextmanager
def planning_for_gpu() -> Iterator[None]:
    """In this context models choose FlexAttention as on a GPU that supports it. Attention of tensors without storage then holds
    the same tensors as its kernel."""
    global _planning
    _planning = True
    try:
        yield
    finally:
        _planning = False
        for made in (causal_blocks, window_blocks):  # drop masks that were made of tensors without storage
            made.cache_clear()


def device_refusal(device: torch.device) -> str | None:
    """Why FlexAttention cannot train on a device; None if it can."""
    if _planning:
        return None
    if device.type != "cuda":
        return f"it has no kernel that trains on {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0) or importlib.util.find_spec("triton") is None:
        return "it needs Triton and compute capability 8.0"
    return None


def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """`flex_attention` of [B, H, T, D], [B, G, T, D] and [B, G, T, Dv]: one compiled kernel on CUDA; elsewhere eager, for tests."""
    if _planning:
        return held_by_flex(q, k, v)[0]
    if torch.compiler.is_compiling():  # compiled with its block; the compiler cannot trace `suited`
        # Evaluated, so that the compiler knows the result and can omit bounds checks.
        bool(q.shape[2] % MIN_LENGTH == 0)
        return flex_attention(q, k, v, **options)
    return suited(flex_attention, q.device)(q, k, v, **options)


def width_refusal(query_width: int, value_width: int, dtype: torch.dtype) -> str | None:
    """Why FlexAttention's kernels do not support heads with this number of channels; None if they do."""
    most = MAX_WIDTH if dtype.itemsize == 2 else MAX_WIDTH_FP32
    if not all(MIN_WIDTH <= width <= most for width in (query_width, value_width)):
        return f"heads must have {MIN_WIDTH} to {most} channels" + " in fp32" * (most == MAX_WIDTH_FP32)
    if value_width > max(query_width, MAX_VALUE_WIDTH):
        return f"values wider than queries must have at most {MAX_VALUE_WIDTH} channels"
    return None


def suited(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """One of torch's functions for FlexAttention; compiled on CUDA."""
    return compiled(function) if device.type == "cuda" else function


@functools.cache
def compiled(function: Callable[..., Any]) -> Any:
    """The function as compiled kernels, which all models of a process share."""
    # One kernel per length, batch size and gradient mode: more than the default limit, above which it would run unfused.
    raise_recompile_limit(64)
    # Without this option, `selective` checkpointing cannot see (and keep) the output of a kernel compiled inside an eager block.
    return torch.compile(function, options={"wrap_inductor_compiled_regions": True})


# These are operators, so that activation checkpointing and the compiler treat them like FlexAttention's.


@torch.library.custom_op("crescendo::held_by_flex", mutates_args=())
def held_by_flex(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """For tensors without storage: the output of FlexAttention, and the log-sum-exp that it keeps for the backward pass."""
    raise NotImplementedError("it has no numbers")


@torch.library.custom_op("crescendo::gradients_of_flex", mutates_args=())
def gradients_of_flex(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, for tensors without storage."""
    raise NotImplementedError("it has no numbers")


@held_by_flex.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    shape, order = (*q.shape[:3], v.shape[-1]), [*sorted(range(3), key=q.stride, reverse=True), 3]
    out = q.new_empty([shape[i] for i in order]).permute([order.index(i) for i in range(4)])  # same memory layout as q
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


@gradients_of_flex.register_fake
def _(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


HELD_BY_FLEX = torch.ops.crescendo.held_by_flex.default  # the operator as activation checkpointing sees it


def _hold(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _gradients(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    return gradients_of_flex(gradient, *ctx.saved_tensors)


held_by_flex.register_autograd(_gradients, setup_context=_hold)


MASKS_KEPT = 16  # of each kind: more than a run has lengths and windows; a limit is needed, because generation can have any length

_readers: list[list[BlockMask]] = []  # lists that currently collect the masks in use


@contextlib.contextmanager
def masks_read() -> Iterator[list[BlockMask]]:
    """In this context every returned mask is also added to the list. Recorded microbatches (engine.cuda_graphs) read masks at fixed
    addresses, so they must keep them alive."""
    masks: list[BlockMask] = []
    _readers.append(masks)
    try:
        yield masks
    finally:
        _readers.pop()


def kept(make: Callable[..., BlockMask]) -> Any:
    """`make` with a cache of the most recent masks."""
    remembered = functools.lru_cache(maxsize=MASKS_KEPT)(make)

    @functools.wraps(make)
    def give(*arguments: Any) -> BlockMask:
        mask = remembered(*arguments)
        for masks in _readers:
            masks.append(mask)
        return mask

    give.cache_clear = remembered.cache_clear  # type: ignore[attr-defined]
    return give


@kept
def causal_blocks(length: int, device: torch.device) -> BlockMask:
    """Every token sees itself and those before it; made once per length."""
    with torch.inference_mode(False):  # a mask made during evaluation must also work in training
        make = suited(create_block_mask, device)  # eager code would need several [T, T] tensors
        return make(lambda batch, head, i, j: j <= i, None, None, length, length, device=device)


@kept
def window_blocks(length: int, window: int, device: torch.device) -> BlockMask:
    """Every token sees itself and the window - 1 before it; made once per length and window."""
    with torch.inference_mode(False):
        reach = torch.full((), window, device=device)  # a tensor, so that one compiled kernel works for every window
        make = suited(create_block_mask, device)
        return make(lambda batch, head, i, j: (j <= i) & (i - j < reach), None, None, length, length, device=device)


def document_blocks(documents: Tensor, window: int = 0) -> BlockMask:
    """Causal within each document, and within the window if it is not 0; documents [B, T].

    These masks differ from batch to batch, so on CUDA a compiled kernel makes them: eager code needs several [B, T, T] tensors.
    """
    # Filled on the device, without waiting.
    reach = torch.full((), window or documents.shape[1], device=documents.device)

    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i - j < reach) & (documents[batch, i] == documents[batch, j])

    batch_size, length = documents.shape
    make = suited(create_block_mask, documents.device)
    return make(visible, batch_size, None, length, length, device=documents.device)
