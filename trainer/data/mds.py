"""The interface to mosaicml-streaming: its import without the parts that nothing here needs, its writer and its reader."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from trainer.data.dataset import SplitInfo
from trainer.data.encode import Encoded
from trainer.data.index import Shard

# These parts import torchvision, which may be built for another torch, and transformers. Together that takes longer than
# everything else at the start of a process.
UNUSED = ("streaming.vision", "streaming.text", "streaming.multimodal", "streaming.base.dataloader")
APPENDED = 1 << 20  # tokens copied at a time; one row may have many more


def import_streaming() -> ModuleType:
    """The `streaming` package without the parts that nothing here needs; prints nothing."""
    if "streaming" not in sys.modules:
        sys.modules.update((name, ModuleType(name)) for name in UNUSED)
        sys.modules["streaming.base.dataloader"].StreamingDataLoader = None  # type: ignore[attr-defined]  # the package exports it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import streaming
    return streaming


def open_shard(folder: Path, shard: Shard, dtype: str) -> Any:
    """The library's reader of a shard in `folder`: `reader[i]["tokens"]` is its sample i. Nothing is read or checked yet."""
    import_streaming()
    from streaming.base.format.base.reader import FileInfo
    from streaming.base.format.mds import MDSReader

    return MDSReader(
        dirname=str(folder),
        split=None,
        column_encodings=[f"ndarray:{dtype}"],
        column_names=["tokens"],
        column_sizes=[None],
        compression=None,
        hashes=["xxh64"],
        raw_data=FileInfo(shard.basename, shard.bytes, {"xxh64": shard.xxh64}),
        samples=shard.samples,
        size_limit=None,
        zip_data=None,
    )


def samples_in(head: bytes) -> int:
    """The number of samples of a shard, from its first 4 bytes."""
    return int.from_bytes(head[:4], "little")


class SplitWriter:
    """Packs one split's stream of tokens into samples, and these into MDS shards."""

    def __init__(self, folder: Path, dtype: str, sample_length: int, shard_megabytes: int):
        self.info = SplitInfo()
        self._length = sample_length
        self._dtype = dtype
        self._rest = np.empty(0, dtype)  # begins with the token shared with the last sample written
        self._mds = import_streaming().MDSWriter(
            out=str(folder),
            columns={"tokens": f"ndarray:{dtype}"},
            hashes=["xxh64"],
            size_limit=shard_megabytes << 20,
        )

    def add(self, encoded: Encoded) -> None:
        """Append a batch to the stream and write the samples it completes."""
        for start in range(0, len(encoded.tokens), APPENDED):
            self._append(encoded.tokens[start : start + APPENDED])
        self.info.tokens += len(encoded.tokens)
        self.info.documents += encoded.documents
        self.info.bytes += encoded.bytes
        self.info.words += encoded.words

    def _append(self, tokens: np.ndarray) -> None:
        stream = np.concatenate([self._rest, tokens])
        ends = range(self._length, len(stream), self._length)
        for end in ends:
            self._write(stream[end - self._length : end + 1])
        self._rest = stream[len(ends) * self._length :]

    def finish(self) -> None:
        """Write the last, shorter sample and the index."""
        if len(self._rest) > 1:
            self._write(self._rest)
        self._mds.finish()

    def _write(self, sample: np.ndarray) -> None:
        self._mds.write({"tokens": sample})
        self.info.samples += 1
