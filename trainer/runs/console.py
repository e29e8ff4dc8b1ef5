"""hlb-gpt's table on a pipe or file, a live view on a terminal. Both go to stderr."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from trainer.core.text import printable_lines

WIDTHS = {
    "epoch": 5,
    "curr_step": 7,
    "train_loss": 7,
    "val_loss": 7,
    "val_perplexity": 11,
    "train_acc": 6,
    "val_acc": 6,
    "grad_norm": 8,
    "microbatch_steps": 11,
    "total_seconds": 11,
}
COLUMNS = tuple(WIDTHS)
LEFT_OUT = ("microbatch_steps", "train_acc", "val_acc", "epoch", "val_perplexity")  # in this order on narrow terminals


def fitting(width: int) -> tuple[str, ...]:
    """The columns that a line of `width` characters has room for: all of them in 100."""
    names = list(COLUMNS)
    for name in LEFT_OUT:
        if len(format_row(dict.fromkeys(names, ""), names)) > width:
            names.remove(name)
    return tuple(names)


def format_header(names: Sequence[str]) -> str:
    """Two lines: each name broken at its last underscore."""
    halves = [name.rpartition("_") for name in names]
    above = {name: first + mark for name, (first, mark, _) in zip(names, halves, strict=True)}
    below = {name: last for name, (_, _, last) in zip(names, halves, strict=True)}
    return f"{format_row(above, names)}\n{format_row(below, names)}"


def format_row(cells: dict[str, str], names: Sequence[str]) -> str:
    return "|" + "|".join(f" {cells[name]:>{WIDTHS[name]}}" for name in names) + "|"


def format_cells(row: dict[str, Any], names: Sequence[str] = COLUMNS) -> str:
    """A row of the table: each cell right-justified in its column, missing ones blank."""
    shown = {name: "" if row.get(name) is None else format_number(row[name], WIDTHS[name]) for name in names}
    return format_row(shown, names)


def format_number(value: Any, width: int = 12) -> str:
    """Floats with 4 decimals, or as many as there is room for; as powers of ten where there is none (a perplexity at the start)."""
    if not isinstance(value, float):
        return str(value)
    texts = [f"{value:.{decimals}f}" for decimals in (4, 3, 2, 1)]
    return next((text for text in texts if len(text) <= width), f"{value:.2e}")


def line_width() -> int:
    """Characters of a line of the terminal that stderr is; 100 where it is none."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 100  # 0: one that does not know
    except (OSError, ValueError):  # ValueError: a stand-in without a file
        return 100


class Table:
    """The original's table."""

    def __init__(self) -> None:
        self._names = fitting(line_width())
        header = format_header(self._names)
        self._rule = "-" * header.index("\n")
        self._closed = False
        self._print(f"{self._rule}\n{header}\n{self._rule}")

    def step(self, facts: dict[str, Any]) -> None:
        """Steps between rows are not shown."""

    def row(self, row: dict[str, Any], facts: dict[str, Any]) -> None:
        self._print(format_cells(row, self._names))

    def say(self, text: str) -> None:
        self._print(text)

    def close(self) -> None:
        """The last rule; notes may follow."""
        if not self._closed:
            self._closed = True
            self._print(self._rule)

    def _print(self, text: str) -> None:
        with contextlib.suppress(OSError):  # nobody reads any more
            print(printable_lines(text), file=sys.stderr, flush=True)


class Live:
    """One panel that is redrawn in place; rows of evaluations scroll by above it."""

    def __init__(self, title: str) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive

        self._title = title
        self._console = Console(stderr=True)
        self._live = RichLive(console=self._console, refresh_per_second=4)
        self._live.start()
        self._facts: dict[str, Any] = {}

    def step(self, facts: dict[str, Any]) -> None:
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table as RichTable

        self._facts.update({key: value for key, value in facts.items() if value is not None})
        grid = RichTable.grid(padding=(0, 3))
        names = [key for key in self._facts if key not in ("step", "max_steps")]
        for first in range(0, len(names), 4):
            grid.add_row(*[f"[dim]{name}[/] {self._facts[name]}" for name in names[first : first + 4]])
        done, total = self._facts["step"], self._facts["max_steps"]
        body = RichTable.grid()
        body.add_row(grid)
        body.add_row(ProgressBar(total=total, completed=done))
        self._live.update(Panel(body, title=f"{self._title}  step {done:,} / {total:,}", title_align="left"))

    def row(self, row: dict[str, Any], facts: dict[str, Any]) -> None:
        self.step(facts)
        if row.get("val_loss") is not None:
            names = ("curr_step", "train_loss", "val_loss", "val_perplexity", "grad_norm")
            self.say("  ".join(f"{name} {format_number(row[name])}" for name in names))

    def say(self, text: str) -> None:
        from rich.text import Text

        with contextlib.suppress(OSError):  # nobody reads any more
            self._console.print(
                Text(printable_lines(text))
            )  # not markup=False: the panel is drawn with the options of this call

    def close(self) -> None:
        """The panel stays as it is; notes may follow below it."""
        with contextlib.suppress(OSError):
            self._live.stop()


class Silent:
    """What ranks other than 0 say."""

    def step(self, facts: dict[str, Any]) -> None:
        """Nothing."""

    def row(self, row: dict[str, Any], facts: dict[str, Any]) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def open_console(kind: str, leader: bool, title: str) -> Table | Live | Silent:
    """The console of `log.console` on rank 0; silence elsewhere."""
    if not leader:
        return Silent()
    if kind == "live" or (kind == "auto" and sys.stderr.isatty()):
        return Live(title)
    return Table()
