"""Tells the script that started a run how the run ended, because launchers do not pass on the exit code of their workers.

The script names a file in CRESCENDO_OUTCOME before it starts the launcher. The first line of the file begins with `finished`,
`stopped` (a signal asked for it; a checkpoint is written) or `refused` (the same command would fail again). A run that
crashed or lost a machine writes nothing.
"""

from __future__ import annotations

import os
import sys

VARIABLE = "CRESCENDO_OUTCOME"


def write_exit_status(text: str) -> None:
    """Append `text` as one line to the file that CRESCENDO_OUTCOME names, if it is set. Any rank may call it."""
    path = os.environ.get(VARIABLE)
    if not path:
        return
    try:
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(" ".join(text.split()) + "\n")
    except OSError as error:  # the script then believes that the run crashed, and starts it again
        print(f"warning: {VARIABLE}: {path} cannot be written: {error.strerror or error}", file=sys.stderr, flush=True)
