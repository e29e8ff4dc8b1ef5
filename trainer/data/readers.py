"""One reader per file format: text in bounded memory, and an error line that says where in the file it went wrong."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from trainer.core.errors import MachineError, UserError
from trainer.core.text import printable

BLOCK = 1 << 18  # bytes
ROW_BYTES = 1 << 28  # most bytes of one row of JSON, which is parsed as a whole
ZSTD_FED = 1 << 12  # bytes given to zstd at a time, so that their expansion stays below 128 MiB
ZSTD_WINDOW = 1 << 31  # the format's largest; `zstd --long` and `--ultra` write such windows
PARQUET_BATCH = 1 << 24  # about how many bytes of a column are read at a time
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class BadRow(UserError):
    """A row that cannot be used: not JSON, not UTF-8, without the field, or without text in it. `on_bad_row` may skip it."""


OnBadRow = Callable[[BadRow], None]  # raises the error, or counts it


class CountedFile(io.FileIO):
    """A file that reports how many bytes each read took, for progress and time left."""

    def __init__(self, path: Path, on_read: Callable[[int], None]):
        super().__init__(path, "rb")
        self._on_read = on_read

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer`; returns the number of bytes."""
        count = super().readinto(buffer) or 0
        self._on_read(count)
        return count


def read_text(file: BinaryIO, path: Path, start: int = 0, stop: int | None = None) -> Iterator[str]:
    """The UTF-8 text of `file` between the byte offsets `start` and `stop`, in blocks, line ends as they are.

    A byte order mark at the beginning of the file is left out.
    """
    file.seek(start)
    rest = b""
    while True:
        at = file.tell()
        wanted = BLOCK if stop is None else min(BLOCK, stop - at)
        block = file.read(wanted)
        refuse_utf16(block, at, printable(path))
        try:
            text, used = codecs.utf_8_decode(rest + block, "strict", not block)
        except UnicodeDecodeError as error:
            offset = at - len(rest) + error.start
            raise UserError(
                f"{printable(path)}: not UTF-8 at byte {offset} ({error.reason}); convert the file to UTF-8"
            ) from None
        if not block:
            return
        rest = (rest + block)[used:]
        yield text if at else text.removeprefix("\ufeff")


def refuse_utf16(block: bytes, at: int, where: str) -> None:
    """Raises UserError if `block`, read at byte `at`, is UTF-16 or has many NUL bytes: it is not UTF-8 text."""
    if at == 0 and block.startswith(UTF16_MARKS):
        raise UserError(f"{where}: is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW")
    zeros = block.count(0)
    if zeros * 100 > (BLOCK if at else len(block)):
        raise UserError(
            f"{where}: {zeros / len(block):.0%} of the {len(block):,} bytes from byte {at} on are zero, so it is UTF-16 or "
            "not text; convert it to UTF-8 (iconv -f UTF-16LE -t UTF-8 FILE > NEW), or repair the file"
        )


