"""A thread that hears of signals at once, and the stacks that SIGUSR2 asks for.

Python runs a signal's handler in the main thread, between two of its own instructions: not while native code computes, builds or
waits. But it writes each signal's number into a pipe at once, and a thread reads there.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import threading
from collections.abc import Callable


class Listener:
    """Calls `work(number)` in its thread for each signal that it was told of, whatever the main thread does.

    It needs the GIL: native code that holds that keeps this thread waiting, too. Signals need a Python handler besides.
    """

    def __init__(self) -> None:
        self._works: dict[int, Callable[[int], None]] = {}
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._drained = threading.Event()
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, daemon=True, name="signals").start()

    def hear(self, number: int, work: Callable[[int], None]) -> None:
        self._works[number] = work

    def forget(self, number: int) -> None:
        """The signal has no work any more. What came before is still dealt with after `drain`."""
        self._works.pop(number, None)

    def drain(self) -> None:
        """Wait until what has come so far is dealt with."""
        self._drained.clear()
        os.write(self._write, b"\0")
        self._drained.wait(1)

    def _listen(self) -> None:
        while True:
            (number,) = os.read(self._read, 1)
            if number == 0:
                self._drained.set()
            elif number in self._works:
                self._works[number](number)


_listener: Listener | None = None
in_child: list[Callable[[], None]] = []  # what else a forked process has to forget


def listener() -> Listener:
    """The one of this process; call it in the main thread."""
    global _listener
    if _listener is None:
        _listener = Listener()
    return _listener


def _forget() -> None:
    """In a forked process, which would write into its parent's pipe."""
    global _listener
    if _listener is not None:
        signal.set_wakeup_fd(-1)
        faulthandler.unregister(signal.SIGUSR2)
        _listener = None
    for forget in in_child:
        forget()


os.register_at_fork(after_in_child=_forget)


def stacks_on_request() -> None:
    """From here on SIGUSR2 writes stacks to stderr, and nothing else happens.

    First faulthandler's own handler writes that of the thread it interrupts, the main one: it needs no GIL. It must not look at
    other threads, which run meanwhile and free what it reads. Then the listener, which has the GIL, writes those of all.
    """
    if threading.current_thread() is threading.main_thread():
        listener().hear(signal.SIGUSR2, _write_all)
        signal.signal(signal.SIGUSR2, lambda *_: None)
        faulthandler.register(signal.SIGUSR2, file=2, all_threads=False, chain=True)
        signal.siginterrupt(signal.SIGUSR2, False)


def _write_all(number: int) -> None:
    write_stacks("stacks of all threads:\n")
    # faulthandler forgets it with each signal: a read of a library that is interrupted shall go on, not fail.
    signal.siginterrupt(number, False)


def write_stacks(title: str) -> None:
    """Write `title` and the Python stacks of all threads to stderr, in one piece where that is possible: ranks may share it."""
    try:
        descriptor = os.memfd_create("stacks")  # no file: its file system may be what hangs
    except (AttributeError, OSError):  # not Linux, or not allowed
        tell(title.encode())
        faulthandler.dump_traceback(2)
        return
    with open(descriptor, "w+b") as memory:
        faulthandler.dump_traceback(memory)
        memory.seek(0)
        tell(title.encode() + memory.read())


def tell(text: bytes) -> None:
    """Write to stderr as far as it takes it. print could wait for a lock that the main thread holds."""
    with contextlib.suppress(OSError):
        while text:
            text = text[os.write(2, text) :]
