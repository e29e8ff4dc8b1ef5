"""Patches: how a row of bytes is cut, as a function of its past alone, and how values go from bytes to patches and back.

A rule says after each byte whether a patch ends there. It sees that byte and those before it, so what is known of a text's first
bytes does not change when it goes on. The first byte of a document is a patch of its own (arXiv 2412.09871), so every byte knows a
patch that has ended. The last byte of a document ends its patch too, but only those after it know.

Shapes must not depend on values: a row of T bytes has `Rule.slots` places for patches, and what is not used is computed for nothing.
Nothing waits for the device, and code can be compiled. Where patches are short for so long that places would run out, an end is
left out, and the patch goes on: a bucket, which each byte fills by ROOM / size places and each patch empties by one. That, too,
follows from the past alone, and not from the length of the row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.layers.positions import positions_in_documents
from models.state import DecodingState

ROOM = 1.25  # places of a row, per byte, over those that patches of the mean size need
SPARE = 16  # places that every row has besides


class Rule(NamedTuple):
    """How a row is cut.

    kind: one of RULES. size: bytes of a patch; of the rules that look at bytes, the mean for which there is room. threshold: of the
    entropies, in nats. longest: most bytes of a patch; 0: no limit.
    """

    kind: str
    size: float
    threshold: float = 0.0
    longest: int = 0

    def slots(self, length: int, documents: bool = False) -> int:
        """Places for patches in a row of `length` bytes. documents: whether the row may hold several."""
        if self.kind == "static" and not self.longest and not documents:  # exactly those that there are
            return min(length, 2 + math.floor((length - 2) / self.size))
        return min(length, self.room(length - 1))

    def room(self, byte: Any) -> Any:
        """How many patches may have begun at byte `byte` of a row (an int, or a tensor of them)."""
        filled = byte * (ROOM / self.size)
        return (torch.floor(filled).long() if isinstance(byte, Tensor) else math.floor(filled)) + SPARE + 1


class Patches(NamedTuple):
    """The patches of rows of T bytes; M places.

    ids: [B, T], the patch of each byte. last: [B, T], the last patch that has ended at or before each byte, -1 for none.
    places: [B, T], position of each byte in its document. of_document: [B, M], the document of each patch, or None; inside: [B, T], whether
    a byte is of the document of its patch, and known: [B, T], whether it is of the document of its last patch, or None.
    """

    ids: Tensor
    last: Tensor
    places: Tensor
    of_document: Tensor | None = None
    inside: Tensor | None = None
    known: Tensor | None = None


def cut(tokens: Tensor, rule: Rule, documents: Tensor | None = None, entropies: Tensor | None = None) -> Patches:
    """tokens: [B, T], a byte's id is its value. documents: as `number_documents` returns them. entropies: [B, T] in nats, of what a
    model predicts after each byte; for the rules that need them."""
    at = torch.arange(tokens.shape[1], device=tokens.device)
    places = at.expand_as(tokens) if documents is None else positions_in_documents(documents)
    ends = (places == 0) | RULES[rule.kind](tokens, rule, places, entropies)
    if rule.longest:
        ends = ends | overlong(ends, places, rule.longest)
    begins = F.pad(ends[:, :-1], (1, 0), value=True) | (places == 0)
    # With a patch allowed to begin only while fewer than room(t) have begun: the closed form of count = min(count + begins, room).
    asked, room = begins.cumsum(1), rule.room(at.double())
    count = asked + (room - asked).cummin(1).values.clamp(max=0)
    ended = ends & (count < rule.room(at.double() + 1))  # the next patch may begin
    ids = count - 1
    last = ids - (~ended).long()
    if documents is None:
        return Patches(ids, last, places)
    slots = rule.slots(tokens.shape[1], documents=True)
    # A document's first byte may have found no place: then the patch before goes on, without the bytes of the new document.
    unused = documents.new_full((len(documents), slots), tokens.shape[1])
    of_document = unused.scatter_reduce(1, ids, documents, "amin")
    inside = of_document.gather(1, ids) == documents
    known = (of_document.gather(1, last.clamp(min=0)) == documents) & (last >= 0)
    return Patches(ids, last, places, of_document, inside, known)


def overlong(ends: Tensor, places: Tensor, longest: int) -> Tensor:
    """[B, T] bool: where patches that would be longer than `longest` end, so that their pieces, but for the last, are that long."""
    at = torch.arange(ends.shape[1], device=ends.device).expand_as(ends)
    ended = F.pad(torch.where(ends, at + 1, 0).cummax(1).values[:, :-1], (1, 0))
    begin = torch.maximum(ended, at - places)  # of the patch, were it not split
    return (at - begin + 1) % longest == 0


def _of_entropy(tokens: Tensor, rule: Rule, places: Tensor, entropies: Tensor | None) -> Tensor:
    assert entropies is not None
    return entropies.float() > rule.threshold


def _of_rising_entropy(tokens: Tensor, rule: Rule, places: Tensor, entropies: Tensor | None) -> Tensor:
    """The approximate monotonic constraint of arXiv 2412.09871. A document's first byte has none before it."""
    assert entropies is not None
    entropies = entropies.float()
    return (entropies - F.pad(entropies[:, :-1], (1, 0)) > rule.threshold) & (places > 0)


