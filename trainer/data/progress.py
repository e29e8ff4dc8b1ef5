"""The progress of `prepare`."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import FrameType

from trainer.core.text import printable
from trainer.data.pieces import opens
from trainer.data.sources import Source

Log = Callable[[str], None]
STILL_SECONDS = 30.0  # a search in one line is reported after this time


def say(line: str) -> None:
    """The default log: a line on stderr."""
    print(line, file=sys.stderr, flush=True)


class Progress:
    """Shows how far reading is: one line rewritten each second on a terminal, a plain line every ten seconds elsewhere."""

    def __init__(self, sources: list[Source], log: Log):
        self._sources = sources
        self._log = log
        self._live = log is say and sys.stderr.isatty()
        self._began = self._shown = time.monotonic()
        self._bytes = 0

    def advance(self, size: int) -> None:
        """Count `size` more bytes of tokenised text."""
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


@contextlib.contextmanager
def telling_of_endless_search(log: Log) -> Iterator[None]:
    """Within the block, log a line if document_start has been searched in the same line for long: some patterns never finish.

    It uses an alarm: during a search `re` lets no other thread run, but it lets signals interrupt it. Outside the main thread,
    or if SIGALRM has another handler, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGALRM) != signal.SIG_DFL:
        yield
        return
    seen: str | None = None  # the line that was searched at the previous alarm
    told = False  # whether that line has been reported

    def look(number: int, frame: FrameType | None) -> None:
        nonlocal seen, told
        line: str | None = None
        if frame is not None and frame.f_code is opens.__code__:
            line = frame.f_locals["line"]
        told = told and line is seen
        if line is not None and line is seen and not told:
            told = True
            log(
                f"document_start: the search in one line of {len(line):,} characters has taken {STILL_SECONDS:g} s so far "
                f"({printable(line, 60)}); a repetition inside a repetition, as in (a+)+, may never finish: stop prepare with "
                "Ctrl-C, and use a simpler pattern"
            )
        seen = line
        # Set the alarm again. A repeating alarm could interrupt this function.
        signal.setitimer(signal.ITIMER_REAL, STILL_SECONDS)

    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, STILL_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
