"""What the tasks of an evaluation found: files in RUN/evaluation, tables, and columns of metrics.jsonl."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from trainer.core.files import write_file
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
