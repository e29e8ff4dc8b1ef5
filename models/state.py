"""The memory of incremental decoding: keys and values of the tokens read so far, and recurrent state of a fixed size."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

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

    def extend(self, layer: int, k: Tensor, v: Tensor, dim: int, window: int = 0) -> tuple[Tensor, Tensor]:
        """Append new keys and values of `layer` along `dim`; returns all keys and values that the new tokens see (see `append`)."""
        return self.append((layer, "keys"), k, dim, window), self.append((layer, "values"), v, dim, window)

    def append(self, key: Hashable, new: Tensor, dim: int, window: int = 0) -> Tensor:
        """Append `new` along `dim` to the tensor under `key`; returns the part that the new tokens see.

        window: a token sees itself and the window - 1 tokens before it, and older tokens are dropped; 0: it sees all of them.
        """
        if self._max_length is not None and self.length + new.shape[dim] > self._max_length:
            raise ValueError(
                f"the state was made for {self._max_length} tokens, but {self.length + new.shape[dim]} are to be read"
            )
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
        """Replace the recurrent state under `key`. ValueError if its shape changes, because its size is fixed."""
        before = self._recurrent.get(key)
        if before is not None and before.shape != value.shape:
            raise ValueError(f"recurrent state {key!r} was {list(before.shape)}, and is now {list(value.shape)}")
        self._recurrent[key] = value

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

    @property
    def nbytes(self) -> int:
        tensors = [*self._recurrent.values(), *(grown.buffer for grown in self._grown.values())]
        return sum({y.untyped_storage().data_ptr(): y.untyped_storage().nbytes() for y in tensors}.values())


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
