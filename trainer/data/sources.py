"""Where text comes from: a source spec becomes a stream of small pieces of documents, in bounded memory."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from trainer.core.config import CorpusConfig
from trainer.core.errors import UserError
from trainer.core.files import user_path
from trainer.core.text import printable
from trainer.data import readers, token_files
from trainer.data.folders import STDLIB, find_files, kind_of, splits_by_name
from trainer.data.mds_source import MdsIndex, open_index
from trainer.data.pieces import Piece, lines, opens, to_pieces, whole_rows
from trainer.data.readers import BadRow
from trainer.data.records import FIELDS, Conversations, open_conversations

FAR_ABOVE = 0.1  # a share of validation text that is never right if 1 % was asked for
BIG = 100  # a file that is at least a hundredth of the text can decide the share alone


@dataclass
class Source:
    """One source. `files` is empty for hf://; `split` is the split of all its documents, None: hold some out.

    Documents are held out as follows. `named` files belong to the split in their name. Each file of `ends` is cut in two: its
    last `validation_fraction` (by bytes, from the next line start on) is a validation document. A single text file without
    document_start is in `ends`. In all other cases a document goes to validation if the hash of its number is below
    `validation_fraction`; the second document always does, so that there is one even among few documents.

    Files of token ids are one stream for each split, so a document may go on in the next file.
    """

    spec: str
    files: list[Path]
    text_field: str
    document_start: re.Pattern[str] | None
    validation_fraction: float
    split: str | None
    skip_bad_rows: bool = False
    conversations: Conversations | None = None  # what its rows hold instead of text
    token_dtype: str | None = None
    max_documents: int | None = None  # of each split
    named: dict[Path, str] = field(default_factory=dict)
    ends: frozenset[Path] = frozenset()
    indexes: dict[Path, MdsIndex] = field(default_factory=dict)  # of its files that list MDS shards
    notes: list[str] = field(default_factory=list)  # what the user should know about how it is read
    bytes_read: int = 0
    skipped_rows: int = 0  # rows that were read here and left out as bad
    first_skipped: str = ""  # what was wrong with the first of them
    stopped: bool = False  # whether max_documents ended the reading

    @property
    def holds_ids(self) -> bool:
        """Whether its files hold token ids instead of text."""
        return any(
            self.indexes[path].holds_ids if path in self.indexes else kind_of(path) == "ids" for path in self.files
        )

    @property
    def total_bytes(self) -> int | None:
        """How many bytes will be read, None if it is not known."""
        if not self.files or self.max_documents is not None:
            return None
        return sum(
            self.indexes[path].total_bytes if path in self.indexes else path.stat().st_size for path in self.files
        )

    def pieces(self, eot_id: int = -1) -> Iterator[Piece]:
        """All pieces from the beginning, in order, each with its split. Documents without any text are left out.

        eot_id: the id that separates documents, for files of token ids.
        """
        second = self._second_document()
        self.bytes_read = self.skipped_rows = 0
        self.stopped = False
        document, kept = 0, dict.fromkeys(("train", "validation"), 0)
        for files in self._groups():
            split = self._split_of_files(files)
            with closing(self._pieces(files, eot_id)) as pieces:
                while not self._enough(kept, split) and (piece := next(pieces, None)) is not None:
                    if not self.ends.intersection(files):
                        piece = piece._replace(split=split or self._split_of(document, second))
                    document += piece.ends_document
                    if self.max_documents is None:
                        yield piece
                    elif kept[piece.split] < self.max_documents:
                        yield piece
                        kept[piece.split] += piece.ends_document and self._has_text(piece)
        if document == 0:
            raise UserError(f"{printable(self.spec)}: is empty; there must be some text")

    def _enough(self, kept: dict[str, int], split: str | None) -> bool:
        """Whether no document is missing of `split`, or of both splits if it is None. kept: documents of each split so far."""
        if self.max_documents is None:
            return False
        # Documents are drawn for validation at a fixed rate: as soon as there is one, nobody waits for max_documents of them.
        wanted = {split: self.max_documents} if split else {"train": self.max_documents, "validation": 1}
        enough = all(kept[name] >= count for name, count in wanted.items())
        self.stopped |= enough
        return enough

    def _groups(self) -> list[list[Path]]:
        """The files in the order of reading; those that are one stream are together. [[]] for hf://."""
        if not self.holds_ids:
            return [[path] for path in self.files] or [[]]
        splits = dict.fromkeys(self.named.get(path) for path in self.files)
        return [[path for path in self.files if self.named.get(path) == split] for split in splits]

    def _split_of_files(self, files: list[Path]) -> str | None:
        """The split of all documents of files that are read together; None: both, or drawn for each document."""
        if self.split or not (self.named or self.ends) or self.ends.intersection(files):
            return self.split
        return self.named.get(files[0], "train") if files else None

    def _split_of(self, document: int, second: int) -> str:
        drawn = document > 0 and _drawn(document, self.validation_fraction)
        return "validation" if drawn or document == second else "train"

    def _second_document(self) -> int:
        """Number of the document that is always held out: 1; if that row is empty and no other is drawn, the second one with text."""
        rows = any(kind_of(path) == "rows" for path in self.files) and self.document_start is None
        if not rows or self.split or self.named or self.ends:
            return 1
        with_text: list[int] = []
        number = 0
        for path in self.files:
            for piece in self._pieces([path]):
                certain = number == 1 or (number > 0 and _drawn(number, self.validation_fraction))
                if piece.ends_document and (certain or len(with_text) < 2) and self._has_text(piece):
                    if certain:
                        return 1
                    with_text.append(number)
                number += piece.ends_document
        return with_text[-1] if len(with_text) > 1 else 1

    def text(self, piece: Piece) -> str:
        """The text of a piece without ids. Raises BadRow."""
        if self.conversations is None:
            return piece.text(self.text_field)
        assert isinstance(piece.data, bytes)
        return self.conversations.text(piece.data, piece.where)

    def _has_text(self, piece: Piece) -> bool:
        try:
            return not isinstance(piece.data, bytes) or bool(self.text(piece))
        except BadRow:
            return False

    def _halves(self, path: Path) -> Iterator[Piece]:
        middle = _middle(path, self.validation_fraction)
        for split, start, stop in (("train", 0, middle), ("validation", middle, None)):
            with self._open(path) as file:
                chunks = readers.read_text(file, path, start, stop)
                for piece in to_pieces(((chunk, False) for chunk in chunks), printable(path)):
                    yield piece._replace(split=split)

    def _pieces(self, files: list[Path], eot_id: int = -1) -> Generator[Piece, None, None]:
        """The pieces of one group of files."""
        if not files and self.conversations is not None:
            yield from whole_rows(readers.hub_rows(self.spec), self.spec)
        elif not files:
            yield from self._row_pieces(readers.read_hub(self.spec, self.text_field, self._bad), self.spec)
        elif self.holds_ids:
            blocks = (self._blocks(path, eot_id) for path in files)
            yield from token_files.to_documents(chain.from_iterable(blocks), eot_id)
        elif files[0] in self.indexes:
            rows = self.indexes[files[0]].texts(self._bad, self._count)
            yield from self._row_pieces(rows, printable(files[0].parent))
        elif files[0] in self.ends:
            yield from self._halves(files[0])
        else:
            with self._open(files[0]) as file:
                yield from self._file_pieces(file, files[0])

    def _blocks(self, path: Path, eot_id: int) -> token_files.Blocks:
        if path in self.indexes:
            return self.indexes[path].blocks(eot_id, self._count)
        return token_files.read_blocks(path, self.token_dtype, self._count)

    def _file_pieces(self, file: BinaryIO, path: Path) -> Iterator[Piece]:
        kind, name, start = kind_of(path), printable(path), self.document_start
        if kind == "parquet" and self.conversations is not None:
            yield from whole_rows(readers.parquet_rows(file, path, FIELDS), name)
        elif kind == "parquet":
            yield from self._row_pieces(readers.read_parquet(file, path, self.text_field, self._bad), name)
        elif kind == "rows":
            rows = (Piece(line, True, f"{name}:{number}") for number, line in readers.read_rows(file, path))
            yield from rows if start is None else self._row_pieces(self._texts(rows), name)
        else:
            chunks = readers.read_text(file, path)
            yield from to_pieces(lines(chunks, start) if start else ((chunk, False) for chunk in chunks), name)

    def _texts(self, rows: Iterable[Piece]) -> Iterator[str]:
        for row in rows:
            try:
                text = row.text(self.text_field)
                readers.utf8_size(text, row.where)
            except BadRow as error:
                self._bad(error)
            else:
                yield text

    def _row_pieces(self, rows: Iterable[str], where: str) -> Iterator[Piece]:
        start = self.document_start
        return to_pieces(((row, start is None or opens(start, row)) for row in rows), where)

    def _bad(self, error: BadRow) -> None:
        if not self.skip_bad_rows:
            raise error
        self.first_skipped = self.first_skipped if self.skipped_rows else str(error)
        self.skipped_rows += 1

    def _open(self, path: Path) -> BinaryIO:
        return io.BufferedReader(readers.CountedFile(path, self._count), readers.BLOCK)

    def _count(self, size: int) -> None:
        self.bytes_read += size


