"""`prepare`: text to MDS shards, on all cores, in order, in bounded memory; the target appears whole or not at all."""

from __future__ import annotations

import errno
import os
import platform
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import asdict
from datetime import timedelta
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import trainer
from trainer.config import PrepareConfig
from trainer.data import dataset, encode
from trainer.data.dataset import SPLITS, DatasetInfo, SplitInfo, TokenizerInfo, partial_folder
from trainer.data.mds import SplitWriter
from trainer.data.sources import Source, open_sources, unread
from trainer.data.tokenizers import Tokenizer, get_tokenizer
from trainer.errors import UserError
from trainer.files import sync_path

Log = Callable[[str], None]


def say(line: str) -> None:
    """The default log: a line on stderr."""
    print(line, file=sys.stderr, flush=True)


def run(config: PrepareConfig) -> None:
    """The verb `prepare`. Raises UserError."""
    prepare(config)


def prepare(config: PrepareConfig, log: Log = say) -> DatasetInfo:
    """Write the dataset that `config` describes to `config.out`, which must not exist, and describe it.

    The shards are the same bytes for any number of workers. Raises UserError, and then leaves nothing behind.
    """
    out = _checked_target(config)
    sources = open_sources(config)
    for line in filter(None, map(unread, sources)):
        log(line)
    with _one_line_errors(out), _fresh_folder(out) as folder:
        info = _write(config, sources, folder, log)
    log(f"prepared {out} (fingerprint {info.fingerprint[:12]})")
    return info


def _checked_target(config: PrepareConfig) -> Path:
    if not config.out:
        raise UserError("out: is not set; name the folder to write")
    if "://" in config.out:
        raise UserError(f"out: {config.out} is not a local folder; prepare a local one and copy it there")
    if config.sample_length < 1:
        raise UserError(f"sample_length: {config.sample_length} is too short; it must be at least 1")
    if not 1 <= config.shard_megabytes < 4096:
        raise UserError(f"shard_megabytes: {config.shard_megabytes} is not allowed; it must be from 1 to 4095")
    if config.workers is not None and config.workers < 1:
        raise UserError(f"workers: {config.workers} is too few; it must be at least 1")
    return Path(config.out).expanduser().absolute()


def _write(config: PrepareConfig, sources: list[Source], folder: Path, log: Log) -> DatasetInfo:
    tokenizer = _tokenizer(config, sources, log)
    log(f"tokenizer {tokenizer.name}: {tokenizer.vocab_size:,} ids")
    tokenizer.save(folder / "tokenizer.json")
    dtype = dataset.dtype_of(tokenizer.vocab_size)
    writers = {
        split: SplitWriter(folder / split, dtype, config.sample_length, config.shard_megabytes) for split in SPLITS
    }
    progress = Progress(sources, log)
    workers = config.workers or _cores()
    pieces = (piece for source in sources for piece in source.pieces())
    with closing(_encoded(encode.batches(pieces), folder, config.text_field, workers)) as results:
        for encoded in results:
            writers[encoded.split].add(encoded)
            progress.advance(encoded.bytes)
    for writer in writers.values():
        writer.finish()
    splits = {split: writer.info for split, writer in writers.items()}
    _refuse_empty(splits, config)
    _summary(splits, progress.seconds(), log)
    hashes = {split: dataset.shard_hashes(folder / split) for split in SPLITS}
    info = DatasetInfo(
        tokenizer=TokenizerInfo(tokenizer.name, tokenizer.sha256, tokenizer.vocab_size, tokenizer.eot_id),
        dtype=dtype,
        sample_length=config.sample_length,
        splits=splits,
        fingerprint=dataset.fingerprint(tokenizer.sha256, config.sample_length, hashes),
        source=str(config.source),
        arguments=asdict(config),
        versions=_versions(),
        indexes={split: dataset.sha256_of(folder / split / "index.json") for split in SPLITS},
    )
    info.save(folder)
    return info


def _tokenizer(config: PrepareConfig, sources: list[Source], log: Log) -> Tokenizer:
    """The tokenizer of `config`; one that is trained sees training text only."""
    if config.tokenizer.startswith("train-bpe"):
        log(f"training {config.tokenizer} on the first text of {config.source}")
    training = (piece for piece in sources[0].pieces() if piece.split == "train")
    return get_tokenizer(config.tokenizer, (piece.text(config.text_field) for piece in training))


