"""A thread that receives signals at once, and the stack traces that SIGUSR2 requests.

Python runs a signal handler in the main thread, between two Python instructions, so it cannot run while native code computes,
compiles or waits. But Python writes the number of each signal to a pipe at once, and the thread here reads this pipe.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import threading
from collections.abc import Callable


class Listener:
    """Calls `work(number)` in its own thread for each signal that `hear` registered, whatever the main thread does.

    The thread needs the GIL, so native code that holds the GIL delays it. Each signal also needs a Python handler.
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
        """Remove the signal's work. Call `drain` first if signals that have already come should still be handled."""
        self._works.pop(number, None)

    def drain(self) -> None:
        """Wait, at most one second, until all signals that have come so far are handled."""
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
in_child: list[Callable[[], None]] = []  # further functions that a forked process calls


def listener() -> Listener:
    """The Listener of this process. Call it in the main thread."""
    global _listener
    if _listener is None:
        _listener = Listener()
    return _listener


def _forget() -> None:
    """Runs in a forked process, which would otherwise write to the pipe of its parent."""
    global _listener
    if _listener is not None:
        signal.set_wakeup_fd(-1)
        faulthandler.unregister(signal.SIGUSR2)
        _listener = None
    for forget in in_child:
        forget()


os.register_at_fork(after_in_child=_forget)


def stacks_on_request() -> None:
    """From now on SIGUSR2 writes stack traces to stderr and has no other effect.

    First faulthandler's handler, which does not need the GIL, writes the stack of the thread that it interrupts, the main
    thread. It must not read the stacks of other threads, because they keep running and may free what it reads. Then the
    listener, which holds the GIL, writes the stacks of all threads.
    """
    if threading.current_thread() is threading.main_thread():
        listener().hear(signal.SIGUSR2, _write_all)
        signal.signal(signal.SIGUSR2, lambda *_: None)
        faulthandler.register(signal.SIGUSR2, file=2, all_threads=False, chain=True)
        signal.siginterrupt(signal.SIGUSR2, False)


def _write_all(number: int) -> None:
    write_stacks("stacks of all threads:\n")
    # faulthandler resets this at each signal. With it, an interrupted system call of a library continues instead of failing.
    signal.siginterrupt(number, False)


def write_stacks(title: str) -> None:
    """Write `title` and the Python stacks of all threads to stderr, if possible in one piece, because ranks may share stderr."""
    try:
        descriptor = os.memfd_create("stacks")  # in memory, because the file system may be what hangs
    except (AttributeError, OSError):  # not Linux, or not allowed
        tell(title.encode())
        faulthandler.dump_traceback(2)
        return
    with open(descriptor, "w+b") as memory:
        faulthandler.dump_traceback(memory)
        memory.seek(0)
        tell(title.encode() + memory.read())


def tell(text: bytes) -> None:
    """Write to stderr and ignore errors. print could wait for a lock that the main thread holds."""
    with contextlib.suppress(OSError):
        while text:
            text = text[os.write(2, text) :]
