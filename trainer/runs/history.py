"""The data behind a run's curves. It is bounded: a million steps take as much memory and time as ten thousand."""

from __future__ import annotations

from typing import Any

import numpy as np

POINTS = 2000  # the least for a long run; it has at most twice as many
STEP_KEYS = ("tokens", "seconds", "loss", "grad_norm", "lr", "tokens_per_second")
EVALUATION_KEYS = ("tokens", "seconds", "val_loss", "val_bits_per_byte", "ema_val_loss", "ema_val_bits_per_byte")


class History:
    """Collects the rows of metrics.jsonl. A point is the mean of `every` neighbouring steps; NaN if none was finite.

    At 2 * POINTS points, each pair of neighbours becomes one point. At 2 * POINTS evaluations, every second one is dropped.
    """

    def __init__(self) -> None:
        self.every = 1
        self._points: list[np.ndarray] = []  # each [len(STEP_KEYS) + 2]: means, then the lowest and the highest loss
        self._open: list[np.ndarray] = []  # steps of the next point, fewer than `every`; each [len(STEP_KEYS) + 2]
        self._evaluations: list[np.ndarray] = []  # each [len(EVALUATION_KEYS)]

    def add(self, row: dict[str, Any]) -> None:
        means = numbers(row, STEP_KEYS)
        self._open.append(np.append(means, [means[2], means[2]]))
        if len(self._open) == self.every:
            self._points.append(merged(self._open))
            self._open = []
        if len(self._points) == 2 * POINTS:
            self._points = [merged(self._points[first : first + 2]) for first in range(0, 2 * POINTS, 2)]
            self.every *= 2
        if row.get("val_loss") is not None:
            self._evaluations.append(numbers(row, EVALUATION_KEYS))
            if len(self._evaluations) == 2 * POINTS:
                self._evaluations = self._evaluations[1::2]

    def steps(self) -> dict[str, np.ndarray]:
        """STEP_KEYS, loss_low and loss_high -> [points]. The last point may cover fewer steps."""
        points = [*self._points, *([merged(self._open)] if self._open else [])]
        columns = np.array(points).reshape(len(points), len(STEP_KEYS) + 2).T
        return dict(zip((*STEP_KEYS, "loss_low", "loss_high"), columns, strict=True))

    def evaluations(self) -> dict[str, np.ndarray]:
        """EVALUATION_KEYS -> [evaluations]."""
        columns = np.array(self._evaluations).reshape(len(self._evaluations), len(EVALUATION_KEYS)).T
        return dict(zip(EVALUATION_KEYS, columns, strict=True))


def numbers(row: dict[str, Any], keys: tuple[str, ...]) -> np.ndarray:
    return np.array([np.nan if row.get(key) is None else row[key] for key in keys], dtype=np.float64)


def merged(points: list[np.ndarray]) -> np.ndarray:
    """Merge points into one: the mean of the finite values, the lowest loss_low and the highest loss_high."""
    if len(points) == 1:
        return points[0]
    block = np.array(points)  # [points, columns]
    there = np.isfinite(block)
    count = there.sum(axis=0)
    mean = np.where(count > 0, np.where(there, block, 0).sum(axis=0) / np.maximum(count, 1), np.nan)
    mean[-2:] = np.fmin.reduce(block[:, -2]), np.fmax.reduce(block[:, -1])
    return mean


def smoothed(values: np.ndarray, share: float = 0.03) -> np.ndarray:
    """Centred moving average over `share` of all values. It stays symmetric: near the ends it covers fewer. NaN is ignored."""
    half = int(len(values) * share / 2)
    if half == 0:
        return values
    there = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(there, values, 0))])
    count = np.concatenate([[0], np.cumsum(there)])
    at = np.arange(len(values))
    reach = np.minimum(half, np.minimum(at, len(values) - 1 - at))
    first, after = at - reach, at + reach + 1
    return (total[after] - total[first]) / np.where(count[after] > count[first], count[after] - count[first], np.nan)
