"""Where text comes from: a source spec becomes a stream of small pieces of documents, in bounded memory."""

from __future__ import annotations

import hashlib
import io
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from trainer.config import CorpusConfig
from trainer.data import readers
from trainer.errors import UserError

CHUNK = 1 << 16  # characters, so at most 256 KiB of UTF-8
TEXT_SUFFIXES = (".txt", ".md", ".raw", ".tokens", ".text")
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
STDLIB = "builtin:python-stdlib"
STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip"}


class Piece(NamedTuple):
    """A part of a document: text, or a raw .jsonl line that a tokenising process parses; `where` serves error lines."""

    data: str | bytes
    ends_document: bool
    where: str
    split: str = "train"

    def text(self, field: str) -> str:
        """The text; `field` names where a .jsonl line holds it."""
        return self.data if isinstance(self.data, str) else readers.row_text(self.data, field, self.where)


@dataclass
class Source:
    """One source. `files` is empty for hf://; `split` is the split of all its documents, None: hold some out.

    Documents are held out as follows. A lone text file without document_start is one document: its last
    `validation_fraction` (by bytes, from the next line start on) is the validation document. Otherwise a document goes
    to validation if the hash of its number is below `validation_fraction`, and the second document always does, so
    that there is one however few there are.
    """

    spec: str
    files: list[Path]
    text_field: str
    document_start: re.Pattern[str] | None
    validation_fraction: float
    split: str | None
    bytes_read: int = 0

    @property
    def total_bytes(self) -> int | None:
        """Size of the files on disk, None where it cannot be known."""
        return sum(path.stat().st_size for path in self.files) if self.files else None

    def pieces(self) -> Iterator[Piece]:
        """All pieces from the beginning, in order, each with its split. Documents without any text are left out."""
        self.bytes_read = 0
        if self.split is None and self._is_one_document():
            yield from self._text_halves()
            return
        document = 0
        for piece in self._pieces():
            yield piece._replace(split=self.split or self._split_of(document))
            document += piece.ends_document
        if document == 0:
            raise UserError(f"{self.spec}: is empty; there must be some text")

    def _is_one_document(self) -> bool:
        return len(self.files) == 1 and _kind(self.files[0]) == "text" and not self.document_start

    def _text_halves(self) -> Iterator[Piece]:
        path = self.files[0]
        middle = _line_start(path, self.validation_fraction)
        for split, start, stop in (("train", 0, middle), ("validation", middle, None)):
            with self._open(path) as file:
                chunks = readers.read_text(file, str(path), start, stop)
                for piece in to_pieces(((chunk, False) for chunk in chunks), str(path)):
                    yield piece._replace(split=split)

    def _split_of(self, document: int) -> str:
        digest = hashlib.blake2b(str(document).encode(), digest_size=8).digest()
        drawn = int.from_bytes(digest, "big") / 2**64 < self.validation_fraction
        return "validation" if document == 1 or (drawn and document > 0) else "train"

    def _pieces(self) -> Iterator[Piece]:
        if not self.files:
            yield from self._row_pieces(readers.read_hub(self.spec, self.text_field), self.spec)
        for path in self.files:
            with self._open(path) as file:
                yield from self._file_pieces(file, path)

    def _file_pieces(self, file: BinaryIO, path: Path) -> Iterator[Piece]:
        kind = _kind(path)
        if kind == "parquet":
            yield from self._row_pieces(readers.read_parquet(file, path, self.text_field), str(path))
        elif kind == "jsonl":
            lines = enumerate(readers.read_jsonl(file, path), 1)
            rows = (Piece(line, True, f"{path}:{number}") for number, line in lines if not line.isspace())
            if self.document_start is None:
                yield from rows
            else:
                yield from self._row_pieces((row.text(self.text_field) for row in rows), str(path))
        else:
            chunks = readers.read_text(file, str(path))
            start = self.document_start
            yield from to_pieces(_lines(chunks, start) if start else ((chunk, False) for chunk in chunks), str(path))

    def _row_pieces(self, rows: Iterable[str], where: str) -> Iterator[Piece]:
        start = self.document_start
        return to_pieces(((row, start is None or start.search(row) is not None) for row in rows), where)

    def _open(self, path: Path) -> BinaryIO:
        return io.BufferedReader(readers.CountedFile(path, self._count), readers.BLOCK)

    def _count(self, size: int) -> None:
        self.bytes_read += size


def open_source(spec: str, config: CorpusConfig, split: str | None = None) -> Source:
    """The source that `spec` names, with the options of `config`. Raises UserError where there is nothing to read.

    `split` takes every document; None holds documents out for validation.
    """
    try:
        start = re.compile(config.document_start) if config.document_start else None
    except re.error as error:
        raise UserError(f"document_start: {config.document_start!r} is not a regular expression ({error})") from None
    return Source(spec, _files(spec), config.text_field, start, config.validation_fraction, split)


