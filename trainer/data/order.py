"""Which windows a run trains on at a position of its data, from (seed, position) alone.

A position counts tokens of the shuffled stream since the start of the run: epoch, sample and offset follow from it, so a run
goes on in the middle of an epoch or past its end, with any number of ranks and threads.

samples: samples in random order, each read from its beginning to its end. While sequences are short, those of one step are
         neighbours of the same text. Runs from before there was a choice have this order.
windows: the samples of a group stand side by side as rows of a table, whose columns are windows. A step reads down a
         column, so all its windows are of other texts as long as it has fewer than a group has samples. At the full length a
         sample is one window, and the order that of samples.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

SHUFFLE_BLOCK = 2**18  # samples shuffled together: shards are visited in random order, a few at a time
GROUP_TOKENS = 2**22  # of windows: 8 or 16 MiB in memory; when sequences double, half of a group at most is passed over


class Order:
    """A different permutation of the samples each epoch, computed block by block from (seed, epoch)."""

    def __init__(self, shard_sizes: Sequence[int], n_samples: int, seed: int) -> None:
        self.n_samples, self.seed = n_samples, seed
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        # Only full samples are trained on; a shorter one can only be the very last.
        self._sizes[-1] -= int(self._sizes.sum()) - n_samples
        self._firsts = np.cumsum(self._sizes) - self._sizes
        self._blocks = LruCache(2)  # a step may straddle two blocks

    def __call__(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """The samples that stand at `places` of `epoch`: [n] -> [n]."""
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


class LruCache:
    """The results for the last few keys."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._results: OrderedDict[tuple[int, ...], np.ndarray] = OrderedDict()

    def get(self, key: tuple[int, ...], compute: Callable[..., np.ndarray]) -> np.ndarray:
        """`compute(*key)`, or what it gave before."""
        if key not in self._results:
            self._results[key] = compute(*key)
            if len(self._results) > self._limit:
                self._results.popitem(last=False)
        return self._results[key]


class SampleOrder:
    """`data.order: samples`. Windows of T tokens start at multiples of T; where T has grown, fewer than T tokens are passed over."""

    reused = 0  # samples worth keeping, because a later step reads on in them

    def __init__(self, order: Order, sample_length: int) -> None:
        self.order, self.sample_length = order, sample_length
        self.epoch_tokens = order.n_samples * sample_length

    def start(self, position: int, length: int, before: int) -> int:
        """Where a step of windows of `length` tokens begins that comes after one at `position`, of windows of `before` tokens."""
        return -(-position // length) * length

    def windows(self, position: int, length: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample and offset in it of windows `first` .. `first + count` of a step that begins at `position`: [count], [count]."""
        at = position + (first + np.arange(count)) * length
        epochs, tokens = np.divmod(at, self.epoch_tokens)
        places, offsets = np.divmod(tokens, self.sample_length)
        return per_epoch(self.order, epochs, places), offsets


class WindowOrder:
    """`data.order: windows`. An epoch is cut into groups of about GROUP_TOKENS, a group into columns of one window per sample.

    Columns follow each other as the text does, so what was read down to some row of some column leaves every sample with a
    rest that begins at one of two offsets. When the length grows, reading goes on at the first column of the new length of
    which nothing was read, or in the middle of one of which nothing was read from here on: no token is a target twice in an
    epoch, and where the length doubles at most half a column of the new length is passed over.
    """

    def __init__(self, order: Order, sample_length: int) -> None:
        self.order, self.sample_length = order, sample_length
        self.epoch_tokens = order.n_samples * sample_length
        groups = min(order.n_samples, -(-self.epoch_tokens // GROUP_TOKENS))
        # In samples; groups differ by one at most.
        self._ends = order.n_samples * np.arange(1, groups + 1) // groups
        self._begins = np.concatenate([[0], self._ends[:-1]])
        self._rows = LruCache(8)
        self.reused = int((self._ends - self._begins).max())

    def start(self, position: int, length: int, before: int) -> int:
        """Where a step of windows of `length` tokens begins that comes after one at `position`, of windows of `before` tokens."""
        if length == before:
            return position
        epoch, token = divmod(position, self.epoch_tokens)
        group = int(np.searchsorted(self._ends, token // self.sample_length, side="right"))
        begin = int(self._begins[group]) * self.sample_length
        samples = int(self._ends[group] - self._begins[group])
        column, row = divmod((token - begin) // before, samples)
        unread = column * before  # offset at which the rest of the rows from `row` on begins
        if row and (unread % length or length < before):
            unread, row = unread + before, 0  # where the rest of the rows above `row` begins
        offset = -(-unread // length) * length
        return epoch * self.epoch_tokens + begin + offset * samples + row * length

    def windows(self, position: int, length: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample and offset in it of windows `first` .. `first + count` of a step that begins at `position`: [count], [count]."""
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
        """The order of a column's rows. That of the first is the order of samples; by its offset, it is the same for all lengths."""
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
