"""Several processes: a run in which nobody makes progress is ended by a line that says which rank is behind, and where.

Without it the ranks that wait in a collective fail first, at the process group's timeout, and their error names neither.
Each rank posts where it is to the store; once every rank has stood still for the timeout, the posts tell who did not come.
Then every rank writes the stacks of its threads to its own stderr, and when all have, they end.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import linecache
import math
import os
import re
import signal
import socket
import sys
import sysconfig
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from trainer.runtime.distributed import World, attempt_prefix
from trainer.runtime.host_info import rank_names
from trainer.runtime.listener import stacks_on_request, tell, write_stacks

LIBRARIES = (*(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")), "<frozen")


@dataclass(frozen=True)
class Post:
    """Where a rank is. `stage` counts the places of a step; `idle` and `unheard` are seconds as in Watchdog."""

    step: int = -1
    stage: int = 0
    place: str = ""
    idle: float = 0.0
    code: str = ""  # what its main thread executes, once it has been idle for some time
    waiting: bool = False  # its main thread is in a collective or a backward pass, which may hold one
    beat: int = 0
    unheard: float = 0.0  # set by the reader: since the post last changed
    limit: float = 0.0  # seconds that a rank may stand there
    written: bool = False  # its stacks are in its log
    host: str = ""
    pid: int = 0

    @property
    def where(self) -> str:
        return f"step {self.step}, {self.place}" if self.step >= 0 else "its start"


class Watchdog:
    """Ends the process with exit code 1 when no rank has made progress for too long; with one process it never does.

    Standing still within an optimiser step may take `step_timeout_seconds`, but for the first step, which compiles; anywhere
    else, and at most, `timeout_seconds`. Start it on every rank after joining the process group, whose own timeout should
    be longer: this one is kept to a fifth of itself. `at` says where the main thread is. Seconds are those in which this
    process really ran: a laptop's sleep or a SIGSTOP counts as two ticks. From its start on a SIGUSR2 writes the stacks of
    all threads to stderr, with one process too, and nothing else happens.
    """

    def __init__(self, world: World, timeout_seconds: float, step_timeout_seconds: float = math.inf) -> None:
        self._world, self._timeout = world, timeout_seconds
        self._step_timeout = min(step_timeout_seconds, timeout_seconds)
        self._tick = min(self._step_timeout / 20, 10.0)
        self._host = socket.gethostname()
        self._first_step: int | None = None
        self._now = (0, 0, "start", timeout_seconds)
        self._stands = self._now, 0.0  # where the main thread was at the last tick, and for how many seconds
        self._clock = self._reached = 0.0
        self._heard: dict[int, tuple[Post, float]] = {}  # each rank's last post, and the clock when it was new
        self._closed, self._ending, self._written = threading.Event(), False, False
        self._main = threading.main_thread().ident
        self._threads: list[threading.Thread] = []
        stacks_on_request()
        if world.size == 1:
            return
        self._address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        self._prefix = f"{attempt_prefix()}/watchdog/"
        # A store whose process is stopped never answers, whatever its timeout: one thread talks to it, the other does not.
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._watch, self._exchange)]
        for thread in self._threads:
            thread.start()

    def at(self, step: int, place: str, in_step: bool = False) -> None:
        """The main thread has come to `place` of optimiser step `step`; in_step: it is part of the step itself.

        Within a step all ranks should come through the same places: the one that passed the fewest is taken to be behind.
        """
        if in_step and self._first_step is None:
            self._first_step = step
        limit = self._step_timeout if in_step and step != self._first_step else self._timeout
        then, stage, _, _ = self._now
        self._now = (step, stage + 1 if step == then else 0, place, limit)

    def close(self) -> None:
        """Stop watching, also when an exception ends the run: the run's end by the watchdog makes collectives fail elsewhere.

        Call it on every rank before they leave the process group, else the first to leave takes the store away.
        """
        if self._ending:
            time.sleep(12 * self._tick)  # the line is out, and this process about to end: no traceback after it
        self._closed.set()
        for thread in self._threads:
            thread.join(timeout=1)

    # -- the thread that keeps the time ------------------------------------------------------------------------------

    # It reads no source lines, as `whereabouts` does: where a file system hangs, this thread must still end the run.

    def _watch(self) -> None:
        last, moved = time.monotonic(), 0.0
        while not self._closed.wait(self._tick):
            now = time.monotonic()
            self._clock += min(now - last, 2 * self._tick)
            last = now
            place = self._now
            if place is not self._stands[0]:
                moved = self._clock
            idle, limit = self._clock - moved, place[-1]
            # One assignment: the seconds of a long place with the limit of the short one after it would end the run.
            self._stands = place, idle
            if not self._ending and idle >= limit and self._clock - self._reached >= limit / 4:
                tell(f"error: {self._no_store()}\n".encode())
                self._ending = True
            if self._ending:
                self._end()

    @property
    def _where(self) -> str:
        step, stage, place, _ = self._stands[0]
        return Post(step, stage, place).where

    def _no_store(self) -> str:
        limit = self._stands[0][-1]
        return (
            f"[rank {self._world.rank}] no progress for {limit:.4g} s at {self._where}; the store at "
            f"{self._address} is gone or stopped, so that where the other ranks are is unknown: look first at rank 0's machine"
        )

    def _end(self) -> None:
        """Write the stacks and end the process, but not before the others have written: a launcher kills them at the first end.

        Without the store nobody knows who has written; the others then have the same eight ticks to notice it themselves.
        """
        time.sleep(min(self._tick, 1.0))  # where all ranks share a terminal, the line that says why comes first
        write_stacks(f"[rank {self._world.rank} on {self._host}, {self._where}] stacks of its threads:\n")
        self._written = True
        for fifth in range(5 * 8):
            if len(self._heard) == self._world.size and all(post.written for post, _ in list(self._heard.values())):
                break
            if fifth == 5 * 5:
                self._ask_the_silent()
            time.sleep(self._tick / 5)
        time.sleep(self._tick)  # the store, which rank 0 may hold, stays until the others have read it too
        os._exit(1)

    def _ask_the_silent(self) -> None:
        """Ask those on this machine who have not written. One who holds the GIL cannot; faulthandler's handler does not need it."""
        posts = {rank: post for rank, (post, _) in list(self._heard.items()) if post.host == self._host}
        if self._world.rank != min((rank for rank, post in posts.items() if post.written), default=None):
            return
        for post in posts.values():
            if not post.written and catches(post.pid, signal.SIGUSR2):
                with contextlib.suppress(OSError):
                    os.kill(post.pid, signal.SIGUSR2)

    # -- the thread that talks to the store --------------------------------------------------------------------------

    def _exchange(self) -> None:
        host, port = self._address.rsplit(":", 1)
        try:
            store = dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False)
            for beat in itertools.count(1):
                post = replace(self._own_post(), beat=beat)
                store.set(f"{self._prefix}{self._world.rank}", json.dumps(asdict(post)))
                # With the main thread at work nobody needs to know where the others are, and the store is spared.
                posts = self._read(store) if self._standing or self._ending else {}
                if not self._ending:
                    self._judge(store, posts)
                self._reached = self._clock
                if self._closed.wait(self._tick / 5 if self._ending else self._tick):
                    return
        except RuntimeError:  # rank 0 is gone; _watch says so if the run stands still
            pass

    @property
    def _standing(self) -> bool:
        return self._stands[1] > 2 * self._tick

    def _own_post(self) -> Post:
        (step, stage, place, limit), idle = self._stands
        code, waiting = whereabouts(sys._current_frames().get(self._main or 0)) if self._standing else ("", False)
        own = Post(step, stage, place, idle, code, waiting, limit=limit)
        return replace(own, written=self._written, host=self._host, pid=os.getpid())

    def _read(self, store: dist.Store) -> dict[int, Post]:
        for rank in range(self._world.size):
            key = f"{self._prefix}{rank}"
            # get would wait for a rank that has not posted yet.
            post = Post(**json.loads(store.get(key))) if store.check([key]) else Post(limit=self._timeout)
            if rank not in self._heard or self._heard[rank][0].beat != post.beat:
                self._heard[rank] = post, self._clock
        return {rank: replace(post, unheard=self._clock - new) for rank, (post, new) in self._heard.items()}

    def _judge(self, store: dist.Store, posts: dict[int, Post]) -> None:
        """Let this process end where another rank has said so, or where the posts do; posts: every rank's, or none."""
        claim = f"{self._prefix}verdict"
        if store.check([claim]):
            self._ending = True
        if self._ending or not posts:
            return
        limit = patience(posts)
        if min(post.idle + post.unheard for post in posts.values()) < limit:
            return
        if store.compare_set(claim, "", str(self._world.rank)) == str(self._world.rank).encode():
            key = "engine.step_timeout_minutes" if limit < self._timeout else "engine.timeout_minutes"
            tell(f"error: {verdict(posts, limit, key)}\n".encode())
        self._ending = True


