"""Several processes: a run in which nobody makes progress is ended by a line that says which rank is behind, and where.

Without it the ranks that wait in a collective fail first, at the process group's timeout, and their error names neither.
Each rank posts where it is to the store; once every rank has stood still for the timeout, the posts tell who did not come.
"""

from __future__ import annotations

import itertools
import json
import linecache
import os
import sys
import sysconfig
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from types import FrameType

import torch.distributed as dist

from trainer.engine.distributed import World

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

    @property
    def where(self) -> str:
        return f"step {self.step}, {self.place}" if self.step >= 0 else "its start"


class Watchdog:
    """Ends the process with exit code 1 when no rank has made progress for `timeout_seconds`; idle with one process.

    Start it on every rank after joining the process group, whose own timeout should be longer: this one is kept to a
    fifth of itself. `at` says where the main thread is. Seconds are those in which this process really ran: a laptop's
    sleep or a SIGSTOP counts as two ticks.
    """

    def __init__(self, world: World, timeout_seconds: float) -> None:
        self._world, self._timeout = world, timeout_seconds
        self._tick = min(timeout_seconds / 20, 10.0)
        self._now = (0, 0, "start")
        self._clock = self._idle = self._reached = 0.0
        self._heard: dict[int, tuple[Post, float]] = {}  # each rank's last post, and the clock when it was new
        self._closed, self._ending = threading.Event(), False
        self._main = threading.main_thread().ident
        self._threads: list[threading.Thread] = []
        if world.size == 1:
            return
        self._address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        self._prefix = f"watchdog{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/"
        # A store whose process is stopped never answers, whatever its timeout: one thread talks to it, the other does not.
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._watch, self._exchange)]
        for thread in self._threads:
            thread.start()

    def at(self, step: int, place: str) -> None:
        """The main thread has come to `place` of optimiser step `step`.

        Within a step all ranks should come through the same places: the one that passed the fewest is taken to be behind.
        """
        then, stage, _ = self._now
        self._now = (step, stage + 1 if step == then else 0, place)

    def close(self) -> None:
        """Stop watching, also when an exception ends the run: the run's end by the watchdog makes collectives fail elsewhere.

        Call it on every rank before they leave the process group, else the first to leave takes the store away.
        """
        if self._ending:
            time.sleep(3 * self._tick)  # the line is out, and this process about to end: no traceback after it
        self._closed.set()
        for thread in self._threads:
            thread.join(timeout=1)

    # -- the thread that keeps the time ------------------------------------------------------------------------------

    def _watch(self) -> None:
        last, seen, moved = time.monotonic(), self._now, 0.0
        while not self._closed.wait(self._tick):
            now = time.monotonic()
            self._clock += min(now - last, 2 * self._tick)
            last = now
            if self._now is not seen:
                seen, moved = self._now, self._clock
            self._idle = self._clock - moved
            if self._idle >= self._timeout and self._clock - self._reached >= self._timeout / 4:
                self._end(self._no_store())

    def _no_store(self) -> str:
        post = self._own_post()
        return (
            f"[rank {self._world.rank}] no progress for {self._timeout:.4g} s at {post.where} ({post.code}); the store at "
            f"{self._address} is gone or stopped, so that where the other ranks are is unknown: look first at rank 0's machine"
        )

    # -- the thread that talks to the store --------------------------------------------------------------------------

    def _exchange(self) -> None:
        host, port = self._address.rsplit(":", 1)
        try:
            store = dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False)
            for beat in itertools.count(1):
                post = replace(self._own_post(), beat=beat)
                store.set(f"{self._prefix}{self._world.rank}", json.dumps(asdict(post)))
                if self._idle > 2 * self._tick:  # else nobody needs to know, and the store is spared
                    self._read(store)
                    self._judge(store)
                self._reached = self._clock
                if self._closed.wait(self._tick):
                    return
        except RuntimeError:  # rank 0 is gone; _watch says so if the run stands still
            pass

    def _own_post(self) -> Post:
        step, stage, place = self._now
        if self._idle <= 2 * self._tick:
            return Post(step, stage, place, self._idle)
        code, waiting = whereabouts(sys._current_frames().get(self._main or 0))
        return Post(step, stage, place, self._idle, code, waiting)

    def _read(self, store: dist.Store) -> None:
        for rank in range(self._world.size):
            key = f"{self._prefix}{rank}"
            # get would wait for a rank that has not posted yet.
            post = Post(**json.loads(store.get(key))) if store.check([key]) else Post()
            if rank not in self._heard or self._heard[rank][0].beat != post.beat:
                self._heard[rank] = post, self._clock

    def _judge(self, store: dist.Store) -> None:
        posts = {rank: replace(post, unheard=self._clock - new) for rank, (post, new) in self._heard.items()}
        claim = f"{self._prefix}verdict"
        if min(post.idle + post.unheard for post in posts.values()) < self._timeout:
            if store.check([claim]):  # another rank's clock was a little faster
                self._end(None)
            return
        first = store.compare_set(claim, "", str(self._world.rank)) == str(self._world.rank).encode()
        self._end(verdict(posts, self._timeout) if first else None)

    def _end(self, line: str | None) -> None:
        """End the process. The others are given time to learn it: rank 0 may take the store with it."""
        self._ending = True
        if line is not None:
            os.write(2, f"error: {line}\n".encode())  # print could wait for a lock that the main thread holds
        time.sleep(2 * self._tick)
        os._exit(1)


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
    waiting = "/torch/distributed/" in path or function == "_engine_run_backward"
    return text if inner is own else f"{text} > {_spot(inner)}", waiting


def _spot(frame: FrameType) -> str:
    code = frame.f_code
    return f"{os.path.basename(code.co_filename)}:{frame.f_lineno} in {code.co_name}"


def verdict(posts: Mapping[int, Post], seconds: float) -> str:
    """One line: which ranks hold the others up and where, after `seconds` without progress. posts: every rank's."""
    blamed = {rank for rank, post in posts.items() if post.unheard >= seconds / 2}
    if blamed:
        unheard = min(posts[rank].unheard for rank in blamed)
        blame = [
            f"{_names(ranks)} {'has' if len(ranks) == 1 else 'have'} not been heard of for {unheard:.3g} s, last from {where}"
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
            blame = [f"{_names(blamed)} is behind, at {where} ({posts[min(blamed)].code})"]
        else:
            blame = [f"{_names(blamed)} are behind, at {where} ({_codes(posts, blamed)})"]
    others = posts.keys() - blamed
    waits = [
        f"{'the other ranks' if ranks == others and len(ranks) > 1 else _names(ranks)} "
        f"wait{'s' if len(ranks) == 1 else ''} at {where}"
        for where, ranks in _groups(posts, others)
    ]
    remedy = "raise engine.timeout_minutes if this is slow rather than stuck"
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
    return " | ".join(f"{_names(at)}: {code}" for code, at in found.items())


def _names(ranks: Iterable[int]) -> str:
    """`rank 3`, or `ranks 0-2, 5`."""
    ordered = sorted(ranks)
    runs: list[list[int]] = []
    for rank in ordered:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1] = [runs[-1][0], rank]
        else:
            runs.append([rank])
    return ("rank " if len(ordered) == 1 else "ranks ") + ", ".join("-".join(map(str, run)) for run in runs)
