"""What the tasks of an evaluation found: files in RUN/evaluation, tables, and columns of metrics.jsonl."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from trainer.core.errors import UserError
from trainer.core.files import read_json, write_file
from trainer.core.text import markdown_table, printable

FOLDER = "evaluation"
FACTS = ("stderr", "version", "shots", "documents", "chance", "centred")  # keys of a task's entry that are no metrics


def metrics_in(entry: dict[str, Any]) -> dict[str, float]:
    """The metrics of a task: name -> value."""
    return {name: value for name, value in entry.items() if name not in FACTS}


def columns(results: dict[str, Any]) -> dict[str, float]:
    """The columns of metrics.jsonl: task_NAME_METRIC, and task_centred_mean of several tasks. results: of Suite.evaluate."""
    found = {
        f"task_{name}_{metric}": value
        for name, entry in results["tasks"].items()
        for metric, value in metrics_in(entry).items()
    }
    if results["centred_mean"] is not None:
        found["task_centred_mean"] = results["centred_mean"]
    return found


def one_line(results: dict[str, Any]) -> str:
    """The figures for the console."""
    parts = [
        f"{printable(name, 60)} " + ", ".join(f"{metric} {figure(entry, metric)}" for metric in metrics_in(entry))
        for name, entry in results["tasks"].items()
    ]
    if results["centred_mean"] is not None:
        parts.append(f"centred mean {results['centred_mean']:.4f}")
    return "; ".join(parts)


def table(results: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    rows = [["task", "shots", "documents", "chance", "metric", "value", "stderr"]]
    for name, entry in results["tasks"].items():
        facts = [str(entry["shots"] or 0), f"{entry['documents']:,}", f"{entry['chance']:.4f}"]
        for metric, value in metrics_in(entry).items():
            error = entry["stderr"].get(metric)
            rows.append([printable(name, 60), *facts, metric, f"{value:.4f}", "" if error is None else f"{error:.4f}"])
    lines = markdown_table(rows)
    if results["centred_mean"] is not None:
        lines += ["", f"Mean of (accuracy - chance) / (1 - chance): {results['centred_mean']:.4f}"]
    return "\n".join(lines)


def figure(entry: dict[str, Any], metric: str) -> str:
    error = entry["stderr"].get(metric)
    return f"{entry[metric]:.4f}" + ("" if error is None else f" ± {error:.4f}")


def write_results(folder: Path, record: dict[str, Any]) -> Path:
    """Write a record, with its step, to RUN/evaluation as JSON, and its table as Markdown beside it. Returns the path of the former.
    Each evaluation has files of its own."""
    place = folder / FOLDER
    place.mkdir(exist_ok=True)
    moment = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S.%fZ")
    path = place / f"step-{record['step']:08d}-{moment}.json"
    write_file(path, json.dumps(record, indent=1) + "\n")
    write_file(path.with_suffix(".md"), table(record) + "\n")
    return path


def read_results(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The records in RUN/evaluation, oldest first, and a line for each file that is none."""
    records: list[dict[str, Any]] = []
    problems: list[str] = []
    for path in sorted((folder / FOLDER).glob("step-*.json")):
        try:
            record = read_json(path)
            if not is_record(record):
                raise UserError(f"{printable(path)}: holds no figures of tasks")
            records.append(record)
        except UserError as error:
            problems.append(f"{error}; it is left out")
    return records, problems


def is_record(record: dict[str, Any]) -> bool:
    """Whether a JSON object has what `write_results` wrote, as far as a report needs it."""
    tasks = record.get("tasks")
    return (
        type(record.get("step")) is int
        and isinstance(record.get("weights"), str)
        and isinstance(tasks, dict)
        and all(isinstance(entry, dict) for entry in tasks.values())
        and all(type(value) in (int, float) for entry in tasks.values() for value in metrics_in(entry).values())
    )