def _at_spaces(tokens: Tensor, rule: Rule, places: Tensor, entropies: Tensor | None) -> Tensor:
    """SpaceByte's rule (arXiv 2404.14408): after the first of some space-like bytes. So a patch holds at least one other byte, except for
    the first byte of a document."""
    spaces = space_like(tokens)
    before = F.pad(spaces[:, :-1], (1, 0), value=True)
    return spaces & ~before & (places > 1)


def _of_one_size(tokens: Tensor, rule: Rule, places: Tensor, entropies: Tensor | None) -> Tensor:
    """Patches of `size` bytes after the first byte; if it is no whole number, of the whole numbers beside it, in the right proportion."""
    passed = torch.floor(places.double() / rule.size)
    return passed > torch.floor((places.double() - 1) / rule.size)


RULES: dict[str, Callable[[Tensor, Rule, Tensor, Tensor | None], Tensor]] = {
    "entropy": _of_entropy,
    "monotonic": _of_rising_entropy,
    "space": _at_spaces,
    "static": _of_one_size,
}
ENTROPY_RULES = ("entropy", "monotonic")
ENTROPIES = "entropies"  # column of a dataset, and key of a batch: what those rules read


def space_like(tokens: Tensor) -> Tensor:
    """Whether an id is neither a letter nor a digit of ASCII nor a byte that continues a character of UTF-8; so ids above 255 are."""
    lower = tokens | 32  # of a letter
    letter = (lower >= ord("a")) & (lower <= ord("z")) & (tokens < 128)
    digit = (tokens >= ord("0")) & (tokens <= ord("9"))
    continues = (tokens >= 0x80) & (tokens < 0xC0)
    return ~(letter | digit | continues)


# -- from bytes to patches, and back --------------------------------------------------------------------------------------


def of_patch(values: Tensor, ids: Tensor) -> Tensor:
    """What each byte's patch has: values [B, M, ...], ids [B, T] -> [B, T, ...]"""
    flat = values.flatten(2)
    found = flat.gather(1, ids[..., None].expand(-1, -1, flat.shape[-1]))
    return found.unflatten(-1, values.shape[2:])


def pooled(values: Tensor, ids: Tensor, inside: Tensor, slots: int) -> Tensor:
    """The maximum over the bytes of each patch: values [B, T, D] -> [B, M, D]; 0 for a patch without bytes. ids, inside: [B, T]."""
    found = values.new_full((len(values), slots, values.shape[-1]), -torch.inf)
    if slots == 0:
        return found
    index = ids[..., None].expand_as(values)
    found = found.scatter_reduce(1, index, values.masked_fill(~inside[..., None], -torch.inf), "amax")
    return found.masked_fill(found.isneginf(), 0)