def catches(pid: int, number: int) -> bool:
    """Whether process `pid` has a handler for signal `number`, which else may kill it. False where there is no /proc."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


def whereabouts(frame: FrameType | None) -> tuple[str, bool]:
    """("file:line in function: source" of the innermost frame outside of libraries, whether it may be waiting for ranks).

    Where the innermost frame of all is a library's, it follows after " > ".
    """
    if frame is None:
        return "unknown", False
    inner = own = frame
    while own.f_code.co_filename.startswith(LIBRARIES) and own.f_back is not None:
        own = own.f_back
    if own.f_code.co_filename.startswith(LIBRARIES):  # no frame is ours
        own = inner
    source = linecache.getline(own.f_code.co_filename, own.f_lineno).strip()
    text = _spot(own) + (f": {source[:60]}" if source else "")
    path, function = inner.f_code.co_filename.replace(os.sep, "/"), inner.f_code.co_name
    # NCCL's collectives return at once; who waits for them waits for the device.
    waiting = (
        any(part in path for part in ("/torch/distributed/", "/torch/cuda/")) or function == "_engine_run_backward"
    )
    return text if inner is own else f"{text} > {_spot(inner)}", waiting


def _spot(frame: FrameType) -> str:
    code = frame.f_code
    return f"{os.path.basename(code.co_filename)}:{frame.f_lineno} in {code.co_name}"


def patience(posts: Mapping[int, Post]) -> float:
    """Seconds for which all ranks may stand still: the limit where the rank that is behind stands.

    Whoever waits in a collective waits for a rank that has not come to it, thus for one that has passed fewer places: the
    limit of its own place says nothing then. And those ahead have made every call that the one behind makes, so that
    their limits say nothing about it. So rank 0 may save for long while others wait in the next step, and a rank lost in
    a step soon ends a run whose others wait in a validation. That they do wait still matters: a post may be merely lost.
    """
    least = min((post.step, post.stage) for post in posts.values())
    return max(post.limit for post in posts.values() if (post.step, post.stage) == least)


def verdict(posts: Mapping[int, Post], seconds: float, key: str) -> str:
    """One line: which ranks hold the others up and where, after `seconds` without progress. posts: every rank's.

    key: of the config, to raise where the ranks are only slow.
    """
    blamed = {rank for rank, post in posts.items() if post.unheard >= seconds / 2}
    if blamed:
        unheard = min(posts[rank].unheard for rank in blamed)
        blame = [
            f"{rank_names(ranks)} {'has' if len(ranks) == 1 else 'have'} not been heard of for {unheard:.3g} s, last from {where}"
            for where, ranks in _groups(posts, blamed)
        ]
    else:
        least = min((post.step, post.stage) for post in posts.values())
        last = {rank for rank, post in posts.items() if (post.step, post.stage) == least}
        blamed = {rank for rank in last if not posts[rank].waiting} or last
        where = posts[min(blamed)].where
        if len(blamed) == len(posts):
            blame = [f"all ranks stand at {where}: {_codes(posts, blamed)}"]
        elif len(blamed) == 1:
            blame = [f"{rank_names(blamed)} is behind, at {where} ({posts[min(blamed)].code})"]
        else:
            blame = [f"{rank_names(blamed)} are behind, at {where} ({_codes(posts, blamed)})"]
    others = posts.keys() - blamed
    waits = [
        f"{'the other ranks' if ranks == others and len(ranks) > 1 else rank_names(ranks)} "
        f"wait{'s' if len(ranks) == 1 else ''} at {where}"
        for where, ranks in _groups(posts, others)
    ]
    remedy = f"raise {key} if this is slow rather than stuck"
    return f"no progress for {seconds:.4g} s: " + "; ".join([*blame, *waits, remedy])


def _groups(posts: Mapping[int, Post], ranks: Iterable[int]) -> list[tuple[str, set[int]]]:
    """The places of `ranks` with who is there, those behind first."""
    found: dict[str, set[int]] = {}
    for rank in sorted(ranks, key=lambda rank: (posts[rank].step, posts[rank].stage, rank)):
        found.setdefault(posts[rank].where, set()).add(rank)
    return list(found.items())


def _codes(posts: Mapping[int, Post], ranks: Iterable[int]) -> str:
    """What `ranks` execute, as "ranks 0-2: CODE | rank 3: CODE"."""
    found: dict[str, set[int]] = {}
    for rank in sorted(ranks):
        found.setdefault(posts[rank].code, set()).add(rank)
    return " | ".join(f"{rank_names(at)}: {code}" for code, at in found.items())
