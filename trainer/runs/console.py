"""A table on a pipe or in a file, a live view on a terminal. Both go to stderr and take at most 100 columns.

`loss` and `tokens/s` are running means; metrics.jsonl has the values of each step.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from trainer.core.text import printable_lines

WIDTHS = {"step": 9, "loss": 8, "val": 8, "bits/byte": 9, "tokens/s": 11, "MFU": 6, "ETA": 11}
COLUMNS = tuple(WIDTHS)
LEFT_OUT = ("MFU", "bits/byte", "tokens/s")  # in this order on narrow terminals
GAP = "  "
DECAY = 0.95  # of a running mean: it covers about the last 20 steps
MOST_COLUMNS = 100
# The terminal prints ^C for Ctrl-C after the last line of the live view. The line needs room for it: on a new line, ^C
# would push the view down, and the top of the old view would stay on the screen.
ROOM_FOR_KEYS = 6
REDRAW_SECONDS = 0.25  # minimum time between two redraws of the live view


class RunningMean:
    """Each value weighs DECAY times as much as the next one. None is ignored."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def add(self, value: float | None) -> None:
        if value is not None:
            self._sum = DECAY * self._sum + value
            self._weight = DECAY * self._weight + 1

    @property
    def mean(self) -> float | None:
        return self._sum / self._weight if self._weight else None


class Figures:
    """Turns the facts of each step into the texts that both views show."""

    def __init__(self) -> None:
        self._loss, self._rate = RunningMean(), RunningMean()

    def add(self, facts: dict[str, Any]) -> dict[str, str]:
        """facts: step, max_steps, loss, val, bits/byte, tokens/s, MFU (a fraction), ETA (seconds). None: no value."""
        self._loss.add(facts["loss"])
        self._rate.add(facts["tokens/s"])
        rate = self._rate.mean
        return {
            "step": f"{facts['step']:,}",
            "loss": _decimals(self._loss.mean),
            "val": _decimals(facts["val"]),
            "bits/byte": _decimals(facts["bits/byte"]),
            "tokens/s": "" if rate is None else f"{rate:,.0f}",
            "MFU": "n/a" if facts["MFU"] is None else f"{facts['MFU']:.1%}",
            "ETA": format_duration(facts["ETA"]),
        }


def _decimals(value: float | None) -> str:
    return "" if value is None else format_number(value, WIDTHS["loss"])


def format_duration(seconds: float) -> str:
    """The two largest units: `2 d 03 h`, `1 h 05 min`, `4 min 09 s`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, days = minutes // 60, minutes // 1440
    if days:
        return f"{days} d {hours % 24:02d} h"
    return f"{hours} h {minutes % 60:02d} min" if hours else f"{minutes} min {rest:02d} s"


def format_number(value: Any, width: int = 12) -> str:
    """A float with 4 decimals, with fewer where `width` is too small, else in scientific notation. Other values as `str`."""
    if not isinstance(value, float):
        return str(value)
    texts = [f"{value:.{decimals}f}" for decimals in (4, 3, 2, 1)]
    return next((text for text in texts if len(text) <= width), f"{value:.2e}")


def fitting(width: int) -> tuple[str, ...]:
    """The columns that fit a line of `width` characters."""
    names = list(COLUMNS)
    for name in LEFT_OUT:
        if len(format_row({}, names)) > width:
            names.remove(name)
    return tuple(names)


def format_row(texts: dict[str, str], names: Sequence[str] = COLUMNS) -> str:
    return GAP.join(f"{texts.get(name, ''):>{WIDTHS[name]}}" for name in names)


def line_width() -> int:
    """Width of the terminal on stderr, in characters; 100 if stderr is not a terminal."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or MOST_COLUMNS  # 0: size unknown
    except (OSError, ValueError):  # ValueError: stderr is replaced by an object without a file descriptor
        return MOST_COLUMNS


class Table:
    """A header, and a line for each row."""

    def __init__(self) -> None:
        self._names = fitting(line_width())
        self._figures = Figures()
        self._texts: dict[str, str] = {}
        header = format_row({name: name for name in self._names}, self._names)
        self._rule = "-" * len(header)
        self._closed = False
        self._print(f"{self._rule}\n{header}\n{self._rule}")

    def step(self, facts: dict[str, Any]) -> None:
        """Count a step."""
        self._texts = self._figures.add(facts)

    def row(self) -> None:
        """Show the last step."""
        self._print(format_row(self._texts, self._names))

    def say(self, text: str) -> None:
        self._print(text)

    def close(self) -> None:
        """Print the last rule. Notes may follow it."""
        if not self._closed:
            self._closed = True
            self._print(self._rule)

    def _print(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the reader of the pipe has ended
            print(printable_lines(text), file=sys.stderr, flush=True)


class Live:
    """One panel that is redrawn in place. Validation results and notes scroll by above it."""

    def __init__(self, title: str) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive

        self._title = title
        self._console = Console(stderr=True)
        # `step` draws the panel, not rich's own thread: two threads that write at once would break it.
        self._live = RichLive(console=self._console, auto_refresh=False)
        self._live.start()
        self._drawn = -math.inf
        self._figures = Figures()
        self._texts: dict[str, str] = {}
        self._shown: dict[str, str] = {}  # the last text of each name: validation results stay visible

    def step(self, facts: dict[str, Any]) -> None:
        """Count a step and show it."""
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table as RichTable

        self._texts = self._figures.add(facts) | facts["more"]
        self._shown.update({name: text for name, text in self._texts.items() if text and name != "step"})
        grid = RichTable.grid(padding=(0, 3))
        names = list(self._shown)
        for first in range(0, len(names), 4):
            grid.add_row(*[f"[dim]{name}[/] {self._shown[name]}" for name in names[first : first + 4]])
        body = RichTable.grid()
        body.add_row(grid)
        body.add_row(ProgressBar(total=facts["max_steps"], completed=facts["step"]))
        title = f"{self._title}  step {facts['step']:,} / {facts['max_steps']:,}"
        width = max(1, min(MOST_COLUMNS, self._console.width - ROOM_FOR_KEYS))
        due = time.monotonic() - self._drawn >= REDRAW_SECONDS
        self._live.update(Panel(body, title=title, title_align="left", width=width), refresh=due)
        if due:
            self._drawn = time.monotonic()

    def row(self) -> None:
        """Keep the result of a validation above the panel."""
        if self._texts["val"]:
            self.say(
                GAP.join(
                    f"{name} {self._texts[name]}" for name in ("step", "loss", "val", "bits/byte") if self._texts[name]
                )
            )

    def say(self, text: str) -> None:
        from rich.text import Text

        with contextlib.suppress(OSError):  # the reader of the pipe has ended
            # A Text, not markup=False: rich also redraws the panel with the options of this call.
            self._console.print(Text(printable_lines(text)))

    def close(self) -> None:
        """Stop redrawing. The panel stays on the screen; notes may follow below it."""
        with contextlib.suppress(OSError):
            self._live.stop()


class Silent:
    """The console of ranks other than 0: it prints nothing."""

    def step(self, facts: dict[str, Any]) -> None:
        """Nothing."""

    def row(self) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def open_console(kind: str, leader: bool, title: str) -> Table | Live | Silent:
    """The console that `log.console` chooses, on rank 0; Silent on other ranks."""
    if not leader:
        return Silent()
    if kind == "live" or (kind == "auto" and sys.stderr.isatty()):
        return Live(title)
    return Table()
