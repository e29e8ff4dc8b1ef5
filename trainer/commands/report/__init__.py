"""`report`: one page, as HTML and Markdown, of any run folders and comparisons. README.md explains how to read it.

load.py: a run's folder; study.py: experiment.json, and the arms of a comparison or of loose runs; statistics.py: tests and
intervals; results.py: what each arm reached; evidence.py: the caveats; figures.py, tables.py: what the page shows; page.py: the
page's parts; html.py, markdown.py: how they are written; publish.py: the verb's work. Of a single run: one_run.py, run_tables.py,
series.py (its curves), run_html.py with run_page.css and run_page.js.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.commands import Verb
from trainer.core.settings import setting


@dataclass
class ReportConfig:
    """`report`: which folders, and what is compared with what."""

    folders: list[str] = setting(
        (), "run folders, comparison folders, or folders that hold such folders (the flag is optional)"
    )
    out: str | None = setting(
        None,
        "folder for report.html, .md, .json and figures; auto: RUN/report or COMPARISON/report, of several runs/report-TIME",
    )
    baseline: str | None = setting(
        None, "arm that the others are compared with; auto: the comparison's, else the first"
    )
    target: float | None = setting(None, "also test whether the mean loss of an arm is below this", above=0)


def run(config: ReportConfig, as_json: bool) -> None:
    """The verb `report`."""
    from trainer.commands.report import publish

    publish.run(config, as_json)


VERB = Verb(
    name="report",
    help="a page of one run, of several, or of a comparison: curves, tables, caveats",
    config=ReportConfig,
    run=run,
    alone=True,
    json=True,
    words="folders",
)
