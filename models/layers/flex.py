"""torch's FlexAttention (arXiv 2412.05496): where it runs, its block masks, and an operator that replaces it in memory plans."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from models.layers.compat import raise_recompile_limit

BLOCK = 128  # FlexAttention works on blocks of 128 x 128
# At least two blocks, because the compiler makes separate code for a size of 1: the code for one block would serve one length only.
MIN_LENGTH = BLOCK + 1
MIN_WIDTH = 16  # Triton cannot multiply narrower tiles
MAX_WIDTH = 256  # channels of a head; wider heads exceed the shared memory of a multiprocessor
MAX_WIDTH_FP32 = 128
MAX_VALUE_WIDTH = (
    128  # for values wider than queries, because only the width of queries decides the tiles of the backward pass
)

# Options for FlexAttention's kernels: (compute capability, channels of queries and keys, of values) -> what differs from
# Inductor's choice, in half precision. With Inductor's choice a thread has too few registers for its numbers, and the rest spills
# to local memory: up to 592 bytes in the forward pass, up to 1,056 in the backward pass. With these options 8 warps share a tile, or
# the tiles of the backward pass are narrower, and at most 40 bytes are left: tests/rehearsal/test_ahead_of_time.py compiles each
# entry and holds the figures. That fewer spills are faster is calculated, not measured. For heads of 128 channels on an H100
# Inductor's choice stays: it spills 168 bytes at most, and every tile without spills is half as wide for the tensor cores.
#
# Two options of torch are not here, because they do not hold for all masks. ROWS_GUARANTEED_SAFE needs, in every row, a visible key
# among the first BLOCK_N of the first partial block. At the far end of a window, or where a block begins with another document,
# some rows see none of these, and their output would be NaN. BLOCKS_ARE_CONTIGUOUS needs partial blocks side by side; a window has
# one at each of its ends.
_TALL = {"bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 128, "bwd_BLOCK_M2": 128, "bwd_BLOCK_N2": 32, "bwd_num_warps": 8}
KERNEL_OPTIONS: dict[tuple[tuple[int, int], int, int], dict[str, int]] = {
    ((8, 0), 64, 64): {"fwd_num_warps": 8, **_TALL},
    ((8, 0), 128, 128): {"bwd_num_warps": 8},
    ((8, 0), 48, 128): {"fwd_num_warps": 8, **_TALL, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64},  # hlb at scale 1
    ((9, 0), 64, 64): {"fwd_num_warps": 8},
    ((9, 0), 48, 128): _TALL,  # hlb at scale 1
}

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
    if q.device.type == "cuda":
        options["kernel_options"] = kernel_options(q, v)
    if torch.compiler.is_compiling():  # compiled with its block
        # Evaluated, so that the compiler knows the result and can omit bounds checks.
        bool(q.shape[2] % BLOCK == 0)
        return flex_attention(q, k, v, **options)
    return (compiled(flex_attention) if q.device.type == "cuda" else flex_attention)(q, k, v, **options)


def kernel_options(q: Tensor, v: Tensor) -> dict[str, int] | None:
    """The entry of KERNEL_OPTIONS for queries and values on a GPU; None where Inductor chooses alone."""
    if q.dtype.itemsize != 2:
        return None
    return KERNEL_OPTIONS.get((_capability(q.device), q.shape[-1], v.shape[-1]))


@torch.compiler.assume_constant_result  # Dynamo cannot trace the question
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def width_refusal(query_width: int, value_width: int, dtype: torch.dtype) -> str | None:
    """Why FlexAttention's kernels do not support heads with this number of channels; None if they do."""
    most = MAX_WIDTH if dtype.itemsize == 2 else MAX_WIDTH_FP32
    if not all(MIN_WIDTH <= width <= most for width in (query_width, value_width)):
        return f"heads must have {MIN_WIDTH} to {most} channels" + " in fp32" * (most == MAX_WIDTH_FP32)
    if value_width > max(query_width, MAX_VALUE_WIDTH):
        return f"values wider than queries must have at most {MAX_VALUE_WIDTH} channels"
    return None


@functools.cache
def compiled(function: Callable[..., Any]) -> Any:
    """The function as compiled kernels, which all models of a process share."""
    # One version per kind of mask and gradient mode: more than the default limit, above which it would run unfused.
    raise_recompile_limit(64)
    # Without this option, `selective` checkpointing cannot see (and keep) the output of a kernel compiled inside an eager block.
    return torch.compile(function, dynamic=True, options={"wrap_inductor_compiled_regions": True})


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
    return _window_blocks(length, length, device)


@kept
def window_blocks(length: int, window: int, device: torch.device) -> BlockMask:
    """Every token sees itself and the window - 1 before it; made once per length and window."""
    return _window_blocks(length, window, device)


def _window_blocks(length: int, window: int, device: torch.device) -> BlockMask:
    with torch.inference_mode(False):  # a mask made during evaluation must also work in training
        reach = torch.full((), window, device=device)  # a tensor, so that one compiled kernel works for every window
        some, every = _blocks_in_window(length, reach, device)
        return _block_mask(some[None], every[None], length, lambda batch, head, i, j: (j <= i) & (i - j < reach))


def document_blocks(documents: Tensor, window: int = 0) -> BlockMask:
    """Causal within each document, and within the window if it is not 0; documents [B, T]. Made without waiting for the device."""
    length, device = documents.shape[1], documents.device
    reach = torch.full((), window or length, device=device)

    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i - j < reach) & (documents[batch, i] == documents[batch, j])

    some, every = _blocks_in_window(length, reach, device)
    positions = torch.arange(len(some) * BLOCK, device=device).clamp(max=length - 1)
    by_block = documents[:, positions].unflatten(1, (-1, BLOCK))  # [B, n, BLOCK]
    least, greatest = by_block.amin(-1), by_block.amax(-1)  # [B, n]
    # Two blocks can share a document only if their ranges overlap. A block of the wrong kind costs time, not correctness:
    # the kernel applies `visible` to every pair of tokens in blocks that are not `every`.
    shared = (least[:, :, None] <= greatest[:, None, :]) & (least[:, None, :] <= greatest[:, :, None])
    same = shared & (least == greatest)[:, :, None] & (least == greatest)[:, None, :]
    return _block_mask(some & shared, every & same, length, visible)


def _blocks_in_window(length: int, window: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """(some, every) [n, n] bool, n blocks of queries by n blocks of keys: whether some or all pairs of their tokens are visible.

    Computed per block, because [T, T] tensors would be large; with the last block cut off, no pair that does not exist counts.
    """
    first = torch.arange(0, length, BLOCK, device=device)
    last = (first + BLOCK - 1).clamp(max=length - 1)
    whole = last - first == BLOCK - 1
    some = (first[None, :] <= last[:, None]) & (first[:, None] - last[None, :] < window)
    every = (last[None, :] <= first[:, None]) & (last[:, None] - first[None, :] < window)
    return some, every & whole[:, None] & whole[None, :]


def _block_mask(some: Tensor, every: Tensor, length: int, visible: Callable[..., Tensor]) -> BlockMask:
    """The mask `visible` of all heads, as `create_block_mask` makes it; some, every: [1 or B, n, n] bool."""
    partial, full = (_counted(blocks[:, None]) for blocks in (some & ~every, every))
    return BlockMask.from_kv_blocks(*partial, *full, BLOCK, visible, seq_lengths=(length, length))


def _counted(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """[..., n, n] bool -> (how many blocks of each row are set [..., n], their columns in order, then the other columns [..., n, n])."""
    columns = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), columns.int()