def open_source(spec: str, config: CorpusConfig, split: str | None = None) -> Source:
    """The source that `spec` names, with the options of `config`. Raises UserError if there is nothing to read.

    split: the split of every document; None: hold documents out for validation.
    """
    try:
        start = re.compile(config.document_start) if config.document_start else None
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"document_start: {config.document_start!r} is not a regular expression ({error})") from None
    key = "validation_source" if split == "validation" else "source"
    files, notes = find_files(spec, key, config.text_field)
    source = Source(spec, files, config.text_field, start, config.validation_fraction, split)
    source.skip_bad_rows = config.on_bad_row == "skip"
    source.token_dtype, source.max_documents = config.token_dtype, config.max_documents
    source.notes = notes
    source.conversations = open_conversations(config, files)
    if spec.startswith(("hf://", "builtin:")):
        return source
    if user_path(spec, key).is_dir():
        _heed_names(source, user_path(spec, key))
    _open_indexes(source)
    if split is None and not source.named:
        _choose_ends(source)
    return source


def _open_indexes(source: Source) -> None:
    """Read the indexes of MDS shards among a source's files, and say how their rows are read."""
    found = [path for path in source.files if kind_of(path) == "mds"]
    source.indexes = {path: open_index(path, source.text_field, source.token_dtype) for path in found}
    if len({index.holds_ids for index in source.indexes.values()}) > 1:
        raise UserError(
            f"{printable(source.spec)}: one split holds text and another token ids; prepare them from one kind"
        )
    for index in source.indexes.values():
        rows = "parts of one stream of ids" if index.holds_ids and index.is_stream else "documents"
        source.notes.append(f"{printable(index.path.parent)}: the rows of column {index.column!r} are {rows}")


