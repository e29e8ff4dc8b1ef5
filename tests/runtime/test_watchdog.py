"""What the posts of all ranks say about a run that stands still, and what a frame says about a rank."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import PATIENCE

from trainer.runtime.distributed import World
from trainer.runtime.listener import listener, write_stacks
from trainer.runtime.watchdog import Post, Watchdog, catches, patience, verdict, whereabouts

REMEDY = "; raise engine.KEY if this is slow rather than stuck"


def post(step, stage, place, code="", waiting=False, unheard=0.1, idle=20.0):
    return Post(step, stage, place, idle, code, waiting, beat=7, unheard=unheard)


BEHIND = post(3, 1, "microbatch 1 of 2", "my_model.py:12 in forward: time.sleep(1000)")
WAITS = post(3, 3, "loss sum", "train.py:90 in step: all_reduce()", waiting=True)
LOST = post(3, 1, "microbatch 1 of 2", unheard=18.4, idle=1.6)


@pytest.mark.parametrize(
    "posts, line",
    [
        (
            [WAITS, BEHIND, WAITS],
            "rank 1 is behind, at step 3, microbatch 1 of 2 (my_model.py:12 in forward: time.sleep(1000)); "
            "the other ranks wait at step 3, loss sum",
        ),
        (
            [BEHIND, WAITS],
            "rank 0 is behind, at step 3, microbatch 1 of 2 (my_model.py:12 in forward: time.sleep(1000)); "
            "rank 1 waits at step 3, loss sum",
        ),
        # A rank that came to a later step by fewer places is not behind.
        (
            [post(4, 0, "microbatch 1 of 1"), BEHIND],
            "rank 1 is behind, at step 3, microbatch 1 of 2 (my_model.py:12 in forward: time.sleep(1000)); "
            "rank 0 waits at step 4, microbatch 1 of 1",
        ),
        # At one place, the one outside of a collective is behind.
        (
            [post(3, 1, "microbatch 1 of 2", "a.py:1 in backward", waiting=True), BEHIND],
            "rank 1 is behind, at step 3, microbatch 1 of 2 (my_model.py:12 in forward: time.sleep(1000)); "
            "rank 0 waits at step 3, microbatch 1 of 2",
        ),
        (
            [WAITS, BEHIND, BEHIND, post(3, 1, "microbatch 1 of 2", "b.py:2 in read")],
            "ranks 1-3 are behind, at step 3, microbatch 1 of 2 "
            "(ranks 1-2: my_model.py:12 in forward: time.sleep(1000) | rank 3: b.py:2 in read); "
            "rank 0 waits at step 3, loss sum",
        ),
        (
            [WAITS, WAITS, WAITS],
            "all ranks stand at step 3, loss sum: ranks 0-2: train.py:90 in step: all_reduce()",
        ),
        (
            [LOST, WAITS],
            "rank 0 has reported nothing for 18.4 s, last at step 3, microbatch 1 of 2; "
            "rank 1 waits at step 3, loss sum",
        ),
        # Who is silent comes before who is behind; the others are told place by place.
        (
            [BEHIND, LOST, WAITS, LOST, WAITS, Post(unheard=20.0)],
            "rank 5 has reported nothing for 18.4 s, last at its start; "
            "ranks 1, 3 have reported nothing for 18.4 s, last at step 3, microbatch 1 of 2; "
            "rank 0 waits at step 3, microbatch 1 of 2; ranks 2, 4 wait at step 3, loss sum",
        ),
    ],
)  # fmt: skip
def test_verdict(posts, line):
    assert verdict(dict(enumerate(posts)), 20, "engine.KEY") == f"no progress for 20 s: {line}{REMEDY}"


def limited(step, stage, limit):
    return Post(step, stage, "anywhere", limit=limit)


@pytest.mark.parametrize(
    "posts, seconds",
    [
        ([limited(4, 1, 5), limited(4, 1, 5)], 5),
        # Others wait in the next step, or later in this one, for who saves or compiles.
        ([limited(3, 6, 30), limited(4, 2, 5)], 30),
        ([limited(4, 2, 5), limited(4, 1, 30), limited(4, 2, 5)], 30),
        # Who is behind stands in a step, whatever those do who have left it.
        ([limited(3, 2, 5), limited(3, 4, 30)], 5),
        # One of those furthest behind may take longer.
        ([limited(1, 1, 30), limited(1, 1, 5)], 30),
        # Not heard of so far.
        ([Post(limit=30), limited(1, 1, 5)], 30),
    ],
)
def test_the_limit_is_that_of_the_rank_behind(posts, seconds):
    assert patience(dict(enumerate(posts))) == seconds


def test_stacks_of_all_threads(capfd):
    release = threading.Event()

    def lingering():
        release.wait(60)

    thread = threading.Thread(target=lingering)
    thread.start()
    time.sleep(0.2)
    write_stacks("title of rank 3\n")
    release.set()
    thread.join()
    written = capfd.readouterr().err
    assert written.startswith("title of rank 3\n")
    assert " in lingering\n" in written and " in test_stacks_of_all_threads\n" in written


STORM = """
import os, signal, threading, time
from trainer.runtime.listener import stacks_on_request

