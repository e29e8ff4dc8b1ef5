"""A text file as a split to evaluate on, tokenised in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trainer.core.errors import UserError
from trainer.core.files import system_error
from trainer.core.text import printable
from trainer.data.dataset import SplitInfo, dtype_of
from trainer.data.encode import Encoder
from trainer.data.pieces import Piece
from trainer.data.stream import Say


class RawText:
    """One document, after an end-of-text id, as documents stand in training: so all tokens of the text are targets.

    Has what an evaluation needs of a `Split`.
    """

    name = "text"
    records = "text"

    def __init__(self, path: Path, tokenizer: Path, eot_id: int, vocab_size: int, say: Say) -> None:
        """tokenizer: a tokenizer.json. UserError if the file cannot be read, is not UTF-8, or holds no text; `say` gets a line about
        characters that the tokenizer has no id for."""
        self.folder = path
        try:
            text = path.read_bytes().decode("utf-8")
        except OSError as error:
            raise system_error(error, f"text: {printable(path)}: cannot be read") from None
        except UnicodeDecodeError as error:
            raise UserError(
                f"text: {printable(path)} is not UTF-8 at byte {error.start}; convert it to UTF-8"
            ) from None
        encoded = Encoder(tokenizer, eot_id, dtype_of(vocab_size), "text", False)([Piece(text, True, printable(path))])
        if encoded.lost_bytes:
            say(
                f"text: {encoded.lost_bytes:,} bytes of {printable(path)} are characters that the tokenizer has no id for "
                f"({printable(encoded.lost)} ...); they are left out, and the figures are those of the rest"
            )
        if len(encoded.tokens) < 2:
            raise UserError(f"text: {printable(path)} holds no text that the tokenizer can encode")
        self._tokens = np.roll(encoded.tokens.astype(np.int64), 1)  # the end-of-text id comes first
        self.text_tokens = len(self._tokens) - 1
        self.counts = SplitInfo(len(self._tokens), 1, encoded.bytes, encoded.words)

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from token `start` on: int64 [count]."""
        return self._tokens[start : start + count]
