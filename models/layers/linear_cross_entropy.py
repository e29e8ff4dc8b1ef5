"""Output projection and cross-entropy together, one chunk of rows at a time: [tokens, V] logits are never held.

The forward pass also computes the gradients of x and weight, chunk by chunk, as in Liger (arXiv 2410.10989): three matrix
products in total, none repeated. The backward pass keeps nothing of the size of the logits.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.base import IGNORE
from models.layers import autocast_dtype, without_autocast

# Bytes of logits held at a time. Every chunk reads and writes the whole gradient of the weight, so the speed depends on the rows per
# chunk, not on bytes: on a CPU core (V = 50304, D = 384 and 768) 125 rows take 1.2 (fp32) to 2.3 (bf16) times as long as 1000, 260
# rows 1.0 to 1.4 times, and 2000 are not faster. GPUs need at least as many (github.com/linkedin/Liger-Kernel/pull/1414): the
# product with the weight has (rows / 128) (D / 128) tiles for the roughly hundred multiprocessors.
CHUNK_BYTES = 64 << 20
CHUNK_BYTES_OF_GPU = 512 << 20
MIN_CHUNK_ROWS = 1024
ROW_ENTRIES_OF_GPU = 64  # a row of bf16 logits is whole lines of the cache, of 128 bytes each
ROWS_OF_GPU = 128  # gives whole tiles of products, and slices of fp32 vectors that start at aligned addresses
# Bytes of fp32 scores held at a time, for a part of a chunk. On a CPU they fit a core's cache, where passes over them are cheapest;
# on a GPU there are enough to hide the launch of a kernel.
TILE_BYTES_PER_CORE = 2 << 20
TILE_BYTES = 64 << 20


class _Form(NamedTuple):
    """The options of the caller; vocab_size: rows of the weight that are not padding."""

    softcap: float | None
    z_loss: float
    vocab_size: int


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    reduction: str = "mean",
    *,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
) -> Tensor:
    """Cross-entropy in nats of the logits x weight^T + bias, fp32 scalar: mean or sum over the targets that are not IGNORE.

    x: [..., D]; weight: [V, D]; bias: [V]; targets: [...]; weights: [...], factor of each target's loss. Products are in the
    dtype of x and weight, or autocast's; softmax and sums are fp32 (fp64 for fp64). If all targets are IGNORE, the sum is 0, the
    mean is NaN, and the gradients are zero.
    softcap: logits become softcap * tanh(logits / softcap) (Gemma 2, arXiv 2408.00118).
    z_loss: coefficient of logsumexp^2, added to the loss of each token (PaLM, arXiv 2204.02311).
    vocab_size: the rows of the weight from this index on are padding: never predicted, without gradient.
    The first backward pass releases the gradients: a second backward pass, or a double backward pass, is a RuntimeError.
    """
    return weighted_linear_cross_entropy(
        x,
        weight,
        targets,
        torch.ones_like(targets) if weights is None else weights,
        divisor(targets, reduction),
        bias=bias,
        softcap=softcap,
        z_loss=z_loss,
        vocab_size=vocab_size,
    )[0]


def weighted_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weights: Tensor,
    divide_by: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_cross_entropy` with a weight for each row: (loss, cross-entropies [...], z-losses [...]).

    row_weights: [...], factor of each row's loss; divide_by: scalar that divides their sum (None: 1).
    Both are constants for autograd. The cross-entropies and z-losses are weighted, fp32, without gradient, and 0 at IGNORE;
    the loss is their sum, divided.
    """
    device = x.device.type
    dtype = autocast_dtype(device) or x.dtype
    form = _Form(softcap, z_loss, len(weight) if vocab_size is None else vocab_size)
    with without_autocast(device):
        rows, labels, factors = x.flatten(0, -2).to(dtype), targets.flatten(), row_weights.flatten()
        loss, cross_entropies, z_losses = _LinearCrossEntropy.apply(
            rows, weight, bias, labels, factors, divide_by, form, torch.is_grad_enabled()
        )
    return loss, cross_entropies.view(targets.shape), z_losses.view(targets.shape)


