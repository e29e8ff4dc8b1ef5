"""A launcher that has imported everything already: `python -m trainer` as one or several forked processes, seconds sooner.

Each line on stdin is one start, as JSON: {"words", "environments" (one for each rank), "log", "result", "seconds" (at most),
"tells"}. Starts run beside each other. As other launchers do, it tells the rest to end when one rank has failed, where "tells".
The exit codes, by rank and negative for a signal, go to the file "result".
"""

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

# What a run imports when it needs it, and others wait for.
import deepspeed.module_inject  # noqa: F401
import torch
import torch._dynamo
import torch._inductor.compile_fx

import models.hlb  # noqa: F401
import trainer.engine.deepspeed_engine
import trainer.engine.fsdp_engine
import trainer.engine.torch_engine
import trainer.runs.plots
import trainer.training.start
from trainer.__main__ import main
from trainer.data.mds import import_streaming
from trainer.runs.history import History
from trainer.runs.metrics import KEYS

GRACE_SECONDS = 30.0  # between SIGTERM and SIGKILL, as torchrun has it


def launch(words: list[str], environments: list[dict], log: str, result: str, seconds: float, tells: bool) -> None:
    running: dict[int, int] = {}  # process id -> rank
    for rank, environment in enumerate(environments):
        pid = os.fork()
        if pid == 0:
            become_rank(words, environment, log)
        os.setpgid(pid, next(iter(running), pid))  # all ranks in one group, without this process
        running[pid] = rank
    codes, failed, deadline = [0] * len(running), False, time.monotonic() + seconds
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            rank = running.pop(pid)
            codes[rank] = os.waitstatus_to_exitcode(status)
            if codes[rank] and tells and not failed:
                failed, deadline = True, min(deadline, time.monotonic() + GRACE_SECONDS)
                kill_all(running, signal.SIGTERM)
        elif time.monotonic() > deadline:
            kill_all(running, signal.SIGKILL)
        time.sleep(0.01)
    part = Path(result).with_suffix(".part")
    part.write_text(json.dumps(codes))
    part.rename(result)


def become_rank(words: list[str], environment: dict, log: str) -> None:
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = ["trainer", *words]
    code: Any = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    sys.stdout.flush()
    os._exit(code)


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
            launch(**json.loads(line))
            os._exit(0)
