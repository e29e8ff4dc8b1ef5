"""Which windows a run trains on at a position of its data, from (seed, position) alone.

A position counts tokens of the shuffled stream since the start of the run: epoch, sample and offset follow from it. So a run
continues in the middle of an epoch or past its end, with any number of ranks and threads.

samples: samples in random order, each read from its beginning to its end. While sequences are short, those of one step are
         neighbours in the same text. Older runs, from before the key `data.order` existed, have this order.
windows: the samples of a group are the rows of a table, whose columns are windows. A step reads down a column, so all its
         windows are from different texts if it has fewer windows than a group has samples. At the full length a sample is
         one window, and the order is the same as that of `samples`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")

SHUFFLE_BLOCK = 2**18  # samples shuffled together: shards are visited in random order, a few at a time
GROUP_TOKENS = 2**22  # of `windows`: 8 or 16 MiB in memory; when sequences double, at most half of a group is skipped


class Order:
    """A different permutation of the samples each epoch, computed block by block from (seed, epoch)."""

    def __init__(self, shard_sizes: Sequence[int], n_samples: int, seed: int) -> None:
        self.n_samples, self.seed = n_samples, seed
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        # Only full samples are trained on; a shorter one can only be the very last.
        self._sizes[-1] -= int(self._sizes.sum()) - n_samples
        self._firsts = np.cumsum(self._sizes) - self._sizes
        self._blocks: LruCache[np.ndarray] = LruCache(2)  # a step may straddle two blocks

    def __call__(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """The samples at `places` of `epoch`: [n] -> [n]."""
        blocks, offsets = np.divmod(np.asarray(places), SHUFFLE_BLOCK)
        samples = np.empty(blocks.shape, np.int64)
        for block in map(int, np.unique(blocks)):
            here = blocks == block
            samples[here] = self._blocks.get((epoch, block), self._shuffle)[offsets[here]]
        return samples

    def _shuffle(self, epoch: int, block: int) -> np.ndarray:
        shards = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(len(self._sizes))
        ends = np.cumsum(self._sizes[shards])
        first = block * SHUFFLE_BLOCK
        places = np.arange(first, min(first + SHUFFLE_BLOCK, self.n_samples))
        which = np.searchsorted(ends, places, side="right")
        samples = self._firsts[shards][which] + places - (ends - self._sizes[shards])[which]
        return np.random.Generator(np.random.PCG64([self.seed, epoch, block])).permutation(samples)


class LruCache(Generic[T]):
    """Keeps the results of the last few keys."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._results: OrderedDict[tuple[int, ...], T] = OrderedDict()

    def get(self, key: tuple[int, ...], compute: Callable[..., T]) -> T:
        """`compute(*key)`, or its kept result."""
        if key not in self._results:
            self._results[key] = compute(*key)
            if len(self._results) > self._limit:
                self._results.popitem(last=False)
        return self._results[key]


class SampleOrder:
    """`data.order: samples`. Windows of T tokens start at multiples of T; when T grows, fewer than T tokens are skipped."""

    reused = 0  # samples worth keeping, because a later step reads more of them

    def __init__(self, order: Order, sample_length: int) -> None:
        self.order, self.sample_length = order, sample_length
        self.epoch_tokens = order.n_samples * sample_length

    def start(self, position: int, length: int, before: int) -> int:
        """Where the next step begins, with windows of `length` tokens, if steps with windows of `before` tokens led to `position`."""
        return -(-position // length) * length

    def windows(self, position: int, length: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The samples, and the offsets in them, of windows `first` .. `first + count` of the step at `position`: [count], [count]."""
        at = position + (first + np.arange(count)) * length
        epochs, tokens = np.divmod(at, self.epoch_tokens)
        places, offsets = np.divmod(tokens, self.sample_length)
        return per_epoch(self.order, epochs, places), offsets


class WindowOrder:
    """`data.order: windows`. An epoch is cut into groups of about GROUP_TOKENS, a group into columns of one window per sample.

    Columns follow each other in the order of the text. So after reading down to some row of a column, the unread rest of every
    sample begins at one of two offsets. When the length grows, reading continues at the first column of the new length that is
    fully unread, or in the middle of a column whose rows are unread from there on. So no token is a target twice in an epoch,
    and when the length doubles, at most half a column of the new length is skipped.
    """

    def __init__(self, order: Order, sample_length: int) -> None:
        self.order, self.sample_length = order, sample_length
        self.epoch_tokens = order.n_samples * sample_length
        groups = min(order.n_samples, -(-self.epoch_tokens // GROUP_TOKENS))
        # In samples; sizes of groups differ by at most one.
        self._ends = order.n_samples * np.arange(1, groups + 1) // groups
        self._begins = np.concatenate([[0], self._ends[:-1]])
        self._rows: LruCache[np.ndarray] = LruCache(8)
        self.reused = int((self._ends - self._begins).max())

    def start(self, position: int, length: int, before: int) -> int:
        """Where the next step begins, with windows of `length` tokens, if steps with windows of `before` tokens led to `position`."""
        if length == before:
            return position
        epoch, token = divmod(position, self.epoch_tokens)
        group = int(np.searchsorted(self._ends, token // self.sample_length, side="right"))
        begin = int(self._begins[group]) * self.sample_length
        samples = int(self._ends[group] - self._begins[group])
        column, row = divmod((token - begin) // before, samples)
        unread = column * before  # offset of the unread rest in the rows from `row` on
        if row and (unread % length or length < before):
            unread, row = unread + before, 0  # offset of the unread rest in the rows above `row`
        offset = -(-unread // length) * length
        return epoch * self.epoch_tokens + begin + offset * samples + row * length

    def windows(self, position: int, length: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The samples, and the offsets in them, of windows `first` .. `first + count` of the step at `position`: [count], [count]."""
        at = position + (first + np.arange(count)) * length
        epochs, tokens = np.divmod(at, self.epoch_tokens)
        groups = np.searchsorted(self._ends, tokens // self.sample_length, side="right")
        begins, samples = self._begins[groups], (self._ends - self._begins)[groups]
        columns, rows = np.divmod((tokens - begins * self.sample_length) // length, samples)
        offsets = columns * length
        keys = np.stack([epochs, groups, offsets])
        new = np.ones(count, bool)
        new[1:] = (keys[:, 1:] != keys[:, :-1]).any(axis=0)
        starts = [*np.flatnonzero(new), count]
        for here, after in zip(starts, starts[1:], strict=False):
            column = tuple(map(int, keys[:, here]))
            rows[here:after] = self._rows.get(column, self._permute)[rows[here:after]]
        return per_epoch(self.order, epochs, begins + rows), offsets

    def _permute(self, epoch: int, group: int, offset: int) -> np.ndarray:
        """The order of a column's rows: the order of samples in the first. It depends on the offset, so it is the same for all lengths."""
        rows = int(self._ends[group] - self._begins[group])
        if offset == 0:
            return np.arange(rows)
        return np.random.Generator(np.random.PCG64([self.order.seed, epoch, group, offset])).permutation(rows)


ORDERS: dict[str, type[SampleOrder] | type[WindowOrder]] = {"samples": SampleOrder, "windows": WindowOrder}


def per_epoch(order: Order, epochs: np.ndarray, places: np.ndarray) -> np.ndarray:
    """`order(epoch, place)` of each pair: [n], [n] -> [n]."""
    samples = np.empty(len(places), np.int64)
    for epoch in map(int, np.unique(epochs)):
        here = epochs == epoch
        samples[here] = order(epoch, places[here])
    return samples
