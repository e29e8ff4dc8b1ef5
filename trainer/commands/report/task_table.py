"""What runs reached in tasks: the newest figures in RUN/evaluation."""

from __future__ import annotations

from typing import Any

from trainer.commands.report.load import Run
from trainer.commands.report.page import Table
from trainer.commands.report.study import Study
from trainer.core.text import printable
from trainer.runs.task_results import metrics_in, read_results

CELL = 60  # characters of a name that comes from a file
MOST_ROWS = 200
Key = tuple[str, str, str, str]  # task, metric, shots, documents: what must be the same to be compared


def task_table(study: Study) -> Table:
    """A row for each arm, task and metric: the mean over the arm's test runs. Figures of other shots or of another number of documents
    have rows of their own. Files that are no results are left out with a note."""
    rows: list[list[str]] = []
    notes: list[str] = []
    for arm in study.arms:
        found: dict[Key, list[tuple[float, int]]] = {}
        for run in arm.test_runs:
            for key, figure in newest(run, notes).items():
                found.setdefault(key, []).append(figure)
        for (task, metric, shots, documents), figures in sorted(found.items()):
            mean = sum(value for value, _ in figures) / len(figures)
            steps = sorted({step for _, step in figures})
            facts = [shots, documents, str(len(figures)), " to ".join(f"{step:,}" for step in {steps[0], steps[-1]})]
            name = f"{arm.name} (scale {arm.scale:g})" if len(study.scales) > 1 else arm.name
            rows.append([printable(name, CELL), printable(task, CELL), printable(metric, CELL), f"{mean:.4f}", *facts])
    if len(rows) > MOST_ROWS:
        notes.append(f"{len(rows) - MOST_ROWS:,} more rows are left out")
    header = ["arm", "task", "metric", "mean", "shots", "documents", "runs", "step"]
    return Table(header, rows[:MOST_ROWS], notes)


def newest(run: Run, notes: list[str]) -> dict[Key, tuple[float, int]]:
    """Of each task and metric: (value, step) at the latest step, of the weights that the run validates with."""
    records, problems = read_results(run.folder)
    notes += [printable(problem, 400) for problem in problems]
    found: dict[Key, tuple[float, int]] = {}
    for record in records:
        if record["weights"] != "evaluation":
            continue
        for task, entry in record["tasks"].items():
            facts = tuple(str(entry.get(name) or 0) for name in ("shots", "documents"))
            for metric, value in metrics_in(entry).items():
                key: Any = (task, metric, *facts)
                if record["step"] >= found.get(key, (0.0, -1))[1]:
                    found[key] = (value, record["step"])
    return found
