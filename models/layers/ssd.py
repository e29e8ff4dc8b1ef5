"""The state space duality of Mamba-2 (arXiv 2405.21060): a recurrence with one decay per head and token, computed in chunks.

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T        [P, N], one for each head
    y_t = S_t C_t

All decays are exponentials of sums between two tokens, which are never positive. exp(sum_i) exp(-sum_j) would overflow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.layers import without_autocast
from models.layers.chunks import carried, chunks_of, chunks_with_state, masked, split, sums_after, sums_between, wide
from models.layers.sums import running_sum

CHUNK = 64


def ssd(
    x: Tensor,  # [B, T, H, P]
    dt: Tensor,  # [B, T, H], positive
    A: Tensor,  # [H], negative
    B: Tensor,  # [B, T, G, N]; heads h with the same h // (H / G) share B and C
    C: Tensor,  # [B, T, G, N]
    state: Tensor | None = None,  # [B, H, P, N], before the first token; None: zeros
    documents: Tensor | None = None,  # [B, T] as `number_documents` returns them; not with a state
    keep_state: bool = True,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor | None]:
    """(y [B, T, H, P] in the dtype of x, the state after the last token, fp32 or fp64 [B, H, P, N]; None unless it is kept).

    Everything is computed in fp32 (fp64 for fp64), also under autocast. The cost is linear in T.
    """
    if state is not None and documents is not None:
        raise ValueError("documents must be None with a state: it belongs to one document per row")
    dtype = x.dtype
    with without_autocast(x.device.type):
        x, dt, A, B, C = wide(x), wide(dt), wide(A), wide(B), wide(C)
        if x.shape[1] == 1:
            y, last = _one_token(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], state)
            return y.unsqueeze(1).to(dtype), last if keep_state else None
        y, after = _by_chunks(x, dt, A, B, C, state, documents, keep_state, min(chunk, x.shape[1]))
        return y.to(dtype), after


def _one_token(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The recurrence itself; x [B, H, P], dt [B, H], B and C [B, G, N]."""
    heads = x.shape[1] // B.shape[1]
    B, C = (t.repeat_interleave(heads, dim=1).unsqueeze(2) for t in (B, C))  # [B, H, 1, N]
    new = (x * dt.unsqueeze(-1)).unsqueeze(-1) * B  # [B, H, P, N]
    if state is not None:
        new = new + (dt * A).exp()[..., None, None] * state
    return (new * C).sum(-1), new


def _by_chunks(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor | None,
    documents: Tensor | None,
    keep_state: bool,
    size: int,
) -> tuple[Tensor, Tensor | None]:
    length, groups = x.shape[1], B.shape[2]
    sees = chunks_of(length, size, documents, x.device)
    # A token that fills up the last chunk has dt = 0: it changes nothing.
    u = split(x * dt.unsqueeze(-1), size).unflatten(3, (groups, -1))  # [B, n, Q, G, H/G, P]
    log_decay = split(dt * A, size).transpose(2, 3).unsqueeze(-1)  # [B, n, H, Q, 1]
    total, after = running_sum(log_decay, 3).squeeze(-1), sums_after(log_decay).squeeze(-1)  # [B, n, H, Q]
    B, C = split(B, size), split(C, size)  # [B, n, Q, G, N]

    decay = masked(sums_between(log_decay).squeeze(-1).exp(), sees.within).unflatten(2, (groups, -1))  # [..., Q, Q]
    scores = torch.einsum("bcign,bcjgn->bcgij", C, B).unsqueeze(3) * decay  # [B, n, G, H/G, Q, Q]
    y = torch.einsum("bcghij,bcjghp->bcighp", scores, u)

    adding, seeing = chunks_with_state(u.shape[1], state, keep_state)
    left = masked(after.exp(), sees.to_end)[:, adding].transpose(2, 3).unflatten(3, (groups, -1))
    added = torch.einsum("bcjghp,bcjgn->bcghpn", u[:, adding] * left.unsqueeze(-1), B[:, adding]).flatten(2, 3)
    kept = masked(total[..., -1].exp(), sees.through)[:, adding]  # [B, n, H], what of the state passes through a chunk
    states = carried(added, state, lambda chunk, before: kept[:, chunk, :, None, None] * before)
    if seeing.start < u.shape[1]:
        before = torch.stack(states[seeing], dim=1).unflatten(2, (groups, -1))  # [B, n, G, H/G, P, N]
        reached = masked(total.exp(), sees.from_start)[:, seeing].transpose(2, 3).unflatten(3, (groups, -1))
        further = torch.einsum("bcign,bcghpn->bcighp", C[:, seeing], before) * reached.unsqueeze(-1)
        y = torch.cat((y[:, : seeing.start], y[:, seeing] + further), dim=1)
    return y.flatten(3, 4).flatten(1, 2)[:, :length], states[-1] if keep_state else None


def ssd_recurrent(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`ssd` token by token, for tests and measurements."""
    outputs = []
    for t in range(x.shape[1]):
        y, state = _one_token(x[:, t], dt[:, t], A, B[:, t], C[:, t], state)
        outputs.append(y)
    assert state is not None
    return torch.stack(outputs, dim=1), state
