"""Ends a run of several processes that makes no progress, with a line that says which rank is behind, and where.

Without the watchdog, the ranks that wait in a collective fail at the process group's timeout, and their error says neither.
Each rank posts its position to the store. When no rank has moved for the timeout, the posts show which rank is behind. Then
every rank writes the stacks of its threads to its own stderr, and when all have done so, they end.
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
    """The position of a rank. `stage` counts the places of a step; `idle` and `unheard` are in seconds as Watchdog counts them."""

    step: int = -1
    stage: int = 0
    place: str = ""
    idle: float = 0.0
    code: str = ""  # the source line that its main thread executes, once it has been idle for some time
    waiting: bool = False  # whether its main thread is in a collective or in a backward pass, which may contain one
    beat: int = 0
    unheard: float = 0.0  # seconds since the post last changed; the reader sets it
    limit: float = 0.0  # seconds that a rank may stay at this place
    written: bool = False  # whether it has written its stacks
    host: str = ""
    pid: int = 0

    @property
    def where(self) -> str:
        return f"step {self.step}, {self.place}" if self.step >= 0 else "its start"


class Watchdog:
    """Ends the process with exit code 1 when no rank makes progress for too long. With one process it never ends it.

    The limit is `step_timeout_seconds` within an optimiser step, except in the first step, which compiles. In the first step
    and everywhere else it is `timeout_seconds`, which is also the upper bound of the step's limit. Start the watchdog on every
    rank after joining the process group. The process group's own timeout should be longer, because the watchdog may act up
    to a fifth of its limit late. `at` records where the main thread is. Only seconds in which this process really ran count:
    a laptop's sleep or a SIGSTOP counts as two ticks. From the start of the watchdog, SIGUSR2 writes the stacks of all
    threads to stderr and does nothing else, also with one process.
    """

    def __init__(self, world: World, timeout_seconds: float, step_timeout_seconds: float = math.inf) -> None:
        self._world, self._timeout = world, timeout_seconds
        self._step_timeout = min(step_timeout_seconds, timeout_seconds)
        self._tick = min(self._step_timeout / 20, 10.0)
        self._host = socket.gethostname()
        self._first_step: int | None = None
        self._now = (0, 0, "start", timeout_seconds)
        # Where the main thread was at the last tick, and for how many seconds it had been there.
        self._stands = self._now, 0.0
        self._clock = self._reached = 0.0
        self._heard: dict[int, tuple[Post, float]] = {}  # the last post of each rank, and the clock when it was new
        self._closed, self._ending, self._written = threading.Event(), False, False
        self._main = threading.main_thread().ident
        self._threads: list[threading.Thread] = []
        stacks_on_request()
        if world.size == 1:
            return
        self._address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        self._prefix = f"{attempt_prefix()}/watchdog/"
        # If the process that holds the store is stopped, the store never answers, despite its timeout. So only one of the two
        # threads talks to the store.
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._watch, self._exchange)]
        for thread in self._threads:
            thread.start()

    def at(self, step: int, place: str, in_step: bool = False) -> None:
        """Record that the main thread is at `place` of optimiser step `step`. in_step: whether this is part of the step itself.

        Within a step all ranks must pass the same places: the rank that has passed the fewest counts as behind.
        """
        if in_step and self._first_step is None:
            self._first_step = step
        limit = self._step_timeout if in_step and step != self._first_step else self._timeout
        then, stage, _, _ = self._now
        self._now = (step, stage + 1 if step == then else 0, place, limit)

    def close(self) -> None:
        """Stop watching. Call it on every rank before the ranks leave the process group, or the store may disappear first.

        Call it also when an exception ends the run. The exception may come from a collective that failed because the watchdog
        is ending the run on another rank.
        """
        if self._ending:
            time.sleep(12 * self._tick)  # the process ends during this sleep, so no traceback follows the line
        self._closed.set()
        for thread in self._threads:
            thread.join(timeout=1)

    # -- the thread that keeps the time ------------------------------------------------------------------------------

    # Unlike `whereabouts`, this thread reads no source lines: it must end the run even if a file system hangs.

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
            # Assign both at once: the seconds of a long place with the limit of a short place after it would end the run.
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
            f"{self._address} is gone or stopped, so it is unknown where the other ranks are: look first at rank 0's machine"
        )

    def _end(self) -> None:
        """Write the stacks, wait until the other ranks have written theirs, and end the process.

        A launcher kills all ranks when the first one ends. Without the store no rank knows which ranks have written; the
        others then have the same eight ticks to notice that the run stands still.
        """
        time.sleep(min(self._tick, 1.0))  # if all ranks share a terminal, the line with the reason must come first
        write_stacks(f"[rank {self._world.rank} on {self._host}, {self._where}] stacks of its threads:\n")
        self._written = True
        for fifth in range(5 * 8):
            if len(self._heard) == self._world.size and all(post.written for post, _ in list(self._heard.values())):
                break
            if fifth == 5 * 5:
                self._ask_the_silent()
            time.sleep(self._tick / 5)
        time.sleep(self._tick)  # rank 0 may hold the store; the others must read it before this process ends
        os._exit(1)

    def _ask_the_silent(self) -> None:
        """Send SIGUSR2 to the ranks on this machine that have not written their stacks.

        In such a rank native code may hold the GIL, so that its watchdog cannot write. faulthandler's handler needs no GIL.
        """
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
                # While the main thread makes progress, the other posts are not needed; reading none spares the store.
                posts = self._read(store) if self._standing or self._ending else {}
                if not self._ending:
                    self._judge(store, posts)
                self._reached = self._clock
                if self._closed.wait(self._tick / 5 if self._ending else self._tick):
                    return
        except RuntimeError:  # rank 0 is gone; _watch reports this if the run stands still
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
            # get alone would wait for a rank that has not posted yet.
            post = Post(**json.loads(store.get(key))) if store.check([key]) else Post(limit=self._timeout)
            if rank not in self._heard or self._heard[rank][0].beat != post.beat:
                self._heard[rank] = post, self._clock
        return {rank: replace(post, unheard=self._clock - new) for rank, (post, new) in self._heard.items()}

    def _judge(self, store: dist.Store, posts: dict[int, Post]) -> None:
        """Decide to end this process if another rank has decided so, or if no rank moves. posts: of every rank, or empty."""
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
    """Whether process `pid` has a handler for signal `number`; without one the signal may kill it. False without /proc."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


