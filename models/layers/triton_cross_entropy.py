"""Triton kernel for a chunk of logits: both losses of each row, and its gradient in place, in one launch.

Only linear_cross_entropy.py imports this module, and only on CUDA: it needs Triton.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# One program has 1,024 threads for a row, and each thread loads 16 bytes of bf16 at a time. With 32 registers for each thread, a
# multiprocessor works on two rows: one has its loads under way while the other computes, and all rows at work (100 KB each at
# V = 50,304) fit the L2 cache, where the second pass finds them.
WARPS = 32
BLOCK = 8192
REGISTERS = 32


def score_in_kernel(
    logits: Tensor, labels: Tensor, factors: Tensor, cross_entropies: Tensor, z_losses: Tensor, form: Any
) -> None:
    """As `score_in_tiles` in training. logits [n, V] in fp32, bf16 or fp16, with adjacent columns; all sums are fp32."""
    with torch.cuda.device_of(logits):
        _score_row[(len(logits),)](
            *(logits, labels, factors, cross_entropies, z_losses, logits.stride(0), logits.shape[1]),
            softcap=form.softcap,
            z_loss=form.z_loss,
            block=BLOCK,
            num_warps=WARPS,
            maxnreg=REGISTERS,
            debug=True,  # device_assert does nothing otherwise
            sanitize_overflow=False,  # the rest of `debug`: a check of each integer operation
        )


@triton.jit
def _score_row(
    logits,
    labels,
    factors,
    cross_entropies,
    z_losses,
    stride,
    vocab_size,
    softcap: tl.constexpr,
    z_loss: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    columns = tl.arange(0, block)
    whole = vocab_size // block * block  # columns in whole blocks, which need no mask: without one, loads are vectors
    label = tl.load(labels + row)
    tl.device_assert((label >= 0) & (label < vocab_size), "a label is out of bounds")
    label = label.to(tl.int32)  # as columns

    # Online softmax (arXiv 1805.02867), for each lane of a block by itself: one exponential for each logit, and no reduction
    # before the end of the row. The start is finite, because -inf - -inf is NaN.
    largest = tl.full([block], -3.0e38, tl.float32)
    total = tl.zeros([block], tl.float32)  # sum of exp(score - largest)
    for masked in tl.static_range(2):
        for start in range(whole * masked, vocab_size * masked + whole * (1 - masked), block):
            inside = (start + columns < vocab_size) | (masked == 0)
            scores = tl.where(inside, _scores(tl.load(logits + start + columns, inside), softcap), -float("inf"))
            above = scores - largest
            smaller = tl.exp(-tl.abs(above))
            total = tl.where(above > 0, total * smaller + 1, total + smaller)
            largest = tl.maximum(largest, scores)
    of_row = tl.max(largest)
    log_sum = of_row + tl.log(tl.sum(total * tl.exp(largest - of_row)))

    of_label = _scores(tl.load(logits + label), softcap)
    tl.store(cross_entropies + row, log_sum - of_label)
    tl.store(z_losses + row, z_loss * log_sum * log_sum)
    tl.debug_barrier()  # the label's logit is read before it is overwritten

    factor = tl.load(factors + row)
    scale = factor * (1 + 2 * z_loss * log_sum)
    for masked in tl.static_range(2):
        for start in range(whole * masked, vocab_size * masked + whole * (1 - masked), block):
            inside = (start + columns < vocab_size) | (masked == 0)
            at = logits + start + columns
            scores = _scores(tl.load(at, inside), softcap)
            gradient = tl.exp(scores - log_sum) * scale - tl.where(start + columns == label, factor, 0)
            if softcap is not None:
                bent = scores * (1 / softcap)
                gradient *= 1 - bent * bent
            tl.store(at, gradient.to(logits.dtype.element_ty), inside)


@triton.jit
def _scores(logits, softcap: tl.constexpr):
    scores = logits.to(tl.float32)
    if softcap is not None:
        scores = softcap * (2 * tl.sigmoid(scores * (2 / softcap)) - 1)  # softcap * tanh(scores / softcap)
    return scores
