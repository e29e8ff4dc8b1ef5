"""SIGINT (Ctrl-C), SIGTERM, SIGHUP and SIGUSR1: the run finishes the current step, writes a checkpoint, and ends."""

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

# If ranks received different signals, the first one in this order counts.
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# nohup and background jobs of a script start a process with these ignored, so that it outlives its shell.
MAY_BE_IGNORED = (signal.SIGINT, signal.SIGHUP)
# `timeout`, and launchers on a terminal or under Slurm, deliver one request twice: the process group gets the signal, and the
# launcher passes it on. A second signal within these seconds is the same request.
SAME_REQUEST_SECONDS = 5.0
SAME_KEY_SECONDS = 0.25  # for Ctrl-C without a launcher: a user is slower, `timeout` is faster
CHECK_SECONDS = 1.0  # minimum time between two checks of `StopCheck` if turns are shorter


class StopSignals:
    """Context manager that handles the signals of STOPPING. Outside the main thread it does nothing.

    Before `begin` a signal raises Stopped, because there is nothing to lose. After `begin` it only sets `asked`, and the loop
    checks `asked` after each step. A second request ends the process at once, even in native code; SIGUSR1 does not count as
    one. A signal may reach only some ranks, so the ranks must agree on one (`StopCheck`). launched: whether a launcher started
    the process; a launcher passes on signals that the whole process group already gets.
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
            in_child.append(self._restore)  # SIGTERM must still end a forked process
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
            # Without this a much later Ctrl-C would count as the second request and end the process.
            for number in self._previous:
                listener().forget(number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def begin(self, say: Callable[[str], None]) -> None:
        """Training begins, so from now on there is something to save. say: prints a line on the console."""
        self._say = say
        if self.asked is not None:  # Stopped was raised, but where Python ignores exceptions, such as in a __del__
            raise Stopped(self.asked)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Runs in the main thread, as soon as that is not in native code."""
        if self.asked in (None, signal.SIGUSR1):
            self.asked = signal.Signals(number)
        if self._say is None and not self._raised:
            self._raised = True
            raise Stopped(self.asked)

    def _hear(self, number: int) -> None:
        """Runs in the listener's thread, at once."""
        now = time.monotonic()
        counts = number != signal.SIGUSR1  # SIGUSR1 is only a warning; a script sends SIGTERM after it
        by_key = number == signal.SIGINT and not self._launched
        if counts and self._first is None:
            self._first = now
        elif counts and now - (self._first or now) > (SAME_KEY_SECONDS if by_key else SAME_REQUEST_SECONDS):
            self._end(signal.Signals(number))
        if self._say is not None and not self._announced:
            self._announced = True
            # In a separate thread: the main thread may hold the console's lock, and this thread must handle the next signal.
            telling = threading.Thread(target=self._say, args=(will_stop_line(signal.Signals(number)),), daemon=True)
            telling.start()
            telling.join(0.2)

    def _end(self, number: signal.Signals) -> None:
        if self._world.leader:
            cursor = "\x1b[?25h\r\n" if sys.stderr.isatty() else ""  # show the cursor again, which the live view hides
            tell(f"{cursor}{number.name} again: ends at once, without another checkpoint\n".encode())
        os._exit(exit_code(number))


class StopCheck:
    """Finds out whether any rank was asked to stop, in a loop that has the same number of turns on all ranks.

    flags: returns this rank's flags as a tensor on its device: one for each signal of STOPPING, perhaps followed by others.
    The ranks sum their flags every few turns and read the result at the next sum. So no rank waits for the device, and all
    ranks get the answer in the same turn.
    """

    def __init__(self, flags: Callable[[], Tensor], world: World) -> None:
        self._flags, self._world = flags, world
        self._turns, self._next, self._interval = 0, 1, 1  # counted in turns
        self._asked_at = -math.inf
        self._answer: HostCopy | None = None  # flags, and seconds since the previous check, summed over ranks

    def heard(self) -> signal.Signals | None:
        """The signal that asks for a stop, or None. Call it in each turn, on all ranks."""
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
    """The first signal in the order of STOPPING that any rank received. Further values in `counts` are ignored."""
    return next((number for number, count in zip(STOPPING, counts, strict=False) if count), None)


def follow_launcher() -> None:
    """Make the kernel send SIGTERM to this process when its parent process ends (Linux only).

    This is for workers of a launcher. On SIGTERM, `accelerate launch` of one process ends without passing the signal on; on
    SIGKILL every launcher does. Their workers would then keep training, and nothing would stop them.
    """
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # the parent ended before the call
            signal.raise_signal(signal.SIGTERM)


def exit_code(asked: signal.Signals) -> int:
    """The exit code that shells and launchers read as "ended by this signal": 130 for SIGINT, 143 for SIGTERM."""
    return 128 + asked


def will_stop_line(asked: signal.Signals) -> str:
    """The line that a request to stop prints at once."""
    return f"{asked.name}: will stop with a checkpoint once all processes know; a second request ends at once"


def stopped_line(asked: signal.Signals, step: int) -> str:
    """The last line of a run that was asked to stop, once its checkpoint of `step` is written."""
    return f"stopped by {asked.name} at step {step:,}; checkpoint written; the same command goes on from it"


def not_begun_line(asked: signal.Signals, newest: int | None) -> str:
    """The last line of a run that was asked to stop before its first step. newest: step of the newest checkpoint, or None."""
    there = (
        "nothing was saved" if newest is None else f"the same command goes on from the checkpoint of step {newest:,}"
    )
    return f"stopped by {asked.name} before training began; {there}"