def whereabouts(frame: FrameType | None) -> tuple[str, bool]:
    """("file:line in function: source" of the innermost frame outside of libraries, whether it may be waiting for ranks).

    If the innermost frame of all belongs to a library, it follows after " > ".
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
    # NCCL's collectives return at once; code that waits for their result waits for the device.
    waiting = (
        any(part in path for part in ("/torch/distributed/", "/torch/cuda/")) or function == "_engine_run_backward"
    )
    return text if inner is own else f"{text} > {_spot(inner)}", waiting


def _spot(frame: FrameType) -> str:
    code = frame.f_code
    return f"{os.path.basename(code.co_filename)}:{frame.f_lineno} in {code.co_name}"


def patience(posts: Mapping[int, Post]) -> float:
    """Seconds for which all ranks may stand still: the limit at the place of the rank that is behind.

    The other ranks are ahead: they have passed more places and wait in a collective for the rank behind, so the limits of
    their own places do not matter. Two examples: rank 0 may take long to save while the others already wait in the next step;
    and a rank that hangs within a step soon ends the run, even if the others wait in a validation, which has a longer limit.
    The caller still checks that all ranks stand still, because a post may only be lost.
    """
    least = min((post.step, post.stage) for post in posts.values())
    return max(post.limit for post in posts.values() if (post.step, post.stage) == least)


def verdict(posts: Mapping[int, Post], seconds: float, key: str) -> str:
    """One line that says which ranks hold up the others, and where, after `seconds` without progress. posts: of every rank.

    key: the config key to raise if the ranks are only slow.
    """
    blamed = {rank for rank, post in posts.items() if post.unheard >= seconds / 2}
    if blamed:
        unheard = min(posts[rank].unheard for rank in blamed)
        blame = [
            f"{rank_names(ranks)} {'has' if len(ranks) == 1 else 'have'} reported nothing for {unheard:.3g} s, last at {where}"
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
    """The places of `ranks` and the ranks at each place, beginning with those behind."""
    found: dict[str, set[int]] = {}
    for rank in sorted(ranks, key=lambda rank: (posts[rank].step, posts[rank].stage, rank)):
        found.setdefault(posts[rank].where, set()).add(rank)
    return list(found.items())


def _codes(posts: Mapping[int, Post], ranks: Iterable[int]) -> str:
    """The code that `ranks` execute, as "ranks 0-2: CODE | rank 3: CODE"."""
    found: dict[str, set[int]] = {}
    for rank in sorted(ranks):
        found.setdefault(posts[rank].code, set()).add(rank)
    return " | ".join(f"{rank_names(at)}: {code}" for code, at in found.items())