def churn():  # new code and frames all the time, which are freed again
    space = {}
    exec("def down(n): return n and down(n - 1)", space)
    space["down"](20)

def work():
    while True:
        churn()

def ask():
    for _ in range(200):
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(0.002)

stacks_on_request()
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
asking = threading.Thread(target=ask)
asking.start()
while asking.is_alive():
    churn()
os._exit(0)
"""


def test_stacks_can_be_asked_for_while_threads_work():
    """A handler that walks the frames of running threads reads freed memory, and ends the process within a few signals."""
    done = subprocess.run([sys.executable, "-c", STORM], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-500:]
    assert "stacks of all threads:" in done.stderr and " in work\n" in done.stderr and " in ask\n" in done.stderr


def test_catches():
    """A handler for SIGINT, which this process may have been started without, and none for SIGVTALRM."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert catches(os.getpid(), signal.SIGINT) == os.path.exists("/proc")
    finally:
        signal.signal(signal.SIGINT, before)
    assert not catches(os.getpid(), signal.SIGVTALRM)
    assert not catches(2**22 + 1, signal.SIGINT)  # above the largest number that Linux gives


def test_whereabouts_is_the_innermost_line_of_ours():
    text, waiting = whereabouts(sys._getframe())
    line = test_whereabouts_is_the_innermost_line_of_ours.__code__.co_firstlineno + 1
    name = "test_whereabouts_is_the_innermost_line_of_ours"
    assert text == f"test_watchdog.py:{line} in {name}: text, waiting = whereabouts(sys._getframe())"
    assert not waiting


def test_who_waits_for_the_device_may_wait_for_ranks():
    """Under NCCL nobody stands in a collective: it was launched, and what follows reads its result."""
    code = "import sys\ndef synchronize(look):\n    return look(sys._getframe())"
    space: dict = {}
    exec(compile(code, os.path.join(os.path.dirname(torch.__file__), "cuda", "streams.py"), "exec"), space)  # noqa: S102
    text, waiting = space["synchronize"](whereabouts)
    assert waiting and text.endswith(" > streams.py:3 in synchronize")


def test_whereabouts_in_a_library():
    """A thread inside of threading's wait: our line that called it comes first."""
    release = threading.Event()
    thread = threading.Thread(target=lambda: release.wait(60))
    thread.start()
    time.sleep(0.2)
    text, waiting = whereabouts(sys._current_frames()[thread.ident])
    release.set()
    thread.join()
    assert "test_watchdog.py:" in text and "release.wait(60)" in text and " > threading.py:" in text
    assert not waiting


def test_whereabouts_in_a_backward_pass_may_wait():
    found = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):  # on CPU in the thread that called backward
            frame = sys._getframe()
            while frame.f_code.co_name != "_engine_run_backward":  # all that is seen while C++ waits
                frame = frame.f_back
            found.append(whereabouts(frame))
            return gradient

    Look.apply(torch.ones(1, requires_grad=True)).backward()
    ((text, waiting),) = found
    assert text.startswith("test_watchdog.py:") and text.endswith(" in _engine_run_backward")
    assert waiting


def test_whereabouts_in_a_collective_waits():
    names = {"sys": sys}
    exec(compile("frame = sys._getframe()", "/any/torch/distributed/distributed_c10d.py", "exec"), names)  # noqa: S102
    text, waiting = whereabouts(names["frame"])
    assert waiting


def test_one_process_has_no_threads():
    """But for the one that hears of signals."""
    listener()
    before = threading.active_count()
    watchdog = Watchdog(World(), 0.01)
    assert threading.active_count() == before
    watchdog.at(1, "microbatch 1 of 2")
    time.sleep(0.05)  # several timeouts: nothing ends this process
    watchdog.close()


def test_at_costs_next_to_nothing():
    """Below 5 microseconds a call, some twenty times what it takes: it is called several times per microbatch."""
    watchdog = Watchdog(World(), 1)
    start = time.perf_counter()
    for _ in range(20_000):
        watchdog.at(1, "loss sum")
    assert (time.perf_counter() - start) / 20_000 < 5e-6
