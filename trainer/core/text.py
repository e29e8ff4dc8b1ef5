"""Makes text from outside (files, names, messages of libraries) safe to print. Also lays out tables."""

from __future__ import annotations

from typing import Any, TextIO


def printable(text: Any, limit: int = 2000) -> str:
    """`text` as one line that is safe on a terminal: control characters, unusual spaces and lone surrogates become escapes."""
    words = str(text)
    return _escaped(words[:limit], "") + ("" if len(words) <= limit else "...")


def printable_lines(text: str) -> str:
    """Like `printable`, for several lines: line ends and tabs stay as they are."""
    return _escaped(text, "\n\t")


def for_stream(text: str, stream: TextIO) -> str:
    """`text` unchanged for a file or a pipe, and `printable_lines(text)` for a terminal, which would obey control characters."""
    return printable_lines(text) if stream.isatty() else text


def count_in_words(count: int) -> str:
    """A count in three digits, as people write it: 1.3B, 46M, 2.5K."""
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{float(f'{count / size:.3g}'):g}{letter}"
    return str(count)


def markdown_table(rows: list[list[str]]) -> list[str]:
    """Lines of a table that also reads well unrendered: the first column to the left, the others to the right."""
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]

    def line(row: list[str]) -> str:
        padded = [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * (width - 1) + ":") if i else "-" * width for i, width in enumerate(widths)]
    return [line(rows[0]), line(rule), *map(line, rows[1:])]


def _escaped(text: str, kept: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode("ascii") for c in text)
