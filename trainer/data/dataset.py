"""`dataset.json`: what a prepared dataset holds, and whether two datasets are the same.

    DIR/dataset.json            this description, written last
    DIR/tokenizer.json          Hugging Face format, whatever tokenizer was used
    DIR/{train,validation}/     index.json and shard.*.mds, one column `tokens`

A split is one stream of tokens: its documents in order, each followed by the end-of-text id. Stored sample i holds the
stream's tokens [i*L, i*L + L], both ends included, so neighbours share one token and every token but the first is a
target exactly once. Only the last sample may be shorter (two tokens at least). Nothing is padded.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.errors import UserError

FORMAT = 1
FILE = "dataset.json"
SPLITS = ("train", "validation")


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
class DatasetInfo:
    """The content of dataset.json."""

    tokenizer: TokenizerInfo
    dtype: str
    sample_length: int
    splits: dict[str, SplitInfo]
    fingerprint: str
    source: str
    arguments: dict[str, Any]
    versions: dict[str, str]
    format: int = FORMAT

    @classmethod
    def load(cls, path: str | Path) -> DatasetInfo:
        """The description of the dataset in the local folder `path`. Raises UserError where there is none."""
        folder = Path(path).expanduser()
        file = folder / FILE
        if file.is_file():
            if not (folder / "tokenizer.json").is_file():
                raise UserError(
                    f"{folder}: has no tokenizer.json, so it is an unfinished copy; copy or prepare it again"
                )
            return cls.from_json(file.read_bytes(), str(file))
        if folder.exists():
            raise UserError(
                f"{folder}: has no {FILE}, so it is no dataset or an unfinished copy; copy or prepare it again"
            )
        unfinished = partial_folder(folder).exists()
        raise UserError(
            f"no dataset at {folder}{' (its preparation did not finish)' if unfinished else ''}: "
            f"run `python -m trainer prepare --source ... --out {folder}`, or set data.source"
        )

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> DatasetInfo:
        """The description in `text`; `where` names the file in error lines."""
        try:
            content = json.loads(text)
            version = content["format"]
            if version != FORMAT:
                raise UserError(f"{where}: format {version!r}, this version reads {FORMAT}; prepare the data again")
            content["tokenizer"] = TokenizerInfo(**content["tokenizer"])
            content["splits"] = {name: SplitInfo(**split) for name, split in content["splits"].items()}
            info = cls(**content)
            counts = [info.sample_length, info.tokenizer.vocab_size, info.tokenizer.eot_id]
            counts += [value for split in info.splits.values() for value in asdict(split).values()]
            if not all(isinstance(count, int) and count >= 0 for count in counts) or info.sample_length < 1:
                raise ValueError("a count is not a number")
            return info
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{where}: malformed ({error}); prepare or copy the dataset again") from None

    def save(self, folder: str | Path) -> None:
        """Write dataset.json into `folder`."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"
        (Path(folder) / FILE).write_text(text, encoding="utf-8")


def partial_folder(out: Path) -> Path:
    """Where `prepare` writes until everything is there and the folder takes its name."""
    return out.parent / f".{out.name}.partial"


def shard_hashes(split_folder: str | Path) -> list[str]:
    """The xxh64 of every shard of a split, in order, as its index.json states them."""
    index = json.loads((Path(split_folder) / "index.json").read_bytes())
    return [shard["raw_data"]["hashes"]["xxh64"] for shard in index["shards"]]


def fingerprint(tokenizer_sha256: str, sample_length: int, hashes: dict[str, list[str]]) -> str:
    """sha256 over all that decides which tokens a run sees; `hashes` maps each split to its shards' hashes."""
    identity = [tokenizer_sha256, sample_length, [[split, hashes[split]] for split in sorted(hashes)]]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()
