"""A page as Markdown, with the figures as files beside it. Readable unrendered too: the terminal shows a part of it."""

from __future__ import annotations

import re
from collections.abc import Iterable

from trainer.commands.report.figures import all_figures
from trainer.commands.report.page import Figure, Page, RunDetails, Section, Table
from trainer.core.text import markdown_table, printable, printable_lines

# What Markdown or HTML would obey. An underscore within a word, a < before a space and a # within a line are only characters.
SPECIAL = re.compile(
    r"[\\`*\[\]|~$]|<(?=\S)|&(?=[#\w])|^>|^#(?=#*\s)|^[+-](?=[\s-])|^\d+(?=[.)]\s)|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"
)


def render(page: Page) -> str:
    """The whole file."""
    lines = [f"# {escape(page.title)}", "", escape(page.made)]
    if page.run is not None:
        return "\n".join([*lines, "", *_summary_of(page.run), *_run_details(page.run)]) + "\n"
    for section in page.sections:
        lines += ["", *results_of(section), *_details_of(section)]
    return "\n".join(lines) + "\n"


def summary(page: Page) -> str:
    """What the terminal shows: verdicts, caveats and the two tables of each study."""
    lines = [f"# {escape(page.title)}"]
    if page.run is not None:
        return "\n".join([*lines, "", *_summary_of(page.run)])
    for section in page.sections:
        lines += ["", *results_of(section)]
    return "\n".join(lines)


def escape(words: str) -> str:
    """`words` as one line of plain text in Markdown."""
    return SPECIAL.sub(_escaped, printable(words))


def _escaped(found: re.Match[str]) -> str:
    """A number at the start of a line makes a list by the dot after it."""
    return f"{found[0]}\\" if found[0].isdigit() else f"\\{found[0]}"


def _summary_of(run: RunDetails) -> list[str]:
    """The numbers, caveats and short tables of one run."""
    lines = [f"{escape(line)}  " for line in [f"state: {run.state}", *run.lead]]
    table = Table(["", "value", ""], [[name, value, more] for name, value, more in run.tiles])
    lines += ["", *_table("Summary", table), *_further(run, ("Evaluations", "Tasks", "Planned and measured"))]
    if run.caveats:
        lines += ["", "### Caveats", "", *[f"- {escape(line)}" for line in run.caveats]]
    return lines


def _further(run: RunDetails, titles: Iterable[str]) -> list[str]:
    """Tables of a run, each below an empty line."""
    shown = [(title, run.tables[title]) for title in titles if run.tables[title].rows]
    return [line for title, table in shown for line in ("", *_table(title, table))]


def _run_details(run: RunDetails) -> list[str]:
    """What the terminal does not show."""
    lines = _figures_of(run.figures)
    lines += _further(run, ("Parameters", "Checkpoints", "Configuration", "Data", "Starts", "Environment"))
    for header, text in run.samples[-1:]:
        lines += ["", f"### Sample: {escape(header)}", "", *_verbatim(text)]
    if run.commands:
        lines += ["", "### Commands", "", *_verbatim("\n".join(map(printable, run.commands)))]
    return lines


def _figures_of(groups: dict[str, list[Figure]]) -> list[str]:
    lines: list[str] = []
    for heading, figures in groups.items():
        lines += ["", f"### {escape(heading)}", "", *[_picture(figure) for figure in figures]]
    return lines


def results_of(section: Section) -> list[str]:
    """Verdicts, caveats and tables."""
    lines = [f"## {escape(section.title)}", "", *[f"{escape(line)}  " for line in section.lead]]
    if section.verdicts:
        lines += [
            "",
            *[
                f"- {'**' if kind != 'none' else ''}{escape(line)}{'**' if kind != 'none' else ''}"
                for kind, line in section.verdicts
            ],
        ]
    if section.claims.rows:
        lines += ["", *_table("Claims", section.claims)]
    lines += ["", *_table("Final table", section.final), "", *_table("What it cost", section.cost)]
    if section.caveats:
        lines += ["", "### Caveats", "", *[f"- {escape(line)}" for line in section.caveats]]
    return lines


def _details_of(section: Section) -> list[str]:
    lines = _figures_of(section.figures)
    for title, table in (
        ("Tasks", section.tasks),
        ("Differences between the configs", section.differences),
        ("Runs that did not finish", section.failures),
        ("Data", section.data),
        ("Environment", section.environment),
    ):
        if table.rows:
            lines += ["", *_table(title, table)]
    for arm, text in section.samples.items():
        lines += ["", f"### Sample of {escape(arm)}", "", *_verbatim(text)]
    if section.commands:
        lines += ["", "### Commands", "", *_verbatim("\n".join(map(printable, section.commands)))]
    return lines


def _table(title: str, table: Table) -> list[str]:
    cells = [[escape(cell) for cell in row] for row in (table.header, *table.rows)]
    notes = [f"- {escape(note)}" for note in table.notes]
    return [f"### {title}", "", *markdown_table(cells), *(["", *notes] if notes else [])]


def _picture(figure: Figure) -> str:
    return f"![{escape(figure.tab)}: {escape(figure.caption)}]({figure.stem}.svg)"


def _verbatim(text: str) -> list[str]:
    """Lines that Markdown shows as they are: indented, so that nothing in them can end the block."""
    return [f"    {line}" for line in printable_lines(text).split("\n")]


def figure_files(page: Page) -> dict[str, str]:
    """The files that the Markdown refers to: name -> SVG."""
    return {f"{figure.stem}.svg": figure.svg for section in page.sections for figure in all_figures(section.figures)}
