"""Programs in processes of their own, forked from one that has imported everything (forks.py): no start waits for torch.

They show what real processes do, but not what a launcher does, nor how a program is found and imported.
"""

import atexit
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from conftest import PATIENCE, ROOT


@dataclass
class Ended:
    """How a program ended."""

    codes: list[int]  # by rank, negative for a signal
    stdout: str  # of all ranks
    stderr: str

    @property
    def returncode(self) -> int:
        return next((code for code in self.codes if code), 0)

    @property
    def said(self) -> str:
        return self.stdout + self.stderr

    def lines(self, beginning: str) -> list[str]:
        return [line for line in self.said.splitlines() if line.startswith(beginning)]


@functools.cache
def server() -> subprocess.Popen:
    """forks.py, from the first start to the end of the tests."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "forks.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    atexit.register(process.wait, PATIENCE)
    atexit.register(process.stdin.close)  # the last to register is the first to be called
    return process


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start(
    *words, ranks: int | None = None, env: dict | None = None, cwd: Path = ROOT, seconds: float = PATIENCE, tells=True
) -> Path:
    """Start `python WORDS`, as `ranks` processes with the variables that launchers set; returns what `wait` takes.

    words: -m trainer and what follows, or a script and its words. tells: whether one rank that fails ends the others.
    """
    common = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **(env or {})}
    environments = [common]
    if ranks is not None:
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        common |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        environments = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    folder = Path(tempfile.mkdtemp(prefix="crescendo-start-"))
    request = {"words": [str(word) for word in words], "environments": environments, "cwd": str(cwd)}
    request |= {"seconds": seconds, "tells": tells}
    for name in ("stdout", "stderr"):
        (folder / name).touch()
    request |= {name: str(folder / name) for name in ("stdout", "stderr", "pids", "result")}
    stdin = server().stdin
    assert stdin is not None
    stdin.write(json.dumps(request) + "\n")
    stdin.flush()
    return folder


def until(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds + 60  # forks.py ends all before
    while not condition():
        assert time.monotonic() < deadline, "forks.py does not answer"
        time.sleep(0.02)


def send(started: Path, number: signal.Signals) -> None:
    """Send a signal to all processes of a start that has not ended."""
    until((started / "pids").exists)
    for pid in json.loads((started / "pids").read_text()):
        os.kill(pid, number)


def wait(started: Path, seconds: float = PATIENCE) -> Ended:
    until((started / "result").exists, seconds)
    texts = [(started / name).read_text() for name in ("stdout", "stderr")]
    ended = Ended(json.loads((started / "result").read_text()), *texts)
    shutil.rmtree(started)
    return ended


def run(*words, seconds: float = PATIENCE, **options) -> Ended:
    """Start it and wait for its end; options: of `start`."""
    return wait(start(*words, seconds=seconds, **options), seconds)


def forked_trainer(*words, **options) -> Ended:
    """`python -m trainer WORDS`; options: of `start`."""
    return run("-m", "trainer", *words, **options)