def open_sources(config: CorpusConfig) -> list[Source]:
    """The sources of a whole corpus: `source` alone, or `source` for training and `validation_source`."""
    if not config.source:
        raise UserError(f"source: is not set; name a text file, a folder, or {STDLIB}")
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


def _heed_names(source: Source, folder: Path) -> None:
    """If the names of a folder's files indicate splits, each file belongs to its split, and test files are left out."""
    named, laid_out = splits_by_name(source.files, folder)
    if not laid_out:
        others = [path for path, split in named.items() if split != "train"]
        if others and source.split is None:
            source.notes.append(
                f"{printable(source.spec)}: {len(others)} files with validation or test in their names (such as "
                f"{printable(others[0].relative_to(folder))}) are read like all others, because no files are named for training "
                "or most have other names; set validation_source to hold them out"
            )
        return
    wanted = {source.split} if source.split else {"train", "validation"}
    if source.split == "validation" and "validation" not in named.values():
        wanted = {"test"}
    kept = [path for path in source.files if named.get(path, "train") in wanted]
    counts = {
        split: sum(named.get(path, "train") == split for path in source.files) for split in sorted(set(named.values()))
    }
    told = ", ".join(f"{count} for {split}" for split, count in counts.items() if split in wanted)
    left_out = [f"{path.relative_to(folder)}" for path in source.files if path not in set(kept)]
    names = printable(", ".join(left_out[:5]) + ", ..." * (len(left_out) > 5))
    source.notes.append(
        f"{printable(source.spec)}: the names of files decide their split: {told}"
        + (f"; left out: {len(left_out)} others ({names})" if left_out else "")
    )
    source.files = kept
    if source.split is None and "validation" in named.values():
        source.named = {path: named.get(path, "train") for path in kept}


