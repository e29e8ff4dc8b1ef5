"""Two real processes over gloo: one that hangs is named with its place, and nothing else ever ends a run."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
from conftest import PATIENCE, ROOT

pytestmark = pytest.mark.slow

TIMEOUT = 2.0  # within a step, after the first
LONG = 3 * TIMEOUT  # elsewhere
WORKER = """
import contextlib, ctypes, os, signal, sys, time
import torch
from trainer.runtime.distributed import join, read_world
from trainer.runtime.watchdog import Watchdog

trouble, hit, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
world = read_world()
join(world, "cpu")

def forward(step, microbatch):
    time.sleep(0.005)
    if (trouble, step, microbatch, world.rank) == ("first", 1, 1, hit):
        time.sleep(2 * TIMEOUT)
    if (step, microbatch, world.rank) != (3, 1, hit):
        return
    if trouble == "asked":
        os.kill(os.getpid(), signal.SIGUSR2)
    if trouble == "sleep":
        time.sleep(1000)
    if trouble in ("stopped", "gil"):
        time.sleep(TIMEOUT / 2)  # long enough for the place to be posted
    if trouble == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if trouble == "gil":  # PyDLL keeps the GIL; a read goes on after a signal, a sleep would end
        ctypes.PyDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)
    if trouble == "gil1":
        ctypes.PyDLL(None).sleep(1)
    if trouble == "nap":
        print("napping", flush=True)
        for part in range(10):
            time.sleep(TIMEOUT / 20)
    if trouble == "slow":  # progress, while the other rank waits for longer than the timeout
        for part in range(16):
            watchdog.at(step, f"part {part}", in_step=True)
            time.sleep(TIMEOUT / 8)

class Hanging(torch.nn.Linear):
    def forward(self, x):
        if (step, microbatch, world.rank) == (3, 2, hit):
            time.sleep(1000)
        return super().forward(x)

model = torch.nn.parallel.DistributedDataParallel(Hanging(4, 4)) if trouble == "ddp" else None
def save(step):
    watchdog.at(step, "saving")
    if (step, world.rank) == (3, hit) and trouble.startswith("save"):
        time.sleep(int(trouble[4:]) * TIMEOUT)

with contextlib.closing(Watchdog(world, LONG, TIMEOUT)) as watchdog:
    for step in range(1, steps + 1):
        for microbatch in (1, 2):
            watchdog.at(step, f"microbatch {microbatch} of 2", in_step=True)
            if model is None:
                forward(step, microbatch)
            else:
                with model.no_sync() if microbatch == 1 else contextlib.nullcontext():
                    model(torch.ones(2, 4)).sum().backward()
        watchdog.at(step, "loss sum", in_step=True)
        world.sum(torch.ones(1))
        save(step)
        if step == 1:
            print("running", flush=True)
world.stop()
print("done", flush=True)
""".replace("TIMEOUT", str(TIMEOUT)).replace("LONG", str(LONG))


STACKS = re.compile(r"^\[rank \d on \S+, step \d, [\w ]+\] stacks of its threads:$", re.MULTILINE)


@pytest.fixture
def start(tmp_path):
    """Starts two ranks whose store is in rank 0's process, as (trouble, rank it strikes, steps) tell the script above."""
    script = tmp_path / "script.py"
    script.write_text(WORKER)
    started = []

    def begin(*words) -> list[Path]:
        variables = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": processes.free_port()}
        for rank in "01":
            place = {"RANK": rank, "LOCAL_RANK": rank}
            started.append(processes.start(script, *words, env=variables | place))
        return started

    yield begin
    for rank in started:
        if rank.exists():  # it has not been waited for
            kill(rank)
            processes.wait(rank)


def kill(rank: Path) -> None:
    if not (rank / "result").exists():
        processes.send(rank, signal.SIGKILL)


def end(started: Path) -> tuple[int, list[str]]:
    """(exit code, error lines). Whoever fails has written its stacks, after its error line if it has one."""
    code, err = end_with_text(started)
    if code:
        assert len(STACKS.findall(err)) == 1, err
        assert 'script.py", line' in STACKS.split(err)[-1], err
        assert "error: " not in STACKS.split(err)[-1], err
    return code, errors(err)


def end_with_text(started: Path) -> tuple[int, str]:
    ended = processes.wait(started)
    assert "Traceback" not in ended.stderr, ended.stderr
    return ended.returncode, ended.stderr


