"""`prepare`: turns text into MDS shards, on all cores, in order, in bounded memory; the target appears whole or not at all."""

from __future__ import annotations

import os
import platform
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import asdict, replace
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import trainer
from trainer.core.config import PrepareConfig
from trainer.core.errors import UserError
from trainer.core.files import user_path
from trainer.core.text import printable
from trainer.data import dataset, encode
from trainer.data.dataset import LOSS_MASK, SPLITS, ColumnInfo, DatasetInfo, SplitInfo, TokenizerInfo
from trainer.data.learn import learn_in_child
from trainer.data.mds import Predictor, SplitWriter
from trainer.data.progress import Log, Progress, say, telling_of_endless_search
from trainer.data.readers import BadRow
from trainer.data.sources import Source, is_far, open_sources
from trainer.data.target import fresh_folder, one_line_errors, signals_as_interrupts
from trainer.data.tokenizers import Tokenizer, get_tokenizer

OpenPredictor = Callable[[TokenizerInfo], Predictor]


def prepare(config: PrepareConfig, log: Log = say, predictor: OpenPredictor | None = None) -> DatasetInfo:
    """Write the dataset that `config` describes to `config.out`, which must not exist; returns its description.

    predictor: opens the model of config.teacher or config.patches.
    The shards are the same bytes for any number of workers. If it raises UserError, it leaves nothing behind.
    """
    config = replace(config, tokenizer=config.new_tokenizer)
    out = _checked_target(config)
    with signals_as_interrupts(), one_line_errors(out):
        sources = open_sources(config)
        for line in (line for source in sources for line in source.notes):
            log(line)
        with fresh_folder(out) as folder, telling_of_endless_search(log):
            info = _write(config, sources, folder, log, predictor)
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
    if config.teacher is not None and config.patches is not None:
        raise UserError("patches: one model at a time predicts; prepare the data with --teacher or with --patches")
    if config.workers is not None and config.workers < 1:
        raise UserError(f"workers: {config.workers} is too few; it must be at least 1")
    for key, value in asdict(config).items():
        if isinstance(value, str) and not value.isprintable() and _has_surrogates(value):
            raise UserError(
                f"{key}: {printable(value)} is not UTF-8, so dataset.json could not hold it; rename or correct it"
            )
    return user_path(config.out, "out").absolute()


def _has_surrogates(text: str) -> bool:
    return any(0xD800 <= ord(character) <= 0xDFFF for character in text)


def _write(
    config: PrepareConfig, sources: list[Source], folder: Path, log: Log, opens: OpenPredictor | None
) -> DatasetInfo:
    tokenizer = _tokenizer(config, sources, log)
    tokenizer.save(folder / "tokenizer.json")
    facts = TokenizerInfo(tokenizer.name, tokenizer.sha256, tokenizer.vocab_size, tokenizer.eot_id)
    predictor = None if opens is None else opens(facts)
    dtype = dataset.dtype_of(tokenizer.vocab_size)
    columns = {} if config.records == "text" else {LOSS_MASK: ColumnInfo("uint8", [])}
    writers = {
        split: SplitWriter(folder / split, dtype, config.sample_length, config.shard_megabytes, columns, predictor)
        for split in SPLITS
    }
    columns = columns if predictor is None else {**columns, **predictor.columns}
    progress = Progress(sources, log)
    flaws = Flaws()
    arguments = (
        *(folder / "tokenizer.json", tokenizer.eot_id, dtype, config.text_field, config.on_bad_row == "skip"),
        sources[0].conversations,
    )
    pieces = (piece for source in sources for piece in source.pieces(tokenizer.eot_id))
    with closing(_encoded(encode.batches(pieces), arguments, config.workers or _cores())) as results:
        for encoded in results:
            writers[encoded.split].add(encoded)
            flaws.add(encoded)
            progress.advance(encoded.bytes)
    for writer in writers.values():
        writer.finish()
    splits = {split: writer.info for split, writer in writers.items()}
    for source in sources:
        if source.stopped:
            log(
                f"{printable(source.spec)}: reading stopped at max_documents: {config.max_documents:,} of each split at most"
            )
    flaws.tell(sources, splits, log)
    _refuse_empty(splits, config)
    _summary(splits, progress.seconds(), config, log)
    hashes = {split: dataset.shard_hashes(folder / split) for split in SPLITS}
    lengths = {split: dataset.sha256_of(folder / split / dataset.LENGTHS) for split in SPLITS}
    info = DatasetInfo(
        tokenizer=facts,
        dtype=dtype,
        sample_length=config.sample_length,
        splits=splits,
        fingerprint=dataset.fingerprint(tokenizer.sha256, config.sample_length, hashes, lengths if columns else None),
        source=str(config.source),
        arguments=asdict(config),
        versions=_versions(),
        indexes={split: dataset.sha256_of(folder / split / dataset.INDEX) for split in SPLITS},
        lengths=lengths,
        columns=columns,
        records=config.records,
        **({} if predictor is None else predictor.facts(log)),
    )
    info.save(folder)
    return info


