"""What the recurrences of ssd.py and delta_rule.py share: a sequence in chunks, and the documents in it.

Within a chunk a recurrence is a few matrix products; only the state passes from chunk to chunk, T / chunk times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.layers.sums import running_sum


class Chunks(NamedTuple):
    """Which tokens of a sequence in chunks of Q, n of them, see which. Documents begin with an empty state.

    within: [Q, Q] or [B, n, 1, Q, Q], token i sees token j <= i of its chunk; from_start: [B, n, 1, Q], token i sees the state that
    enters its chunk; to_end: [B, n, 1, Q], the state that leaves the chunk holds token i; through: [B, n, 1], it also holds the
    state that entered. The last three are None if all are true.
    """

    within: Tensor
    from_start: Tensor | None = None
    to_end: Tensor | None = None
    through: Tensor | None = None


def chunks_of(length: int, size: int, documents: Tensor | None, device: torch.device) -> Chunks:
    """documents: [B, T] as `number_documents` returns them, or None; T = `length` tokens, filled up to whole chunks of `size`."""
    causal = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    if documents is None:
        return Chunks(causal)
    number = documents_in_chunks(documents, size).unsqueeze(2)  # [B, n, 1, Q]
    last = number[..., -1]  # [B, n, 1]
    before = torch.cat((number[:, :1, :, 0], last[:, :-1]), dim=1)  # the document that the chunk begins in
    return Chunks(
        causal & (number.unsqueeze(-1) == number.unsqueeze(-2)),
        number == before.unsqueeze(-1),
        number == last.unsqueeze(-1),
        before == last,
    )


def documents_in_chunks(documents: Tensor, size: int) -> Tensor:
    """[B, T] -> [B, n, size]; what fills up the last chunk belongs to the last document. (CUDA replicates no integers in F.pad.)"""
    filling = documents[:, -1:].expand(-1, -documents.shape[1] % size)
    return torch.cat((documents, filling), dim=1).unflatten(1, (-1, size))


def split(x: Tensor, size: int) -> Tensor:
    """[B, T, ...] -> [B, n, size, ...], with zeros at the end of the last chunk."""
    missing = -x.shape[1] % size
    if missing:
        x = torch.cat((x, x.new_zeros(x.shape[0], missing, *x.shape[2:])), dim=1)
    return x.unflatten(1, (-1, size))


def chunks_with_state(count: int, state: Tensor | None, keep_state: bool) -> tuple[slice, slice]:
    """(the chunks that add to a state that is used, those that see one) of `count`: the first has none to see unless `state` is given,
    what the last one adds is only for later."""
    return slice(0, count if keep_state else count - 1), slice(0 if state is not None else 1, count)


def carried(added: Tensor, state: Tensor | None, passed: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
    """The states before each chunk, and after the last one. added: [B, n, H, ...], what each chunk adds; state: before the first one
    (None: zeros, which stand for themselves as an empty tensor); passed(number of the chunk, the state before it) -> what is left of it."""
    states = [added.new_empty(0) if state is None else wide(state)]  # the empty one is never read
    for chunk, own in enumerate(added.unbind(1)):
        states.append(own if chunk == 0 and state is None else passed(chunk, states[-1]) + own)
    return states


def sums_between(x: Tensor) -> Tensor:
    """[..., Q, C] -> [..., Q, Q, C]: entry i, j is the sum of x over j < l <= i, and 0 for j >= i.

    Differences of cumulative sums would lose the digits that the sums have in common.
    """
    later = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool, device=x.device).tril(-1).unsqueeze(-1)  # l > j
    return running_sum(x.unsqueeze(-2).where(later, 0.0), -3)


def sums_before(x: Tensor) -> Tensor:
    """[..., Q, C]: entry i is the sum of x over l < i."""
    return running_sum(F.pad(x[..., :-1, :], (0, 0, 1, 0)), -2)


def sums_after(x: Tensor) -> Tensor:
    """[..., Q, C]: entry i is the sum of x over l > i."""
    return running_sum(F.pad(x[..., 1:, :], (0, 0, 0, 1)).flip(-2), -2).flip(-2)


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """x with zeros where `mask`, which broadcasts to it, is false. None: x."""
    return x if mask is None else x.masked_fill(~mask, 0.0)


def wide(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 if it is: states and decays are not rounded to the dtype of the activations."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
