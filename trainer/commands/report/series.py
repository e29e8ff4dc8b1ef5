"""The rows of metrics.jsonl as the curves of one run's page: few enough points for a browser, however long the run is."""

from __future__ import annotations

import math
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from trainer.runs.metrics import numbered_lines

POINTS = 1000  # of a curve over steps
EVALUATIONS = 500  # of a curve over evaluations
DIGITS = 6
MOST_KEYS = 64  # of a row
AXES = ("step", "tokens", "seconds")
EVALUATED = ("val_", "ema_val_", "task_")  # beginnings of keys that only rows with an evaluation have
NOT_DRAWN = ("compile_seconds", "peak_memory_bytes")  # sums; the tables have them


def read_columns(path: Path) -> dict[str, np.ndarray]:
    """Key -> [rows], NaN where a row has no number. Lines that are not rows, and rows out of order, are left out, as in load.py.

    Raises OSError if the file cannot be read; no columns if there is none."""
    columns: dict[str, array[float]] = {}
    count, before = 0, 0
    if not path.exists():
        return {}
    for _, _, row in numbered_lines(path):
        if row is None or row["step"] <= before:
            continue
        before = row["step"]
        for key, value in row.items():
            if type(value) not in (int, float) or (key not in columns and len(columns) >= MOST_KEYS):
                continue
            column = columns.setdefault(key, array("d"))
            column.extend([math.nan] * (count - len(column)))
            column.append(_as_float(value))
        count += 1
    for column in columns.values():
        column.extend([math.nan] * (count - len(column)))
    return {key: np.frombuffer(column, dtype=np.float64) for key, column in columns.items()}


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.nan


def thinned(columns: dict[str, np.ndarray]) -> dict[str, Any]:
    """What the page draws: {every, points, evaluations}. points: means of `every` neighbouring rows, with the lowest and the highest
    loss of each; evaluations: rows with one, some of them if there are many, the best and the last always."""
    if not columns:
        return {"every": 1, "points": {}, "evaluations": {}}
    rows = len(columns["step"])
    every = max(1, math.ceil(rows / POINTS))
    steps = {key: values for key, values in columns.items() if not key.startswith(EVALUATED) and key not in NOT_DRAWN}
    starts = np.arange(0, rows, every)
    points = {key: _means(values, starts) for key, values in steps.items()}
    for key in AXES:
        points[key] = columns[key][np.minimum(starts + every, rows) - 1]  # where a point ends
    if "loss" in columns:
        filled = columns["loss"]
        points["loss_low"], points["loss_high"] = np.fmin.reduceat(filled, starts), np.fmax.reduceat(filled, starts)
    chosen = _evaluated(columns)
    evaluations = {key: values[chosen] for key, values in columns.items() if key in AXES or key.startswith(EVALUATED)}
    return {"every": every, "points": _numbers(points), "evaluations": _numbers(evaluations)}


