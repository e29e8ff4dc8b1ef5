"""How far `prepare` is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import timedelta

from trainer.data.sources import Source

Log = Callable[[str], None]


def say(line: str) -> None:
    """The default log: a line on stderr."""
    print(line, file=sys.stderr, flush=True)


class Progress:
    """How far reading is: one line rewritten each second on a terminal, a plain line every ten seconds elsewhere."""

    def __init__(self, sources: list[Source], log: Log):
        self._sources = sources
        self._log = log
        self._live = log is say and sys.stderr.isatty()
        self._began = self._shown = time.monotonic()
        self._bytes = 0

    def advance(self, size: int) -> None:
        """`size` more bytes of text are tokenised."""
        self._bytes += size
        now = time.monotonic()
        if now - self._shown >= (1 if self._live else 10):
            self._shown = now
            if self._live:
                print(f"{self._line():<60}", end="\r", file=sys.stderr, flush=True)
            else:
                self._log(self._line())

    def seconds(self) -> float:
        """Time since reading began."""
        return time.monotonic() - self._began

    def _line(self) -> str:
        seconds = self.seconds()
        line = f"{self._bytes / 1e6:.0f} MB of text, {self._bytes / 1e6 / seconds:.1f} MB/s"
        read = sum(source.bytes_read for source in self._sources)
        sizes = [source.total_bytes for source in self._sources]
        if not read or None in sizes:
            return line
        total = max(read, sum(size or 0 for size in sizes))
        left = timedelta(seconds=round(seconds * (total - read) / read))
        return f"{line}, {read / total:.0%} read, {left} left"
