"""SIGTERM and SIGUSR1: the run writes a checkpoint after the step it is in, and ends."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from trainer.engine.distributed import World

STOPPING = (signal.SIGTERM, signal.SIGUSR1)
# `timeout`, and Slurm with torchrun, deliver one request twice: to the whole group, and passed on by the launcher.
SAME_REQUEST_SECONDS = 5.0


class StopSignals:
    """Context manager under which SIGTERM and SIGUSR1 only set `asked`; the loop looks there after each step.

    A SIGTERM more than SAME_REQUEST_SECONDS after the first ends the process at once. A signal may reach some ranks only:
    let the ranks agree on the largest signal number (0: none). Outside the main thread it does nothing.
    """

    def __init__(self, world: World) -> None:
        self.asked: signal.Signals | None = None
        self._world = world
        self._first_sigterm: float | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in STOPPING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            now = time.monotonic()
            if self._first_sigterm is None:
                self._first_sigterm = now
            elif now - self._first_sigterm > SAME_REQUEST_SECONDS:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.raise_signal(signal.SIGTERM)
        if self.asked is None and self._world.leader:
            line = f"{signal.Signals(number).name}: will stop with a checkpoint once all processes have heard\n"
            os.write(2, line.encode())  # print fails where the signal interrupts another print
        if self.asked is None or number == signal.SIGTERM:
            self.asked = signal.Signals(number)


def follow_launcher() -> None:
    """Have the kernel send us SIGTERM when the process that started us ends (Linux).

    For workers of a launcher: `accelerate launch` of one process ends of a SIGTERM without passing it on, and any launcher of a
    SIGKILL; without it their workers would train on with nobody to stop them.
    """
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):  # no Linux
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it ended just now
            signal.raise_signal(signal.SIGTERM)


def exit_code(asked: signal.Signals) -> int:
    """What shells and launchers take for "ended by that signal": 143 for SIGTERM, 138 for SIGUSR1."""
    return 128 + asked


def stopped_line(asked: signal.Signals, step: int) -> str:
    """The last line of a run that was asked to stop, once its checkpoint of `step` is written."""
    return f"stopped by {asked.name} at step {step:,}; checkpoint written; the same command goes on from it"
