"""`data.mix`: rows of several datasets in one stream."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator

import numpy as np

from models.base import IGNORE
from trainer.core.config import DataConfig
from trainer.core.errors import UserError
from trainer.data.dataset import DatasetInfo
from trainer.data.proportions import Proportions, Ramp
from trainer.data.stream import Stream, find_dataset, open_stream


def further_datasets(data: DataConfig, main: DatasetInfo) -> dict[str, tuple[DataConfig, DatasetInfo]]:
    """Name in data.mix -> how that dataset is read, and what it is. UserError if there is none, or if it does not fit the main one."""
    found = {}
    for name, entry in data.mix.items():
        key = f"data.mix.{name}"
        if entry.path is None:
            raise UserError(f"{key}.path: name a prepared dataset")
        own = dataclasses.replace(data, path=entry.path, source=None, mix={})
        info = find_dataset(own)
        assert info is not None  # without a source it is there, or find_dataset has raised
        for what, here, there in (
            ("tokenizer", info.tokenizer.sha256, main.tokenizer.sha256),
            ("records", info.records, main.records),
            ("columns", info.columns, main.columns),
            ("entropy model", info.patches and info.patches.weights, main.patches and main.patches.weights),
        ):
            if here != there:
                raise UserError(
                    f"{key}.path: {entry.path} differs from {data.path} in its {what}; prepare both alike, with one tokenizer"
                )
        found[name] = own, info
    return found


def fingerprint(data: DataConfig, main: DatasetInfo) -> str:
    """That of all data that a run reads."""
    prints = [main.fingerprint, *(info.fingerprint for _, info in further_datasets(data, main).values())]
    return prints[0] if len(prints) == 1 else hashlib.sha256("\n".join(prints).encode()).hexdigest()


def proportions(data: DataConfig, length: int) -> Proportions:
    """The order of the datasets, the main one first. length: tokens of a row."""
    ramps = [Ramp(1.0, 1.0)]
    for entry in data.mix.values():
        until = (entry.until or 0) / length
        ramps.append(Ramp(entry.weight_start if until else entry.weight, entry.weight, until))
    return Proportions(ramps)


def open_mixture(data: DataConfig, main: DatasetInfo, seed: int, length: int) -> MixedStream:
    """The training splits of all datasets. Arguments: as for `open_stream`."""
    further = further_datasets(data, main)
    alone = dataclasses.replace(data, mix={})
    streams = [open_stream(own, info, seed, length) for own, info in ((alone, main), *further.values())]
    return MixedStream(tuple(further), streams, proportions(data, length), length, main.tokenizer.eot_id)


class MixedStream(Stream):
    """Rows of several streams. Row i of the run is at position i * length; which stream it comes from follows from i alone. The
    rows of each stream follow each other as they do without the others."""

    def __init__(
        self, names: tuple[str, ...], streams: list[Stream], order: Proportions, length: int, padding: int
    ) -> None:
        """names: of the streams after the first, which is of the main dataset; length: of every row, at most; padding: the token id of padding, where streams have rows of different width."""
        self.names, self.streams, self.order = names, streams, order
        self._length, self._padding = length, padding
        self.every_token = all(stream.every_token for stream in streams)

    def epoch(self, position: int) -> float:
        """Of the main dataset."""
        return self._epochs(position)[0]

    def epochs(self, position: int) -> dict[str, float]:
        return dict(zip(self.names, self._epochs(position)[1:], strict=True))

    def _epochs(self, position: int) -> list[float]:
        _, before = self.order.assigned(position // self._length, 1)
        return [stream.epoch(rows * self._length) for stream, rows in zip(self.streams, before.tolist(), strict=True)]

    def tokens(self, position: int, length: int, count: int) -> int:
        return sum(stream.tokens(at, length, len(rows)) for stream, at, rows in self._parts(position, 0, count))

    def width(self, position: int, length: int, first: int, count: int) -> int:
        parts = self._parts(position, first, count)
        return max((stream.width(at, length, 0, len(rows)) for stream, at, rows in parts), default=length)

    def batch(self, position: int, length: int, first: int, count: int) -> dict[str, np.ndarray]:
        parts = [
            (stream.batch(at, length, 0, len(rows)), rows) for stream, at, rows in self._parts(position, first, count)
        ]
        if not parts:
            return self.streams[0].batch(0, length, 0, 0)
        found = parts[0][0]
        width = max(part["tokens"].shape[-1] for part, _ in parts)
        fills = {"tokens": self._padding, "targets": IGNORE, "documents": IGNORE}  # of padding; a document of its own
        batch = {}
        for name, values in found.items():
            axis = found["tokens"].ndim - 1
            shape = (count, *values.shape[1:axis], width, *values.shape[axis + 1 :])
            batch[name] = np.full(shape, fills.get(name, 0), values.dtype)
            for part, rows in parts:
                narrow = (rows, *[slice(None)] * (axis - 1), slice(part[name].shape[axis]))
                batch[name][narrow] = part[name]
        return batch

    def read_ahead(self, position: int, length: int, first: int, count: int) -> None:
        for stream, at, rows in self._parts(position, first, count):
            stream.read_ahead(at, length, 0, len(rows))

    def close(self) -> None:
        for stream in self.streams:
            stream.close()

    def mark(self, position: int) -> list[int]:
        return self.order.mark(position // self._length)

    def go_on(self, mark: list[int]) -> None:
        if mark:
            self.order.go_on(mark)

    def _parts(self, position: int, first: int, count: int) -> Iterator[tuple[Stream, int, np.ndarray]]:
        """For each stream that gives any of the rows: it, the position of its own next row, and the places of its rows, [rows]."""
        if count == 0:
            return
        chosen, before = self.order.assigned(position // self._length + first, count)
        for number, stream in enumerate(self.streams):
            rows = np.flatnonzero(chosen == number)
            if len(rows):
                yield stream, int(before[number]) * self._length, rows
