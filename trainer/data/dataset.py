"""`dataset.json`: what a prepared dataset holds, and whether two datasets are the same.

    DIR/dataset.json            this description, written last
    DIR/tokenizer.json          Hugging Face format, whatever tokenizer was used
    DIR/{train,validation}/     index.json, shard.*.mds, and lengths.bin

A split is one stream of tokens: its documents in order, each followed by the end-of-text id. Stored sample i holds the
stream's tokens [i*L, i*L + L], both ends included, so neighbours share one token and every token except the first is a
target exactly once. Only the last sample may be shorter (at least two tokens). Nothing is padded. lengths.bin holds the number of
tokens of each document, with its end-of-text id, as little-endian uint32.

A sample has the column `tokens`, and those of `columns`: arrays of the same length that say something about each token. What such a
column says about the first token of a sample is not used, because that token is a target in the sample before.

The fingerprint covers what decides the tokens: the tokenizer, the sample length and the shards; with further columns also the
lengths, which then do not follow from the tokens. The digest of dataset.json covers everything else in it, every index.json, and
lengths.bin. Format 2 had neither lengths nor columns, format 1 no digest either.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainer.core.errors import Absent, Damaged, UserError
from trainer.core.files import DIGEST, parse_json, read_small, sealed, system_error, write_file
from trainer.core.text import printable

FORMATS = (1, 2, 3)
FILE = "dataset.json"
TOKENIZER = "tokenizer.json"
LENGTHS = "lengths.bin"
INDEX = "index.json"
LOSS_MASK = "loss_mask"  # column of chat and preference data, uint8: 1 for a token that an answer consists of, else 0
# Columns of `prepare --teacher`: the ids that a teacher finds most likely at each token, and their log-probabilities, [k] each.
TEACHER_IDS, TEACHER_LOG_PROBS = "teacher_ids", "teacher_log_probs"
# Column of `prepare --patches`: how uncertain an entropy model was of each token, in nats.
ENTROPIES = "entropies"
LENGTH_TYPE = np.dtype("<u4")
COLUMN_TYPES = ("uint8", "uint16", "uint32", "float16", "float32")
SPLITS = ("train", "validation")
RECORDS = (
    "text",
    "chat",
    "preference",
)  # what a document is; preference: two in a row answer the same, the first better
UINT16_IDS = 1 << 16


@dataclass
class TokenizerInfo:
    """Which tokenizer made the ids; `sha256` is that of the stored tokenizer.json, `vocab_size` counts `eot_id` too."""

    name: str
    sha256: str
    vocab_size: int
    eot_id: int


@dataclass
class SplitInfo:
    """Size of one split. `bytes` are UTF-8 bytes of text, `words` are separated by white space."""

    tokens: int = 0
    documents: int = 0
    bytes: int = 0
    words: int = 0
    samples: int = 0


@dataclass
class ColumnInfo:
    """A further column: number type and shape of what it says about one token."""

    dtype: str
    shape: list[int]


@dataclass
class PatchesInfo:
    """What `prepare --patches` found. run: the entropy model, as init_from names one; weights: sha256 of its weights; separate: whether it
    kept documents apart. thresholds: for each rule of models/layers/patching.py, in nats, for patches of patch_size tokens on average.
    histogram: how many entropies lie in each tenth of a nat."""

    run: str
    weights: str
    separate: bool
    patch_size: float
    thresholds: dict[str, float]
    histogram: list[int]

    def check(self) -> None:
        """Raises ValueError if `prepare` would not write such a value."""
        hex_digits(self.weights, "patches.weights")
        numbers = [self.patch_size, *self.thresholds.values()]
        right = isinstance(self.run, str) and isinstance(self.separate, bool)
        if not right or not all(type(number) is float and math.isfinite(number) for number in numbers):
            raise ValueError("patches have a value of the wrong type")
        for count in self.histogram:
            whole_number(count, "patches.histogram")


@dataclass
class DatasetInfo:
    """The content of dataset.json. indexes, lengths: sha256 of each split's index.json and lengths.bin; columns: by name, those
    beside `tokens`; patches: of a dataset with the column ENTROPIES."""

    tokenizer: TokenizerInfo
    dtype: str
    sample_length: int
    splits: dict[str, SplitInfo]
    fingerprint: str
    source: str
    arguments: dict[str, Any]
    versions: dict[str, str]
    indexes: dict[str, str] = field(default_factory=dict)
    lengths: dict[str, str] = field(default_factory=dict)
    columns: dict[str, ColumnInfo] = field(default_factory=dict)
    records: str = RECORDS[0]
    patches: PatchesInfo | None = None
    format: int = FORMATS[-1]

    @classmethod
    def load(cls, path: str | Path) -> DatasetInfo:
        """The description in the local folder `path`, of a dataset or of a run, compared with the tokenizer.json beside it.

        Raises Absent if there is none, Damaged if it is not what was written, another UserError if it is something else.
        """
        folder = Path(path).expanduser()
        if not present(folder):
            raise Absent(_missing(folder))
        if folder.is_file():
            raise UserError(
                f"{folder}: is a file, not a prepared dataset; run `python -m trainer prepare --source {folder} --out DIR` "
                "(with --tokenizer RUN/tokenizer.json if it is for an existing run) and give that folder"
            )
        for name in (FILE, TOKENIZER):
            if not present(folder / name):
                raise UserError(
                    f"{folder}: has no {name}, so it is not a dataset, or an unfinished copy; copy or prepare it again"
                    + foreign_shards(folder)
                )
        info = cls.from_json(read_small(folder / FILE), str(folder / FILE))
        if sha256_of(folder / TOKENIZER) != info.tokenizer.sha256:
            raise Damaged(
                f"{folder / TOKENIZER}: is not the tokenizer that {FILE} names (another sha256); "
                "copy or prepare the dataset again"
            )
        return info

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> DatasetInfo:
        """The description in `text`, checked without reading other files; `where` names the file in error lines."""
        try:
            content = parse_json(text, FILE)
        except Damaged as error:
            why = str(error).removeprefix(f"{FILE}: ")
            raise Damaged(f"{where}: malformed ({why}); prepare or copy the dataset again") from None
        version = content.get("format")
        if version not in FORMATS or isinstance(version, bool):
            raise UserError(
                f"{where}: format {printable(repr(version))}, this version reads {FORMATS[0]} to {FORMATS[-1]}; "
                "prepare the data again"
            )
        if version > 1 and content.pop(DIGEST, None) is None:
            raise Damaged(f"{where}: has lost its digest; prepare or copy the dataset again")
        try:
            content["tokenizer"] = TokenizerInfo(**content["tokenizer"])
            content["splits"] = {name: SplitInfo(**split) for name, split in content["splits"].items()}
            content["columns"] = {name: ColumnInfo(**column) for name, column in content.get("columns", {}).items()}
            content["patches"] = PatchesInfo(**content["patches"]) if "patches" in content else None
            info = cls(**content)
            info._check()
            info.tokenizer.name = printable(info.tokenizer.name)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Damaged(f"{where}: malformed ({printable(error)}); prepare or copy the dataset again") from None
        return info

    def _check(self) -> None:
        """Raises ValueError if `prepare` would not write such a value."""
        tokenizer = self.tokenizer
        hex_digits(self.fingerprint, "fingerprint")
        hex_digits(tokenizer.sha256, "tokenizer.sha256")
        whole_number(tokenizer.vocab_size, "tokenizer.vocab_size", 1)
        whole_number(tokenizer.eot_id, "tokenizer.eot_id", 0, tokenizer.vocab_size - 1)
        whole_number(self.sample_length, "sample_length", 1)
        texts = {"tokenizer.name": tokenizer.name, "source": self.source}
        wrong = [name for name, value in texts.items() if not isinstance(value, str)]
        wrong += [name for name in ("arguments", "versions") if not isinstance(getattr(self, name), dict)]
        if wrong:
            raise ValueError(f"{wrong[0]} has the wrong type")
        if self.dtype != dtype_of(tokenizer.vocab_size):
            raise ValueError(f"dtype {self.dtype!r} is not that of {tokenizer.vocab_size} ids")
        if not self.splits or not set(self.splits) <= set(SPLITS):
            raise ValueError(f"splits are {', '.join(self.splits)}, not {' and '.join(SPLITS)}")
        if self.sealed and set(self.indexes) != set(self.splits):
            raise ValueError("indexes do not name the splits")
        if self.has_lengths and set(self.lengths) != set(self.splits):
            raise ValueError("lengths do not name the splits")
        if self.records not in RECORDS:
            raise ValueError(f"records are {printable(repr(self.records), 60)}, not {', '.join(RECORDS)}")
        if self.records != "text" and LOSS_MASK not in self.columns:
            raise ValueError(f"records are {self.records}, but there is no column {LOSS_MASK}")
        for key in ("indexes", "lengths"):
            for name, digest in getattr(self, key).items():
                hex_digits(digest, f"{key}.{name}")
        for name, column in self.columns.items():
            _check_column(name, column)
        if (self.patches is None) != (ENTROPIES not in self.columns):
            raise ValueError(f"patches and a column {ENTROPIES} belong together")
        if self.patches is not None:
            self.patches.check()
        if self.records == "preference" and any(split.documents % 2 for split in self.splits.values()):
            raise ValueError("records are preference, but a split has an odd number of documents")
        for name, split in self.splits.items():
            for key, count in asdict(split).items():
                whole_number(count, f"splits.{name}.{key}")
            if split.samples != -(-(split.tokens - 1) // self.sample_length):
                raise ValueError(
                    f"{split.tokens} tokens of {name} do not make {split.samples} samples of {self.sample_length}"
                )

    @property
    def sealed(self) -> bool:
        """Whether a digest covers the counts. The counts of format 1 cannot be checked."""
        return self.format > 1

    @property
    def has_lengths(self) -> bool:
        """Whether the lengths of the documents are stored."""
        return self.format > 2

    @property
    def texts_per_row(self) -> int:
        """Documents that belong together, and stay in one row of a batch."""
        return 2 if self.records == "preference" else 1

    def save(self, folder: str | Path) -> None:
        """Write dataset.json into `folder`."""
        content = asdict(self)
        if self.patches is None:
            del content["patches"]  # which earlier versions do not know
        write_file(Path(folder) / FILE, sealed(content))


def _check_column(name: str, column: ColumnInfo) -> None:
    """Raises ValueError if no command of ours writes such a column."""
    if not name.isidentifier() or name == "tokens":
        raise ValueError(f"a column is named {printable(repr(name), 60)}")
    if column.dtype not in COLUMN_TYPES or not isinstance(column.shape, list):
        raise ValueError(f"column {name} has dtype {printable(repr(column.dtype), 60)}")
    for size in column.shape:
        whole_number(size, f"columns.{name}.shape", 1, UINT16_IDS)


def _missing(folder: Path) -> str:
    unfinished = present(partial_folder(folder))
    where = "" if folder.is_absolute() else f" in {Path.cwd()}"
    return (
        f"no dataset at {folder}{where}{' (its preparation did not finish)' if unfinished else ''}: "
        f"run `python -m trainer prepare --source ... --out {folder}`, or set data.source; "
        "if it was moved, give its --data.path"
    )


def foreign_shards(folder: Path) -> str:
    """What to do if a folder without dataset.json holds MDS shards, or folders of them."""
    found = present(folder / INDEX) or any(present(path / INDEX) for path in folder.iterdir() if path.is_dir())
    return "; for MDS shards of another program, give it as data.source, and a new folder as data.path" if found else ""


def present(path: Path) -> bool:
    """Whether `path` exists. Raises MachineError or UserError if the system cannot tell."""
    try:
        return path.exists()
    except OSError as error:
        raise system_error(error, f"{printable(path)}: cannot be read") from None


def dtype_of(vocab_size: int) -> str:
    """The type in which ids are stored."""
    return "uint16" if vocab_size <= UINT16_IDS else "uint32"


def whole_number(value: Any, name: str, low: int = 0, high: int | None = None) -> int:
    """Returns `value` if it is an integer from `low` to `high`; otherwise raises ValueError."""
    if type(value) is not int or value < low or (high is not None and value > high):
        raise ValueError(f"{name} is {printable(repr(value), 60)}")
    return value


def hex_digits(value: Any, name: str, count: int = 64) -> str:
    """Returns `value` if it is `count` hexadecimal digits; otherwise raises ValueError."""
    if not isinstance(value, str) or not re.fullmatch(f"[0-9a-f]{{{count}}}", value):
        raise ValueError(f"{name} is {printable(repr(value), 90)}")
    return value


def partial_folder(out: Path) -> Path:
    """The folder that `prepare` writes to, and renames to `out` when everything is in it."""
    return out.parent / f".{out.name}.partial"


def sha256_of(path: Path) -> str:
    """sha256 of a file. Raises MachineError or UserError if it cannot be read."""
    return _digest(path, hashlib.sha256())


def xxh64_of(path: Path) -> str:
    """xxh64 of a file, as index.json holds it. Raises MachineError or UserError if it cannot be read."""
    import xxhash

    return _digest(path, xxhash.xxh64())


def _digest(path: Path, digest: Any) -> str:
    try:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        raise system_error(error, f"{printable(path)}: cannot be read") from None
    return digest.hexdigest()


def shard_hashes(split_folder: str | Path) -> list[str]:
    """The xxh64 of every shard of a split, in order, as its index.json states them."""
    index = json.loads((Path(split_folder) / INDEX).read_bytes())
    return [shard["raw_data"]["hashes"]["xxh64"] for shard in index["shards"]]


def fingerprint(
    tokenizer_sha256: str, sample_length: int, hashes: dict[str, list[str]], lengths: dict[str, str] | None = None
) -> str:
    """sha256 over all that decides which tokens a run sees. hashes: of each split's shards; lengths: sha256 of each split's
    lengths.bin, for a dataset with further columns."""
    identity: list[Any] = [tokenizer_sha256, sample_length, [[split, hashes[split]] for split in sorted(hashes)]]
    if lengths:
        identity.append([[split, lengths[split]] for split in sorted(lengths)])
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()
