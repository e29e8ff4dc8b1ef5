"""The tables on the page of one run: config with reasons, planned against measured, evaluations, checkpoints, parameters, starts.

What cannot be read becomes a line in `Run.notes`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.checkpoint.manifest import NAME, found, read_manifest, validation_of
from trainer.commands.report.load import Run
from trainer.commands.report.page import Table
from trainer.commands.report.tables import CELL, GIB, MISSING, MOST_ROWS, show
from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.core.files import read_json, system_error
from trainer.core.settings import helps
from trainer.core.text import printable
from trainer.planning.expected import outcome
from trainer.planning.laws import SHARE
from trainer.planning.plan import show_number
from trainer.planning.run_config import flat

PLAN_BYTES = 1 << 20  # read of plan.txt
COUNTED = (
    "parameters",
    "tokens",
    "epochs",
)  # rows of a plan that count something, beside keys of the config with these names
MOST_RESULTS = 20  # files of RUN/evaluation


@dataclass(frozen=True)
class Rule:
    """A row of plan.txt."""

    value: str
    rule: str


def read_plan(run: Run) -> dict[str, Rule]:
    """Key -> its row of plan.txt, as the first start printed it; empty without one."""
    try:
        with (run.folder / "plan.txt").open("rb") as file:
            text = file.read(PLAN_BYTES).decode("utf-8", "replace")
    except FileNotFoundError:
        run.note(f"{run.name}: has no plan.txt, so the reasons of its values are not known")
        return {}
    except OSError as error:
        run.note(str(system_error(error, f"{run.name}: plan.txt: cannot be read")))
        return {}
    rows = (
        re.split(r"\s{2,}", line.strip(), maxsplit=2) for line in text.splitlines() if not line.startswith("note: ")
    )
    return {row[0]: Rule(row[1], row[2]) for row in rows if len(row) == 3}


def config_table(run: Run, plan: dict[str, Rule]) -> Table:
    """Every key of config.yaml: its value, where that comes from, and the rule. First what was set or inferred, then defaults."""
    defaults, meanings, rows = flat(RunConfig()), helps(RunConfig), []
    for key, value in run.values.items():
        row = None if key in COUNTED else plan.get(key)
        origin, rule = _origin(value, row, key in defaults and defaults[key] == value, meanings.get(key, ""))
        rows.append([printable(key, CELL), printable(show_number(value), CELL), origin, printable(rule, 400)])
    rows.sort(key=lambda row: row[2] == "default")
    notes = [
        "set: by the file or the flags of the start; inferred: by the rule beside it; changed: since the plan of the first start; "
        "default: what the release takes"
    ]
    return Table(["key", "value", "from", "reason"], rows, notes)


def _origin(value: Any, rule: Rule | None, is_default: bool, meaning: str) -> tuple[str, str]:
    """(set, inferred, changed or default; the reason) of a value of the config. meaning: of its key."""
    if rule is not None and rule.value != show_number(value):
        return "changed", f"the plan of the first start had {rule.value}: {rule.rule}"
    if rule is not None:
        return ("set", meaning) if rule.rule == "set" else ("inferred", rule.rule)
    return ("default" if is_default else "set"), meaning


def amounts_table(run: Run, plan: dict[str, Rule], columns: dict[str, np.ndarray]) -> Table:
    """What the plan expected, beside what was measured."""

    def planned(key: str) -> str:
        return plan[key].value if key in plan else MISSING

    speed, mfu = (
        _spread(columns.get("tokens_per_second", np.array([]))[1:], ",.0f"),
        _spread(columns.get("mfu", np.array([])), ".1%"),
    )
    peak = run.peak_memory_bytes
    rows = [
        *expected_row(columns),
        ["steps", show(run.get("max_steps"), ",.0f"), f"{run.step:,}", ""],
        ["tokens", planned("tokens"), show(run.tokens, ",.0f"), ""],
        ["epochs", planned("epochs"), show(run.epochs, ".4g"), ""],
        ["parameters", planned("parameters"), show(run.parameters, ",.0f"), ""],
        ["FLOPs of training", _planned_flops(plan), show(run.flops, ".4g"), ""],
        ["memory of one device, GiB", planned("memory, GiB"), MISSING if peak is None else f"{peak / GIB:.2f}", ""],
        ["tokens/s", MISSING, *speed],
        ["MFU", MISSING, *mfu],
        ["seconds of training", MISSING, show(run.seconds, ",.1f"), ""],
        ["of them compiling", MISSING, show(_last(columns, "compile_seconds"), ",.1f"), ""],
    ]
    notes = [
        "planned: of the first start, for the whole run; measured: up to the last row of metrics.jsonl",
        "tokens/s and MFU: median of the steps, and from the 10th to the 90th percentile; a plan holds neither",
        "measured memory: the peak of rank 0; on a GPU of torch's allocator, on a CPU of the whole process with its libraries",
    ]
    if "memory, GiB" in plan:
        notes.append(f"planned memory: {printable(plan['memory, GiB'].rule, 400)}")
    return Table(["", "planned", "measured", "range"], [row for row in rows if row[1:3] != [MISSING, MISSING]], notes)


def expected_row(columns: dict[str, np.ndarray]) -> list[list[str]]:
    """The validation loss at the end beside the one that the laws of a ladder expected; no row if they expected none."""
    ends = np.flatnonzero(np.isfinite(columns.get("expected_val_loss", np.array([]))))
    if not len(ends):
        return []
    row = {key: float(column[ends[-1]]) for key, column in columns.items()}
    found = outcome(row)
    if not found:
        return []
    place = "inside" if found["inside_interval"] else "outside"
    interval = f"{SHARE:.0%} expected from {row['expected_low']:.4f} to {row['expected_high']:.4f}: {place}"
    return [["validation loss", f"{row['expected_val_loss']:.4f}", f"{row['val_loss']:.4f}", interval]]


def _planned_flops(plan: dict[str, Rule]) -> str:
    try:
        amounts = [float(plan[key].value.replace(",", "")) for key in ("FLOPs per token", "tokens")]
    except (KeyError, ValueError):
        return MISSING
    return f"{amounts[0] * amounts[1]:.4g}"


def _spread(values: np.ndarray, form: str) -> tuple[str, str]:
    """The median of the finite values, and from their 10th to their 90th percentile."""
    known = values[np.isfinite(values)]
    if not len(known):
        return MISSING, ""
    low, middle, high = (format(float(value), form) for value in np.percentile(known, [10, 50, 90]))
    return middle, f"{low} to {high}"


def _last(columns: dict[str, np.ndarray], key: str) -> float | None:
    values = columns.get(key)
    known = [] if values is None else values[np.isfinite(values)]
    return float(known[-1]) if len(known) else None


def roles_table(run: Run) -> Table:
    """The parameters of each role. No rows if the model cannot be built here (load.py says so)."""
    from trainer.engine.meta import build_meta
    from trainer.planning.model import written_out

    table = Table(["role", "tensors", "parameters", "share"], [])
    if run.config is None or run.parameters is None:
        return table
    try:
        model = build_meta(*written_out(run.config))
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        by_role = model.names_by_role()
    except Exception as error:  # a plug-in's own code
        run.note(f"{run.name}: the roles of its parameters are not known: {type(error).__name__}: {error}")
        return table
    for role, names in by_role.items():
        count = sum(sizes.get(name, 0) for name in names)
        if names:
            table.rows.append([printable(role, CELL), f"{len(names):,}", f"{count:,}", f"{count / run.parameters:.2%}"])
    table.rows.append(["all", f"{len(sizes):,}", f"{run.parameters:,}", "100.00%"])
    return table


def checkpoints_table(run: Run) -> Table:
    """The checkpoints that are there, the newest first, and what was set aside. Their tensors are not read."""
    folder, rows, values = run.folder / "checkpoints", [], {}
    for step, path in reversed(found(folder)):
        try:
            manifest = read_manifest(path)
            validation = validation_of(manifest, path)
        except UserError as error:
            run.note(str(error))
            rows.append([path.name, f"{step:,}", MISSING, MISSING, MISSING, "damaged"])
            continue
        size = sum(entry["bytes"] for entry in manifest["files"].values())
        if validation is not None:
            values[path.name] = validation
        shown = MISSING if validation is None else f"{validation[0]} {validation[1]:.4f}"
        tokens = manifest.get("tokens")
        rows.append(
            [
                path.name,
                f"{step:,}",
                show(tokens if type(tokens) is int else None, ",d"),
                f"{size / GIB:.3f}",
                shown,
                "",
            ]
        )
    if rows:
        rows[0][-1] = rows[0][-1] or "newest"
    best = min(values, key=lambda name: values[name][1], default=None)
    for row in rows:
        if row[0] == best:
            row[-1] = ", ".join(filter(None, [row[-1], "best"]))
    rows += [[printable(name, CELL), "", "", "", "", "set aside"] for name in _aside(folder)]
    notes = ["sizes and hashes of the tensors are checked when a checkpoint is read, not here"]
    return Table(["checkpoint", "step", "tokens", "GiB", "validation", ""], rows[:MOST_ROWS], notes)


def _aside(folder: Path) -> list[str]:
    """Checkpoints under other names: damaged, or replaced."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    return [
        name for name in names if name.startswith("step-") and not NAME.fullmatch(name) and not name.endswith(".tmp")
    ]


