"""A run's folder as the report needs it: its final loss, its curves, its config, where it ran. Old and damaged folders too.

Whatever could not be read becomes a line in `Run.notes`, which the report prints; nothing here is guessed.
"""

from __future__ import annotations

import math
import operator
import re
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.core.files import read_json, system_error
from trainer.core.settings import build, free_sections, leaf_keys
from trainer.core.text import printable
from trainer.engine.meta import flops_per_token
from trainer.planning.dial import DEFAULT_SCALE
from trainer.planning.model import written_out
from trainer.planning.run_config import StoredConfig, flat, plugins_of, read_config, starts_of
from trainer.runs.history import smoothed
from trainer.runs.metrics import numbered_lines

POINTS = 1000  # of a curve that is kept
SAMPLE_BYTES = 1 << 16  # read from the end of samples.txt
COLUMNS = ("tokens", "seconds", "loss", "val_loss", "val_bits_per_byte", "tokens_per_second", "sequence_length")
AXES = ("tokens", "flops", "seconds")  # what a loss can be drawn against


@dataclass
class Run:
    """One run. What is not known is None, NaN or empty.

    name: for the reader; values: dotted key -> value of config.yaml; inferred: the keys that plan.txt has a rule for
    seed, learning_rate, scale: of config.yaml, or of experiment.json if the run has no config
    purpose: test (for the final table), tuning (for the learning-rate curve) or both; state: finished, unfinished, waiting, running, diverged, failed, refused
    loss, bits: validation loss (nats per token) and bits per byte at the end of the schedule; last_loss: the last one that is there
    ended_early: why the run ended before max_steps, by evaluation.patience; tokens, flops, seconds: training in all; rate: tokens per second (median of the steps after the first)
    training, validation: AXES and loss (nats per token), and bits for validation -> [points]
    frozen: keys of the models that the objective asks and does not train; starts: the lines of environment.jsonl; data: dataset.json; sample: the last text of samples.txt
    """

    folder: Path
    name: str
    values: dict[str, Any] = field(default_factory=dict)
    inferred: set[str] = field(default_factory=set)
    seed: int = 0
    learning_rate: float | None = None
    scale: float = 1.0
    purpose: str = "test"
    state: str = "waiting"
    message: str = ""
    step: int = 0
    loss: float | None = None
    bits: float | None = None
    last_loss: float | None = None
    tokens: int | None = None
    flops: float | None = None
    seconds: float | None = None
    rate: float | None = None
    peak_memory_bytes: int | None = None
    parameters: int | None = None
    epochs: float | None = None
    multiplied: bool = False
    ended_early: str = ""
    training: dict[str, np.ndarray] = field(default_factory=dict)
    validation: dict[str, np.ndarray] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    config: RunConfig | None = None  # as read, without the kernels of its machine
    sample: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return self.state == "finished"

    @property
    def device(self) -> str | None:
        """What its starts computed on. Older runs do not say; then it is what their config asks for."""
        named = dict.fromkeys(printable(start["device"], 80) for start in self.starts if start.get("device"))
        return ", then ".join(named) or self.get("device")

    def note(self, line: str) -> None:
        self.notes.append(printable(line, 400))

    def get(self, key: str) -> Any:
        """The value of a dotted key of the config; None if it is not there."""
        return self.values.get(key)


def load_run(folder: Path, name: str) -> Run:
    """The run in `folder`. Its state is finished, unfinished or diverged, as its rows say. Raises nothing for damaged files."""
    run = Run(folder, name)
    config = _read_config(run)
    rows = _read_rows(run)
    if config is not None:
        run.config = config
        run.values = {key: value for key, value in flat(config).items() if not isinstance(value, dict)}
        run.seed, run.learning_rate, run.scale = config.seed, config.optim.lr, config.model_scale or DEFAULT_SCALE
        per_token = _count(run, config, rows)
        _measure(run, config, rows, per_token)
    run.starts = starts_of(folder, run.note)
    run.data = _read_data(run)
    run.inferred = _read_inferred(folder)
    run.sample = _read_sample(run)
    return run


# -- config ----------------------------------------------------------------------------------------------------------------


def _read_config(run: Run) -> RunConfig | None:
    """The run's config. Keys that this release does not know are left out, and noted; None if nothing of it can be read."""
    try:
        stored = read_config(run.folder, run.note)
        return _build(run, stored)
    except UserError as error:
        run.note(f"{error}; this run is left out")
        return None


