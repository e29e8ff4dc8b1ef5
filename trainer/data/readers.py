"""One reader per file format: text in bounded memory, and an error line that says where in the file it went wrong."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from trainer.errors import UserError

BLOCK = 1 << 18  # bytes


class CountedFile(io.FileIO):
    """A file that reports how many bytes each read took, for progress and time left."""

    def __init__(self, path: Path, on_read: Callable[[int], None]):
        super().__init__(path, "rb")
        self._on_read = on_read

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer`; the number of bytes."""
        count = super().readinto(buffer) or 0
        self._on_read(count)
        return count


def read_text(file: BinaryIO, name: str, start: int = 0, stop: int | None = None) -> Iterator[str]:
    """The UTF-8 text of `file` between the byte offsets `start` and `stop`, in blocks, line ends as they are."""
    file.seek(start)
    rest = b""
    while True:
        at = file.tell()
        wanted = BLOCK if stop is None else min(BLOCK, stop - at)
        block = file.read(wanted)
        try:
            text, used = codecs.utf_8_decode(rest + block, "strict", not block)
        except UnicodeDecodeError as error:
            offset = at - len(rest) + error.start
            raise UserError(f"{name}: not UTF-8 at byte {offset} ({error.reason}); convert the file to UTF-8") from None
        if not block:
            return
        rest = (rest + block)[used:]
        yield text


def read_jsonl(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """The raw lines of a .jsonl, .jsonl.gz or .jsonl.zst file."""
    lines: Any = file
    errors: tuple[type[Exception], ...] = ()
    if path.suffix == ".gz":
        lines, errors = gzip.GzipFile(fileobj=file), (gzip.BadGzipFile, EOFError, zlib.error)
    elif path.suffix == ".zst":
        zstandard = _optional("zstandard", "zstd", path)
        lines = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        lines, errors = io.BufferedReader(lines, BLOCK), (zstandard.ZstdError,)
    try:
        yield from lines
    except errors as error:
        raise UserError(f"{path}: damaged or cut-off {path.suffix[1:]} file ({error}); copy it again") from None


def read_parquet(file: BinaryIO, path: Path, field: str) -> Iterator[str]:
    """The rows of one text column of a .parquet file, read a part of a row group at a time."""
    _optional("pyarrow", "parquet", path)
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
        names = table.schema_arrow.names
        if field not in names:
            raise UserError(f"{path}: {_no_field(field, names)}")
        number = 0
        for batch in table.iter_batches(batch_size=256, columns=[field]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield _text(value, field, f"{path}:row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable .parquet file ({_first_line(error)})") from None


def read_hub(spec: str, field: str) -> Iterator[str]:
    """The rows of one text field of the Hugging Face dataset `hf://NAME[/CONFIG][:SPLIT]`, streamed.

    NAME is `owner/name` or a bare `name`; a third part is the configuration; the split is `train` unless given.
    """
    datasets = _optional("datasets", "hf", spec)
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()  # its retries would drown the one line below
    datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False  # reading data runs no code of its authors
    path, _, split = spec.removeprefix("hf://").partition(":")
    parts = path.split("/")
    if not all(parts) or len(parts) > 3:
        raise UserError(
            f"{spec}: expected hf://NAME[/CONFIG][:SPLIT], e.g. hf://Salesforce/wikitext/wikitext-103-raw-v1"
        )
    try:
        rows = datasets.load_dataset("/".join(parts[:2]), *parts[2:], split=split or "train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield _field(row, field, f"{spec}:row {number}")
    except UserError:
        raise
    except Exception as error:  # the library's errors have no common base
        raise UserError(
            f"{spec}: cannot be read from the Hugging Face hub; check name, split and network, or pass local files "
            f"({type(error).__name__}: {_first_line(error)})"
        ) from None


def row_text(line: bytes, field: str, where: str) -> str:
    """The text of one raw .jsonl line; `where` is file:line."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start} of the line; convert the file to UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}); each line must be one JSON object") from None
    return _field(row, field, where)


def _field(row: Any, field: str, where: str) -> str:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
    if field not in row:
        raise UserError(f"{where}: {_no_field(field, list(row))}")
    return _text(row[field], field, where)


def _text(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(
            f"{where}: field {field!r} holds {type(value).__name__}, not text; set text_field to a text field"
        )
    return value


def _no_field(field: str, names: list[str]) -> str:
    return f"no field {field!r}; set text_field to one of: {', '.join(map(str, names)) or '(it has no fields)'}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _optional(module: str, extra: str, needed_by: object) -> Any:
    try:
        return __import__(module)
    except ImportError:
        raise UserError(f"{needed_by}: needs {module}; run pip install 'crescendo-lm[{extra}]'") from None