def linear_nll(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """The cross-entropy of each token in nats, times its weight: fp32, in the shape of `targets`, 0 at IGNORE.

    As in `linear_cross_entropy`, at most one chunk of the logits is held at a time. Each token can get a different gradient, so
    the backward pass computes the logits again: a fourth matrix product.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    form = _Form(softcap, 0.0, len(weight) if vocab_size is None else vocab_size)
    with torch.autocast(device, enabled=False):
        losses = _LinearNll.apply(x.flatten(0, -2).to(dtype), weight, targets.flatten(), form).view(targets.shape)
    return losses if weights is None else losses * weights


class _LinearNll(torch.autograd.Function):
    """x [N, D], weight [V, D], targets [N] -> [N]."""

    gives_every_gradient = True

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, form: _Form) -> Tensor:
        ctx.save_for_backward(x, weight, targets)
        ctx.form = form
        return _LinearCrossEntropy.apply(x, weight, None, targets, torch.ones_like(targets), None, form, False)[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *given, targets = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]  # a weight may be frozen
        x, weight = (tensor.detach().requires_grad_(need) for tensor, need in zip(given, needed, strict=True))
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            loss = _LinearCrossEntropy.apply(x, weight, None, targets, gradient, None, ctx.form, True)[0]
        found = iter(torch.autograd.grad(loss, [tensor for tensor in (x, weight) if tensor.requires_grad]))
        return (*(next(found) if need else None for need in needed), None, None)


def divisor(targets: Tensor, reduction: str) -> Tensor | None:
    """The divisor of a sum of losses: for mean the number of targets that are not IGNORE, for sum None."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be mean or sum, not {reduction!r}")
    return (targets != IGNORE).sum() if reduction == "mean" else None


class _LinearCrossEntropy(torch.autograd.Function):
    """x [N, D], targets [N] -> scalar, [N], [N]. The forward pass computes the gradients of x, weight and bias."""

    gives_every_gradient = True  # to every input that needs one (see trainer/engine/gradients.py)

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        row_weights: Tensor,
        divide_by: Tensor | None,
        form: _Form,
        train: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        counted = targets != IGNORE
        labels = targets.where(counted, 0)
        factors = row_weights.to(wide).where(counted, 0)
        need_x, need_weight, need_bias = (train and need for need in ctx.needs_input_grad[:3])
        train = need_x or need_weight or need_bias
        dx = torch.empty_like(x) if need_x else None
        dweight = torch.empty_like(weight, dtype=wide) if need_weight else None
        dbias = torch.zeros_like(bias, dtype=wide) if bias is not None and need_bias else None
        cross_entropies, z_losses = (torch.empty_like(factors) for _ in range(2))
        w = weight[: form.vocab_size].to(x.dtype)
        b = None if bias is None else bias[: form.vocab_size].to(x.dtype)
        if dweight is not None:
            dweight[len(w) :] = 0

        chunk = _chunk_rows(len(x), len(w), x.element_size(), x.device.type != "cpu")
        buffer = _rows_of_logits(x, chunk, len(w))
        starts = range(0, len(x), chunk)
        for start in starts[:2] if _scorer.get() is score_nothing else starts:
            part = slice(start, start + chunk)
            rows = x[part]
            logits = buffer[: len(rows)]
            if b is None:
                torch.mm(rows, w.t(), out=logits)
            else:
                torch.addmm(b, rows, w.t(), out=logits)
            facts = logits, labels[part], factors[part], cross_entropies[part], z_losses[part], form
            _scorer.get()(*facts) if train else score_in_tiles(*facts, train=False)
            if dx is not None:
                torch.mm(logits, w, out=dx[part])
            if dweight is not None:
                _add_product(dweight[: len(w)], logits.t(), rows, first=start == 0)
            if dbias is not None:
                dbias[: len(w)] += logits.sum(0, dtype=wide)

        cross_entropies, z_losses = ((losses * factors).where(counted, 0) for losses in (cross_entropies, z_losses))
        total = cross_entropies.sum() + z_losses.sum()
        # Attributes, not saved tensors, because autograd would still hold saved tensors while the backward pass returns them.
        ctx.gradients = [(dx, x.dtype), (dweight, weight.dtype), (dbias, wide if bias is None else bias.dtype)]
        ctx.factor = 1.0 if divide_by is None else divide_by.clamp(min=1).to(wide).reciprocal()
        ctx.mark_non_differentiable(cross_entropies, z_losses)
        return total if divide_by is None else total / divide_by, cross_entropies, z_losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("linear_cross_entropy cannot be differentiated twice; leave out create_graph")
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_cross_entropy has released its gradients: only one backward pass per forward pass"
            )
        factor = (gradient * ctx.factor).view(1)  # 1-D: its product with bf16 is computed in fp32, and rounded once
        scaled = [
            None if made is None else torch.mul(made, factor, out=_in_dtype(made, dtype))
            for made, dtype in ctx.gradients
        ]
        ctx.gradients = None
        return (*scaled, None, None, None, None, None)


@contextlib.contextmanager
def scored_by(scorer: Callable[..., None]) -> Iterator[None]:
    """In this context, training applies `scorer` instead of `score` to chunks of logits."""
    token = _scorer.set(scorer)
    try:
        yield
    finally:
        _scorer.reset(token)