def _choose_ends(source: Source) -> None:
    """Hold out the ends of text files if whole files cannot make a validation split of the size that was asked for."""
    texts = source.document_start is None and all(kind_of(path) == "text" for path in source.files)
    if not texts or not source.files:
        return
    if len(source.files) == 1:
        source.ends = frozenset(source.files)
        return
    sizes = {path: size for path in source.files if (size := path.stat().st_size)}
    held = [
        size
        for number, size in enumerate(sizes.values())
        if number == 1 or (number > 0 and _drawn(number, source.validation_fraction))
    ]
    share = sum(held) / max(1, sum(sizes.values()))
    if not is_far(share, source.validation_fraction):
        return
    big = [path for path, size in sizes.items() if size * BIG >= sum(sizes.values())]
    source.ends = frozenset(path for path in big if _line_start(path, source.validation_fraction) is not None)
    if source.ends:
        source.notes.append(
            f"{printable(source.spec)}: whole files would make validation {share:.2%} of the text, so the last "
            f"{source.validation_fraction:.2%} of each of its {len(source.ends)} large files is held out instead"
        )


def is_far(share: float, fraction: float) -> bool:
    """Whether a validation split is far from the share of the text that was asked for."""
    return share > max(FAR_ABOVE, 3 * fraction) or 1 - share < (1 - fraction) / 3 or share < fraction / 10


def _drawn(document: int, fraction: float) -> bool:
    digest = hashlib.blake2b(str(document).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < fraction


def _middle(path: Path, fraction: float) -> int:
    """Byte offset at which the last `fraction` of a file begins: at the start of a line if there is one, else of a word."""
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"{printable(path)}: is empty; there must be some text")
    found = _line_start(path, fraction)
    if found is not None:
        return found
    wanted = int(size * (1 - fraction))
    first = max(0, wanted - readers.BLOCK)
    with path.open("rb") as file:
        file.seek(first)
        text = file.read(wanted - first + 1)
    for mark in (b"\r", b" "):  # line ends of old Macs; a text of one line
        at = text.rfind(mark, 0, -1)
        if at >= 0:
            return first + at + 1
    at = len(text) - 1
    while at > 0 and text[at] & 0xC0 == 0x80:  # inside a character of UTF-8: go back to where it begins
        at -= 1
    if first + at == 0:
        raise UserError(f"{printable(path)}: is too short to hold out a part of it; give more text")
    return first + at


def _line_start(path: Path, fraction: float) -> int | None:
    """Byte offset of the line start that ends the training part; if the last line is too long, its own start."""
    size = path.stat().st_size
    wanted = position = int(size * (1 - fraction))
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
    return None if found < 0 else before + found + 1
