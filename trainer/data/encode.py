"""The work of one tokenising process: batches of pieces to arrays of ids. Imports neither torch nor streaming."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trainer.data.sources import Piece, cut
from trainer.data.tokenizers import Tokenizer
from trainer.errors import UserError

BATCH = 1 << 18  # characters (bytes of raw .jsonl) in one unit of work
Batch = list[Piece]


class Encoded(NamedTuple):
    """The ids of a batch, an end-of-text id after each document that ends in it, and its sizes (see SplitInfo)."""

    split: str
    tokens: np.ndarray
    documents: int
    bytes: int
    words: int


def batches(pieces: Iterable[Piece]) -> Iterator[Batch]:
    """Group pieces of one split to units of work. The order within a split is kept."""
    waiting: dict[str, Batch] = {}
    sizes: dict[str, int] = {}
    for piece in pieces:
        waiting.setdefault(piece.split, []).append(piece)
        sizes[piece.split] = sizes.get(piece.split, 0) + len(piece.data)
        if sizes[piece.split] >= BATCH:
            sizes[piece.split] = 0
            yield waiting.pop(piece.split)
    yield from waiting.values()


class Encoder:
    """Tokenises batches with the tokenizer.json at `path`; `field` names the text in .jsonl rows."""

    def __init__(self, path: Path, field: str):
        self._tokenizer = Tokenizer.from_file(path)
        self._field = field
        self._end = np.array([self._tokenizer.eot_id], np.uint32)

    def __call__(self, batch: Batch) -> Encoded:
        """The encoded batch. Raises UserError that names the file (and line)."""
        tokens = [np.empty(0, np.uint32)]
        documents = size = words = 0
        for piece in batch:
            text = piece.text(self._field)
            if not text:
                continue  # an empty row is no document
            size += _utf8_size(text, piece.where)
            words += len(text.split())
            tokens += [self._encode(part, piece.where) for part in cut(text)]
            if piece.ends_document:
                tokens.append(self._end)
                documents += 1
        return Encoded(batch[0].split, np.concatenate(tokens), documents, size, words)

    def _encode(self, text: str, where: str) -> np.ndarray:
        try:
            return self._tokenizer.encode(text)
        except Exception as error:  # whatever the tokenizer library raises, the reader wants to know where
            raise UserError(f"{where}: cannot be tokenised ({type(error).__name__}: {error})") from error


def _utf8_size(text: str, where: str) -> int:
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: holds half a surrogate pair at character {error.start}; repair the text") from None


_encoder: Encoder | None = None


def start_process(path: Path, field: str) -> None:
    """Make a new process ready for `encode_batch`."""
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent alone answers it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = Encoder(path, field)


def _end_with_parent() -> None:
    """A killed parent cannot tell its workers to end, and they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def encode_batch(batch: Batch) -> Encoded:
    """Encode a batch in a process made ready by `start_process`."""
    assert _encoder is not None
    return _encoder(batch)