def score_nothing(*facts: Any) -> None:
    """The scorer for tensors without storage, where only held memory counts: it holds nothing, and two chunks stand for all."""


def score_in_tiles(
    logits: Tensor,
    labels: Tensor,
    factors: Tensor,
    cross_entropies: Tensor,
    z_losses: Tensor,
    form: _Form,
    train: bool = True,
) -> None:
    """Fill in both losses [n] of a chunk; if `train`, overwrite its logits [n, V] with the gradient of factors times losses."""
    tile = _tile_rows(logits, factors.dtype)
    for start in range(0, len(logits), tile):
        part = slice(start, start + tile)
        _score_tile(logits[part], labels[part], factors[part], cross_entropies[part], z_losses[part], form, train)


def in_kernel_or(scorer: Callable[..., None]) -> Callable[..., None]:
    """A scorer: the Triton kernel for logits on a GPU where it runs, `scorer` for all others."""

    def choose(logits: Tensor, *facts: Any) -> None:
        kernel = _kernel(logits.device) if _on_gpu(logits) and logits.dtype != torch.float64 else None
        (kernel or scorer)(logits, *facts)

    return choose


score = in_kernel_or(score_in_tiles)
_scorer: ContextVar[Callable[..., None]] = ContextVar("scorer", default=score)


def kernel_refusal(device: torch.device) -> str | None:
    """Why the Triton kernel does not score the logits on a device; None if it does."""
    if device.type != "cuda":
        return "it needs CUDA"
    if torch.cuda.get_device_capability(device) < (8, 0) or importlib.util.find_spec("triton") is None:
        return "it needs Triton and compute capability 8.0"
    return None


def describe_kernel(device: torch.device) -> str:
    """Which kernel scores the logits in training on a GPU, and why; "" for a CPU."""
    if device.type == "cpu":
        return ""
    refusal = kernel_refusal(device)
    return f"loss: torch ({refusal})" if refusal else "loss: triton (one launch for a chunk of logits)"


@functools.cache
def _kernel(device: torch.device) -> Callable[..., None] | None:
    """The Triton kernel after a trial on `device`; None where it does not run. A failed trial is a warning."""
    if kernel_refusal(device) is not None:
        return None
    try:
        from models.layers.triton_cross_entropy import score_in_kernel

        logits = torch.zeros(1, 16, dtype=torch.bfloat16, device=device)  # whose code real rows in bf16 use too
        label, row = torch.zeros(1, dtype=torch.long, device=device), torch.zeros(1, device=device)
        score_in_kernel(logits, label, row, row.clone(), row.clone(), _Form(None, 0.0, 16))
    except Exception as error:  # Triton needs a C compiler and a driver that it knows
        reason = (str(error).strip().splitlines() or [""])[0]
        warnings.warn(
            f"the loss uses torch's kernels, because Triton failed: {type(error).__name__}: {reason}", stacklevel=2
        )
        return None
    return score_in_kernel


def _score_tile(
    logits: Tensor,
    labels: Tensor,
    factors: Tensor,
    cross_entropies: Tensor,
    z_losses: Tensor,
    form: _Form,
    train: bool,
) -> None:
    scores = logits.to(factors.dtype)
    if form.softcap is not None:
        bent = (scores / form.softcap).tanh_()
        scores = bent * form.softcap
    probabilities = scores.softmax(-1)  # one kernel instead of five for logsumexp and exp
    log_sum = scores.amax(-1) - probabilities.amax(-1).log()  # the largest probability is never 0, unlike the target's
    column = labels[:, None]
    torch.sub(log_sum, scores.gather(1, column)[:, 0], out=cross_entropies)
    torch.mul(log_sum.square(), form.z_loss, out=z_losses)
    if not train:
        return
    probabilities *= (factors * (1 + 2 * form.z_loss * log_sum))[:, None]
    probabilities.scatter_(1, column, probabilities.gather(1, column) - factors[:, None])
    if form.softcap is not None:
        probabilities *= bent.square_().neg_().add_(1)
    logits.copy_(probabilities)


