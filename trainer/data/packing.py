"""Rows made of documents, for `data.packing`: packed with whole documents (`best_fit`), or one document each (`none`).

A document is all its tokens, with the end-of-text id that closes it. Each token but the first is a target once in an epoch. What
is left of a row is padding: the end-of-text id, with targets that are IGNORE. Which documents a row of the run holds follows from
the seed, the lengths of the documents and the row's number alone, whatever the number of ranks and threads.

Memory: two 64-bit numbers for each document of the split.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from models.base import IGNORE
from trainer.core.errors import UserError
from trainer.data.order import LruCache, Order, per_epoch
from trainer.data.stream import Split, Stream

GROUP = (
    2**16
)  # documents that are packed together: neighbours in the split, so that a remote one is fetched shard by shard
SORTED = 2**12  # rows of `none` that are sorted by length together
CHUNK = 64  # of them are neighbours in the run: about a microbatch
MULTIPLE = 16  # widths of `none` are multiples of it, so that there are few


class Pieces(NamedTuple):
    """What rows consist of, piece by piece: documents or parts of them.

    starts: place of the first token in the split; lengths: tokens; ends: whether the document ends with the piece; all [pieces].
    firsts: [rows + 1], the first piece of each row, and the number of pieces.
    """

    starts: np.ndarray
    lengths: np.ndarray
    ends: np.ndarray
    firsts: np.ndarray

    def rows(self, numbers: np.ndarray) -> Pieces:
        """The pieces of some rows, in that order."""
        counts = self.firsts[numbers + 1] - self.firsts[numbers]
        firsts = np.concatenate([[0], np.cumsum(counts)])
        chosen = np.repeat(self.firsts[numbers] - firsts[:-1], counts) + np.arange(firsts[-1])
        return Pieces(self.starts[chosen], self.lengths[chosen], self.ends[chosen], firsts)

    @staticmethod
    def joined(parts: Sequence[Pieces]) -> Pieces:
        """The rows of all parts, one after the other."""
        before = np.cumsum([0, *(len(part.starts) for part in parts)])
        firsts = [part.firsts[:-1] + first for part, first in zip(parts, before, strict=False)]
        starts, lengths, ends = (np.concatenate(values) for values in list(zip(*parts, strict=True))[:3])
        return Pieces(starts, lengths, ends, np.concatenate([*firsts, before[-1:]]))


NOTHING = Pieces(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, bool), np.zeros(1, np.int64))


class Rows:
    """The rows of a run. length: most tokens of a text; texts: of a row; count: rows of an epoch; tokens: in these, without padding;
    longer: documents that are longer than a row."""

    texts, count, tokens = 1, 0, 0

    def __init__(self, lengths: np.ndarray, length: int) -> None:
        """lengths: tokens of each document of the split, [documents]."""
        self.lengths, self.length = lengths, length
        self.starts = np.cumsum(lengths) - lengths
        self.longer = int((lengths > length).sum())

    def at(self, numbers: np.ndarray) -> Pieces:
        """The rows of the run with these numbers, from 0 on: `texts` rows of pieces for each of them."""
        raise NotImplementedError

    def width(self, pieces: Pieces) -> int:
        """Tokens of the tensors that hold these pieces."""
        return self.length

    def padding(self) -> float:
        """Share of padding in the tensors of the first epoch."""
        raise NotImplementedError


class BestFit(Rows):
    """`best_fit`: each document, the longest first, goes into the row that it fits most tightly (arXiv 2404.10830). One that is longer
    than a row is first cut into full rows and a rest. The rows are the same in each epoch, in another order."""

    def __init__(self, lengths: np.ndarray, length: int, seed: int) -> None:
        super().__init__(lengths, length)
        self.seed = seed
        groups = range(-(-len(lengths) // GROUP))
        sizes = [sum(rows for rows, _ in kinds_of_rows(self._counts(self._cut(group)[1]))) for group in groups]
        self._after = np.cumsum(sizes)
        self.count, self.tokens = int(self._after[-1]), int(lengths.sum())
        self._order = Order(sizes, self.count, seed)
        self._packed: LruCache[Pieces] = LruCache(16)  # a step's rows are of the groups in one block of the order

    def at(self, numbers: np.ndarray) -> Pieces:
        rows = per_epoch(self._order, *np.divmod(numbers, self.count))
        groups = np.searchsorted(self._after, rows, side="right")
        found, place, done = [NOTHING], np.empty(len(rows), np.int64), 0
        for group in map(int, np.unique(groups)):
            here = np.flatnonzero(groups == group)
            packed = self._packed.get((group,), self._pack)
            found.append(packed.rows(rows[here] - self._after[group] + len(packed.firsts) - 1))
            place[here], done = done + np.arange(len(here)), done + len(here)
        return Pieces.joined(found).rows(place)

    def padding(self) -> float:
        return 1 - self.tokens / (self.count * self.length)

    def _cut(self, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Starts, lengths and ends of the pieces of a group's documents, in their order."""
        here = slice(group * GROUP, (group + 1) * GROUP)
        lengths, starts = self.lengths[here], self.starts[here]
        counts = -(-lengths // self.length)
        number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # of the piece in its document
        before = number * self.length
        rest = np.repeat(lengths, counts) - before
        return np.repeat(starts, counts) + before, np.minimum(rest, self.length), rest <= self.length

    def _counts(self, lengths: np.ndarray) -> np.ndarray:
        return np.bincount(lengths, minlength=self.length + 1)

    def _pack(self, group: int) -> Pieces:
        """The rows of a group. Which of the pieces of equal length go where, and their order in a row, is random."""
        starts, lengths, ends = self._cut(group)
        draw = np.random.Generator(np.random.PCG64([self.seed, group]))
        counts = self._counts(lengths)
        shuffled = draw.permutation(len(lengths))
        by_length = shuffled[np.argsort(lengths[shuffled], kind="stable")]
        unused = np.cumsum(counts) - counts  # of `by_length`: the first piece of each length that has no row
        row, count = np.empty(len(lengths), np.int64), 0
        for rows, sizes in kinds_of_rows(counts):
            for size in sizes:
                row[by_length[unused[size] : unused[size] + rows]] = np.arange(count, count + rows)
                unused[size] += rows
            count += rows
        order = np.lexsort((draw.random(len(lengths)), row))
        firsts = np.searchsorted(row[order], np.arange(count + 1))
        return Pieces(starts[order], lengths[order], ends[order], firsts)


def kinds_of_rows(counts: np.ndarray) -> list[tuple[int, tuple[int, ...]]]:
    """Best-fit decreasing: (number of equal rows, lengths of their pieces) of each kind of row.

    counts: [T + 1], the pieces of each length, for rows of T tokens. Pieces of one length are placed together, and so are rows
    of one kind; so the work grows with T, hardly with the pieces.
    """
    length = len(counts) - 1
    kinds: list[list[tuple[int, tuple[int, ...]]]] = [[] for _ in counts]  # by the room that is left in a row
    rooms = 0  # its bit r is set if kinds[r] holds something

    def put(room: int, rows: int, sizes: tuple[int, ...]) -> None:
        nonlocal rooms
        kinds[room].append((rows, sizes))
        rooms |= 1 << room

    for size in range(length, 0, -1):
        left = int(counts[size])
        while left:
            fitting = rooms >> size
            if fitting:
                room = size + (fitting & -fitting).bit_length() - 1
                rows, sizes = kinds[room].pop()
                rooms ^= 0 if kinds[room] else 1 << room
            else:
                room, rows, sizes = length, left, ()
            each = min(room // size, left)  # the next piece fits most tightly beside the one before
            filled = min(rows, left // each)
            left -= filled * each
            put(room - each * size, filled, sizes + (size,) * each)
            if sizes and filled < rows:
                put(room, rows - filled, sizes)
    return [kind for same_room in kinds for kind in same_room]


class Alone(Rows):
    """`none`: a document for each row; of preference data two, which belong together. What a document has beyond `length` is left
    out. In an epoch, 4,096 random rows at a time are sorted by length and cut into chunks of rows that are about equally long;
    the chunks follow in random order."""

    def __init__(self, lengths: np.ndarray, length: int, seed: int, texts: int) -> None:
        super().__init__(lengths, length)
        self.texts, self.seed, self.count = texts, seed, len(lengths) // texts
        self._cut = np.minimum(lengths, length)[: self.count * texts]
        self.tokens = int(self._cut.sum())
        sizes = [min(GROUP, self.count - first) for first in range(0, self.count, GROUP)]
        self._order = Order(sizes, self.count, seed)
        self._sorted: LruCache[np.ndarray] = LruCache(2)

    def at(self, numbers: np.ndarray) -> Pieces:
        rows = np.empty(len(numbers), np.int64)
        epochs, places = np.divmod(numbers, self.count)
        groups, offsets = np.divmod(places, SORTED)
        for epoch, group in {*zip(epochs.tolist(), groups.tolist(), strict=True)}:
            here = (epochs == epoch) & (groups == group)
            rows[here] = self._sorted.get((epoch, group), self._sort)[offsets[here]]
        documents = (rows[:, None] * self.texts + np.arange(self.texts)).ravel()
        lengths = self._cut[documents]
        ends = lengths == self.lengths[documents]
        return Pieces(self.starts[documents], lengths, ends, np.arange(len(documents) + 1))

    def _sort(self, epoch: int, group: int) -> np.ndarray:
        first = group * SORTED
        rows = self._order(epoch, np.arange(first, min(first + SORTED, self.count)))
        by_length = rows[np.argsort(self._longest(rows), kind="stable")]
        chunks = np.split(by_length, range(CHUNK, len(rows), CHUNK))
        draw = np.random.Generator(np.random.PCG64([self.seed, epoch, group, CHUNK]))
        return np.concatenate([chunks[i] for i in draw.permutation(len(chunks))])

    def _longest(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of the longest text of each row."""
        return self._cut.reshape(-1, self.texts)[rows].max(axis=1)

    def width(self, pieces: Pieces) -> int:
        longest = int(pieces.lengths.max(initial=1))
        return min(self.length, -(-longest // MULTIPLE) * MULTIPLE)

    def padding(self) -> float:
        """Of batches of CHUNK rows: a larger one has more."""
        slots = 0
        for first in range(0, self.count, CHUNK):
            pieces = self.at(np.arange(first, min(first + CHUNK, self.count)))
            slots += len(pieces.lengths) * self.width(pieces)
        return 1 - self.tokens / slots


def rows_of(lengths: np.ndarray, packing: str, length: int, seed: int, texts: int) -> Rows:
    """The rows of `data.packing`, best_fit or none. lengths: tokens of each document; texts: of a row. UserError if there are none."""
    if len(lengths) < texts:
        raise UserError("data: the training split has no document; prepare more text")
    return BestFit(lengths, length, seed) if packing == "best_fit" else Alone(lengths, length, seed, texts)


class DocumentStream(Stream):
    """The training split as rows of documents, read ahead by threads. Pairs are [count, 2, width], all else [count, width].

    separate: whether a batch says which document each token is of; padding is a document of its own.
    """

    every_token = False

    def __init__(self, split: Split, rows: Rows, separate: bool, threads: int = 4) -> None:
        self.split, self.rows, self._separate = split, rows, separate
        self._threads = max(1, threads)
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="data")
        self._ahead: dict[tuple[int, int], list[Future]] = {}  # (first row, rows) -> tasks, each for some of the rows

    def epoch(self, position: int) -> float:
        return position / (self.rows.count * self.rows.length)

    def tokens(self, position: int, length: int, count: int) -> int:
        return int(self.rows.at(position // length + np.arange(count)).lengths.sum())

    def batch(self, position: int, length: int, first: int, count: int) -> dict[str, np.ndarray]:
        parts = [task.result() for task in self._begin(position // length + first, count)]
        self._ahead.clear()
        batch = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        if self.rows.texts == 1:
            return batch
        return {name: values.reshape(count, self.rows.texts, *values.shape[1:]) for name, values in batch.items()}

    def width(self, position: int, length: int, first: int, count: int) -> int:
        return self.rows.width(self.rows.at(position // length + first + np.arange(count)))

    def read_ahead(self, position: int, length: int, first: int, count: int) -> None:
        self._begin(position // length + first, count)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self, first: int, count: int) -> list[Future]:
        """Let the threads read these rows, unless they do so already."""
        if (first, count) not in self._ahead:
            pieces = self.rows.at(first + np.arange(count))
            width, rows = self.rows.width(pieces), np.arange(len(pieces.firsts) - 1)
            shares = [pieces.rows(share) for share in np.array_split(rows, self._threads)]
            self._ahead = {(first, count): [self._pool.submit(self._read, share, width) for share in shares]}
        return self._ahead[first, count]

    def _read(self, pieces: Pieces, width: int) -> dict[str, np.ndarray]:
        """The rows that consist of these pieces, padded to `width`: [rows, width, ...]."""
        info, shape = self.split.info, (len(pieces.firsts) - 1, width)
        batch = {"tokens": np.full(shape, info.tokenizer.eot_id), "targets": np.full(shape, IGNORE)}
        batch |= {name: np.zeros((*shape, *column.shape), column.dtype) for name, column in info.columns.items()}
        if self._separate:
            batch["documents"] = np.repeat(np.diff(pieces.firsts)[:, None], width, axis=1)
        row = np.repeat(np.arange(shape[0]), np.diff(pieces.firsts))
        number = np.arange(len(row)) - pieces.firsts[row]
        before = np.cumsum(pieces.lengths) - pieces.lengths
        names = ["tokens", *info.columns]
        columns = [values.tolist() for values in (row, number, before - before[pieces.firsts[row]], *pieces[:3])]
        for i, document, at, start, length, ends in zip(*columns, strict=True):
            found = self.split.read_columns(start, length + (not ends), names)
            after = at + length - ends  # of the last target
            batch["tokens"][i, at : at + length] = found["tokens"][:length]
            batch["targets"][i, at:after] = found["tokens"][1:]
            for name in info.columns:
                batch[name][i, at:after] = found[name][1:]
            if self._separate:
                batch["documents"][i, at : at + length] = document
        return batch