def _build(run: Run, stored: StoredConfig) -> RunConfig:
    try:
        return stored.build()
    except UserError:
        known, free = set(leaf_keys(RunConfig)), tuple(f"{section}." for section in free_sections(RunConfig))
        unknown = {key for key in flat(stored.values) if key not in known and not key.startswith(free)}
        if not unknown:
            raise
        values = build(RunConfig, _without(stored.values, unknown))
        release = stored.release or "another release"
        run.note(f"{run.name}: the report ignores keys of crescendo-lm {release}: {', '.join(sorted(unknown))}")
        return values


def _without(values: dict[str, Any], keys: set[str], prefix: str = "") -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            kept[key] = _without(value, keys, f"{prefix}{key}.")
        elif f"{prefix}{key}" not in keys:
            kept[key] = value
    return {key: value for key, value in kept.items() if value != {} or key in ("model", "objective")}


# -- rows ------------------------------------------------------------------------------------------------------------------


@dataclass
class Rows:
    """The rows of metrics.jsonl as columns, and what of them needs no column."""

    columns: dict[str, np.ndarray]  # COLUMNS and "step" -> [rows]
    multiplied: bool = False
    epochs: float | None = None
    peak_memory_bytes: int | None = None
    ended_early: str = ""  # why, if the last row says so

    def __len__(self) -> int:
        return len(self.columns["step"])


def _read_rows(run: Run) -> Rows:
    """Each line is parsed once. Lines that are not rows, and rows out of order, are left out and noted."""
    table = array("d")  # [rows, 1 + len(COLUMNS)]
    rows = Rows({})
    odd, before, peak = 0, 0, 0
    try:
        for _, _, row in numbered_lines(run.folder / "metrics.jsonl"):
            if row is None or row["step"] <= before or not _append(table, row):
                odd += 1
                continue
            before = row["step"]
            rows.multiplied |= row.get("batch_multiplier", 1) != 1
            rows.epochs = _epochs(row.get("epoch"), rows.epochs)
            early = row.get("ended_early")
            rows.ended_early = printable(early, 400) if isinstance(early, str) else ""
            peak = max(peak, _whole(row.get("peak_memory_bytes")))
    except FileNotFoundError:
        pass  # a run that was stopped before its first step
    except OSError as error:
        run.note(str(system_error(error, f"{run.name}: metrics.jsonl: cannot be read")))
    if odd:
        run.note(f"{run.name}: metrics.jsonl: {odd:,} lines are not rows or are out of order; they are left out")
    columns = np.frombuffer(table, dtype=np.float64).reshape(-1, 1 + len(COLUMNS)).T
    rows.columns = dict(zip(("step", *COLUMNS), columns.copy(), strict=True))
    if before > len(rows):
        run.note(f"{run.name}: metrics.jsonl: {before - len(rows):,} of {before:,} steps have no row")
    rows.peak_memory_bytes = peak or None
    return rows


def _append(table: array[float], row: dict[str, Any]) -> bool:
    """Add the step and COLUMNS of a row, NaN for null. False, and nothing added, if a number is too large for a float."""
    if (
        type(row.setdefault("sequence_length", None)) is not int
    ):  # the only one of them that `numbered_lines` does not check
        row["sequence_length"] = None
    try:
        table.fromlist([math.nan if value is None else value for value in _values_of(row)])
        return True
    except OverflowError:
        return False


_values_of = operator.itemgetter("step", *COLUMNS)


def _epochs(value: Any, before: float | None) -> float | None:
    """The passes over the data so far; as before where a row does not tell."""
    return float(value) if type(value) in (int, float) and 0 <= value < 1e9 else before


def _whole(value: Any) -> int:
    return value if type(value) is int and 0 < value < 2**63 else 0


# -- what follows from both ------------------------------------------------------------------------------------------------


def _count(run: Run, config: RunConfig, rows: Rows) -> dict[int, int]:
    """Count the run's parameters. Returns sequence length -> training FLOPs of one token; empty if the model cannot be built."""
    from models.config import kernel_fields_of
    from models.counting import parameters_of
    from trainer.objectives import build_objective, resolve_objective

    lengths = rows.columns["sequence_length"]
    if config.batch.sequence_double_every == 0 and config.batch.sequence_length:
        lengths[np.isnan(lengths)] = config.batch.sequence_length
    # Which kernels compute changes no count, and those of a GPU may not be here.
    kernels = set(kernel_fields_of(config.model.get("name")))
    config.model = {key: value for key, value in config.model.items() if key not in kernels}
    try:
        model_class, model_config = written_out(config)
        run.parameters = parameters_of(model_class, model_config)
        run.frozen = tuple(
            f"objective.{name}" for name in build_objective(resolve_objective(config.objective)).frozen_models()
        )
        known = np.unique(lengths[np.isfinite(lengths)])
        return {int(length): flops_per_token(model_class, model_config, int(length)) for length in known}
    except Exception as error:  # a model of a plug-in may raise anything
        words = " ".join(f"--plugin {name}" for name in plugins_of(run.folder))
        told = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        run.note(
            f"{run.name}: its model cannot be built here"
            f"{f' (the run was started with {words}: add it)' if words else ''}"
            f", so its parameters and FLOPs are not known: {told}"
        )
        return {}