def read_rows(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, raw line) of a file of JSON rows, plain, .gz or .zst; lines of white space are left out."""
    name, began = printable(path), False
    lines, errors = _unpacked(file, path)
    try:
        for number, line in enumerate(iter(partial(lines.readline, ROW_BYTES + 1), b""), 1):
            if number == 1:
                refuse_utf16(line[:BLOCK], 0, name)
                line = line.removeprefix(codecs.BOM_UTF8)
            if len(line) > ROW_BYTES:
                raise UserError(
                    f"{name}:{number}: is longer than {ROW_BYTES >> 20} MiB, too much for one row; cut it into documents"
                )
            if line.isspace():
                continue
            if not began and line.lstrip().startswith(b"["):
                raise UserError(
                    f"{name}: is one JSON array, not one JSON object on each line; convert it: jq -c '.[]' FILE > NEW.jsonl"
                )
            began = True
            yield number, line
    except errors as error:
        kind = path.suffix[1:].lower()
        raise UserError(f"{name}: damaged or cut-off {kind} file ({printable(error)}); copy it again") from None


def _unpacked(file: BinaryIO, path: Path) -> tuple[BinaryIO, tuple[type[Exception], ...]]:
    """The content of a file, unpacked as its suffix says, and the exceptions that unpacking may raise."""
    suffix = path.suffix.lower()
    if suffix not in (".gz", ".zst"):
        return file, ()
    if os.fstat(file.fileno()).st_size == 0:
        raise UserError(f"{printable(path)}: has no bytes, so it is a cut-off {suffix[1:]} file; copy it again")
    if suffix == ".gz":
        unpacked: Any = gzip.GzipFile(fileobj=file)
        return io.BufferedReader(unpacked, BLOCK), (gzip.BadGzipFile, EOFError, zlib.error)
    zstandard = _optional("zstandard", "zstd", path)
    return io.BufferedReader(ZstdFile(file, zstandard), BLOCK), (EOFError, zstandard.ZstdError)


class ZstdFile(io.RawIOBase):
    """The unpacked content of a .zst file. Unlike the library's own reader, it detects a last frame that was cut off."""

    def __init__(self, file: BinaryIO, zstandard: Any):
        self._file = file
        self._library = zstandard
        self._frame: Any = None  # decompresses the frame that is being read; None between frames
        self._packed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """Always true."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer`; returns the number of bytes. Raises EOFError if the file ends inside a frame."""
        while not self._ready:
            packed = self._packed or self._file.read(ZSTD_FED)
            if not packed:
                if self._frame is not None:
                    raise EOFError("it ends inside a frame")
                return 0
            if self._frame is None:
                self._frame = self._library.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj()
            self._ready = memoryview(self._frame.decompress(packed))
            self._packed = b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def row_text(line: bytes, field: str, where: str) -> str:
    """The text of one raw row of JSON, "" for a null; `where` is file:line. Raises BadRow."""
    return _field(parsed_row(line, where), field, where)


def parsed_row(line: bytes, where: str) -> Any:
    """The value of one raw row of JSON; `where` is file:line. Raises BadRow."""
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(f"{where}: not UTF-8 at byte {error.start} of the line; convert the file to UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{where}: not valid JSON ({printable(error, 200)}); each line must be one JSON object") from None


def utf8_size(text: str, where: str) -> int:
    """How many bytes `text` has in UTF-8. Raises BadRow on half a surrogate pair, which JSON escapes can produce."""
    if text.isascii():
        return len(text)
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise BadRow(f"{where}: holds half a surrogate pair at character {error.start}; repair the text") from None


def read_parquet(file: BinaryIO, path: Path, field: str, bad: OnBadRow) -> Iterator[str]:
    """The rows of one text column of a .parquet file, read a part of a row group at a time."""
    _optional("pyarrow", "parquet", path)
    import pyarrow
    from pyarrow import parquet

    name = printable(path)
    try:
        table = parquet.ParquetFile(file)
        fields = list(_parquet_fields(table.schema_arrow))
        if field not in fields:
            raise UserError(f"{name}: {_no_field(field, fields)}")
        number = 0
        for batch in table.iter_batches(batch_size=_parquet_rows(table.metadata, field), columns=[field]):
            nested = [] if field in table.schema_arrow.names else field.split(".")[1:]
            for value in _values(batch.column(0), nested):
                number += 1
                try:
                    yield _text(value, field, f"{name}:row {number}")
                except BadRow as error:
                    bad(error)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{name}: not a readable .parquet file ({_first_line(error)})") from None


def parquet_rows(file: BinaryIO, path: Path, fields: Collection[str]) -> Iterator[dict[str, Any]]:
    """The rows of a .parquet file, of each those of `fields` that it has."""
    _optional("pyarrow", "parquet", path)
    import pyarrow
    from pyarrow import parquet

    name = printable(path)
    try:
        table = parquet.ParquetFile(file)
        columns = [column for column in table.schema_arrow.names if column in fields]
        if not columns:
            raise UserError(f"{name}: has none of the fields {', '.join(fields)}")
        for batch in table.iter_batches(batch_size=64, columns=columns):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: not a readable .parquet file ({_first_line(error)})") from None