def attend_to_own_bytes(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, inside: Tensor, scale: float) -> Tensor:
    """Softmax attention of the queries of each patch to the bytes of that patch alone.

    q: [B, M, K, H, d], K queries in each patch; k, v: [B, T, H, d]; ids, inside: [B, T] -> [B, M, K, H, d], fp32 (fp64 for fp64), 0 for a
    patch without bytes. A byte has one patch, so the scores are [B, T, K, H], and not a table of all patches and bytes.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(wide), k.to(wide)[:, :, None], v.to(wide)[:, :, None]
    scores = (of_patch(q, ids) * k).sum(-1) * scale
    scores = scores.masked_fill(~inside[..., None, None], -torch.inf)
    index = ids[..., None, None].expand_as(scores)
    shape = q.shape[:-1]
    with torch.no_grad():  # it cancels
        most = scores.new_full(shape, -torch.inf).scatter_reduce(1, index, scores, "amax")
        most = most.masked_fill(most.isneginf(), 0)
    weights = (scores - of_patch(most, ids)).exp()  # [B, T, K, H]
    total = scores.new_zeros(shape).scatter_add(1, index, weights)
    weighted = weights[..., None] * v
    summed = torch.zeros_like(q).scatter_add(1, index[..., None].expand_as(weighted), weighted)
    return summed / total.clamp(min=torch.finfo(wide).tiny)[..., None]


# -- decoding -------------------------------------------------------------------------------------------------------------


class PatchState(DecodingState):
    """A DecodingState whose latent layers read patches, of which each row has as many as it has. patcher: the state of the model that
    computes entropies, or None."""

    def __init__(self, max_length: int | None = None, patcher: Any = None) -> None:
        super().__init__(max_length)
        self.patcher = patcher
        self._slots: dict[Hashable, Tensor] = {}

    def latent(self, first: Tensor, size: int) -> SlotWriter:
        """What latent layers use as their state. first: [B], the place of each row's first new patch; size: places up to the last new one
        of any row."""
        return SlotWriter(self._slots, first, size)

    def reset(self, rows: Tensor | None = None) -> None:
        super().reset(rows)
        if rows is None:
            self._slots = {}
            if self.patcher is not None:
                self.patcher.reset()

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self._slots = {key: held.index_select(0, rows) for key, held in self._slots.items()}
        if self.patcher is not None:
            self.patcher.select(rows)

    # Places behind a row's patches hold nothing that is read, so `_slots` need not be remembered.

    def snapshot(self) -> Any:
        return super().snapshot(), None if self.patcher is None else self.patcher.snapshot()

    def restore(self, snapshot: Any) -> None:
        own, of_patcher = snapshot
        super().restore(own)
        if self.patcher is not None:
            self.patcher.restore(of_patcher)

    @property
    def nbytes(self) -> int:
        slots = sum(held.nbytes for held in self._slots.values())
        return super().nbytes + slots + (0 if self.patcher is None else self.patcher.nbytes)


def refuse_fixed_shapes(state: Any) -> None:
    """ValueError for a decoding state that is no PatchState, such as that of compiled steps."""
    if state is not None and not isinstance(state, PatchState):
        raise ValueError("its steps have no fixed shapes: what stands for a patch is computed only where one ends")


class SlotWriter:
    """Keys and values of patches, which attention appends as to a DecodingState: each row at its own place."""

    def __init__(self, slots: dict[Hashable, Tensor], first: Tensor, size: int) -> None:
        self._slots, self._first, self._size = slots, first, size

    def append(self, key: Hashable, new: Tensor, dim: int, window: int = 0) -> Tensor:
        """new: [B, H, n, d] -> [B, H, size, d], what was held and `new` from place `first` of each row on."""
        held = self._slots.get(key)
        if held is None or held.shape[dim] < self._size:
            grown = new.new_zeros(*new.shape[:2], self._size + self._size // 2, new.shape[3])
            if held is not None:
                grown[:, :, : held.shape[dim]] = held
            held = grown
        at = self._first[:, None] + torch.arange(new.shape[dim], device=new.device)  # [B, n]
        index = at[:, None, :, None].expand_as(new)
        held = held.scatter(dim, index, new) if new.requires_grad else held.scatter_(dim, index, new)
        self._slots[key] = held
        return held.narrow(dim, 0, self._size)
