"""The memory of incremental decoding: keys and values of the tokens read so far, and recurrent state of a fixed size."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Protocol

import torch
from torch import Tensor


class State(Protocol):
    """The memory of a batch of texts that are decoded together. All rows have read the same number of tokens.

    length: tokens read so far; the model increases it at the end of each forward pass.
    """

    length: int

    def reset(self, rows: Tensor | None = None) -> None:
        """Forget everything (None), or only the given rows [N]. ValueError if single rows cannot be reset."""
        ...

    def select(self, rows: Tensor) -> None:
        """Replace row i by the old row rows[i]: reorders, repeats and drops rows. rows: [N] int64 on the state's device."""
        ...

    def crop(self, length: int) -> None:
        """Keep only the first `length` tokens. If the state cannot go back so far, ValueError, and nothing changes."""
        ...

    def snapshot(self) -> Any:
        """The state as it is now, for `restore`. It costs no copy of what was read."""
        ...

    def restore(self, snapshot: Any) -> None:
        """Go back to a snapshot: the tokens read since then are forgotten. Not after a reset, a select or a crop to fewer tokens than
        the snapshot holds."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the state holds."""
        ...


class DecodingState:
    """Keys and values that grow with the text, and recurrent state of a fixed size. Dimension 0 of every tensor is the batch.

    max_length: maximum number of tokens of a text. With it, space for all keys and values is allocated once, and more tokens
    are a ValueError. With None, the space grows by half whenever it is full. A layer with a window keeps only its window.
    """

    def __init__(self, max_length: int | None = None) -> None:
        self.length = 0
        self._max_length = max_length
        self._grown: dict[Hashable, _Growing] = {}
        self._recurrent: dict[Hashable, Tensor] = {}

    # -- for models ----------------------------------------------------------------------------------------------------

    def positions(self, count: int, device: torch.device) -> Tensor:
        """[count] int64: the positions of the next `count` tokens."""
        return torch.arange(self.length, self.length + count, device=device)

    def n_keys(self, count: int) -> int:
        """How many keys `append` returns for `count` new tokens, in a layer without a window."""
        return self.length + count

    def extend(self, layer: int, k: Tensor, v: Tensor, dim: int, window: int = 0) -> tuple[Tensor, Tensor]:
        """Append new keys and values of `layer` along `dim`; returns all keys and values that the new tokens see (see `append`)."""
        return self.append((layer, "keys"), k, dim, window), self.append((layer, "values"), v, dim, window)

    def append(self, key: Hashable, new: Tensor, dim: int, window: int = 0) -> Tensor:
        """Append `new` along `dim` to the tensor under `key`; returns the part that the new tokens see.

        window: a token sees itself and the window - 1 tokens before it, and older tokens are dropped; 0: it sees all of them.
        """
        self.check_room(new.shape[dim])
        return self.grow(key, new, dim, window)

    def check_room(self, count: int) -> None:
        """ValueError if `count` more tokens are more than max_length."""
        if self._max_length is not None and self.length + count > self._max_length:
            raise ValueError(
                f"the state was made for {self._max_length} tokens, but {self.length + count} are to be read"
            )

    def grow(self, key: Hashable, new: Tensor, dim: int, window: int = 0) -> Tensor:
        """`append` of what is not one per token, and so not counted by `length`."""
        if key not in self._grown:
            self._grown[key] = _Growing(dim, window, self._max_length)
        return self._grown[key].append(new)

    def last(self, key: Hashable) -> Tensor | None:
        """The last entry under `key`, of size 1 along its dimension; None if there is nothing."""
        return self._grown[key].last() if key in self._grown else None

    def recall(self, key: Hashable, like: Tensor) -> Tensor:
        """The recurrent state under `key`: zeros in the shape of `like` before the first token."""
        return self._recurrent[key] if key in self._recurrent else torch.zeros_like(like)

    def remember(self, key: Hashable, value: Tensor) -> None:
        """Replace the recurrent state under `key`. ValueError if its shape changes, because its size is fixed.

        A small part of a large tensor is copied: it would keep a whole prompt in memory.
        """
        before = self._recurrent.get(key)
        if before is not None and before.shape != value.shape:
            raise ValueError(f"recurrent state {key!r} was {list(before.shape)}, and is now {list(value.shape)}")
        a_part = value.untyped_storage().nbytes() > 2 * value.nbytes
        self._recurrent[key] = value.clone() if a_part else value

    # -- for the decoding loop -----------------------------------------------------------------------------------------

    def reset(self, rows: Tensor | None = None) -> None:
        """See `State.reset`. Keys and values have the same length in all rows, so with them only all rows can be reset together."""
        if rows is None:
            self.length = 0
            self._grown, self._recurrent = {}, {}
            return
        if self._grown:
            raise ValueError("single rows cannot be reset: the keys and values of all rows have the same length")
        self._recurrent = {key: value.index_fill(0, rows, 0) for key, value in self._recurrent.items()}

    def select(self, rows: Tensor) -> None:
        for grown in self._grown.values():
            grown.select(rows)
        self._recurrent = {key: value.index_select(0, rows) for key, value in self._recurrent.items()}

    def crop(self, length: int) -> None:
        """See `State.crop`. Recurrent state cannot go back at all. A layer with a window of two or more can at least undo the
        last forward pass."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot crop a state of {self.length} tokens to {length}")
        if length == self.length:
            return
        if length == 0:
            return self.reset()
        if self._recurrent:
            raise ValueError(f"cannot crop to {length} tokens: recurrent state does not go back")
        count = self.length - length
        if not all(grown.holds_enough_without(count, length) for grown in self._grown.values()):
            raise ValueError(f"cannot crop to {length} tokens: a layer's window has dropped what they see")
        for grown in self._grown.values():
            grown.drop(count)
        self.length = length

    def snapshot(self) -> Any:
        # Recurrent tensors are replaced and never written to; buffers are only written to behind what they hold.
        marks = {key: grown.mark() for key, grown in self._grown.items()}
        return self.length, marks, dict(self._recurrent)

    def restore(self, snapshot: Any) -> None:
        self.length, marks, recurrent = snapshot
        self._recurrent = dict(recurrent)
        self._grown = {key: grown for key, grown in self._grown.items() if key in marks}
        for key, mark in marks.items():
            self._grown[key].go_back(mark)

    @property
    def nbytes(self) -> int:
        tensors = [*self._recurrent.values(), *(grown.buffer for grown in self._grown.values())]
        return sum({y.untyped_storage().data_ptr(): y.untyped_storage().nbytes() for y in tensors}.values())


class StaticState(DecodingState):
    """A DecodingState whose tensors have one shape and one address for all tokens, so that a step of one token can be compiled and
    recorded as a CUDA graph. It begins as a copy of another state, which has read the prompt.

    length: int64 scalar on the device. A layer with a window keeps all of its keys. `append` returns the whole space, of which a
    token sees what `visible` says: the rest is not filled yet. Only single tokens are read; more than max_length of them are
    not noticed.
    """

    length: Tensor  # type: ignore[assignment]

    def __init__(self, state: DecodingState, max_length: int, device: torch.device) -> None:
        super().__init__(max_length)
        self.length = torch.zeros((), dtype=torch.int64, device=device)
        self._space: dict[Hashable, Tensor] = {}
        self._dims: dict[Hashable, int] = {}
        self.load(state)

    def load(self, state: DecodingState) -> None:
        """Become a copy of `state`, in the same memory. It must be of the same texts and model."""
        self.length.fill_(state.length)
        for key, grown in state._grown.items():
            held, dim = grown.held(), grown.dim
            if key not in self._space:
                shape = list(held.shape)
                shape[dim] = self.max_length
                self._space[key], self._dims[key] = held.new_zeros(shape), dim
            # Behind a window the beginning stays empty, and nobody sees it.
            self._space[key].narrow(dim, state.length - held.shape[dim], held.shape[dim]).copy_(held)
        for key, value in state._recurrent.items():
            self._recurrent.setdefault(key, torch.empty_like(value)).copy_(value)

    @property
    def max_length(self) -> int:
        assert self._max_length is not None
        return self._max_length

    def tensors(self) -> list[Tensor]:
        """All that a step reads and writes."""
        return [self.length, *self._space.values(), *self._recurrent.values()]

    def positions(self, count: int, device: torch.device) -> Tensor:
        return self.length + torch.arange(count, device=device)

    def n_keys(self, count: int) -> int:
        return self.max_length

    def visible(self, count: int, window: int) -> Tensor:
        """[count, max_length] bool: the keys that each of the next tokens sees; window: as for `append`."""
        keys = torch.arange(self.max_length, device=self.length.device)
        queries = self.positions(count, self.length.device)[:, None]
        seen = keys <= queries
        return seen & (queries - keys < window) if window else seen

    def append(self, key: Hashable, new: Tensor, dim: int, window: int = 0) -> Tensor:
        return self._space[key].index_copy_(dim, self.positions(new.shape[dim], new.device), new)

    def last(self, key: Hashable) -> Tensor | None:
        return self._space[key].index_select(self._dims[key], (self.length - 1)[None])

    def recall(self, key: Hashable, like: Tensor) -> Tensor:
        return self._recurrent[key].clone()  # `remember` writes into it

    def remember(self, key: Hashable, value: Tensor) -> None:
        self._recurrent[key].copy_(value)

    def reset(self, rows: Tensor | None = None) -> None:
        raise ValueError("a static state is not reset: load another state")

    def select(self, rows: Tensor) -> None:
        for tensor in (*self._space.values(), *self._recurrent.values()):
            tensor.copy_(tensor.index_select(0, rows))

    def crop(self, length: int) -> None:
        raise ValueError("a static state does not go back")

    def snapshot(self) -> Any:
        raise ValueError("a static state does not go back")

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())


class _Growing:
    """A tensor that grows at its end along `dim`, and with a window loses its beginning. Usually it copies only new entries."""

    buffer: Tensor

    def __init__(self, dim: int, window: int, max_length: int | None) -> None:
        self.dim, self.window, self.max_length = dim, window, max_length
        self.start = self.stop = 0
        self._owned = False  # whether this object may write into the buffer

    def held(self) -> Tensor:
        return self.buffer.narrow(self.dim, self.start, self.stop - self.start)

    def last(self) -> Tensor:
        return self.buffer.narrow(self.dim, self.stop - 1, 1)

    def append(self, new: Tensor) -> Tensor:
        count = new.shape[self.dim]
        if self.stop == 0:
            # A prompt is not copied, unless space for a whole text is allocated. The returned tensor is the prompt in both cases.
            self.buffer = new
            self.stop = count
            if self.max_length is not None and not self.window and not new.requires_grad:
                self._make_room(self.max_length)
            return new
        if self.window:
            self.start = max(self.start, self.stop - (self.window - 1))
        if new.requires_grad:  # autograd needs the old values, so do not write in place
            self.buffer = torch.cat((self.held(), new), self.dim)
            self.start, self.stop, self._owned = 0, self.buffer.shape[self.dim], False
            return self.buffer
        if not self._owned or self.stop + count > self.buffer.shape[self.dim]:
            needed = self.stop - self.start + count
            self._make_room(needed + max(16, needed // 2))
        self.buffer.narrow(self.dim, self.stop, count).copy_(new)
        self.stop += count
        return self.held()

    def _make_room(self, size: int) -> None:
        """Move the held entries to the beginning of a new buffer of `size` along `dim`."""
        held = self.held()
        shape = list(held.shape)
        shape[self.dim] = size
        self.buffer = held.new_empty(shape)
        self.start, self.stop, self._owned = 0, held.shape[self.dim], True
        self.held().copy_(held)

    def select(self, rows: Tensor) -> None:
        self.buffer, self._owned = self.buffer.index_select(0, rows), True

    def holds_enough_without(self, count: int, length: int) -> bool:
        """Whether, without the last `count` entries, the token after the first `length` still finds everything that it sees."""
        seen = min(length, max(1, self.window - 1)) if self.window else length  # `last` needs one
        return self.stop - self.start - count >= seen

    def drop(self, count: int) -> None:
        self.stop -= count

    def mark(self) -> tuple[Tensor, int, int, bool]:
        return self.buffer, self.start, self.stop, self._owned

    def go_back(self, mark: tuple[Tensor, int, int, bool]) -> None:
        self.buffer, self.start, self.stop, self._owned = mark
