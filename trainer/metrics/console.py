"""hlb-gpt's table on a pipe or file, a live view on a terminal. Both go to stderr."""

from __future__ import annotations

import sys
from typing import Any

from trainer.text import printable_lines

COLUMNS = (
    "epoch",
    "curr_step",
    "train_loss",
    "val_loss",
    "val_perplexity",
    "train_acc",
    "val_acc",
    "grad_norm",
    "microbatch_steps",
    "total_seconds",
)


def format_cells(row: dict[str, Any]) -> str:
    """A row of the table: each cell right-justified to its header, missing ones blank."""
    cells = [format_number(row[name]) if row.get(name) is not None else "" for name in COLUMNS]
    return "|  " + "  |  ".join(cell.rjust(len(name)) for name, cell in zip(COLUMNS, cells, strict=True)) + "  |"


def format_number(value: Any) -> str:
    """Floats with 4 decimals, as powers of ten where that would be wider than a column (a perplexity at the start)."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4f}" if abs(value) < 1e7 else f"{value:.3e}"


class Table:
    """The original's table."""

    def __init__(self) -> None:
        header = format_cells(dict(zip(COLUMNS, COLUMNS, strict=True)))
        self._rule = "-" * len(header)
        self._print(f"{self._rule}\n{header}\n{self._rule}")

    def step(self, facts: dict[str, Any]) -> None:
        """Steps between rows are not shown."""

    def row(self, row: dict[str, Any], facts: dict[str, Any]) -> None:
        self._print(format_cells(row))

    def say(self, text: str) -> None:
        self._print(text)

    def close(self) -> None:
        self._print(self._rule)

    def _print(self, text: str) -> None:
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

        self._console.print(
            Text(printable_lines(text))
        )  # not markup=False: the panel is drawn with the options of this call

    def close(self) -> None:
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
