"""Documents in small pieces: joined from the parts that a reader yields, and cut where a cut changes no token."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from trainer.data import readers

CHUNK = 1 << 16  # characters, so at most 256 KiB of UTF-8


class Piece(NamedTuple):
    """A part of a document: text, a raw row of JSON that a tokenising process parses, or an array of token ids.

    where: for error lines. context: how many ids at the beginning belong to the piece before; they only show where words begin.
    """

    data: str | bytes | np.ndarray
    ends_document: bool
    where: str
    split: str = "train"
    context: int = 0

    def text(self, field: str) -> str:
        """The text of a piece without ids; `field` is the field of a row that holds it. Raises BadRow."""
        if isinstance(self.data, bytes):
            return readers.row_text(self.data, field, self.where)
        assert isinstance(self.data, str)
        return self.data


def to_pieces(parts: Iterable[tuple[str, bool]], where: str) -> Iterator[Piece]:
    """Join (text, opens a document) parts into documents, and cut these into pieces of at most CHUNK characters."""
    held: list[str] = []
    size = 0
    for text, opens in parts:
        if opens and held:
            yield Piece("".join(held), True, where)
            held, size = [], 0
        if text:
            held.append(text)
            size += len(text)
        if size > CHUNK:
            *ready, rest = cut("".join(held))
            yield from (Piece(part, False, where) for part in ready)
            held, size = [rest], len(rest)
    if held:
        yield Piece("".join(held), True, where)


def whole_rows(rows: Iterable[Any], where: str) -> Iterator[Piece]:
    """Rows of several fields as raw rows of JSON, each with all of its documents."""
    for number, row in enumerate(rows, 1):
        yield Piece(json.dumps(row, default=str).encode("utf-8"), True, f"{where}:row {number}")


def cut(text: str) -> Iterator[str]:
    """`text` in parts of at most CHUNK characters, cut where that does not change its tokens, if there is such a place."""
    start = 0
    while len(text) - start > CHUNK:
        end = _cut_place(text, start, start + CHUNK)
        yield text[start:end]
        start = end
    yield text[start:] if start else text


def _cut_place(text: str, start: int, end: int) -> int:
    """Where to cut text[start:end], which more text follows.

    A cut before a single space between two other characters is exact: a word begins there in GPT-2's pre-tokenisation and in
    all later ones. For GPT-2's, a cut after a single line end is exact too. The other cuts are for unusual texts.
    """
    for mark, behind in ((" ", 0), ("\n", 1)):
        at = text.rfind(mark, start + 1, end - 1)
        while at > 0:
            if not text[at - 1].isspace() and not text[at + 1].isspace():
                return at + behind
            at = text.rfind(mark, start + 1, at)
    for mark in "\n ":
        at = text.rfind(mark, start, end)
        if at >= 0:
            return at + 1
    return end


def lines(chunks: Iterable[str], document_start: re.Pattern[str]) -> Iterator[tuple[str, bool]]:
    """(line, opens a document) for text in chunks; an overlong line comes in several parts."""
    mark, rest, at_start = "", "", True
    for chunk in chunks:
        mark = mark or _line_end(chunk)
        *whole, rest = (rest + chunk).split(mark)
        for line in whole:
            yield line + mark, at_start and opens(document_start, line)
            at_start = True
        if len(rest) > CHUNK:
            yield rest, at_start and opens(document_start, rest)
            rest, at_start = "", False
    if rest:
        yield rest, at_start and opens(document_start, rest)


def _line_end(chunk: str) -> str:
    """What ends the lines of a text that begins with `chunk`: in files of old Macs, a carriage return alone."""
    return "\r" if "\r" in chunk[:-1] and "\n" not in chunk else "\n"


def opens(document_start: re.Pattern[str], line: str) -> bool:
    """Whether a line (or row) opens a document; `$` also matches before a carriage return, as DOS and Windows write it."""
    if line.endswith("\r\n"):
        line = line[:-2] + "\n"
    return document_start.search(line.removesuffix("\r")) is not None
