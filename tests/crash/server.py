"""A process that has imported the trainer, under the preloaded shim, and runs each command it is sent in a fork of itself.

A request is a line of JSON on stdin: {"folder": current folder, "words": command line, "root", "at", "fault", "trace": as of
crash_arm, "log": file of stdout and stderr}; the answer is the exit code and the number of operations.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
import traceback
from pathlib import Path

from matplotlib.figure import Figure

from models.base import load_models
from trainer.__main__ import main
from trainer.data.mds import import_streaming

IMPORTED_LATER = ("data.prepare", "runs.plots", "training.start", "checkpoint.saver", "runs.folder", "training.profile")
LIBRARY = ctypes.CDLL(None)
LIBRARY.crash_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_char_p]
LIBRARY.crash_count.restype = ctypes.c_long


def child(request: dict, pipe: int) -> None:
    os.chdir(request["folder"])
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["trainer", *request["words"]]
    trace = request["trace"]
    # Drawing is most of such a short run; the writing stays.
    Figure.savefig = lambda self, path, **_: Path(path).write_bytes(b"a picture")
    LIBRARY.crash_arm(request["root"].encode(), request["at"], request["fault"], trace and trace.encode())
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    os.write(pipe, str(LIBRARY.crash_count()).encode())
    sys.stdout.flush()
    os._exit(code)


def answer(request: dict) -> dict:
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(read)
        child(request, write)
    os.close(write)
    count = b"".join(iter(lambda: os.read(read, 100), b""))
    os.close(read)
    _, status = os.waitpid(process, 0)
    return {"code": os.waitstatus_to_exitcode(status), "count": int(count or 0)}


if __name__ == "__main__":
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])  # text is then tokenised in the process of the run
    import_streaming()
    load_models()
    for name in IMPORTED_LATER:  # by each run, were it not for this
        importlib.import_module(f"trainer.{name}")
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
