"""Which of several datasets each row of a run comes from, for `data.mix`.

The asked number of rows of a dataset after i rows is S(i), the integral of its share. Row r of a dataset may come once S has passed
r - 1, and must have come when S reaches r. Of those that may come, the one that must come first does. Such an order exists for any
shares, and then this rule finds it: so at every row, each dataset has had less than one row more or fewer than asked (the argument of
proportionate fairness, Baruah et al., Algorithmica 15, 1996).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from trainer.data.order import LruCache

CHUNK = 4096  # rows that are assigned together
SLACK = 1e-9  # rows: what rounding may add to a time at which S is a whole number
NEVER = 2**62
HALVINGS = 64  # of an interval of time: to the last bit


class Ramp(NamedTuple):
    """The weight of a dataset: `start` at row 0, `end` from row `until` on, linear between."""

    start: float
    end: float
    until: float = 0.0


class Proportions:
    """The order of the datasets. One of them at least has a weight above 0 at every row."""

    def __init__(self, ramps: Sequence[Ramp]) -> None:
        self.ramps = ramps
        self._breaks = np.unique([0.0, *(ramp.until for ramp in ramps)])  # rows where a share stops changing
        self._weights = np.array([self.weights(at) for at in self._breaks])  # [breaks, datasets]
        spans = np.diff(self._breaks)
        self._slopes = np.vstack([np.diff(self._weights, axis=0) / spans[:, None], np.zeros(len(ramps))])
        passed = [self._within(i, np.array([span]))[0] for i, span in enumerate(spans)]
        self._before = np.vstack([np.zeros(len(ramps)), np.cumsum(np.reshape(passed, (-1, len(ramps))), axis=0)])
        self._counts = {0: [0] * len(ramps)}  # chunk -> rows of each dataset before it
        self._chunks: LruCache[np.ndarray] = LruCache(4)

    def weights(self, row: float) -> list[float]:
        """The weight of each dataset at a row."""
        return [
            ramp.end if row >= ramp.until else ramp.start + (ramp.end - ramp.start) * row / ramp.until
            for ramp in self.ramps
        ]

    def asked(self, rows: np.ndarray) -> np.ndarray:
        """S: how many of the first `rows` [n] rows are to come from each dataset, [n, datasets]."""
        part = np.searchsorted(self._breaks, rows, side="right") - 1
        found = np.empty((len(rows), len(self.ramps)))
        for i in np.unique(part):
            here = part == i
            found[here] = self._before[i] + self._within(int(i), rows[here] - self._breaks[i])
        return found

    def assigned(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(the dataset of each of the rows `first` .. `first + count`, [count]; how many rows before them come from each, [datasets])."""
        chunks = range(first // CHUNK, (first + count - 1) // CHUNK + 1)
        chosen = np.concatenate([self._chunk(chunk) for chunk in chunks])
        offset = first - chunks[0] * CHUNK
        before = np.bincount(chosen[:offset], minlength=len(self.ramps))
        return chosen[offset : offset + count], before + self._counts[chunks[0]]

    def mark(self, row: int) -> list[int]:
        """From where to assign `row` without those before it: a chunk, and the rows of each dataset before it."""
        self._chunk(row // CHUNK)
        return [row // CHUNK, *self._counts[row // CHUNK]]

    def go_on(self, mark: list[int]) -> None:
        """Go on from a `mark`. ValueError if it is none of these proportions."""
        chunk, *counts = mark
        asked = self.asked(np.array([float(chunk * CHUNK)]))[0]
        if len(counts) != len(asked) or sum(counts) != chunk * CHUNK or (np.abs(asked - counts) > 1).any():
            raise ValueError(f"{counts} rows of each dataset are not those of {chunk * CHUNK} rows")
        self._counts[chunk] = counts

    def _within(self, part: int, times: np.ndarray) -> np.ndarray:
        """S since the beginning of the part between two breaks: [n] -> [n, datasets]. There the weights are a + b t, their sum is
        c + e t, and the integral of their quotient is b t / e + (a - b c / e) log(1 + e t / c) / e."""
        a, b, t = self._weights[part], self._slopes[part], times[:, None]
        c, e = a.sum(), b.sum()
        if abs(e * times.max(initial=0)) < 1e-9 * c:
            return (a * t + b * t * t / 2) / c
        return b / e * t + (a - b * c / e) / e * np.log1p(e * t / c)

    def _due(self, dataset: int, numbers: np.ndarray) -> np.ndarray:
        """The time at which S of a dataset reaches `numbers` [n]: rows, with fractions; NEVER if it does not."""
        end, reached = self._breaks[-1], self._before[-1][dataset]
        share = self._weights[-1][dataset] / self._weights[-1].sum()
        due = np.full(len(numbers), float(NEVER)) if share == 0 else end + (numbers - reached) / share
        low, high = np.zeros(len(numbers)), np.full(len(numbers), end)
        within = numbers <= reached
        for _ in range(HALVINGS if within.any() else 0):
            middle = (low + high) / 2
            short = self.asked(middle)[:, dataset] < numbers
            low, high = np.where(short, middle, low), np.where(short, high, middle)
        return np.where(within, high, due)

    def _chunk(self, chunk: int) -> np.ndarray:
        """The datasets of a chunk's rows, [CHUNK]; those of earlier chunks are assigned first, from the nearest one that is known."""
        if chunk not in self._counts:  # a step asks for the same chunk several times, and a long run knows many
            for at in range(max(known for known in self._counts if known <= chunk), chunk):
                self._chunks.get((at,), self._assign)
        return self._chunks.get((chunk,), self._assign)

    def _assign(self, chunk: int) -> np.ndarray:
        first, counts = chunk * CHUNK, list(self._counts[chunk])
        after = self.asked(np.array([first + CHUNK + 1.0]))[0]
        may, must = [], []  # by dataset: the first and the last row of each of its next rows
        for dataset, done in enumerate(counts):
            numbers = np.arange(done, max(done, int(after[dataset])) + 3)
            due = np.minimum(self._due(dataset, numbers.astype(float)) - SLACK, NEVER)
            may.append(np.floor(due[:-1]).astype(np.int64).tolist())
            must.append(np.ceil(due[1:]).astype(np.int64).tolist())
        chosen = np.empty(CHUNK, np.int64)
        next_of = [0] * len(counts)
        for row in range(CHUNK):
            ready = [d for d, number in enumerate(next_of) if may[d][number] <= first + row]
            best = min(ready, key=lambda d: must[d][next_of[d]])
            chosen[row] = best
            next_of[best] += 1
        self._counts[chunk + 1] = [done + more for done, more in zip(counts, next_of, strict=True)]
        return chosen