def errors(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("hit", [0, 1])
def test_a_rank_asleep_is_named_and_all_end(start, hit):
    ranks = [end(process) for process in start("sleep", hit, 10)]
    assert [code for code, _ in ranks] == [1, 1]
    (line,) = ranks[0][1] + ranks[1][1]
    pattern = (
        rf"error: no progress for 2 s: rank {hit} is behind, at step 3, microbatch 1 of 2 "
        rf"\(script\.py:\d+ in forward: time\.sleep\(1000\)\); rank {1 - hit} waits at step 3, loss sum; "
        r"raise engine\.step_timeout_minutes if this is slow rather than stuck"
    )
    assert re.fullmatch(pattern, line), line


def test_each_rank_writes_where_it_stands(start):
    """Also the one that is stuck in C++, and the one that only hears of the end."""
    (_, zero), (_, one) = [end_with_text(process) for process in start("sleep", 1, 10)]
    assert "[rank 0 on " in zero and ", step 3, loss sum] stacks of its threads:\n" in zero
    assert "[rank 1 on " in one and ", step 3, microbatch 1 of 2] stacks of its threads:\n" in one
    assert " in all_reduce\n" in zero and " in forward\n" not in zero
    assert " in forward\n" in one and " in all_reduce\n" not in one
    assert " in _watch\n" in zero and " in _watch\n" in one  # all threads


@pytest.mark.parametrize("hit", [0, 1])
def test_outside_of_a_step_the_long_timeout_counts(start, hit):
    """The other rank waits in the next step, where the short one would have ended the run."""
    ranks = [end(process) for process in start("save1000", hit, 10)]
    (line,) = ranks[0][1] + ranks[1][1]
    assert f"error: no progress for 6 s: rank {hit} is behind, at step 3, saving (script.py:" in line
    assert line.endswith(
        f"rank {1 - hit} waits at step 4, loss sum; raise engine.timeout_minutes if this is slow rather than stuck"
    )


def test_of_two_at_one_place_the_one_outside_the_collective_is_named(start):
    """Under DDP the others wait inside the backward pass of the microbatch in whose forward pass one hangs."""
    ranks = [end(process) for process in start("ddp", 1, 10)]
    (line,) = ranks[0][1] + ranks[1][1]
    assert "rank 1 is behind, at step 3, microbatch 2 of 2 (script.py:" in line
    assert "in forward: time.sleep(1000)" in line
    assert "rank 0 waits at step 3, microbatch 2 of 2" in line


@pytest.mark.parametrize("trouble", ["stopped", "gil"])
def test_a_rank_that_says_nothing_is_named(start, trouble):
    ranks = start(trouble, 1, 10)
    code, (line,) = end(ranks[0])
    assert code == 1
    assert re.search(
        r"rank 1 has reported nothing for [\d.]+ s, last at step 3, microbatch 1 of 2; rank 0 waits", line
    ), line
    assert not (ranks[1] / "result").exists()  # for the launcher to kill
    kill(ranks[1])
    assert (" in forward\n" in end_with_text(ranks[1])[1]) == (trouble == "gil")  # rank 0 has asked it to write


def test_the_stores_process_stopped(start):
    """Rank 0 holds the store: the others cannot know where it is, and end all the same."""
    code, (line,) = end(start("stopped", 0, 10)[1])
    assert code == 1
    assert "error: [rank 1] no progress for 2 s at step 3, loss sum; the store at " in line
    assert "is gone or stopped" in line and "rank 0's machine" in line


@pytest.mark.parametrize("trouble", ["none", "gil1", "slow", "first", "save2"])
def test_no_false_alarm(start, trouble):
    """Many short steps over several timeouts; the GIL held for half of one; one rank slow but at work for two of them; for two of
    them at one place in the first step, and in a later one outside of it."""
    for process in start(trouble, 1, 400):
        code, text = end_with_text(process)
        assert (code, errors(text)) == (0, [])
        assert "most recent call first" not in text


def test_a_rank_asked_by_a_signal_writes_and_goes_on(start):
    (code, text), (other_code, other_text) = [end_with_text(process) for process in start("asked", 0, 10)]
    assert (code, other_code) == (0, 0)
    assert " in forward\n" in text and "most recent call first" not in other_text


def test_processes_suspended_for_longer_than_the_timeout_go_on(start):
    """Suspended where no rank makes progress for half a timeout: the time of the suspension would end the run if it counted."""
    ranks = start("nap", 1, 10)
    processes.until(lambda: (ranks[1] / "stdout").read_text() == "running\nnapping\n")
    time.sleep(TIMEOUT / 8)  # some ticks: the watchdogs have seen the last progress
    for rank in ranks:
        processes.send(rank, signal.SIGSTOP)
    time.sleep(2 * TIMEOUT)
    for rank in ranks:
        processes.send(rank, signal.SIGCONT)
    assert [end(process) for process in ranks] == [(0, [])] * 2


def under_torchrun(tmp_path, *words) -> subprocess.CompletedProcess:
    (tmp_path / "script.py").write_text(WORKER)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", tmp_path / "script.py"]
    return subprocess.run(
        [sys.executable, *map(str, [*command, *words])],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def test_under_torchrun(tmp_path):
    done = under_torchrun(tmp_path, "sleep", 0, 10)
    assert done.returncode != 0
    (line,) = errors(done.stderr)
    assert "rank 0 is behind, at step 3, microbatch 1 of 2" in line
    assert len(STACKS.findall(done.stderr)) == 2  # though torchrun kills the one that is later to end


def test_asked_under_torchrun(tmp_path):
    done = under_torchrun(tmp_path, "asked", 0, 10)
    assert done.returncode == 0, done.stderr
    assert " in forward\n" in done.stderr
    assert done.stdout.count("done") == 2
