"""Text from outside, made fit to be shown."""

from __future__ import annotations

from typing import Any


def printable(text: Any, limit: int = 2000) -> str:
    """`text` in one line that moves no cursor: control characters, odd blanks and lone surrogates are shown as escapes."""
    words = str(text)
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in words[:limit])
    return shown if len(words) <= limit else shown + "..."
