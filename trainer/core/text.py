"""Text from outside, made fit to be shown."""

from __future__ import annotations

from typing import Any, TextIO


def printable(text: Any, limit: int = 2000) -> str:
    """`text` in one line that moves no cursor: control characters, odd blanks and lone surrogates are shown as escapes."""
    words = str(text)
    return _escaped(words[:limit], "") + ("" if len(words) <= limit else "...")


def printable_lines(text: str) -> str:
    """`text` of several lines, as `printable` but for the ends of its lines and its tabs."""
    return _escaped(text, "\n\t")


def for_stream(text: str, stream: TextIO) -> str:
    """`text` as it is for a file or a pipe; where a terminal would obey what stands in it, as `printable_lines`."""
    return printable_lines(text) if stream.isatty() else text


def _escaped(text: str, kept: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode("ascii") for c in text)
