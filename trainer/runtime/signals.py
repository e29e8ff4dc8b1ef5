"""SIGINT (Ctrl-C), SIGTERM, SIGHUP and SIGUSR1: the run writes a checkpoint after the step it is in, and ends."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from trainer.core.errors import Stopped
from trainer.runtime.device import HostCopy
from trainer.runtime.distributed import World
from trainer.runtime.listener import in_child, listener, tell

# Where ranks heard of several, the first of these counts.
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# What must outlive its shell is started with these ignored: by nohup, and in the background of a script.
MAY_BE_IGNORED = (signal.SIGINT, signal.SIGHUP)
# `timeout`, and launchers on a terminal or under Slurm, deliver one request twice: to the whole group, and passed on.
SAME_REQUEST_SECONDS = 5.0
SAME_KEY_SECONDS = 0.25  # the same of a Ctrl-C without a launcher: a finger is slower, `timeout` is faster
CHECK_SECONDS = 1.0  # at least, between two questions of `StopCheck`, where turns are shorter


class StopSignals:
    """Context manager. Until `begin` a signal of STOPPING raises Stopped, as nothing can be lost; from then on it only sets `asked`,
    and the loop looks there after each step.

    A further request, but for SIGUSR1, ends the process at once, also in native code. A signal may reach some ranks only: let
    the ranks agree on one. launched: by a launcher, which passes on what the whole group gets. Outside the main thread
    nothing changes.
    """

    def __init__(self, world: World, launched: bool = False) -> None:
        self.asked: signal.Signals | None = None
        self._world, self._launched = world, launched
        self._say: Callable[[str], None] | None = None  # set once training has begun
        self._raised = self._announced = False
        self._first: float | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            in_child.append(self._restore)  # a forked process must not outlive the SIGTERM of who ends it
            for number in STOPPING:
                if number not in MAY_BE_IGNORED or signal.getsignal(number) != signal.SIG_IGN:
                    listener().hear(number, self._hear)
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous:
            self._restore()
            in_child.remove(self._restore)
            listener().drain()
            for (
                number
            ) in self._previous:  # else a Ctrl-C long after would count as a further request, and end the process
                listener().forget(number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def begin(self, say: Callable[[str], None]) -> None:
        """Training begins: from here on there is something to save. say: the console's."""
        self._say = say
        if self.asked is not None:  # Stopped was raised where nothing comes of it, as in a __del__
            raise Stopped(self.asked)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """In the main thread, as soon as that is not in native code."""
        if self.asked in (None, signal.SIGUSR1):
            self.asked = signal.Signals(number)
        if self._say is None and not self._raised:
            self._raised = True
            raise Stopped(self.asked)

    def _hear(self, number: int) -> None:
        """In the listener's thread, at once."""
        now = time.monotonic()
        counts = number != signal.SIGUSR1  # that is a warning, and a script sends SIGTERM after it
        by_key = number == signal.SIGINT and not self._launched
        if counts and self._first is None:
            self._first = now
        elif counts and now - (self._first or now) > (SAME_KEY_SECONDS if by_key else SAME_REQUEST_SECONDS):
            self._end(signal.Signals(number))
        if self._say is not None and not self._announced:
            self._announced = True
            # In a thread of its own: the main thread may hold the console's lock, and the next signal must be heard.
            telling = threading.Thread(target=self._say, args=(will_stop_line(signal.Signals(number)),), daemon=True)
            telling.start()
            telling.join(0.2)

    def _end(self, number: signal.Signals) -> None:
        if self._world.leader:
            cursor = "\x1b[?25h\r\n" if sys.stderr.isatty() else ""  # the live view hides it
            tell(f"{cursor}{number.name} once more: ends at once, without another checkpoint\n".encode())
        os._exit(exit_code(number))


class StopCheck:
    """Whether any rank was asked to stop, for a loop whose turns all ranks take equally often.

    flags: those of this rank, on its device, one for each of STOPPING and perhaps more after them. The ranks ask each other
    every few turns, and read the answer when they ask again: nobody waits for the device, and all hear in the same turn.
    """

    def __init__(self, flags: Callable[[], Tensor], world: World) -> None:
        self._flags, self._world = flags, world
        self._turns, self._next, self._interval = 0, 1, 1  # counted in turns
        self._asked_at = -math.inf
        self._answer: HostCopy | None = None  # flags, and the seconds since the question before, summed over ranks

    def heard(self) -> signal.Signals | None:
        """The signal to stop by. Call it in each turn, on all ranks."""
        self._turns += 1
        if self._turns < self._next:
            return None
        asked = None
        if self._answer is not None:
            answer = self._answer.read()
            asked = first_of(answer["flags"])
            if answer["seconds"][0] < CHECK_SECONDS * self._world.size:
                self._interval *= 2
        now = time.monotonic()
        flags_here = self._flags()
        question = self._world.sum(torch.cat([flags_here, flags_here.new_tensor([now - self._asked_at])]))
        self._answer = HostCopy(flags=question[:-1], seconds=question[-1:])
        self._asked_at, self._next = now, self._turns + self._interval
        return asked


def first_of(counts: Sequence[float]) -> signal.Signals | None:
    """Of signals that some ranks have heard, in the order of STOPPING, the one that counts; what stands after them does not."""
    return next((number for number, count in zip(STOPPING, counts, strict=False) if count), None)


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
    """What shells and launchers take for "ended by that signal": 130 for SIGINT, 143 for SIGTERM."""
    return 128 + asked


def will_stop_line(asked: signal.Signals) -> str:
    """What is said at once of a request to stop."""
    return f"{asked.name}: will stop with a checkpoint once all processes have heard; once more: ends at once"


def stopped_line(asked: signal.Signals, step: int) -> str:
    """The last line of a run that was asked to stop, once its checkpoint of `step` is written."""
    return f"stopped by {asked.name} at step {step:,}; checkpoint written; the same command goes on from it"


def not_begun_line(asked: signal.Signals, newest: int | None) -> str:
    """The last line of a run that was asked to stop before its first step. newest: step of the newest checkpoint there is."""
    there = (
        "nothing was saved" if newest is None else f"the same command goes on from the checkpoint of step {newest:,}"
    )
    return f"stopped by {asked.name} before training began; {there}"
