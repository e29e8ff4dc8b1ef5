"""The process group: how long it may take, who is told what, and what groups that others make are held to."""

from datetime import timedelta

import processes
import pytest
import torch
import torch.distributed as dist

from trainer.runtime.distributed import World

BOUNDED = """
import sys, time
from trainer.runtime.distributed import bounded
with bounded(float(sys.argv[1]), "not connected"):
    time.sleep(float(sys.argv[2]))
time.sleep(1)
print("on")
"""


@pytest.mark.parametrize(
    "limit, takes, code, said", [(0.2, 1000, 2, "error: not connected within 0.2 s\n"), (0.5, 0, 0, "on\n")]
)
def test_a_call_that_never_returns_ends_the_process(tmp_path, limit, takes, code, said):
    (tmp_path / "script.py").write_text(BOUNDED)
    done = processes.run(tmp_path / "script.py", limit, takes)
    assert (done.returncode, done.stdout + done.stderr) == (code, said)


def test_what_befalls_one_rank_is_told_by_it(capsys, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "node2")
    World(1, 2).say("not told")
    World(1, 2).say_from("eager")
    World().say_from("eager")
    assert capsys.readouterr().err == "[rank 1, node2] eager\neager\n"


def test_groups_of_libraries_have_our_timeout():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        theirs = dist.new_group([0], timeout=timedelta(minutes=5))
        World(timeout=timedelta(minutes=90)).limit_groups()
        for group in (theirs, dist.group.WORLD):
            assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(minutes=90)
    finally:
        dist.destroy_process_group()
