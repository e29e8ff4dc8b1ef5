"""The generalised delta rule of RWKV-7 (arXiv 2503.14456), gated delta nets (2412.06464) and KDA (2510.26692), in chunks.

    S_t = S_{t-1} diag(w_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T        [V, K], one for each head
    o_t = S_t r_t

RWKV-7: a = -kappa, b = kappa * alpha. Delta rule with decay w and rate beta: a = -beta w k, b = k, and beta v for v.

Within a chunk every product has the form x_i . (y_j exp(sum of log w over j < l <= i)): its exponent is never positive. One decay per head: the [Q, Q] matrix of exponentials multiplies the plain products. One decay per channel: the tokens
of a block of BLOCK are compared channel by channel, and two neighbouring blocks meet at the end of the earlier one, then pairs of blocks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.layers import without_autocast
from models.layers.chunks import (
    carried,
    chunks_of,
    chunks_with_state,
    masked,
    split,
    sums_after,
    sums_before,
    sums_between,
    wide,
)
from models.layers.sums import running_sum

CHUNK = 64
BLOCK = 4  # tokens that are compared channel by channel: the memory for it grows with it
LARGEST = 40.0  # exponent of a factor on either side of a product: fp32 holds e^88, and products of two factors


class Inputs(NamedTuple):
    """The inputs of `delta_rule`: of a sequence, of a token, or of a sequence in chunks."""

    r: Tensor
    log_w: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor


def delta_rule(
    r: Tensor,  # [B, T, H, K], queries
    log_w: Tensor,  # [B, T, H, K] or [B, T, H, 1], not positive
    k: Tensor,  # [B, T, H, K]
    v: Tensor,  # [B, T, H, V]
    a: Tensor,  # [B, T, H, K]
    b: Tensor,  # [B, T, H, K]
    state: Tensor | None = None,  # [B, H, V, K], before the first token; None: zeros
    documents: Tensor | None = None,  # [B, T] as `number_documents` returns them; not with a state
    keep_state: bool = True,
    chunk: int = CHUNK,  # a power of two
    least_log_w: float = -math.inf,  # a lower bound of log_w, if one is known: with it, longer blocks are plain products
) -> tuple[Tensor, Tensor | None]:
    """(o [B, T, H, V] in the dtype of v, the state after the last token, fp32 or fp64 [B, H, V, K]; None unless it is kept).

    Everything is computed in fp32 (fp64 for fp64), also under autocast. The cost is linear in T.
    """
    if state is not None and documents is not None:
        raise ValueError("documents must be None with a state: it belongs to one document per row")
    dtype = v.dtype
    with without_autocast(v.device.type):
        inputs = Inputs(wide(r), wide(log_w), wide(k), wide(v), wide(a), wide(b))
        if v.shape[1] == 1:
            o, last = _one_token(_at(inputs, 0), state)
            return o.unsqueeze(1).to(dtype), last if keep_state else None
        size = min(chunk, _at_least(v.shape[1]))
        o, after = _by_chunks(inputs, state, documents, keep_state, size, least_log_w)
        return o.to(dtype), after


def gated_delta_rule(
    q: Tensor,  # [B, T, H, K]
    log_w: Tensor,  # [B, T, H, 1], or [B, T, H, K] (KDA)
    k: Tensor,  # [B, T, H, K], of length 1
    v: Tensor,  # [B, T, H, V]
    beta: Tensor,  # [B, T, H, 1], from 0 to 1
    state: Tensor | None = None,
    documents: Tensor | None = None,
    keep_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """`delta_rule` of gated delta nets: S_t = decay(S_{t-1}) (I - beta k k^T) + beta v k^T. o is at least fp32."""
    beta = wide(beta)
    return delta_rule(q, log_w, k, beta * v, -beta * log_w.exp() * k, k, state, documents, keep_state)


def _at(inputs: Inputs, t: int) -> Inputs:
    return Inputs(*(x[:, t] for x in inputs))


def _one_token(token: Inputs, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The recurrence itself; all but the state are [B, H, K or V]."""
    r, log_w, k, v, a, b = token
    new = v.unsqueeze(-1) * k.unsqueeze(-2)  # [B, H, V, K]
    if state is not None:
        state = wide(state)
        removed = (state * a.unsqueeze(-2)).sum(-1, keepdim=True)  # [B, H, V, 1]
        new = new + state * log_w.exp().unsqueeze(-2) + removed * b.unsqueeze(-2)
    return (new * r.unsqueeze(-2)).sum(-1), new