def _measure(run: Run, config: RunConfig, rows: Rows, per_token: dict[int, int]) -> None:
    """Fill in what the rows say: state, losses, sums and curves."""
    columns = rows.columns
    run.multiplied, run.epochs, run.peak_memory_bytes = rows.multiplied, rows.epochs, rows.peak_memory_bytes
    run.ended_early = rows.ended_early
    if not len(rows):
        run.state = "unfinished"
        return
    run.step = int(columns["step"][-1])
    run.tokens, run.seconds = int(columns["tokens"][-1]), float(columns["seconds"][-1])
    rates = columns["tokens_per_second"][1:]
    run.rate = float(np.nanmedian(rates)) if np.isfinite(rates).any() else None
    each = np.array(
        [
            per_token.get(int(length), math.nan) if length == length else math.nan
            for length in columns["sequence_length"]
        ]
    )
    columns["flops"] = np.cumsum(np.diff(columns["tokens"], prepend=0.0) * each)
    run.flops = _finite(columns["flops"][-1])
    if run.flops is None and per_token:
        run.note(f"{run.name}: some rows do not say their sequence length, so its FLOPs are not known")
    evaluated = np.isfinite(columns["val_loss"])
    run.validation = _curve(columns, evaluated, columns["val_loss"]) | {
        "bits": _spaced(columns["val_bits_per_byte"][evaluated])
    }
    run.training = _curve(columns, np.ones(len(rows), dtype=bool), smoothed(columns["loss"]))
    run.last_loss = float(columns["val_loss"][evaluated][-1]) if evaluated.any() else None
    if config.max_steps is None:
        run.note(f"{run.name}: its config does not say max_steps, so it counts as unfinished")
    _decide(run, math.inf if config.max_steps is None else config.max_steps, columns)


def _decide(run: Run, max_steps: float, columns: dict[str, np.ndarray]) -> None:
    """State and final loss: only the end of the schedule counts."""
    last = {key: _finite(column[-1]) for key, column in columns.items()}
    if last["loss"] is None:
        run.state, run.message = "diverged", f"the loss of step {run.step:,} is not finite"
    elif run.step != max_steps:
        early = f", ended early: {run.ended_early}" if run.ended_early else ""
        run.state, run.message = "unfinished", f"{run.step:,} of {max_steps:,} steps{early}"
    elif last["val_loss"] is None:
        run.state, run.message = "unfinished", "no validation loss at the last step"
    else:
        run.state, run.loss, run.bits = "finished", last["val_loss"], last["val_bits_per_byte"]


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def _curve(columns: dict[str, np.ndarray], chosen: np.ndarray, loss: np.ndarray) -> dict[str, np.ndarray]:
    return {key: _spaced(columns[key][chosen]) for key in AXES} | {"loss": _spaced(loss[chosen])}


def _spaced(values: np.ndarray) -> np.ndarray:
    """At most POINTS of the values, evenly spaced, with the first and the last."""
    if len(values) <= POINTS:
        return values.copy()
    return values[np.linspace(0, len(values) - 1, POINTS).round().astype(int)]


# -- other files -----------------------------------------------------------------------------------------------------------


def _read_data(run: Run) -> dict[str, Any]:
    try:
        return read_json(run.folder / "dataset.json")
    except UserError as error:
        run.note(f"{error}; the data of this run are not known")
        return {}


def _read_inferred(folder: Path) -> set[str]:
    """The keys that plan.txt gives a rule other than `set`; none without a plan."""
    try:
        with (folder / "plan.txt").open("rb") as file:
            text = file.read(1 << 20).decode("utf-8", "replace")
    except OSError:
        return set()
    entries = (re.split(r"\s{2,}", line.strip()) for line in text.splitlines())
    return {words[0] for words in entries if len(words) == 3 and words[2] != "set"}


def _read_sample(run: Run) -> str:
    """The last text of samples.txt, without its header; "" if there is none."""
    try:
        with (run.folder / "samples.txt").open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - SAMPLE_BYTES))
            text = file.read(SAMPLE_BYTES).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        run.note(str(system_error(error, f"{run.name}: samples.txt: cannot be read")))
        return ""
    return re.split(r"^=== step [^\n]*\n", text, flags=re.MULTILINE)[-1].strip()