def score_at_once(
    logits: Tensor, labels: Tensor, factors: Tensor, cross_entropies: Tensor, z_losses: Tensor, form: _Form
) -> None:
    """As `score_in_tiles` in training, written for torch.compile to fuse into few kernels: only the results are written in place."""
    scores = logits.to(factors.dtype)
    if form.softcap is not None:
        bent = (scores / form.softcap).tanh()
        scores = bent * form.softcap
    largest = scores.amax(-1, keepdim=True)
    log_sum = (largest + (scores - largest).exp().sum(-1, keepdim=True).log())[:, 0]
    is_label = torch.arange(scores.shape[1], device=scores.device) == labels[:, None]
    of_label = scores.gather(1, labels[:, None])[:, 0]
    cross_entropies.copy_(log_sum - of_label)
    z_losses.copy_(form.z_loss * log_sum.square())
    # Computes exp again, of other numbers, because the exponentials of the sum would have to be held until here.
    gradient = (scores - log_sum[:, None]).exp() * (1 + 2 * form.z_loss * log_sum)[:, None] - is_label.to(scores.dtype)
    if form.softcap is not None:
        gradient = gradient * (1 - bent.square())
    logits.copy_(gradient * factors[:, None])


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a b, or total = a b if `first`; total may be fp32 even if a and b are not."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=0 if first else 1, out=total)
    elif _on_gpu(a) and _adds_in_fp32(a.device, a.dtype):  # no product in half precision is written, read and added
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=0 if first else 1, out=total)
    elif first:
        total.copy_(a @ b)
    else:
        total += a @ b


@functools.cache
def _adds_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has a product on `device` that multiplies in `dtype` and adds to an fp32 matrix. (Tried, since not all have.)"""
    a, total = torch.zeros(16, 16, dtype=dtype, device=device), torch.zeros(16, 16, device=device)
    try:
        torch.addmm(total, a, a, out_dtype=total.dtype, out=total)
    except (RuntimeError, TypeError):
        return False
    return True


def _in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x itself if it has this dtype, else uninitialised memory of its shape."""
    return x if x.dtype == dtype else torch.empty_like(x, dtype=dtype)


def _on_gpu(x: Tensor) -> bool:
    """Whether x has storage on a GPU. (Tensors without storage have another type.)"""
    return type(x) is Tensor and x.is_cuda


def _rows_of_logits(x: Tensor, rows: int, vocab_size: int) -> Tensor:
    """Uninitialised logits [rows, V] in the dtype and on the device of x."""
    return x.new_empty(rows, _row_entries(vocab_size, x.device.type != "cpu"))[:, :vocab_size]


def working_bytes(
    rows: float,
    weight: int,
    vocab_size: int,
    itemsize: int,
    *,
    on_gpu: bool,
    fused: bool = False,
    softcap: bool = False,
    rounded: bool = False,
) -> int:
    """Most bytes that the loss of `rows` rows holds besides its results; of infinitely many rows, the most of any number.

    A chunk of logits of `itemsize` bytes, and what a part of it needs: its tiles in fp32, or in half precision its product, which
    is then added to the gradient of the weight, of `weight` entries. fused: a GPU with the Triton kernel and products that add
    in fp32 (compute capability 8.0) has neither. rounded: the backward pass copies that gradient to the dtype of the logits.
    """
    most = _most_rows(vocab_size, itemsize, on_gpu)
    chunk = most if rows == float("inf") else _chunk_rows(int(rows), vocab_size, itemsize, on_gpu)
    entries = chunk * _row_entries(vocab_size, on_gpu)
    # Scores and probabilities; fp32 logits are used as scores. A soft-cap needs new scores, and keeps its tanh.
    tiles = (3 if softcap else 1 if itemsize == 4 else 2) * min(4 * entries, _tile_bytes(on_gpu))
    product = weight * itemsize if itemsize < 4 else 0
    return max(entries * itemsize + (0 if fused else max(tiles, product)), product if rounded else 0)


def _row_entries(vocab_size: int, on_gpu: bool) -> int:
    """Entries of memory for a row. On a GPU a row starts where vectors can be loaded, for the products and the Triton kernel."""
    return -(-vocab_size // ROW_ENTRIES_OF_GPU) * ROW_ENTRIES_OF_GPU if on_gpu else vocab_size


def _most_rows(vocab_size: int, itemsize: int, on_gpu: bool) -> int:
    most = max(MIN_CHUNK_ROWS, (CHUNK_BYTES_OF_GPU if on_gpu else CHUNK_BYTES) // (vocab_size * itemsize))
    return most // ROWS_OF_GPU * ROWS_OF_GPU if on_gpu else most


def _chunk_rows(rows: int, vocab_size: int, itemsize: int, on_gpu: bool) -> int:
    """Rows per chunk: the same in all chunks except the last."""
    chunks = max(1, -(-rows // _most_rows(vocab_size, itemsize, on_gpu)))
    even = max(1, -(-rows // chunks))
    return even if chunks == 1 or not on_gpu else -(-even // ROWS_OF_GPU) * ROWS_OF_GPU


def _tile_rows(logits: Tensor, wide: torch.dtype) -> int:
    return max(1, _tile_bytes(logits.device.type != "cpu") // (logits.shape[1] * wide.itemsize))


def _tile_bytes(on_gpu: bool) -> int:
    return TILE_BYTES if on_gpu else TILE_BYTES_PER_CORE * torch.get_num_threads()