def _means(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The mean of the finite values from each start to the next; NaN where none is."""
    there = np.isfinite(values)
    count = np.add.reduceat(there, starts, dtype=np.int64)
    total = np.add.reduceat(np.where(there, values, 0), starts)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _evaluated(columns: dict[str, np.ndarray]) -> np.ndarray:
    """The rows whose evaluation is drawn."""
    keys = [key for key in columns if key.startswith(EVALUATED)]
    if not keys:
        return np.array([], dtype=int)
    rows = np.flatnonzero(np.any([np.isfinite(columns[key]) for key in keys], axis=0))
    if len(rows) <= EVALUATIONS:
        return rows
    kept = set(rows[np.linspace(0, len(rows) - 1, EVALUATIONS).round().astype(int)].tolist())
    losses = columns.get("val_loss")
    if losses is not None and np.isfinite(losses[rows]).any():
        kept.add(int(rows[np.nanargmin(losses[rows])]))
    return np.array(sorted(kept))


def _numbers(columns: dict[str, np.ndarray]) -> dict[str, list[float | int | None]]:
    """Columns for JSON, with DIGITS digits; None for what is not finite. Columns without a number are left out."""
    found: dict[str, list[float | int | None]] = {}
    for key, values in columns.items():
        if not np.isfinite(values).any():
            continue
        whole = key in AXES[:2]
        found[key] = [
            None if not math.isfinite(value) else int(value) if whole else float(f"{value:.{DIGITS}g}")
            for value in values.tolist()
        ]
    return found


def charts(series: dict[str, Any]) -> list[dict[str, Any]]:
    """The charts of a page: title, unit, and series with key, label, where it comes from. Only those that have points."""
    points, evaluations = series["points"], series["evaluations"]

    def over_steps(key: str, label: str, **more: Any) -> dict[str, Any] | None:
        return {"key": key, "from": "points", "label": label, **more} if key in points else None

    def evaluated(key: str, label: str, colour: int | None = None) -> dict[str, Any] | None:
        return {"key": key, "from": "evaluations", "label": label, "colour": colour} if key in evaluations else None

    parts = sorted(key for key in points if key.startswith("loss_") and key not in ("loss_low", "loss_high"))
    tasks = sorted(key for key in evaluations if key.startswith("task_"))
    objective = sorted(key for key in evaluations if key.startswith("val_objective_"))
    epochs = sorted(key for key in points if key == "epoch" or key.startswith("epoch_"))
    wanted: list[tuple[str, str, str, list[dict[str, Any] | None], dict[str, bool]]] = [
        (
            "loss", "Loss", "nats per token",
            [over_steps("loss", "training", band=["loss_low", "loss_high"], smooth=True),
             evaluated("val_loss", "validation", 1), evaluated("ema_val_loss", "validation, moving average", 2),
             evaluated("val_loss_hlb", "validation, protocol hlb", 3)],
            {"wide": True, "trim": True},
        ),
        (
            "bits", "Bits per byte", "validation",
            [evaluated("val_bits_per_byte", "validation", 1), evaluated("ema_val_bits_per_byte", "moving average", 2)],
            {"trim": True},
        ),
        ("lr", "Learning rate", "of the matrices", [over_steps("lr", "learning rate")], {}),
        ("norm", "Gradient norm", "before clipping", [over_steps("grad_norm", "gradient norm", smooth=True)], {"trim": True}),
        ("speed", "Speed", "tokens per second", [over_steps("tokens_per_second", "tokens/s", smooth=True)], {"zero": True}),
        ("mfu", "MFU", "share of the peak", [over_steps("mfu", "MFU", smooth=True)], {"zero": True}),
        ("parts", "Further losses", "training", [over_steps(key, key[5:], smooth=True) for key in parts], {"trim": True}),
        ("objective", "Objective", "validation", [evaluated(key, key[14:]) for key in objective], {}),
        ("tasks", "Tasks", "at evaluations", [evaluated(key, key[5:]) for key in tasks], {}),
        ("length", "Sequence length", "tokens", [over_steps("sequence_length", "sequence length", steps=True)], {"zero": True}),
        ("batch", "Batch multiplier", "of tokens_per_step", [over_steps("batch_multiplier", "multiplier", steps=True)], {"zero": True}),
        ("noise", "Gradient noise scale", "tokens", [over_steps("noise_scale", "noise scale", smooth=True)], {}),
        ("epoch", "Epochs", "passes over the data", [over_steps(key, key) for key in epochs], {"zero": True}),
    ]  # fmt: skip
    found = []
    for name, title, unit, lines, look in wanted:
        there = [line for line in lines if line is not None]
        if there and not _constant(points, name, there):
            found.append({"id": name, "title": title, "unit": unit, "series": there, **look})
    return found


def _constant(points: dict[str, Any], name: str, lines: list[dict[str, Any]]) -> bool:
    """Whether a chart would show one and the same number, and its name says that this is not worth a picture."""
    return name in ("length", "batch") and all(len(set(points[line["key"]])) < 2 for line in lines)
