"""A launcher that has imported everything already: Python programs in one or several forked processes, seconds sooner.

Each line on stdin is one start, as JSON: {"words" (as after `python`: -m trainer and its words, or a script and its words),
"environments" (the whole one, for each rank), "cwd", "stdout", "stderr", "pids", "result" (files), "seconds" (at most), "tells"}.
Starts run beside each other. As other launchers do, this one ends the other ranks when one has failed, where "tells" is true.
It writes the process ids to the file "pids", and at the end the exit codes, negative for a signal, to the file "result".
"""

import contextlib
import json
import os
import runpy
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = (
    "1"  # read once, at the import: no pool of compiling processes in each fork
)

# What a run imports when it needs it, and others wait for.
import deepspeed.module_inject  # noqa: F401
import torch
import torch._dynamo
import torch._inductor.compile_fx

import models.hlb  # noqa: F401
import trainer.__main__
import trainer.engine.deepspeed_engine
import trainer.engine.fsdp_engine
import trainer.engine.torch_engine
import trainer.runs.plots
import trainer.training.start
from trainer.data.mds import import_streaming
from trainer.runs.history import History
from trainer.runs.metrics import KEYS

GRACE_SECONDS = 30.0  # between SIGTERM and SIGKILL, as torchrun has it


def launch(request: dict[str, Any]) -> None:
    """Fork the ranks, wait for them and write their exit codes."""
    running: dict[int, int] = {}  # process id -> rank
    for rank, environment in enumerate(request["environments"]):
        pid = os.fork()
        if pid == 0:
            become_rank(request, environment)
        os.setpgid(pid, next(iter(running), pid))  # all ranks in one group, without this process
        running[pid] = rank
    publish(request["pids"], list(running))
    codes, failed, deadline = [0] * len(running), False, time.monotonic() + request["seconds"]
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            rank = running.pop(pid)
            codes[rank] = os.waitstatus_to_exitcode(status)
            if codes[rank] and request["tells"] and not failed:
                failed, deadline = True, min(deadline, time.monotonic() + GRACE_SECONDS)
                kill_all(running, signal.SIGTERM)
        elif time.monotonic() > deadline:
            kill_all(running, signal.SIGKILL)
        time.sleep(0.01)
    publish(request["result"], codes)


def publish(path: str, numbers: list[int]) -> None:
    """Whole from the moment it is there."""
    part = Path(path).with_suffix(".part")
    part.write_text(json.dumps(numbers))
    part.rename(path)


def become_rank(request: dict[str, Any], environment: dict[str, str]) -> None:
    """Run the program as Python would, and end."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(request["cwd"])
    torch.set_num_threads(1)
    sys.path[:0] = [folder for folder in environment.get("PYTHONPATH", "").split(os.pathsep) if folder]
    code: Any = 0
    try:
        run_program(request["words"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_program(words: list[str]) -> None:
    if words[:2] == ["-m", "trainer"]:
        sys.argv = ["trainer", *words[2:]]
        sys.modules["__main__"] = trainer.__main__  # spawned processes import their parent's main module
        trainer.__main__.main()
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")


def kill_all(pids: dict[int, int], number: signal.Signals) -> None:
    for pid in pids:
        os.kill(pid, number)


def warm_up() -> None:
    """What takes long the first time, without threads or process groups, which no fork survives."""
    import_streaming()
    with tempfile.TemporaryDirectory() as folder:
        history = History()
        for value in (1, 2):
            history.add(dict.fromkeys(KEYS, value))
        trainer.runs.plots.draw(history, Path(folder) / "curves.png", "")


if __name__ == "__main__":
    warm_up()
    print("ready", flush=True)
    for line in sys.stdin:
        if os.fork() == 0:
            launch(json.loads(line))
            os._exit(0)
        with contextlib.suppress(ChildProcessError):  # starts that have ended since
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
