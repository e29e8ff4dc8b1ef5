"""The table of tasks in a report: the newest figures of each run, and what cannot be read."""

import json

from synthetic_runs import simple_comparison

from trainer.commands.report import ReportConfig
from trainer.commands.report.publish import run as report
from trainer.commands.report.study import read_studies
from trainer.commands.report.task_table import task_table
from trainer.runs.task_results import write_results


def record(step: int, value: float, weights: str = "evaluation", documents: int = 20) -> dict:
    entry = {"acc": value, "stderr": {"acc": 0.1}, "version": 1.0, "shots": 0, "documents": documents}
    return {
        "step": step,
        "weights": weights,
        "centred_mean": None,
        "tasks": {"piqa": entry | {"chance": 0.5, "centred": 0}},
    }


def test_the_newest_figures_of_each_run_are_averaged(tmp_path):
    folder = simple_comparison(tmp_path, seeds=2).write()
    [study] = read_studies([str(folder)], None)
    arm = study.arms[0]
    first, second = (run.folder for run in arm.test_runs)
    write_results(first, record(5, 0.1))
    write_results(first, record(9, 0.6))
    write_results(first, record(9, 0.9, "ema"))
    write_results(second, record(9, 0.8))
    write_results(second, record(9, 0.3, documents=40))
    (second / "evaluation" / "step-00000009-cut.json").write_text(json.dumps(record(9, 0.5))[:30])
    (second / "evaluation" / "step-00000009-odd.json").write_text('{"tasks": {"piqa": {"acc": "high"}}}')
    table = task_table(study)
    assert table.rows == [
        [arm.name, "piqa", "acc", "0.7000", "0", "20", "2", "9"],
        [arm.name, "piqa", "acc", "0.3000", "0", "40", "1", "9"],
    ]
    assert len(table.notes) == 2 and all("it is left out" in note for note in table.notes)
    report(ReportConfig([str(folder)], out=str(tmp_path / "out")), False)
    assert "### Tasks" in (tmp_path / "out" / "report.md").read_text()
    assert "<h3>Tasks</h3>" in (tmp_path / "out" / "report.html").read_text()
