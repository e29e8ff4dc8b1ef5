"""The interface to mosaicml-streaming: its import without the parts that nothing here needs, its writer and its reader."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, Protocol

import numpy as np

from trainer.data.dataset import LENGTH_TYPE, LENGTHS, ColumnInfo, SplitInfo
from trainer.data.encode import Encoded
from trainer.data.index import Shard

# These parts import torchvision, which may be built for another torch, and transformers. Together that takes longer than
# everything else at the start of a process.
UNUSED = ("streaming.vision", "streaming.text", "streaming.multimodal", "streaming.base.dataloader")
PREDICTED = 8  # samples in one forward pass of a teacher
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


def open_shard(folder: Path, shard: Shard, encodings: Mapping[str, str]) -> Any:
    """The library's reader of a shard in `folder`: `reader[i]["tokens"]` is that column of its sample i. encodings: as in
    `encodings_of`. Nothing is read or checked yet."""
    import_streaming()
    from streaming.base.format.base.reader import FileInfo
    from streaming.base.format.mds import MDSReader

    return MDSReader(
        dirname=str(folder),
        split=None,
        column_encodings=list(encodings.values()),
        column_names=list(encodings),
        column_sizes=[None] * len(encodings),
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


class Predictor(Protocol):
    """Adds columns to whole samples: what a model predicts of each token. columns: their types."""

    columns: Mapping[str, ColumnInfo]

    def predict(self, tokens: np.ndarray) -> Mapping[str, np.ndarray]:
        """Samples [N, L + 1] -> each column of their tokens 1 to L: [N, L, ...]"""
        ...

    def facts(self, log: Callable[[str], None]) -> dict[str, Any]:
        """Fields of DatasetInfo that are known once all samples were predicted."""
        ...


class SplitWriter:
    """Packs one split's stream of tokens into samples, and these into MDS shards. columns: those beside `tokens` in what is added;
    predictor: makes more."""

    def __init__(
        self,
        folder: Path,
        dtype: str,
        sample_length: int,
        shard_megabytes: int,
        columns: Mapping[str, ColumnInfo] = MappingProxyType({}),
        predictor: Predictor | None = None,
    ):
        every = {"tokens": ColumnInfo(dtype, []), **columns}
        self._predictor = predictor
        predicted = {} if predictor is None else predictor.columns
        # What was predicted of the token that the last sample shares with the next; of the split's first token nothing is.
        self._shared = {name: np.zeros((1, *column.shape), column.dtype) for name, column in predicted.items()}
        self._waiting: list[dict[str, np.ndarray]] = []  # samples of one length, to be predicted together
        self.info = SplitInfo()
        self._length = sample_length
        self._folder = folder
        # Begins with the token shared with the last sample written.
        self._rest = {name: np.empty((0, *column.shape), column.dtype) for name, column in every.items()}
        self._open = 0  # tokens of the document that has not ended yet
        self._lengths: list[np.ndarray] = []
        self._mds = import_streaming().MDSWriter(
            out=str(folder),
            columns={name: f"ndarray:{column.dtype}" for name, column in {**every, **predicted}.items()},
            hashes=["xxh64"],
            size_limit=shard_megabytes << 20,
        )

    def add(self, encoded: Encoded) -> None:
        """Append a batch to the stream and write the samples it completes."""
        columns = {"tokens": encoded.tokens, **encoded.columns}
        for start in range(0, len(encoded.tokens), APPENDED):
            self._append({name: values[start : start + APPENDED] for name, values in columns.items()})
        lengths = np.diff(encoded.ends, prepend=-self._open)
        self._open += len(encoded.tokens) - int(lengths.sum())
        self._lengths.append(lengths.astype(LENGTH_TYPE))
        self.info.tokens += len(encoded.tokens)
        self.info.documents += len(lengths)
        self.info.bytes += encoded.bytes
        self.info.words += encoded.words

    def _append(self, columns: Mapping[str, np.ndarray]) -> None:
        streams = {name: np.concatenate([rest, columns[name]]) for name, rest in self._rest.items()}
        ends = range(self._length, len(streams["tokens"]), self._length)
        for end in ends:
            self._write({name: stream[end - self._length : end + 1] for name, stream in streams.items()})
        self._rest = {name: stream[len(ends) * self._length :] for name, stream in streams.items()}

    def finish(self) -> None:
        """Write the last, shorter sample, the index and the lengths of the documents."""
        self._write_waiting()
        if len(self._rest["tokens"]) > 1:
            self._write(self._rest)
            self._write_waiting()
        self._mds.finish()
        (self._folder / LENGTHS).write_bytes(b"".join(lengths.tobytes() for lengths in self._lengths))

    def _write(self, sample: Mapping[str, np.ndarray]) -> None:
        self._waiting.append(dict(sample))
        if self._predictor is None or len(self._waiting) == PREDICTED:
            self._write_waiting()

    def _write_waiting(self) -> None:
        samples, self._waiting = self._waiting, []
        if self._predictor is not None and samples:
            predicted = self._predictor.predict(np.stack([sample["tokens"] for sample in samples]))
            for name, values in predicted.items():  # [N, L, ...]
                for sample, rows in zip(samples, values, strict=True):
                    sample[name] = np.concatenate([self._shared[name], rows])
                    self._shared[name] = rows[-1:]
        for sample in samples:
            self._mds.write(sample)
            self.info.samples += 1