def evaluations_table(columns: dict[str, np.ndarray]) -> Table:
    """The evaluations: the first, the best, and the last ones."""
    table = Table(["", "step", "tokens", "seconds", "loss", "bits/byte"], [])
    losses = columns.get("val_loss", np.array([]))
    rows = np.flatnonzero(np.isfinite(losses))
    if not len(rows):
        return table
    best = int(rows[np.argmin(losses[rows])])
    chosen = sorted({int(rows[0]), best, *map(int, rows[-10:])})
    for row in chosen:
        marks = [word for word, at in (("first", rows[0]), ("best", best), ("last", rows[-1])) if row == at]
        numbers = [show(float(columns[key][row]), ",.0f") for key in ("step", "tokens", "seconds")]
        bits = columns.get("val_bits_per_byte")
        bit = MISSING if bits is None or not np.isfinite(bits[row]) else f"{bits[row]:.4f}"
        table.rows.append([", ".join(marks), *numbers, f"{losses[row]:.4f}", bit])
    if len(rows) > len(chosen):
        table.notes.append(f"{len(rows) - len(chosen):,} more are in the curves")
    return table


def results_table(run: Run) -> Table:
    """The numbers in RUN/evaluation/*.json: of tasks by their name, of other records by their keys."""
    table = Table(["file", "step", "what", "metric", "value", "stderr"], [])
    try:
        files = sorted((run.folder / "evaluation").glob("*.json"), reverse=True)
    except OSError:
        return table
    for path in files[:MOST_RESULTS]:
        try:
            record = read_json(path)
        except UserError as problem:
            run.note(str(problem))
            continue
        step = f"{record['step']:,}" if type(record.get("step")) is int else MISSING
        table.rows += [[printable(path.name, CELL), step, *cells] for cells in _numbers_in(record)]
    if len(table.rows) > MOST_ROWS:
        table.notes.append(f"{len(table.rows) - MOST_ROWS:,} more numbers are in the files")
        del table.rows[MOST_ROWS:]
    if len(files) > MOST_RESULTS:
        table.notes.append(f"of {len(files):,} files the newest {MOST_RESULTS}")
    return table