def _tokenizer(config: PrepareConfig, sources: list[Source], log: Log) -> Tokenizer:
    """The tokenizer of `config`; if it is trained, it sees only training text."""
    ids = next((source for source in sources if source.holds_ids), None)
    spec = config.new_tokenizer
    if ids and spec.startswith(("train-bpe", "chars")):
        raise UserError(
            f"{printable(ids.spec)}: holds token ids, so the tokenizer that made them is needed, not {spec}"
        )
    if spec.startswith("train-bpe"):
        log(f"training {spec} on the first text of {printable(config.source)}")
    elif spec == "chars":
        log(f"reading {printable(config.source)} once for its characters")
    tokenizer = get_tokenizer(spec, _training_texts(sources[0]), config.end_of_text, learn_in_child)
    for note in tokenizer.notes:
        log(note)
    end = printable(tokenizer.decode([tokenizer.eot_id]))
    log(f"tokenizer {tokenizer.name}: {tokenizer.vocab_size:,} ids, {end} (id {tokenizer.eot_id}) ends documents")
    if ids:
        log(
            f"{printable(ids.spec)}: holds token ids; {end} separates documents, and is stored at their end even if it stood at their "
            "beginning"
        )
    return tokenizer


def _training_texts(source: Source) -> Iterator[str]:
    for piece in source.pieces():
        if piece.split == "train":
            try:
                yield source.text(piece)
            except BadRow:
                if not source.skip_bad_rows:
                    raise


def _encoded(
    batches: Iterable[encode.Batch], arguments: tuple[Any, ...], workers: int
) -> Generator[encode.Encoded, None, None]:
    """Encoded batches in the order of `batches`; arguments: those of Encoder."""
    if workers == 1:
        yield from map(encode.Encoder(*arguments), batches)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), encode.start_process, arguments)
    try:
        yield from in_order(pool, batches, 2 * workers + 2)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def in_order(pool: Any, batches: Iterable[encode.Batch], limit: int) -> Iterator[encode.Encoded]:
    """Results of `pool` in the order of `batches`. At most `limit` batches are read ahead of the results that are yielded."""
    waiting: deque[Any] = deque()
    for batch in batches:
        waiting.append(pool.submit(encode.encode_batch, batch))
        if len(waiting) >= limit:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class Flaws:
    """The text that could not be kept: rows that were skipped, and characters without an id."""

    def __init__(self) -> None:
        self._rows, self._first_row = 0, ""
        self._bytes, self._characters = 0, ""

    def add(self, encoded: encode.Encoded) -> None:
        """Count the flaws of a batch."""
        self._first_row = self._first_row or encoded.first_skipped
        self._rows += encoded.skipped_rows
        self._characters = "".join(dict.fromkeys(self._characters + encoded.lost))[:10]
        self._bytes += encoded.lost_bytes

    def tell(self, sources: list[Source], splits: dict[str, SplitInfo], log: Log) -> None:
        """Log how much text was lost."""
        rows = self._rows + sum(source.skipped_rows for source in sources)
        if rows:
            first = self._first_row or next(source.first_skipped for source in sources if source.skipped_rows)
            log(f"{rows:,} bad rows were skipped, the first one: {first}")
        if self._bytes:
            share = self._bytes / (self._bytes + sum(info.bytes for info in splits.values()))
            named = " ".join(printable(character) for character in self._characters)
            log(
                f"warning: the tokenizer has no id for {share:.2%} of the text (such as {named}): {self._bytes:,} bytes are lost to "
                "the model, and are not counted in bits/byte; a byte-level tokenizer loses nothing"
            )


def _refuse_empty(splits: dict[str, SplitInfo], config: PrepareConfig) -> None:
    if not any(info.documents for info in splits.values()):
        raise UserError(f"{printable(config.source)}: is empty; there must be some text")
    for split, info in splits.items():
        if info.samples == 0:
            raise UserError(
                f"{printable(config.source)}: no text for the {split} split; "
                "give more documents, set document_start to find them in the text, or set validation_source"
            )


def _summary(splits: dict[str, SplitInfo], seconds: float, config: PrepareConfig, log: Log) -> None:
    size = sum(info.bytes for info in splits.values())
    for split, info in splits.items():
        log(
            f"{split}: {info.documents:,} documents ({info.bytes / size:.2%} of the text), {info.tokens:,} tokens, "
            f"{info.bytes / info.tokens:.2f} bytes/token, {info.samples:,} samples"
        )
    share = splits["validation"].bytes / size
    if not config.validation_source and is_far(share, config.validation_fraction):
        log(
            f"warning: validation is {share:.2%} of the text, but validation_fraction is {config.validation_fraction:.2%}: there are "
            "few documents, or the names of files decide the split; give more documents, or set validation_source"
        )
    log(f"{size / 1e6:.1f} MB tokenised in {seconds:.1f} s, {size / 1e6 / seconds:.1f} MB/s")


def _versions() -> dict[str, str]:
    names = ("tokenizers", "tiktoken", "mosaicml-streaming", "numpy")
    libraries = {name: metadata.version(name) for name in names}
    return {"crescendo": trainer.__version__, "python": platform.python_version(), **libraries}


def _cores() -> int:
    """Number of cores that this process may use; under a scheduler, fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
