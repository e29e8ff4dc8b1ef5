"""The work of one tokenising process: it turns batches of pieces into arrays of ids. Imports neither torch nor streaming."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.core.errors import UserError
from trainer.core.text import printable
from trainer.data.child import begin_child
from trainer.data.coder import silent_stderr
from trainer.data.dataset import LOSS_MASK
from trainer.data.pieces import Piece, cut
from trainer.data.readers import BadRow, utf8_size
from trainer.data.records import Conversations, Segment
from trainer.data.tokenizers import Tokenizer

BATCH = 1 << 18  # characters (bytes of raw .jsonl) in one unit of work
SPLIT = 1 << 20  # characters split into words at once
Batch = list[Piece]


class Encoded(NamedTuple):
    """The ids of a batch, an end-of-text id after each document that ends in it, and its sizes (see SplitInfo). ends: where these
    documents end, as counts of the batch's tokens; columns: those beside `tokens`."""

    split: str
    tokens: np.ndarray
    ends: np.ndarray
    bytes: int
    words: int
    lost_bytes: int = 0  # of characters that no id stands for; not in `bytes`
    lost: str = ""  # some of these characters
    skipped_rows: int = 0
    first_skipped: str = ""  # what was wrong with the first of them
    columns: Mapping[str, np.ndarray] = {}


def batches(pieces: Iterable[Piece]) -> Iterator[Batch]:
    """Group pieces of the same split into units of work. The order within a split is kept."""
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
    """Tokenises batches with the tokenizer.json at `path` to ids of type `dtype`; `eot_id` ends documents.

    field: the field of JSON rows that holds the text. skip_bad_rows: count bad rows, and continue. conversations: what the rows hold
    instead of text; then there is the column LOSS_MASK.
    """

    def __init__(
        self,
        path: Path,
        eot_id: int,
        dtype: str,
        field: str,
        skip_bad_rows: bool,
        conversations: Conversations | None = None,
    ):
        self._tokenizer = Tokenizer.from_file(path, eot_id=eot_id)
        self._dtype = dtype
        self._field = field
        self._skip_bad_rows = skip_bad_rows
        self._conversations = conversations
        self._end = np.array([eot_id], dtype)

    def __call__(self, batch: Batch) -> Encoded:
        """The encoded batch. Raises UserError that names the file (and line)."""
        if isinstance(batch[0].data, np.ndarray):
            return self._given(batch)
        tokens = [np.empty(0, self._dtype)]
        answers = [np.empty(0, np.uint8)]  # of LOSS_MASK
        ends: list[int] = []
        count = size = words = skipped = 0
        lost, first_skipped = [], ""
        with silent_stderr():
            for piece in batch:
                try:
                    segments = self._segments(piece)
                    size += sum(utf8_size(segment.text, piece.where) for segment in segments)
                except BadRow as error:
                    if not self._skip_bad_rows:
                        raise
                    first_skipped = first_skipped or str(error)
                    skipped += 1
                    continue
                for segment in segments:
                    words += _word_count(segment.text)
                    began = count
                    for part in cut(segment.text):
                        ids, lost_here = self._encode(part, piece.where)
                        tokens.append(ids.astype(self._dtype))
                        count += len(ids)
                        lost.append(lost_here)
                    if segment.closed:
                        tokens.append(self._end)
                        count += 1
                    if segment.last:
                        ends.append(count)
                    answers.append(np.full(count - began, segment.answer, np.uint8))
        all_lost = "".join(lost)
        lost_bytes = len(all_lost.encode("utf-8"))
        return Encoded(
            *(batch[0].split, np.concatenate(tokens), np.array(ends, np.int64), size - lost_bytes, words),
            *(lost_bytes, "".join(dict.fromkeys(all_lost[:10_000]))[:10], skipped, first_skipped),
            columns={} if self._conversations is None else {LOSS_MASK: np.concatenate(answers)},
        )

    def _segments(self, piece: Piece) -> list[Segment]:
        """The text of a piece, in parts that are tokenised on their own. Raises BadRow."""
        if self._conversations is not None:
            assert isinstance(piece.data, bytes)
            documents = self._conversations.documents(piece.data, piece.where)
            return [segment for document in documents for segment in document]
        text = piece.text(self._field)
        # An empty row is not a document.
        return [Segment(text, closed=piece.ends_document, last=piece.ends_document)] if text else []

    def _given(self, batch: Batch) -> Encoded:
        """A batch of ids, checked, with the sizes of the text that they stand for."""
        tokens, ends = [], []
        count = size = words = 0
        for piece in batch:
            ids = np.asarray(piece.data)
            self._check(ids, piece.where)
            # Both ends of the piece may be inside a word or a character. The difference is what this piece adds to those before.
            texts = [self._tokenizer.decode_bytes(part.tolist()) for part in (ids, ids[: piece.context])]
            whole, before = (_word_count(text.decode("utf-8", "replace")) for text in texts)
            size += len(texts[0]) - len(texts[1])
            words += whole - before
            tokens.append(ids[piece.context :].astype(self._dtype))
            count += len(tokens[-1])
            if piece.ends_document:
                tokens.append(self._end)
                count += 1
                ends.append(count)
        return Encoded(batch[0].split, np.concatenate(tokens), np.array(ends, np.int64), size, words)

    def _check(self, ids: np.ndarray, where: str) -> None:
        lowest, highest, known = ids.min(), ids.max(), self._tokenizer.vocab_size
        if lowest < 0 or highest >= known:
            raise UserError(
                f"{where}: holds the id {lowest if lowest < 0 else highest}, but the tokenizer has {known:,} ids, from 0 on; name the "
                "tokenizer that made the ids, or set token_dtype if a file without a header has another type"
            )

    def _encode(self, text: str, where: str) -> tuple[np.ndarray, str]:
        try:
            return self._tokenizer.encode_telling_losses(text)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        except Exception as error:  # whatever the tokenizer library raises, the message says where
            raise UserError(
                f"{where}: cannot be tokenised ({type(error).__name__}: {printable(error, 200)})"
            ) from error


def _word_count(text: str) -> int:
    """How many words `text` has, counted without a list of all words."""
    if len(text) <= SPLIT:
        return len(text.split())
    starts = range(0, len(text), SPLIT)
    cut_words = sum(not (text[start - 1].isspace() or text[start].isspace()) for start in starts[1:])
    return sum(len(text[start : start + SPLIT].split()) for start in starts) - cut_words


_encoder: Encoder | None = None


def start_process(*arguments: Any) -> None:
    """Make a new process ready for `encode_batch`. arguments: those of Encoder."""
    global _encoder
    begin_child()
    _encoder = Encoder(*arguments)


def encode_batch(batch: Batch) -> Encoded:
    """Encode a batch in a process made ready by `start_process`."""
    assert _encoder is not None
    return _encoder(batch)