def _by_chunks(
    inputs: Inputs, state: Tensor | None, documents: Tensor | None, keep_state: bool, size: int, least_log_w: float
) -> tuple[Tensor, Tensor | None]:
    """The vectors u_i = S_{i-1} a_i solve a triangular system in each chunk. What is left is affine in the state: S -> S M + N."""
    length = inputs.v.shape[1]
    sees = chunks_of(length, size, documents, inputs.v.device)
    # [B, n, H, Q, ...]; a token that fills up the last chunk is zero, with decay 1: it changes nothing
    r, log_w, k, v, a, b = (split(x, size).transpose(2, 3) for x in inputs)
    products = _pairs(torch.stack((a, r), 3), torch.stack((b, k), 3), log_w, least_log_w)
    (ab, ak), (rb, rk) = (pair.unbind(3) for pair in products.unbind(3))  # [B, n, H, Q, Q] each
    ab, ak = (masked(x, sees.within.tril(-1)) for x in (ab, ak))
    rb, rk = (masked(x, sees.within) for x in (rb, rk))

    from_start = None if sees.from_start is None else sees.from_start.unsqueeze(-1)  # [B, n, 1, Q, 1]
    to_end = None if sees.to_end is None else sees.to_end.unsqueeze(-1)
    through = None if sees.through is None else sees.through[..., None, None]
    aa = masked(a * sums_before(log_w).exp(), from_start)  # the factor of the state in the system
    right = torch.cat((ak @ v, aa), dim=-1)
    solved = torch.linalg.solve_triangular(_identity(size, v) - ab, right, upper=False, unitriangular=True)
    u, ua = solved.split([v.shape[-1], k.shape[-1]], dim=-1)  # u_i = u[i] + S ua[i]
    o = rk @ v + rb @ u  # [B, n, H, Q, V]

    adding, seeing = chunks_with_state(v.shape[1], state, keep_state)
    left = masked(sums_after(log_w).exp(), to_end)[:, adding]  # [B, n, H, Q, K or 1]
    kl, bl = k[:, adding] * left, b[:, adding] * left
    added = v[:, adding].transpose(-1, -2) @ kl + u[:, adding].transpose(-1, -2) @ bl  # N [B, n, H, V, K]
    decay = masked(log_w.sum(-2, keepdim=True).exp(), through)[:, adding]  # [B, n, H, 1, K or 1]
    both = slice(seeing.start, adding.stop)  # chunks that a state passes through
    factors = (
        _identity(k.shape[-1], v) * decay[:, both] + ua[:, both].transpose(-1, -2) @ bl[:, both]
    )  # M [B, n, H, K, K]
    states = carried(added, state, lambda chunk, entering: entering @ factors[:, chunk - both.start])
    if seeing.start < v.shape[1]:
        start = torch.stack(states[seeing], dim=1).transpose(-1, -2)  # [B, n, H, K, V]
        ra = masked(r * running_sum(log_w, -2).exp(), from_start)
        further = rb[:, seeing] @ (ua[:, seeing] @ start) + ra[:, seeing] @ start
        o = torch.cat((o[:, : seeing.start], o[:, seeing] + further), dim=1)
    return o.transpose(2, 3).flatten(1, 2)[:, :length], states[-1] if keep_state else None


def _identity(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)


def _at_least(length: int) -> int:
    """The smallest power of two that is not below `length`."""
    return 1 << (length - 1).bit_length()


def _pairs(x: Tensor, y: Tensor, log_w: Tensor, least_log_w: float) -> Tensor:
    """x_i . (y_j exp(sum of log_w over j < l < i for the first x, j < l <= i for the second)) for j <= i: [..., 2, Y, Q, Q].

    Entries above the diagonal have no meaning. x [..., 2, Q, K], y [..., Y, Q, K], log_w [..., Q, K or 1].
    """
    if log_w.shape[-1] == 1:
        return (x.unsqueeze(-3) @ y.transpose(-1, -2).unsqueeze(-4)) * _both(log_w).squeeze(-1).exp().unsqueeze(-3)
    size = BLOCK
    while 2 * size * -least_log_w <= 2 * LARGEST:
        size *= 2
    size = min(size, x.shape[-2])
    compare = _through_the_middle if size > BLOCK else _by_channel
    found = compare(*(t.unflatten(-2, (-1, size)) for t in (x, y, log_w)))
    while (
        size < x.shape[-2]
    ):  # two neighbours make one: the rows of the later one meet the columns of the earlier one at its end
        (_, second), (first, _) = (t.unflatten(-2, (-1, 2, size)).unbind(-3) for t in (x, y))
        early, late = log_w.unflatten(-2, (-1, 2, size)).unbind(-3)
        later = second * torch.stack((sums_before(late), running_sum(late, -2)), dim=-4).exp()
        cross = _product(later, first * sums_after(early).exp().unsqueeze(-4))
        upper, lower = found.unflatten(-3, (-1, 2)).unbind(-3)
        found = torch.cat((F.pad(upper, (0, size)), torch.cat((cross, lower), dim=-1)), dim=-2)
        size *= 2
    return found.squeeze(-3)


def _both(log_w: Tensor) -> Tensor:
    """The exponents of `_pairs`, [..., Q, K] -> [..., 2, Q, Q, K]."""
    sums = sums_between(log_w)
    return torch.stack((F.pad(sums[..., :-1, :, :], (0, 0, 0, 0, 1, 0)), sums), dim=-4)


def _by_channel(x: Tensor, y: Tensor, log_w: Tensor) -> Tensor:
    """`_pairs` of m short blocks, for any decays. x [..., 2, m, b, K], y [..., Y, m, b, K] -> [..., 2, Y, m, b, b]."""
    exponents = _both(log_w).transpose(-5, -4)  # [..., 2, m, i, j, K]
    return torch.einsum("...xmijk,...ymjk->...xymij", x.unsqueeze(-2) * exponents.exp(), y)


def _through_the_middle(x: Tensor, y: Tensor, log_w: Tensor) -> Tensor:
    """As `_by_channel`, for decays so weak that no exponent exceeds LARGEST: both sides are scaled to a token in the middle."""
    sums = running_sum(log_w, -2)
    middle = sums[..., (y.shape[-2] - 1) // 2, :].unsqueeze(-2)  # [..., m, 1, K]
    later = x * (torch.stack((sums_before(log_w), sums), dim=-4) - middle.unsqueeze(-4)).exp()
    return _product(later, y * (middle - sums).exp().unsqueeze(-4))


def _product(x: Tensor, y: Tensor) -> Tensor:
    return torch.einsum("...xmik,...ymjk->...xymij", x, y)


def delta_rule_recurrent(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`delta_rule` token by token, for tests and measurements."""
    inputs, outputs = Inputs(r, log_w, k, v, a, b), []
    for t in range(v.shape[1]):
        o, state = _one_token(_at(inputs, t), state)
        outputs.append(o)
    assert state is not None
    return torch.stack(outputs, dim=1), state
