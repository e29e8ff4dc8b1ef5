"""MDS shards that mosaicml-streaming or llm-foundry wrote, as a source of text or of token ids. The library decodes them.

`index.json` may come from a stranger: names must stay inside its folder, only the column that is asked for is decoded, and never
a pickle. Shards may be compressed; their hashes are compared if there are any.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from trainer.core.errors import Damaged, UserError
from trainer.core.files import bare_name, parse_json, read_small, system_error
from trainer.core.text import printable
from trainer.data import dataset
from trainer.data.dataset import whole_number
from trainer.data.readers import BadRow, OnBadRow
from trainer.data.token_files import TYPES

TEXT_COLUMN, TOKEN_COLUMN = "text", "tokens"


@dataclass(frozen=True)
class MdsShard:
    """A shard of an index: where the uncompressed file and the compressed one (if any) are, and what must be in them."""

    raw: Path
    raw_bytes: int
    raw_hashes: dict[str, str]
    samples: int
    compression: str | None
    zipped: Path | None
    zip_hashes: dict[str, str]


@dataclass(frozen=True)
class MdsIndex:
    """The shards below one index.json, and the column of them that is read.

    sizes: bytes of each column, None if they vary. token_dtype: the type of the ids in a column of raw bytes.
    """

    path: Path
    shards: list[MdsShard]
    column: str
    number: int  # of the column
    sizes: list[int | None]
    encoding: str
    token_dtype: str | None

    @property
    def holds_ids(self) -> bool:
        """Whether the column holds token ids instead of text."""
        return self.encoding.startswith("ndarray") or self.token_dtype is not None

    @property
    def total_bytes(self) -> int:
        """Size of all shards, uncompressed."""
        return sum(shard.raw_bytes for shard in self.shards)

    def texts(self, bad: OnBadRow, on_read: Callable[[int], None]) -> Iterator[str]:
        """The text of each row. bad: called with each row that is not UTF-8; on_read: with the size of each row in bytes."""
        for value, where in self._values(on_read):
            try:
                yield value.decode("utf-8")
            except UnicodeDecodeError as error:
                bad(
                    BadRow(
                        f"{where}: column {self.column!r} is not UTF-8 at byte {error.start}; for token ids set token_dtype"
                    )
                )

    def blocks(self, eot_id: int, on_read: Callable[[int], None]) -> Iterator[tuple[np.ndarray, str]]:
        """The ids of each row, and where it is. If each row is a document, `eot_id` ends it."""
        for value, where in self._values(on_read):
            ids = self._ids(value, where)
            yield ids if self.is_stream else np.append(ids, eot_id), where

    @functools.cached_property
    def is_stream(self) -> bool:
        """Whether rows of ids are parts of one stream, as llm-foundry cuts it: all have one length, only the last one of a writer,
        which has a folder of its own, may be shorter. Otherwise each row is a document.
        """
        length = None
        for shard, after in zip(self.shards, [*self.shards[1:], None], strict=True):
            may_be_shorter = after is None or after.raw.parent != shard.raw.parent
            for row, (value, where) in enumerate(self._rows_of(shard), 1):
                count = len(self._ids(value, where))
                length = count if length is None else length
                if count > length or (count < length and not (may_be_shorter and row == shard.samples)):
                    return False
        return True

    def _values(self, on_read: Callable[[int], None]) -> Iterator[tuple[bytes, str]]:
        for shard in self.shards:
            for value, where in self._rows_of(shard):
                on_read(len(value))
                yield value, where

    def _rows_of(self, shard: MdsShard) -> Iterator[tuple[bytes, str]]:
        """(the column's bytes, where they are) of each row. Raises UserError if the shard is missing or damaged."""
        name, content = printable(shard.raw), _content(shard)
        starts = np.frombuffer(content[4 : 4 * shard.samples + 8], "<u4").tolist()
        whole = len(starts) == shard.samples + 1 and starts == sorted(starts) and starts[-1] == len(content)
        if not whole or int.from_bytes(content[:4], "little") != shard.samples:
            raise UserError(f"{name}: does not hold the {shard.samples:,} rows of its index; copy it again")
        for row, (start, stop) in enumerate(zip(starts, starts[1:], strict=False)):
            yield self._value(bytes(content[start:stop]), f"{name}: row {row}"), f"{name}: row {row}"

    def _value(self, row: bytes, where: str) -> bytes:
        """The column's bytes in a row, which holds the sizes of the columns whose size varies, uint32, then all columns."""
        head = 4 * self.sizes.count(None)
        varying = iter(np.frombuffer(row[:head], "<u4").tolist()) if len(row) >= head else iter(())
        sizes = [next(varying, 0) if size is None else size for size in self.sizes]
        if head + sum(sizes) != len(row):
            raise UserError(f"{where}: has {len(row):,} bytes, its columns {head + sum(sizes):,}; copy the shard again")
        start = head + sum(sizes[: self.number])
        return row[start : start + sizes[self.number]]

    def _ids(self, value: bytes, where: str) -> np.ndarray:
        """The ids in a column: [N], of one of TYPES."""
        from streaming.base.format.mds.encodings import mds_decode

        try:
            ids = np.frombuffer(value, self.token_dtype) if self.token_dtype else mds_decode(self.encoding, value)
        except (ValueError, KeyError, IndexError) as error:
            raise UserError(f"{where}: column {self.column!r} cannot be decoded ({printable(error, 200)})") from None
        if ids.ndim != 1 or ids.dtype.name not in TYPES:
            raise UserError(
                f"{where}: column {self.column!r} holds {ids.dtype.name} of shape {ids.shape}, not token ids ({', '.join(TYPES)})"
            )
        return ids


def is_index(path: Path) -> bool:
    """Whether a file is the index.json of MDS shards."""
    try:
        return path.name == dataset.INDEX and isinstance(json.loads(read_small(path)).get("shards"), list)
    except (ValueError, RecursionError, AttributeError, UserError):
        return False


def open_index(path: Path, field: str, token_dtype: str | None) -> MdsIndex:
    """The index at `path`. field: the column to read; if it is `text` and there is none, `tokens`. Raises UserError."""
    if any((folder / dataset.FILE).exists() for folder in (path.parent, path.parent.parent)):
        raise UserError(
            f"{printable(path.parent)}: is a prepared dataset, which is trained on as it is: give its folder as data.path, without "
            "data.source"
        )
    try:
        entries = parse_json(read_small(path), path)["shards"]
        shards = [_shard(entry, path.parent) for entry in entries]
        columns = {
            tuple(zip(e["column_names"], e["column_encodings"], e["column_sizes"], strict=True)) for e in entries
        }
        [names, encodings, sizes] = map(list, zip(*columns.pop(), strict=True))
        if columns:
            raise ValueError("its shards differ in their columns")
    except (Damaged, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"{printable(path)}: is not an index of MDS shards that can be read ({printable(error, 200)})"
        ) from None
    name = TOKEN_COLUMN if field == TEXT_COLUMN and field not in names and TOKEN_COLUMN in names else field
    if name not in names:
        named = ", ".join(printable(column, 100) for column in names)
        raise UserError(f"{printable(path)}: has no column {name!r}; set text_field to one of: {named}")
    number = names.index(name)
    encoding = encodings[number]
    raw = encoding == "bytes"
    if raw and name == TOKEN_COLUMN and token_dtype is None:
        raise UserError(
            f"{printable(path)}: column {name!r} holds raw bytes; set token_dtype to the type of its ids (llm-foundry: int64, later int32)"
        )
    if not raw and encoding != "str" and encoding.split(":")[0] != "ndarray":
        raise UserError(
            f"{printable(path)}: column {name!r} is of type {printable(encoding)}; str, bytes and ndarray can be read"
        )
    return MdsIndex(path, shards, name, number, sizes, encoding, token_dtype if raw else None)


def _shard(entry: dict[str, Any], folder: Path) -> MdsShard:
    """Raises ValueError, KeyError, TypeError or AttributeError if an entry of `shards` is not as the library writes it."""
    raw, zipped = entry["raw_data"], entry["zip_data"]
    if (entry["format"], entry["version"]) != ("mds", 2):
        raise ValueError(f"format {entry['format']}, version {entry['version']}")
    for size in entry["column_sizes"]:
        whole_number(size or 0, "column_sizes")
    return MdsShard(
        _inside(folder, raw["basename"]),
        whole_number(raw["bytes"], "bytes", 1, 2**32 - 1),  # offsets in a shard are uint32
        dict(raw["hashes"]),
        whole_number(entry["samples"], "samples", 1),
        entry["compression"],
        _inside(folder, zipped["basename"]) if zipped else None,
        dict(zipped["hashes"]) if zipped else {},
    )


def _inside(folder: Path, name: str) -> Path:
    """The path of a shard; several writers' shards are in folders below that of the merged index."""
    return folder.joinpath(*(bare_name(part, "basename") for part in PurePosixPath(name).parts))


def _content(shard: MdsShard) -> memoryview:
    """The bytes of a shard: mapped into memory, or unpacked there."""
    from trainer.data.mds import import_streaming

    import_streaming()
    from streaming.base.compression import decompress

    try:
        if shard.zipped is None or shard.raw.exists():
            content = np.memmap(shard.raw, np.uint8, "r").data
        else:
            packed = shard.zipped.read_bytes()
            _compare(packed, shard.zip_hashes, shard.zipped)
            content = memoryview(decompress(shard.compression, packed))
    except FileNotFoundError as error:
        raise UserError(f"{printable(error.filename)}: is missing, but its index names it; copy it again") from None
    except OSError as error:
        raise system_error(error, f"{printable(shard.raw)}: cannot be read") from None
    except UserError:
        raise
    except Exception as error:  # each compression library has its own; an empty file cannot be mapped
        name = printable(shard.raw if shard.zipped is None else shard.zipped)
        raise UserError(f"{name}: cannot be read ({printable(error, 200)}); copy it again") from None
    if len(content) != shard.raw_bytes:
        raise UserError(
            f"{printable(shard.raw)}: has {len(content):,} bytes, its index says {shard.raw_bytes:,}; copy it again"
        )
    _compare(content, shard.raw_hashes, shard.raw)
    return content


def _compare(content: bytes | memoryview, hashes: dict[str, str], path: Path) -> None:
    """Raises UserError if `content` has another hash than its index states, or if none that it states can be computed."""
    from streaming.base.hashing import get_hash, is_hash

    known = {name: stated for name, stated in hashes.items() if is_hash(name)}
    if hashes and not known:
        raise UserError(
            f"{printable(path)}: its index states only hashes that are not known here ({printable(', '.join(hashes))}), so it cannot "
            "be checked; write the shards again with sha1 or xxh64"
        )
    for name, stated in known.items():
        if get_hash(name, content) != stated:  # type: ignore[arg-type]  # any buffer will do
            raise UserError(
                f"{printable(path)}: is damaged: its {printable(name)} is not the one in its index; copy it again"
            )