def open_sources(config: CorpusConfig) -> list[Source]:
    """The sources of a whole corpus: `source` alone, or `source` for training and `validation_source`."""
    if not config.source:
        raise UserError("source: is not set; name a text file, a folder, or builtin:python-stdlib")
    if config.validation_source:
        return [
            open_source(config.source, config, "train"),
            open_source(config.validation_source, config, "validation"),
        ]
    if not 0 < config.validation_fraction < 1:
        raise UserError(
            f"validation_fraction: {config.validation_fraction} is not between 0 and 1; "
            "hold out a share of the documents or set validation_source"
        )
    return [open_source(config.source, config)]


def to_pieces(parts: Iterable[tuple[str, bool]], where: str) -> Iterator[Piece]:
    """Join (text, opens a document) parts to documents and cut these to pieces of at most CHUNK characters."""
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


def cut(text: str) -> list[str]:
    """`text` in parts of at most CHUNK characters, cut where that does not change its tokens if it has such a place."""
    parts = []
    start = 0
    while len(text) - start > CHUNK:
        end = _cut_place(text, start, start + CHUNK)
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


def _cut_place(text: str, start: int, end: int) -> int:
    """Where to cut text[start:end], which more text follows.

    In front of a lone space between two other characters a word begins in GPT-2's pre-tokenisation and in all that
    came after it, so that cut is exact. So is, for GPT-2's, one behind a lone line end. The rest is for odd texts.
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


def _lines(chunks: Iterable[str], document_start: re.Pattern[str]) -> Iterator[tuple[str, bool]]:
    """(line, opens a document) for text in chunks; an overlong line comes in several parts."""
    rest, at_start = "", True
    for chunk in chunks:
        *lines, rest = (rest + chunk).split("\n")
        for line in lines:
            yield line + "\n", at_start and document_start.search(line) is not None
            at_start = True
        if len(rest) > CHUNK:
            yield rest, at_start and document_start.search(rest) is not None
            rest, at_start = "", False
    if rest:
        yield rest, at_start and document_start.search(rest) is not None


def _line_start(path: Path, validation_fraction: float) -> int:
    """Byte offset of the line start that ends the training part; where the last line is too long, its own start."""
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"{path}: is empty; there must be some text")
    wanted = position = int(size * (1 - validation_fraction))
    with path.open("rb") as file:
        file.seek(wanted)
        while line := file.readline(readers.BLOCK):
            position += len(line)
            if line.endswith(b"\n"):
                break
        if position < size:
            return position
        before = max(0, wanted - readers.BLOCK)
        file.seek(before)
        found = file.read(wanted - before).rfind(b"\n")
    if found < 0:
        raise UserError(
            f"{path}: has no line end to hold out its last part at; set validation_source or document_start"
        )
    return before + found + 1


def _kind(path: Path) -> str:
    if path.name.endswith(JSONL_SUFFIXES):
        return "jsonl"
    return "parquet" if path.suffix == ".parquet" else "text"


def _files(spec: str) -> list[Path]:
    if spec.startswith("hf://"):
        return []
    if spec.startswith("builtin:"):
        return _stdlib(spec)
    path = Path(spec).expanduser()
    if path.is_dir():
        wanted = (*TEXT_SUFFIXES, *JSONL_SUFFIXES, ".parquet")
        found = _walk(path, wanted)
        if not found:
            raise UserError(f"{spec}: holds no text; looked for *{', *'.join(wanted)} in it and below")
        return found
    if not path.is_file():
        raise UserError(f"{spec}: no such file or folder; give one, hf://NAME, or {STDLIB}")
    return [path]


def unread(source: Source) -> str | None:
    """A line on the files of a folder that are not read; None where there are none but hidden ones."""
    folder = Path(source.spec).expanduser()
    others = set(_walk(folder, ("",))) - set(source.files) if folder.is_dir() else set()
    if not others:
        return None
    counts = Counter(path.suffix or "without a suffix" for path in sorted(others)).most_common()
    named = ", ".join(f"{count} {suffix}" for suffix, count in counts[:5]) + ", and others" * (len(counts) > 5)
    return f"{source.spec}: left out what is no text by its name: {named}"


def _walk(folder: Path, suffixes: tuple[str, ...], left_out: frozenset[str] | set[str] = frozenset()) -> list[Path]:
    """Files below `folder` by suffix, sorted, without hidden ones and without folders named in `left_out`."""
    found = []
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)
        if path.name.endswith(suffixes) and not hidden and left_out.isdisjoint(parts) and path.is_file():
            found.append(path)
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def _stdlib(spec: str) -> list[Path]:
    if spec != STDLIB:
        raise UserError(f"{spec}: unknown; the only built-in source is {STDLIB}")
    folder = Path(sysconfig.get_paths()["stdlib"])
    found = _walk(folder, (".py",), STDLIB_LEFT_OUT)
    if not found:
        raise UserError(f"{spec}: no .py files in {folder}; this Python comes without its source, use another source")
    return found
