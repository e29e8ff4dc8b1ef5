"""A page as one HTML file: no script, nothing from outside, for screen (light, dark, narrow) and paper."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape

from trainer.commands.report.figures import COLOURS, FOREGROUND, in_tags
from trainer.commands.report.page import Figure, Page, Section, Table
from trainer.commands.report.style import MOST_TABS, style
from trainer.core.text import printable, printable_lines

# Forbids scripts and every address, whatever a folder may have brought into the page.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
COLOURED = {claim: f' class="{claim}"' for claim in ("better", "worse")}


def render(page: Page) -> str:
    """The whole file."""
    sections = "\n".join(_section(section, f"s{i}") for i, section in enumerate(page.sections))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{text_of(page.title)}</title>
<style>
{style()}
</style>
</head>
<body>
<main>
<header>
<h1>{text_of(page.title)}</h1>
<p class="made">{text_of(page.made)}</p>
</header>
{sections}
</main>
</body>
</html>
"""


def text_of(words: str) -> str:
    """Words as HTML, on one line."""
    return escape(printable(words))


def _section(section: Section, prefix: str) -> str:
    """All parts of a study. Long lists are closed until the reader opens them."""
    verdicts = "".join(f'<li class="{kind}">{text_of(line)}</li>' for kind, line in section.verdicts)
    caveats = "".join(f"<li>{text_of(line)}</li>" for line in section.caveats)
    parts = [
        f"<h2>{text_of(section.title)}</h2>",
        *(f'<p class="lead">{text_of(line)}</p>' for line in section.lead),
        f'<ul class="verdicts">{verdicts}</ul>' if verdicts else "",
        f'<div class="caveats"><h3>Caveats</h3><ul>{caveats}</ul></div>' if caveats else "",
        _titled("Claims", section.claims),
        "<h3>Final table</h3>",
        table_of(section.final),
        "<h3>What it cost</h3>",
        table_of(section.cost),
        *(_figures(heading, figures, f"{prefix}-{i}") for i, (heading, figures) in enumerate(section.figures.items())),
        _titled("Tasks", section.tasks),
        _titled("Differences between the configs", section.differences),
        _samples(section.samples),
        _titled("Runs that did not finish", section.failures),
        _titled("Data", section.data),
        _titled("Environment", section.environment),
        _commands(section.commands),
    ]
    return f'<section id="{prefix}">\n' + "\n".join(filter(None, parts)) + "\n</section>"


def _titled(title: str, table: Table) -> str:
    return f"<h3>{title}</h3>\n{table_of(table)}" if table.rows else ""


def table_of(table: Table) -> str:
    """Columns of numbers stand to the right; the first column stays in sight when the rest is scrolled."""
    kinds = [
        ' class="number"' if i and _is_numeric(row[i] for row in table.rows) else "" for i in range(len(table.header))
    ]
    head = "".join(
        f'<th scope="col"{kind}>{text_of(cell)}</th>' for kind, cell in zip(kinds, table.header, strict=True)
    )
    rows = "".join(f"<tr>{_row(row, kinds)}</tr>\n" for row in table.rows)
    notes = "".join(f"<li>{text_of(note)}</li>" for note in table.notes)
    return (
        f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>'
        + (f'<ul class="notes">{notes}</ul>' if notes else "")
    )


def _is_numeric(cells: Iterable[str]) -> bool:
    return all(re.fullmatch(r"[-+<\d.,e% \[\]]*|n/a|baseline|\d+ of \d+", cell) for cell in cells)


def _row(row: list[str], kinds: list[str]) -> str:
    first, *rest = row
    cells = "".join(
        f"<td{COLOURED.get(cell, kind)}>{text_of(cell)}</td>" for kind, cell in zip(kinds[1:], rest, strict=True)
    )
    return f'<th scope="row">{text_of(first)}</th>{cells}'


def _figures(heading: str, figures: list[Figure], group: str) -> str:
    """Figures of which radio buttons show one; paper shows the first of them."""
    shown = figures[:MOST_TABS]
    buttons = "".join(
        f'<input type="radio" name="{group}" id="{group}-{i}"{" checked" if i == 0 else ""}>'
        f'<label for="{group}-{i}">{text_of(figure.tab)}</label>'
        for i, figure in enumerate(shown)
    )
    panels = "\n".join(
        f"<figure>{inline(figure)}<figcaption>{text_of(figure.caption)}</figcaption></figure>" for figure in shown
    )
    kind = "tabs" if len(shown) > 1 else "tabs single"
    return f'<h3>{text_of(heading)}</h3>\n<div class="{kind}">{buttons}\n{panels}</div>'


def inline(figure: Figure) -> str:
    """The SVG as a part of a page: without its XML head and size, and in the page's colours."""
    svg = figure.svg[figure.svg.index("<svg") :]
    svg = (
        re.sub(r' (?:width|height|version|xmlns(?::xlink)?)="[^"]*"', "", svg[: svg.index(">")]) + svg[svg.index(">") :]
    )
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{text_of(figure.caption)}"', 1)
    return in_tags(svg, _with_the_pages_colours)


def _with_the_pages_colours(tag: str) -> str:
    for i, colour in enumerate(COLOURS):
        tag = tag.replace(colour, f"var(--arm-{i})")
    return tag.replace(FOREGROUND, "currentColor")


def _samples(samples: dict[str, str]) -> str:
    if not samples:
        return ""
    quotes = "\n".join(
        f"<details><summary>{text_of(arm)}</summary><pre>{escape(printable_lines(text))}</pre></details>"
        for arm, text in samples.items()
    )
    return f"<h3>Samples</h3>\n{quotes}"


def _commands(lines: Iterable[str]) -> str:
    text = escape("\n".join(map(printable, lines)))
    return (
        f"<h3>Commands</h3>\n<details><summary>as they were given</summary><pre>{text}</pre></details>" if text else ""
    )