def _parquet_fields(fields: Any, prefix: str = "") -> Iterator[str]:
    """Names of columns; `a.b` is field b of the structs in a."""
    from pyarrow import types

    for field in fields:
        yield prefix + field.name
        if types.is_struct(field.type):
            yield from _parquet_fields(
                [field.type.field(i) for i in range(field.type.num_fields)], f"{prefix}{field.name}."
            )


def _parquet_rows(metadata: Any, field: str) -> int:
    """How many rows to read at a time: fewer if rows are long."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    size = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == field)
    return max(1, min(256, metadata.num_rows * PARQUET_BATCH // max(1, size)))


def _values(column: Any, nested: list[str]) -> list[Any]:
    """The values of a column, or of a field in its structs; text comes as bytes, which may not be valid UTF-8."""
    import pyarrow
    from pyarrow import compute, types

    if nested:
        column = compute.struct_field(column, nested)
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if types.is_string(column.type) or types.is_large_string(column.type):
        column = column.cast(pyarrow.binary() if types.is_string(column.type) else pyarrow.large_binary())
    return column.to_pylist()


def read_hub(spec: str, field: str, bad: OnBadRow) -> Iterator[str]:
    """The texts in one field of the rows of `hub_rows`."""
    for number, row in enumerate(hub_rows(spec), 1):
        try:
            text = _field(row, field, f"{spec}:row {number}")
        except BadRow as error:
            bad(error)
        else:
            yield text


def hub_rows(spec: str) -> Iterator[Any]:
    """The rows of the Hugging Face dataset `hf://NAME[/CONFIG][:SPLIT]`, streamed.

    NAME is `owner/name` or a bare `name`; a third part is the configuration; the split is `train` unless given.
    """
    datasets = _optional("datasets", "hf", spec)
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()  # its lines about retries would hide the one below
    datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False  # reading data must not run its authors' code
    path, _, split = spec.removeprefix("hf://").partition(":")
    parts = path.split("/")
    if not all(parts) or len(parts) > 3:
        raise UserError(
            f"{spec}: expected hf://NAME[/CONFIG][:SPLIT], e.g. hf://Salesforce/wikitext/wikitext-103-raw-v1"
        )
    try:
        yield from datasets.load_dataset("/".join(parts[:2]), *parts[2:], split=split or "train", streaming=True)
    except Exception as error:  # the library's errors have no common base
        raise hub_error(error)(
            f"{spec}: cannot be read from the Hugging Face hub; check name, split and network, or pass local files "
            f"({type(error).__name__}: {_first_line(error)})"
        ) from None


def hub_error(error: Exception) -> type[UserError]:
    """The class for an error of the Hugging Face hub's libraries: MachineError for one of the network, which may pass."""
    return MachineError if any(word in type(error).__name__ for word in ("Connect", "Timeout")) else UserError


def _field(row: Any, field: str, where: str) -> str:
    """The text in `field` of a row; `a.b` may also mean field b inside field a."""
    if not isinstance(row, dict):
        raise BadRow(f"{where}: expected a JSON object, found {type(row).__name__}")
    if field in row:
        return _text(row[field], field, where)
    value: Any = row
    for part in field.split("."):
        if not isinstance(value, dict) or part not in value:
            raise BadRow(f"{where}: {_no_field(field, list(row))}")
        value = value[part]
    return _text(value, field, where)


def _text(value: Any, field: str, where: str) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return ""  # like an empty text, which is not a document
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadRow(f"{where}: field {field!r} is not UTF-8 at byte {error.start}; convert it to UTF-8") from None
    raise BadRow(f"{where}: field {field!r} holds {type(value).__name__}, not text; set text_field to a text field")


def _no_field(field: str, names: list[str]) -> str:
    named = ", ".join(printable(name, 100) for name in names[:20]) + ", ..." * (len(names) > 20)
    return f"no field {field!r}; set text_field to one of: {named or '(it has no fields)'}"


def _first_line(error: BaseException) -> str:
    return printable((str(error).strip() or type(error).__name__).splitlines()[0])


def _optional(module: str, extra: str, needed_by: object) -> Any:
    try:
        return __import__(module)
    except ImportError:
        raise UserError(f"{printable(needed_by)}: needs {module}; run pip install 'crescendo-lm[{extra}]'") from None
