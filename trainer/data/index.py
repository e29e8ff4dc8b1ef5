"""`index.json` lists the shards of a split. It must be what `prepare` writes; this is checked before any shard is touched.

The file may come from a stranger's remote, and the library that reads shards trusts it: names become paths, encodings become
decoders, compressed shards are unpacked to any size. So every value is checked here before it is used.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.core.errors import Damaged
from trainer.core.files import bare_name, parse_json, read_small
from trainer.core.text import printable
from trainer.data import dataset
from trainer.data.dataset import DatasetInfo, hex_digits, whole_number

KEYS = {
    *("column_encodings", "column_names", "column_sizes", "compression", "format", "hashes"),
    *("raw_data", "samples", "size_limit", "version", "zip_data"),
}


@dataclass(frozen=True)
class Shard:
    """A file of a split: its size in bytes, its number of samples, and its hash."""

    basename: str
    bytes: int
    samples: int
    xxh64: str


def read_index(folder: Path, split: str, info: DatasetInfo) -> list[Shard]:
    """The shards of a split of the dataset in `folder`. Raises Damaged if index.json is missing or not what was written."""
    path = folder / split / dataset.INDEX
    if not dataset.present(path):
        raise Damaged(f"data: {path} is missing or damaged: there is no such file; copy or prepare the dataset again")
    data = read_small(path)
    try:
        if info.sealed and hashlib.sha256(data).hexdigest() != info.indexes[split]:
            raise Damaged(f"its sha256 is not the one in {dataset.FILE}")
        return _shards(parse_json(data, dataset.INDEX), split, info)
    except (Damaged, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(
            f"data: {path} is missing or damaged: {printable(error, 300)}; copy or prepare the data again"
        ) from None


def check_fingerprint(folder: Path, info: DatasetInfo) -> None:
    """Raises Damaged if the dataset in `folder` is not the one that `info` describes. Reads only small files."""
    hashes = {split: [shard.xxh64 for shard in read_index(folder, split, info)] for split in info.splits}
    lengths = info.lengths if info.columns else None
    if dataset.fingerprint(info.tokenizer.sha256, info.sample_length, hashes, lengths) != info.fingerprint:
        raise Damaged(
            f"data: the fingerprint in {folder / dataset.FILE} does not match its tokenizer and shards: one of these files was "
            "changed or belongs to another dataset; copy or prepare the data again"
        )


def _shards(index: dict[str, Any], split: str, info: DatasetInfo) -> list[Shard]:
    """Raises ValueError, KeyError, TypeError, AttributeError or Damaged if something is not as `prepare` writes it."""
    if set(index) != {"shards", "version"}:
        raise ValueError(f"its keys are {', '.join(index)}")
    _expect(index["version"], 2, "version")
    shards = [_shard(entry, number, info) for number, entry in enumerate(index["shards"])]
    samples, counts = sum(shard.samples for shard in shards), info.splits[split]
    if samples != counts.samples:
        raise ValueError(f"it lists {samples} samples, {dataset.FILE} {counts.samples}")
    itemsize = np.dtype(info.dtype).itemsize
    for number, shard in enumerate(shards, 1):
        full = max(0, shard.samples - (number == len(shards)))  # the last one of a split may be short
        if shard.bytes < full * (info.sample_length + 1) * itemsize:
            raise ValueError(f"{shard.samples} samples do not fit in the {shard.bytes} bytes of {shard.basename}")
    return shards


def _shard(entry: dict[str, Any], number: int, info: DatasetInfo) -> Shard:
    name = f"shard.{number:05d}.mds"
    if set(entry) != KEYS:
        raise ValueError(f"the keys of {name} are {', '.join(entry)}")
    raw = entry["raw_data"]
    if set(raw) != {"basename", "bytes", "hashes"}:
        raise ValueError(f"the keys of raw_data are {', '.join(raw)}")
    _expect(bare_name(raw["basename"], "raw_data.basename"), name, "raw_data.basename")
    _expect(entry["version"], 2, "version")
    _expect(entry["format"], "mds", "format")
    encodings = encodings_of(info)
    _expect(entry["column_names"], list(encodings), "column_names")
    _expect(entry["column_encodings"], list(encodings.values()), "column_encodings")
    _expect(entry["column_sizes"], [None] * len(encodings), "column_sizes")
    _expect(entry["compression"], None, "compression")
    _expect(entry["zip_data"], None, "zip_data")
    _expect(entry["hashes"], ["xxh64"], "hashes")
    _expect(list(raw["hashes"]), ["xxh64"], "raw_data.hashes")
    whole_number(entry["size_limit"], "size_limit")
    return Shard(
        name,
        whole_number(raw["bytes"], "bytes", 1, 2**32 - 1),  # offsets in a shard are uint32
        whole_number(entry["samples"], "samples"),  # 0 if a single sample is larger than a shard should be
        hex_digits(raw["hashes"]["xxh64"], "xxh64", 16),
    )


def encodings_of(info: DatasetInfo) -> dict[str, str]:
    """Column -> its encoding in MDS, in the order of the library's files."""
    types = {"tokens": info.dtype, **{name: column.dtype for name, column in info.columns.items()}}
    return {name: f"ndarray:{types[name]}" for name in sorted(types)}


def _expect(found: Any, written: Any, name: str) -> None:
    if found != written or type(found) is not type(written):
        raise ValueError(f"{name} is {printable(repr(found), 80)}, not {written!r}")