def _numbers_in(record: dict[str, Any]) -> list[list[str]]:
    """[what, metric, value, stderr] of every number of a record's tasks, or of its sections if it has none."""
    tasks = record.get("tasks")
    sections = tasks if isinstance(tasks, dict) else record
    found = []
    for name, entry in sections.items():
        if not isinstance(entry, dict):
            continue
        errors = entry.get("stderr")
        errors = errors if isinstance(errors, dict) else {}
        for metric, value in entry.items():
            if type(value) in (int, float):
                error = errors.get(metric)
                shown = f"{error:.4g}" if type(error) in (int, float) else ""
                found.append([printable(name, CELL), printable(metric, CELL), f"{value:.6g}", shown])
    return found


def starts_table(run: Run) -> Table:
    """When, where and with what the run was started, each start a row."""
    rows = []
    for start in run.starts:
        git, versions = start.get("git"), start.get("versions", {})
        commit = MISSING
        if isinstance(git, dict):
            commit = str(git.get("sha"))[:12] + (" with uncommitted changes" if git.get("dirty") else "")
        facts = [start.get("time"), start.get("host"), start.get("processes"), start.get("cpus"), start.get("python")]
        releases = ", ".join(f"{name} {version}" for name, version in versions.items())
        rows.append(
            [printable(MISSING if fact is None else fact, CELL) for fact in (*facts, commit)]
            + [printable(releases, 400)]
        )
    notes = [f"{len(rows) - MOST_ROWS:,} earlier starts are left out"] if len(rows) > MOST_ROWS else []
    return Table(["started", "host", "processes", "CPUs", "Python", "git", "versions"], rows[-MOST_ROWS:], notes)
