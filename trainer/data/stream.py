"""MDS shards -> batches, at a position that is one global number.

mosaicml-streaming supplies the format, the remotes and the cache; the order is ours. A run's place in its data is
(seed, fingerprint, position), position being the tokens passed so far: epoch and sample follow from it. So a run resumes in
the middle of an epoch or past its end with any number of ranks and threads, and the sequence length may change at any step.
(The library's own iterator keeps its state in shared memory, ends an epoch silently at a missing shard and trusts local
files without looking at their hashes.)
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import DataConfig
from trainer.data.dataset import DatasetInfo
from trainer.data.mds import import_streaming
from trainer.errors import UserError

SHUFFLE_BLOCK = 2**18  # samples shuffled together: shards are visited in random order, a few at a time


def is_remote(path: str) -> bool:
    """Whether the dataset lies elsewhere and is cached here (s3://, gs://, hf://, file:// for a slow mount)."""
    return "://" in path


def find_dataset(data: DataConfig) -> DatasetInfo | None:
    """What is known of the dataset at `data.path`; None where nothing has been prepared there yet."""
    if data.path is None:
        return None
    if not is_remote(data.path):
        folder = Path(data.path).expanduser()
        return DatasetInfo.load(folder) if folder.exists() or data.source is None else None
    folder = cache_folder(data)
    _fetch(data.path, "dataset.json", folder)
    _fetch(data.path, "tokenizer.json", folder)
    return DatasetInfo.load(folder)


def local_folder(data: DataConfig) -> Path:
    """Where dataset.json and tokenizer.json lie on this machine."""
    return cache_folder(data) if is_remote(data.path or "") else Path(data.path or "").expanduser()


def cache_folder(data: DataConfig) -> Path:
    """The folder that holds this remote dataset's shards here."""
    address = data.path or ""
    root = Path(data.cache).expanduser() if data.cache else Path.home() / ".cache" / "crescendo"
    return root / hashlib.sha256(address.encode()).hexdigest()[:16]


def _remote_address(path: str) -> str:
    return path.removeprefix("file://")


def _fetch(path: str, name: str, folder: Path) -> None:
    """Download one small file into the cache, once, under a lock shared by all processes of the machine."""
    if (folder / name).exists():
        return
    from filelock import FileLock

    import_streaming()
    from streaming.base.storage.download import CloudDownloader

    folder.mkdir(parents=True, exist_ok=True)
    address = _remote_address(path)
    with FileLock(folder / ".lock"):
        if (folder / name).exists():
            return
        temporary = folder / (name + ".tmp")
        try:
            CloudDownloader.get(address).download(f"{address}/{name}", str(temporary), 60)
        except Exception as error:
            raise UserError(f"data.path: cannot fetch {path}/{name}: {_one_line(error)}") from None
        temporary.rename(folder / name)


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


class Split:
    """Random access to one split. Every shard's size is checked at the start and its hash before its first sample is used."""

    def __init__(self, data: DataConfig, info: DatasetInfo, name: str) -> None:
        import_streaming()
        from streaming.base.stream import Stream
        from streaming.base.world import World

        if name not in info.splits:
            raise UserError(f"data: {data.path} has no split {name!r} (it has {', '.join(info.splits)})")
        self.name, self.info, self.counts = name, info, info.splits[name]
        self.length = info.sample_length
        remote = is_remote(data.path or "")
        self.folder = local_folder(data)
        self._stream = Stream(
            remote=_remote_address(data.path or "") if remote else None,
            local=str(self.folder),
            split=name,
            download_retry=3,
            download_timeout=120,
            validate_hash="xxh64",
            keep_zip=False,
        )
        if remote:
            _fetch(data.path or "", f"{name}/index.json", self.folder)
        try:  # as if alone in the world: locks, not ranks, keep processes apart
            self.shards: list[Any] = self._stream.get_shards(World(1, 1, 1, 0), allow_unsafe_types=False)
        except Exception as error:
            raise UserError(
                f"data: {self.folder / name / 'index.json'} is missing or damaged: {_one_line(error)}"
            ) from None
        self.starts = np.cumsum([0] + [shard.samples for shard in self.shards])
        if self.starts[-1] != self.counts.samples:
            raise UserError(
                f"data: {self.folder / name / 'index.json'} lists {self.starts[-1]} samples, dataset.json "
                f"{self.counts.samples}; prepare the data again"
            )
        if not remote:
            for shard in self.shards:
                self._check_size(shard)
        if -(-(self.counts.tokens - 1) // self.length) != self.counts.samples:
            raise UserError(
                f"data: dataset.json in {self.folder} contradicts itself: {self.counts.tokens} tokens do not make "
                f"{self.counts.samples} samples of {self.length}; prepare the data again"
            )
        self._ready = [False] * len(self.shards)
        self._locks = [threading.Lock() for _ in self.shards]

    @property
    def full_samples(self) -> int:
        """Samples of full length; a shorter last one is for validation only."""
        return (self.counts.tokens - 1) // self.length

    @property
    def shard_sizes(self) -> list[int]:
        return [shard.samples for shard in self.shards]

    def sample(self, index: int) -> np.ndarray:
        """Stored sample `index`: [L + 1] tokens (fewer for the last)."""
        which = int(np.searchsorted(self.starts, index, side="right")) - 1
        if not self._ready[which]:
            self._prepare(which)
        try:
            tokens = self.shards[which][index - int(self.starts[which])]["tokens"]
        except Exception as error:
            raise UserError(f"data: {self._path(which)} cannot be read: {_one_line(error)}") from None
        return tokens

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens of the split's stream from token `start` on: [count] int64. Windows may span samples."""
        first, last = start // self.length, max(start // self.length, (start + count - 2) // self.length)
        parts = [self.sample(i) for i in range(first, last + 1)]
        joined = np.concatenate([part[: self.length] for part in parts[:-1]] + [parts[-1]])
        offset = start - first * self.length
        return joined[offset : offset + count].astype(np.int64)

    def _path(self, which: int) -> Path:
        return self.folder / self.name / self.shards[which].raw_data.basename

    def _check_size(self, shard: Any) -> None:
        path = self.folder / self.name / shard.raw_data.basename
        if not path.exists():
            raise UserError(
                f"data: shard {path} is missing ({shard.raw_data.bytes:,} bytes expected); prepare the data again"
            )
        if path.stat().st_size != shard.raw_data.bytes:
            raise UserError(
                f"data: shard {path} has {path.stat().st_size:,} bytes, {shard.raw_data.bytes:,} expected; "
                "it is truncated or was changed; prepare the data again"
            )

    def _prepare(self, which: int) -> None:
        """Have the shard here and whole: downloaded where remote, its hash equal to the index's."""
        import xxhash
        from filelock import FileLock

        with self._locks[which]:
            if self._ready[which]:
                return
            shard, path = self.shards[which], self._path(which)
            if self._stream.remote:
                with FileLock(self.folder / self.name / ".lock"):
                    try:
                        self._stream.prepare_shard(shard)
                    except Exception as error:
                        path.unlink(missing_ok=True)  # a damaged download must not stay in the cache
                        raise UserError(
                            f"data: cannot fetch shard {path.name} of {self._stream.remote}: {_one_line(error)}"
                        ) from None
            self._check_size(shard)
            expected = shard.raw_data.hashes.get("xxh64")
            found = xxhash.xxh64(path.read_bytes()).hexdigest()
            if found != expected:
                raise UserError(
                    f"data: shard {path} is damaged: its xxh64 is {found}, {expected} expected; prepare the data again"
                )
            self._ready[which] = True


class Order:
    """A different permutation of the samples each epoch, computed block by block from (seed, epoch)."""

    def __init__(self, shard_sizes: list[int], n_samples: int, seed: int) -> None:
        self.n_samples, self.seed = n_samples, seed
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        # Only full samples are trained on; a shorter one can only be the very last.
        self._sizes[-1] -= int(self._sizes.sum()) - n_samples
        self._firsts = np.cumsum(self._sizes) - self._sizes
        self._blocks: dict[tuple[int, int], np.ndarray] = {}

    def __call__(self, epoch: int, index: int) -> int:
        """The sample that stands at place `index` of `epoch`."""
        block, offset = divmod(index, SHUFFLE_BLOCK)
        return int(self._block(epoch, block)[offset])

    def _block(self, epoch: int, block: int) -> np.ndarray:
        key = (epoch, block)
        if key not in self._blocks:
            while len(self._blocks) >= 2:  # a step may straddle two blocks
                self._blocks.pop(next(iter(self._blocks)))
            self._blocks[key] = self._shuffle(epoch, block)
        return self._blocks[key]

    def _shuffle(self, epoch: int, block: int) -> np.ndarray:
        shards = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(len(self._sizes))
        ends = np.cumsum(self._sizes[shards])
        first = block * SHUFFLE_BLOCK
        places = np.arange(first, min(first + SHUFFLE_BLOCK, self.n_samples))
        which = np.searchsorted(ends, places, side="right")
        samples = self._firsts[shards][which] + places - (ends - self._sizes[shards])[which]
        return np.random.Generator(np.random.PCG64([self.seed, epoch, block])).permutation(samples)


class TrainStream:
    """The training split as an endless stream of windows, read ahead by threads.

    A position counts tokens of the shuffled stream since the start of the run. Windows of T tokens start at multiples of T;
    where T has just grown, fewer than T tokens are passed over.
    """

    def __init__(self, split: Split, seed: int, threads: int = 4) -> None:
        self.split = split
        self.n_samples = split.full_samples
        if self.n_samples < 1:
            raise UserError(
                f"data: the training split has {split.counts.tokens} tokens, fewer than one sample of {split.length}; "
                "prepare more text or a smaller --sample_length"
            )
        self.epoch_tokens = self.n_samples * split.length
        self._order = Order(split.shard_sizes, self.n_samples, seed)
        self._pool = ThreadPoolExecutor(max(1, threads), thread_name_prefix="data")
        self._reading: dict[int, Future] = {}

    def start(self, position: int, length: int) -> int:
        """Where a step of `length`-token windows at `position` begins."""
        return -(-position // length) * length

    def epoch(self, position: int) -> float:
        """Epochs passed at `position`."""
        return position / self.epoch_tokens

    def windows(self, position: int, length: int, first: int, count: int) -> np.ndarray:
        """Windows `first` .. `first + count` of the step at `position`: [count, length + 1] int64 (inputs and last target)."""
        out, filled = np.empty((count, length + 1), dtype=np.int64), 0
        stretches = self._stretches(position, length, first, count)
        reading = [self._submit(sample) for sample, _, _ in stretches]
        for (_, offset, n), row in zip(stretches, reading, strict=True):
            tokens = row.result()[offset : offset + n * length + 1]
            out[filled : filled + n] = np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::length]
            filled += n
        return out

    def read_ahead(self, position: int, length: int, first: int, count: int) -> None:
        """Begin to read what `windows` will be asked for next; a wrong guess costs time, never correctness."""
        wanted = {sample for sample, _, _ in self._stretches(position, length, first, count)}
        self._reading = {sample: future for sample, future in self._reading.items() if sample in wanted}
        for sample in wanted:
            self._submit(sample)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self, sample: int) -> Future:
        if sample not in self._reading:
            self._reading[sample] = self._pool.submit(self.split.sample, sample)
        return self._reading[sample]

    def _stretches(self, position: int, length: int, first: int, count: int) -> list[tuple[int, int, int]]:
        """(sample, offset in it, number of windows) of those windows that lie in one sample; `length` divides a sample's."""
        at = self.start(position, length) + first * length
        end = at + count * length
        stretches = []
        while at < end:
            epoch, token = divmod(at, self.epoch_tokens)
            index, offset = divmod(token, self.split.length)
            n = min(self.split.length - offset, end - at) // length
            stretches.append((self._order(epoch, index), offset, n))
            at += n * length
        return stretches


def ordered_windows(split: Split, length: int, max_tokens: int = 0) -> Iterator[tuple[int, int]]:
    """(start, targets) of the non-overlapping windows that cover a split in order; the last may be shorter.

    max_tokens: stop after about this many targets; 0: the whole split.
    """
    targets = split.counts.tokens - 1
    if max_tokens:
        targets = min(targets, -(-max_tokens // length) * length)
    for start in range(0, targets, length):
        yield start, min(length, targets - start)
