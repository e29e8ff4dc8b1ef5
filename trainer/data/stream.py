"""MDS shards -> batches, at a position that is one global number.

mosaicml-streaming supplies the format and the downloads; the checks, the cache and the order are our own. A run's place in its
data is (seed, fingerprint, position); the position counts the tokens passed so far. So a run resumes in the middle of an epoch
or past its end with any number of ranks and threads, and the sequence length may grow at any step. (The library's own iterator
keeps its state in shared memory, silently ends an epoch at a missing shard, does not check the hashes of local files, and trusts
index files.)
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from trainer.core.config import DataConfig
from trainer.core.errors import Damaged, UserError
from trainer.core.files import system_error, user_path
from trainer.data import remote
from trainer.data.dataset import LENGTH_TYPE, LENGTHS, DatasetInfo, present, sha256_of, xxh64_of
from trainer.data.index import Shard, check_fingerprint, encodings_of, read_index
from trainer.data.mds import open_shard, samples_in
from trainer.data.order import ORDERS, Order
from trainer.data.remote import Say, is_remote

MOST_AT_ONCE = 16  # most samples that a thread reads in one task


def say(line: str) -> None:
    """The default log: a line on stderr."""
    print(line, file=sys.stderr, flush=True)


def find_dataset(data: DataConfig, say: Say = say) -> DatasetInfo | None:
    """The description of the dataset at `data.path`, with its small files checked; None if nothing has been prepared there yet.
    say: called with a line if a remote dataset cannot be reached.

    Raises Damaged if the small files contradict each other, another UserError if there is no dataset.
    """
    if data.path is None:
        return None
    if is_remote(data.path):
        return remote.find(data, say)
    folder = user_path(data.path, "data.path")
    if data.source is not None and not present(folder):
        return None
    info = DatasetInfo.load(folder)
    check_fingerprint(folder, info)
    return info


def local_folder(data: DataConfig, info: DatasetInfo) -> Path:
    """Where dataset.json, tokenizer.json and the shards lie on this machine."""
    path = data.path or ""
    return remote.cache_folder(data, info) if is_remote(path) else user_path(path, "data.path")


def read_lengths(data: DataConfig, info: DatasetInfo, name: str) -> np.ndarray:
    """Tokens of each document of a split in order, with its end-of-text id: [documents] int64, read and checked here.

    UserError if the dataset is of a format that has no lengths, Damaged if they are not what was written.
    """
    folder = local_folder(data, info)
    if not info.has_lengths:
        raise UserError(
            f"data: {folder} was prepared before the lengths of documents were stored; prepare the data again"
        )
    path = folder / name / LENGTHS
    if is_remote(data.path or ""):
        remote.fetch_once(str(data.path), f"{name}/{LENGTHS}", folder, info.lengths[name])
    if not present(path) or sha256_of(path) != info.lengths[name]:
        raise Damaged(
            f"data: {path} is missing or damaged: its sha256 is not the one in dataset.json; prepare the data again"
        )
    lengths = np.fromfile(path, LENGTH_TYPE).astype(np.int64)
    if len(lengths) != info.splits[name].documents or lengths.sum() != info.splits[name].tokens:
        raise Damaged(f"data: {path} does not add up to the documents and tokens of the split; prepare the data again")
    return lengths


class Split:
    """Random access to one split. Every shard's size is checked at the start and its hash before its first sample is used."""

    def __init__(self, data: DataConfig, info: DatasetInfo, name: str) -> None:
        if name not in info.splits:
            raise UserError(f"data: {data.path} has no split {name!r} (it has {', '.join(info.splits)})")
        self.name, self.info, self.counts, self._data = name, info, info.splits[name], data
        self.length = info.sample_length
        self.folder = local_folder(data, info)
        self._remote = data.path if is_remote(data.path or "") else None
        self._shards = read_index(self.folder, name, info)
        self._starts = np.cumsum([0] + self.shard_sizes)
        self._readers = [open_shard(self.folder / name, shard, encodings_of(info)) for shard in self._shards]
        if self._remote is None:
            for shard in self._shards:
                self._check_size(shard)
        self._ready = [False] * len(self._shards)
        self._locks = [threading.Lock() for _ in self._shards]

    @property
    def full_samples(self) -> int:
        """Samples of full length; a shorter last one is for validation only."""
        return (self.counts.tokens - 1) // self.length

    @property
    def records(self) -> str:
        """What its documents are, of RECORDS."""
        return self.info.records

    @property
    def text_tokens(self) -> int:
        """Tokens that the bytes and words of `counts` belong to."""
        return self.counts.tokens

    @property
    def shard_sizes(self) -> list[int]:
        return [shard.samples for shard in self._shards]

    def lengths(self) -> np.ndarray:
        """As `read_lengths` of this split."""
        return read_lengths(self._data, self.info, self.name)

    def sample(self, index: int) -> dict[str, np.ndarray]:
        """Stored sample `index`: column -> [L + 1, ...] (fewer for the last sample)."""
        which = int(np.searchsorted(self._starts, index, side="right")) - 1
        if not self._ready[which]:
            self._prepare(which)
        path = self._path(self._shards[which])
        try:
            sample = self._readers[which][index - int(self._starts[which])]
        except OSError as error:
            raise system_error(error, f"data: {path}: cannot be read") from None
        except Exception as error:  # whatever the decoder raises on bytes that a stranger wrote
            raise Damaged(f"data: {path} cannot be read: {remote.one_line(error)}") from None
        length = min(self.length + 1, self.counts.tokens - index * self.length)
        tokens = sample["tokens"]
        if tokens.shape != (length,) or tokens.max() >= self.info.tokenizer.vocab_size:
            raise Damaged(
                f"data: {path} holds a sample that is not {length} ids below {self.info.tokenizer.vocab_size}; "
                "prepare the data again"
            )
        for name, column in self.info.columns.items():
            if sample[name].shape != (length, *column.shape):
                raise Damaged(
                    f"data: {path} holds a sample whose {name} are not those of {length} tokens; prepare the data again"
                )
        return sample

    def read(self, start: int, count: int, column: str = "tokens") -> np.ndarray:
        """`count` tokens of the split's stream from token `start` on, or what a column says about them: [count, ...], tokens as
        int64. Windows may span samples."""
        return self.read_columns(start, count, [column])[column]

    def read_columns(self, start: int, count: int, columns: Iterable[str]) -> dict[str, np.ndarray]:
        """`read` of several columns at once."""
        # A sample's last token is the first of the next one, which the split's last sample does not have.
        first = max(0, min(start, start + count - 2)) // self.length
        last = max(first, (start + count - 2) // self.length)
        samples = [self.sample(i) for i in range(first, last + 1)]
        offset = start - first * self.length
        found = {}
        for name in columns:
            parts = [*(sample[name][: self.length] for sample in samples[:-1]), samples[-1][name]]
            found[name] = np.concatenate(parts)[offset : offset + count]
        return found | ({"tokens": found["tokens"].astype(np.int64)} if "tokens" in found else {})

    def _path(self, shard: Shard) -> Path:
        return self.folder / self.name / shard.basename

    def _check_size(self, shard: Shard) -> None:
        """Check that the shard exists and has its size and, if no digest covers the index, its number of samples."""
        path = self._path(shard)
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                samples = shard.samples if self.info.sealed else samples_in(file.read(4))
        except FileNotFoundError:
            raise UserError(
                f"data: shard {path} is missing ({shard.bytes:,} bytes expected); prepare the data again"
            ) from None
        except OSError as error:
            raise system_error(error, f"data: shard {path}: cannot be read") from None
        if size != shard.bytes:
            raise Damaged(
                f"data: shard {path} has {size:,} bytes, {shard.bytes:,} expected; "
                "it is truncated or was changed; prepare the data again"
            )
        if samples != shard.samples:
            raise Damaged(
                f"data: shard {path} holds {samples} samples, index.json says {shard.samples}; prepare the data again"
            )

    def _prepare(self, which: int) -> None:
        """Make sure that the shard is here and whole: download it if it is remote, and compare its hash with the index."""
        with self._locks[which]:
            if self._ready[which]:
                return
            shard, path = self._shards[which], self._path(self._shards[which])
            if self._remote is not None:
                remote.fetch_shard(self._remote, self.name, shard, self.folder)
            self._check_size(shard)
            found = xxh64_of(path)
            if found != shard.xxh64:
                raise Damaged(
                    f"data: shard {path} is damaged: its xxh64 is {found}, {shard.xxh64} expected; prepare the data again"
                )
            self._ready[which] = True


class Stream:
    """The training data as endless rows. Which rows a step has follows from the seed and its position alone; the position counts
    row lengths, padding included.

    every_token: whether every target of every row counts, so that a step's count is its size.
    """

    every_token = True

    def start(self, position: int, length: int, before: int | None = None) -> int:
        """Where the step at `position` begins, with rows of `length` tokens; before: length of the rows that led there."""
        return position

    def epoch(self, position: int) -> float:
        """Epochs passed at `position`."""
        raise NotImplementedError

    def tokens(self, position: int, length: int, count: int) -> int:
        """How many tokens the first `count` rows of the step at `position` hold, without padding."""
        return length * count

    def batch(self, position: int, length: int, first: int, count: int) -> dict[str, np.ndarray]:
        """Rows `first` .. `first + count` of the step that begins at `position`: see models.base.Batch; no row is longer than
        `length`."""
        raise NotImplementedError

    def width(self, position: int, length: int, first: int, count: int) -> int:
        """Tokens of the longest of these rows, or a few more: `batch` of more rows may be wider, by padding alone."""
        return length

    def read_ahead(self, position: int, length: int, first: int, count: int) -> None:
        """Begin to read what `batch` is expected to need next; a wrong guess costs time, never correctness."""

    def close(self) -> None:
        """Stop reading ahead."""

    def epochs(self, position: int) -> dict[str, float]:
        """Epochs passed of each further dataset, by name."""
        return {}

    def mark(self, position: int) -> list[int]:
        """What a checkpoint keeps, so that a later process need not find out what came before `position`."""
        return []

    def go_on(self, mark: list[int]) -> None:
        """Take a `mark`. ValueError if it is not of this data."""


def open_stream(data: DataConfig, info: DatasetInfo, seed: int, length: int) -> Stream:
    """The training split as `data`, resolved, says it is to be read. length: most tokens of a row."""
    if data.mix:
        from trainer.data.mixture import open_mixture

        return open_mixture(data, info, seed, length)
    from trainer.data.packing import DocumentStream, rows_of

    split = Split(data, info, "train")
    if data.packing == "concat":
        return TrainStream(split, seed, data.threads, data.order)
    rows = rows_of(split.lengths(), data.packing, length, seed, info.texts_per_row)
    separate = data.separate_documents and data.packing == "best_fit"
    return DocumentStream(split, rows, separate, data.threads)


class TrainStream(Stream):
    """The training split as one text, cut into windows, read ahead by threads.

    order: "samples" or "windows", see trainer/data/order.py, which also explains positions.
    """

    def __init__(self, split: Split, seed: int, threads: int = 4, order: str = "samples") -> None:
        self.split = split
        self.n_samples = split.full_samples
        if self.n_samples < 1:
            raise UserError(
                f"data: the training split has {split.counts.tokens} tokens, fewer than one sample of {split.length}; "
                "prepare more text or a smaller --sample_length"
            )
        self.epoch_tokens = self.n_samples * split.length
        self._order = ORDERS[order](Order(split.shard_sizes, self.n_samples, seed), split.length)
        self._threads = max(1, threads)
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="data")
        # Sample -> its columns, or (the task that reads it, its place in the task's result); last used last.
        self._samples: OrderedDict[int, dict[str, np.ndarray] | tuple[Future, int]] = OrderedDict()

    def start(self, position: int, length: int, before: int | None = None) -> int:
        return self._order.start(position, length, before or length)

    def epoch(self, position: int) -> float:
        return position / self.epoch_tokens

    def batch(self, position: int, length: int, first: int, count: int) -> dict[str, np.ndarray]:
        """Rows `first` .. `first + count` of the step that begins at `position`: tokens and targets [count, length] int64, and what
        the further columns say about the targets [count, length, ...]."""
        tokens = self.windows(position, length, first, count)
        columns = {name: self.windows(position, length, first, count, name) for name in self.split.info.columns}
        return {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            **{name: values[:, 1:] for name, values in columns.items()},
        }

    def windows(self, position: int, length: int, first: int, count: int, column: str = "tokens") -> np.ndarray:
        """A column of the windows `first` .. `first + count` of the step that begins at `position`: [count, length + 1, ...], inputs
        and last target. Tokens are int64."""
        samples, offsets = self._order.windows(self.start(position, length), length, first, count)
        read = {sample: self._read(sample)[column] for sample in self._begin_to_read(samples)}
        info = self.split.info.columns.get(column)
        out = np.empty((count, length + 1, *(info.shape if info else ())), info.dtype if info else np.int64)
        for row, sample, offset in zip(out, samples.tolist(), offsets.tolist(), strict=True):
            row[:] = read[sample][offset : offset + length + 1]
        return out

    def read_ahead(self, position: int, length: int, first: int, count: int) -> None:
        """Begin to read what `windows` is expected to need next; a wrong guess costs time, never correctness."""
        samples, _ = self._order.windows(self.start(position, length), length, first, count)
        wanted = self._begin_to_read(samples)
        while len(self._samples) > len(wanted) + self._order.reused:
            self._samples.popitem(last=False)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _begin_to_read(self, samples: np.ndarray) -> list[int]:
        """Let the threads read those of `samples` that are not in memory yet; returns all of them, each once."""
        wanted = list(dict.fromkeys(samples.tolist()))
        missing = [sample for sample in wanted if sample not in self._samples]
        size = max(1, min(MOST_AT_ONCE, len(missing) // self._threads))
        for first in range(0, len(missing), size):
            together = missing[first : first + size]
            future = self._pool.submit(lambda numbers: [self.split.sample(number) for number in numbers], together)
            self._samples.update((sample, (future, place)) for place, sample in enumerate(together))
        for sample in wanted:
            self._samples.move_to_end(sample)
        return wanted

    def _read(self, sample: int) -> dict[str, np.ndarray]:
        """The columns of a sample that a thread reads: [L + 1, ...] each."""
        found = self._samples[sample]
        if isinstance(found, tuple):
            future, place = found
            found = self._samples[sample] = future.result()[place]
        return found


def ordered_windows(split: Any, length: int, max_tokens: int = 0) -> Iterator[tuple[int, int]]:
    """(start, targets) of the non-overlapping windows that cover a Split (or RawText) in order; the last may be shorter.

    max_tokens: stop after about this many targets; 0: the whole split.
    """
    targets = split.counts.tokens - 1
    if max_tokens:
        targets = min(targets, -(-max_tokens // length) * length)
    for start in range(0, targets, length):
        yield start, min(length, targets - start)
