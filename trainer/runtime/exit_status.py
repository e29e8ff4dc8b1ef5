"""How a run ended, for the script that started it: launchers do not hand on what their workers exit with.

The script names a file in CRESCENDO_OUTCOME before it starts the launcher. Its first line begins with `finished`, `stopped`
(asked to; a checkpoint is written) or `refused` (the same command would fail again). A run that crashed or lost a machine
writes nothing.
"""

from __future__ import annotations

import os
import sys

VARIABLE = "CRESCENDO_OUTCOME"


def write_exit_status(text: str) -> None:
    """Append `text` as a line to the file that CRESCENDO_OUTCOME names, if it names one; any rank may."""
    path = os.environ.get(VARIABLE)
    if not path:
        return
    try:
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(" ".join(text.split()) + "\n")
    except OSError as error:  # the script then takes the run for one that crashed, and starts it again
        print(f"warning: {VARIABLE}: {path} cannot be written: {error.strerror or error}", file=sys.stderr, flush=True)