def _encoded(
    batches: Iterable[encode.Batch], folder: Path, field: str, workers: int
) -> Generator[encode.Encoded, None, None]:
    """Encoded batches in the order of `batches`; the processes read the tokenizer from `folder`."""
    tokenizer = folder / "tokenizer.json"
    if workers == 1:
        yield from map(encode.Encoder(tokenizer, field), batches)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), encode.start_process, (tokenizer, field))
    try:
        yield from in_order(pool, batches, 2 * workers + 2)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def in_order(pool: Any, batches: Iterable[encode.Batch], limit: int) -> Iterator[encode.Encoded]:
    """Results of `pool` in the order of `batches`, of which at most `limit` are read and not yet yielded."""
    waiting: deque[Any] = deque()
    for batch in batches:
        waiting.append(pool.submit(encode.encode_batch, batch))
        if len(waiting) >= limit:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class Progress:
    """How far reading is: one line rewritten each second on a terminal, a plain line every ten seconds elsewhere."""

    def __init__(self, sources: list[Source], log: Log):
        self._sources = sources
        self._log = log
        self._live = log is say and sys.stderr.isatty()
        self._began = self._shown = time.monotonic()
        self._bytes = 0

    def advance(self, size: int) -> None:
        """`size` more bytes of text are tokenised."""
        self._bytes += size
        now = time.monotonic()
        if now - self._shown >= (1 if self._live else 10):
            self._shown = now
            if self._live:
                print(f"{self._line():<60}", end="\r", file=sys.stderr, flush=True)
            else:
                self._log(self._line())

    def seconds(self) -> float:
        """Time since reading began."""
        return time.monotonic() - self._began

    def _line(self) -> str:
        seconds = self.seconds()
        line = f"{self._bytes / 1e6:.0f} MB of text, {self._bytes / 1e6 / seconds:.1f} MB/s"
        read = sum(source.bytes_read for source in self._sources)
        sizes = [source.total_bytes for source in self._sources]
        if not read or None in sizes:
            return line
        total = max(read, sum(size or 0 for size in sizes))
        left = timedelta(seconds=round(seconds * (total - read) / read))
        return f"{line}, {read / total:.0%} read, {left} left"


def _refuse_empty(splits: dict[str, SplitInfo], config: PrepareConfig) -> None:
    if not any(info.documents for info in splits.values()):
        raise UserError(f"{config.source}: is empty; there must be some text")
    for split, info in splits.items():
        if info.samples == 0:
            raise UserError(
                f"{config.source}: no text for the {split} split; "
                "give more documents, set document_start to find them in the text, or set validation_source"
            )


def _summary(splits: dict[str, SplitInfo], seconds: float, log: Log) -> None:
    size = sum(info.bytes for info in splits.values())
    for split, info in splits.items():
        log(
            f"{split}: {info.documents:,} documents ({info.bytes / size:.2%} of the text), {info.tokens:,} tokens, "
            f"{info.bytes / info.tokens:.2f} bytes/token, {info.samples:,} samples"
        )
    log(f"{size / 1e6:.1f} MB tokenised in {seconds:.1f} s, {size / 1e6 / seconds:.1f} MB/s")


def _versions() -> dict[str, str]:
    names = ("tokenizers", "tiktoken", "mosaicml-streaming", "numpy")
    libraries = {name: metadata.version(name) for name in names}
    return {"crescendo": trainer.__version__, "python": platform.python_version(), **libraries}


def _cores() -> int:
    """Cores this process may use, which under a scheduler are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _one_line_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise UserError(f"prepare was interrupted; {out} was not written, run it again from the start") from None
    except BrokenProcessPool:
        raise UserError(
            f"a tokenising process died (killed, or out of memory); {out} was not written, try again with fewer workers"
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"no space left for {out}; nothing was kept, free some space and run again") from None
        raise UserError(f"{error.filename or out}: {error.strerror or error}; {out} was not written") from None


@contextmanager
def _fresh_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` that takes its name if the block succeeds, and is removed if not."""
    import filelock

    _refuse_existing(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_folder(out)
    lock = filelock.FileLock(f"{partial}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"{out}: is being prepared by another process; wait for it or choose another folder") from None
    try:
        _refuse_existing(out)
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed run
        partial.mkdir()
        yield partial
        _sync(partial)
        partial.rename(out)
        sync_path(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _refuse_existing(out: Path) -> None:
    if os.path.lexists(out):
        raise UserError(f"out: {out} exists already; choose another folder or remove it first")


def _sync(folder: Path) -> None:
    """Make everything below `folder` survive a power cut."""
    for path in (*folder.rglob("*"), folder):
        sync_path(path)
