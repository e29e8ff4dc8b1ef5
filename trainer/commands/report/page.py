"""The parts of a page. html.py and markdown.py write the same parts; both escape all of their text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Table:
    """header and rows of cells, plain text; notes: how to read it, each a line."""

    header: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


@dataclass
class Figure:
    """A picture. stem: name of its file, and prefix of all ids in it; tab: its choice among its group; svg: the whole file."""

    stem: str
    tab: str
    caption: str
    svg: str


@dataclass
class Section:
    """All that is shown of one study.

    lead: what was compared, each a line; verdicts: (better, worse or none; the sentence); caveats: sentences
    figures: heading -> figures, of which the reader chooses one; samples: arm -> text; commands: words of a shell
    """

    title: str
    lead: list[str]
    verdicts: list[tuple[str, str]]
    caveats: list[str]
    final: Table
    cost: Table
    figures: dict[str, list[Figure]]
    differences: Table
    samples: dict[str, str]
    failures: Table
    environment: Table
    data: Table
    commands: list[str]
    tasks: Table = field(default_factory=lambda: Table([], []))
    claims: Table = field(default_factory=lambda: Table([], []))


@dataclass
class RunDetails:
    """All that is shown of one run.

    state: finished, unfinished, diverged; tiles: (name, value, more) of the most important numbers
    tables: title -> table, in order; series: see series.py; samples: (header, text), the first one first
    figures: as in a Section, for Markdown and for readers without scripts
    """

    name: str
    state: str
    lead: list[str]
    tiles: list[tuple[str, str, str]]
    caveats: list[str]
    series: dict[str, Any]
    charts: list[dict[str, Any]]
    figures: dict[str, list[Figure]]
    samples: list[tuple[str, str]]
    tables: dict[str, Table]
    commands: list[str]


@dataclass
class Page:
    title: str
    made: str  # when, by which release
    sections: list[Section]
    run: RunDetails | None = None  # instead of sections
