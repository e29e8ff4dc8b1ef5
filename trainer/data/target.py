"""The folder that `prepare` writes: it appears whole or not at all, however the work ends."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from trainer.core.errors import MachineError, UserError
from trainer.core.files import may_pass, sync_path
from trainer.core.text import printable
from trainer.data.dataset import partial_folder

ENDING = (signal.SIGTERM, signal.SIGHUP)  # from a scheduler, or from a terminal that closes


@contextmanager
def signals_as_interrupts() -> Iterator[None]:
    """Within the block, signals that end a process act like Ctrl-C, so that no files are left behind. The old handlers are restored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in ENDING}
    heeded = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    for number in heeded:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in heeded:
            signal.signal(number, before[number])


@contextmanager
def one_line_errors(out: Path) -> Iterator[None]:
    """Turn whatever ends the work into a one-line error."""
    name = printable(out)
    try:
        try:
            yield
        except BrokenProcessPool:
            time.sleep(0.5)  # a signal to all processes may reach a child first
            raise
    except KeyboardInterrupt:
        raise MachineError(f"prepare was interrupted; {name} was not written, run it again from the start") from None
    except BrokenProcessPool:
        raise MachineError(
            f"a tokenising process died (killed, or out of memory); {name} was not written, try again with fewer workers"
        ) from None
    except MemoryError:
        raise UserError(
            f"out of memory; {name} was not written, try again with fewer workers or shorter rows"
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MachineError(f"no space left for {name}; nothing was kept, free some space and run again") from None
        kind = MachineError if may_pass(error) else UserError
        what = printable(error.strerror or error)
        raise kind(f"{printable(error.filename or out)}: {what}; {name} was not written") from None


@contextmanager
def fresh_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out`. It is renamed to `out` if the block succeeds, and removed if not."""
    import filelock

    _refuse_existing(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_folder(out)
    lock = filelock.FileLock(f"{partial}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(
            f"{printable(out)}: is being prepared by another process; wait for it or choose another folder"
        ) from None
    try:
        _refuse_existing(out)
        _remove(partial)  # left by a killed run
        partial.mkdir()
        yield partial
        _sync(partial)
        partial.rename(out)
        sync_path(out.parent)
    finally:
        _remove(partial)
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _refuse_existing(out: Path) -> None:
    if os.path.lexists(out):
        raise UserError(f"out: {printable(out)} exists already; choose another folder or remove it first")


def _sync(folder: Path) -> None:
    """Make everything below `folder` survive a power cut."""
    for path in (*folder.rglob("*"), folder):
        sync_path(path)
