"""Stages: layers that run at some positions of a row alone, and give what they say to those positions and the ones after them.

At each position of a stage a rule, or a router, says whether the next stage has it too. As in patching.py, shapes do not depend on
values: the next stage has room for so many positions, as `Rule.slots` says, and where positions are wanted more often for long, the
last ones are left out. Whether a position is, follows from those up to it. Places that are not used come last in a row.

In decoding the new positions of a row are few, and other rows may have more: each row has its own place in every stage but the first.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.layers.attend import AttentionMask
from models.layers.causal import Context
from models.layers.patching import PatchState, Rule, of_patch
from models.layers.plain_attention import Visible, visible


class Stage(NamedTuple):
    """The n positions of one stage that a forward pass computes.

    documents: [B, n] as `number_documents` returns them, or None. real: [B, n] bool, which are used (None: all).
    Of decoding: state; first: [B], how many positions each row had before; size: places up to the last one of any row.
    """

    documents: Tensor | None = None
    real: Tensor | None = None
    state: PatchState | None = None
    first: Tensor | None = None
    size: int = 0

    def places(self, count: int, device: torch.device) -> Tensor:
        """[count], or [B, count] in decoding: which of its row each of the `count` positions is."""
        places = torch.arange(count, device=device)
        return places if self.first is None else self.first[:, None] + places

    def context(self, x: Tensor, kernel: str, head_dim: int, weight: Tensor) -> Context:
        """What layers of this stage without a window need besides x [B, n, D]; not for the first stage."""
        if self.state is None or self.first is None:
            context = Context(self.documents)
            return context._replace(visible=visible(kernel, (0,), head_dim, weight, x[..., 0], context))
        at = self.places(x.shape[1], x.device)
        mask = torch.arange(self.size, device=x.device) <= at[:, None, :, None]  # [B, 1, n, size]
        seen = Visible(at, {0: AttentionMask(mask=mask)}, "sdpa")
        return Context(None, self.state.latent(self.first, self.size), seen)  # type: ignore[arg-type]


def first_stage(tokens: Tensor, documents: Tensor | None, state: PatchState | None) -> Stage:
    """The stage of the tokens [B, T] themselves; documents: [B, T] as `number_documents` returns them."""
    if state is None:
        return Stage(documents)
    return Stage(None, None, state, torch.full_like(tokens[:, 0], state.length), state.length + tokens.shape[1])


def before_each(x: Tensor, stage: Stage, key: Hashable) -> Tensor:
    """x [B, n, D] of the position before each one in its row: zeros before the first."""
    if stage.state is None:
        return F.pad(x[:, :-1], (0, 0, 1, 0))
    held = torch.cat((stage.state.recall(key, x[:, :1]), x), dim=1)
    rows = torch.arange(len(x), device=x.device)
    new = x.shape[1] if stage.real is None else stage.real.sum(1)
    stage.state.remember(key, held[rows, new][:, None])
    return held[:, :-1]


class Choice(NamedTuple):
    """Which of the n positions of a stage the next one has, in M places.

    at: [B, M], which of the n each is. last: [B, n], the last one at or before each position; in decoding 0 is the one before the new
    ones, and the first new one 1. since: [B, n], how many positions lie between. known: [B, n, 1] bool, whether the last one is of the
    same document (None: all are).
    """

    at: Tensor
    last: Tensor
    since: Tensor
    known: Tensor | None = None

    def taken(self, x: Tensor) -> Tensor:
        """x [B, n, D] at the chosen positions, [B, M, D]; of places that are not used that of the first position."""
        return x.gather(1, self.at[..., None].expand(-1, -1, x.shape[2]))

    def spread(self, values: Tensor) -> Tensor:
        """What the last chosen position has: values [B, M, ...] as `with_last` returns them -> [B, n, ...]; 0 if none is known."""
        found = of_patch(values, self.last)
        return found if self.known is None else found * self.known.view(*self.known.shape[:2], *[1] * (found.dim() - 2))

    def with_last(self, values: Tensor, state: PatchState | None, key: Hashable) -> Tensor:
        """values [B, M, ...]; in decoding after those of the position before the new ones, [B, 1 + M, ...]."""
        if state is None:
            return values
        before = state.recall(key, values.new_zeros(len(values), 1, *values.shape[2:]))
        values = torch.cat((before.to(values.dtype), values), dim=1)
        rows = torch.arange(len(values), device=values.device)
        state.remember(key, values[rows, self.last[:, -1]][:, None])
        return values


def choose(stage: Stage, wanted: Tensor, rule: Rule, key: Hashable) -> tuple[Choice, Stage]:
    """wanted: [B, n] bool, whether a position should go on to the next stage; the first of a row is. rule: says how much room there is.

    While decoding, the host waits for the device, so that steps in which no position is chosen run no deeper stage.
    """
    here = torch.arange(wanted.shape[1], device=wanted.device)
    places = stage.places(wanted.shape[1], wanted.device)
    wanted = wanted if stage.real is None else wanted & stage.real
    held = wanted.new_zeros(
        len(wanted), 3, dtype=torch.long
    )  # wanted before; what was left out, negative; the place of the last
    if stage.state is not None:
        held = stage.state.recall((key, "chosen"), held)
    # The closed form of count = min(count + wanted, room).
    asked, room = held[:, :1] + wanted.cumsum(1), rule.room(places.double())
    left_out = torch.minimum((room - asked).cummin(1).values, held[:, 1:2])
    count, first = asked + left_out, held[:, :1] + held[:, 1:2]
    chosen = count > torch.cat((first, count[:, :-1]), dim=1)
    new = count[:, -1:] - first  # [B, 1]
    if stage.state is None:
        slots, size = rule.slots(wanted.shape[1], stage.documents is not None), 0
    else:
        slots, size = (int(n) for n in torch.stack((new.max(), first.max())).tolist())
        size += slots
    order = (count - first - 1).clamp(0, max(0, slots - 1))
    at = here.new_zeros(len(wanted), slots)
    if slots:
        at = at.scatter_add(1, order, here * chosen)
    used = torch.arange(slots, device=here.device) < new  # [B, M]
    if stage.state is None:
        choice = Choice(at, count - 1, here - at.gather(1, count - 1))
        if stage.documents is None:
            return choice, Stage(None, used)
        # Unused places are a document of their own.
        documents = stage.documents.gather(1, at).where(used, wanted.shape[1])
        known = documents.gather(1, choice.last) == stage.documents
        return choice._replace(known=known[..., None]), Stage(documents, used)
    row = places[:, :1]
    since = places - torch.cat((held[:, 2:], row + at), dim=1).gather(1, count - first)
    choice = Choice(at, count - first, since)
    newest = places[:, -1:] - since[:, -1:]
    stage.state.remember((key, "chosen"), torch.cat((asked[:, -1:], left_out[:, -1:], newest), dim=1))
    return choice, Stage(None, used, stage.state, first[:, 0], size)
