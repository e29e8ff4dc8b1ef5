"""Preflight: what is made of the facts and measurements of ranks that are not here."""

import dataclasses
import random
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from trainer.core.errors import UserError
from trainer.runtime.host_info import HostInfo, absentees, compare, find_host_info, rank_names
from trainer.runtime.launcher import RankInfo, own_host, own_ranks, slurm_hosts
from trainer.training.preflight import Measured, Survey, _free, check_room, judge, pairings, summary, table

SOFTWARE = {"python": "3.12.1", "torch": "2.13.0", "deepspeed": "0.19.8"}
MB, GB = 10**6, 10**9


def ranks(machines: int = 3, each: int = 2) -> list[HostInfo]:
    """Of equal machines; the first rank of each has asked git."""
    return [
        HostInfo(
            rank=rank,
            host=f"node{rank // each + 1}",
            peers=(rank // each * each, rank // each * each + each),
            software=SOFTWARE | ({"git": "1a2b3c4d5e6f"} if rank % each == 0 else {}),
        )
        for rank in range(machines * each)
    ]


def change(everyone: list[HostInfo], *which: int, **changes) -> list[HostInfo]:
    return [dataclasses.replace(one, **changes) if one.rank in which else one for one in everyone]


def with_software(everyone: list[HostInfo], *which: int, **versions) -> list[HostInfo]:
    return [
        dataclasses.replace(one, software=one.software | versions) if one.rank in which else one for one in everyone
    ]


# -- hosts ---------------------------------------------------------------------------------------------------------------


def test_equal_machines_are_fine():
    assert compare(ranks()) == ([], [])
    assert compare([]) == ([], [])


def test_other_versions_are_one_line_that_names_the_minority():
    everyone = with_software(with_software(ranks(), 2, 3, torch="2.12.0"), 5, python="3.11.9")
    (error,), warnings = compare(everyone)
    assert error == (
        "preflight: python is 3.11.9 on node3 (rank 5), 3.12.1 elsewhere; "
        "torch is 2.12.0 on node2 (ranks 2-3), 2.13.0 elsewhere: make them equal on all machines, or leave these machines out"
    )
    assert warnings == []


def test_of_two_that_differ_rank_zero_is_right():
    (error,), _ = compare(with_software(ranks(2, 1), 0, torch="2.14.0"))
    assert "torch is 2.13.0 on node2 (rank 1), 2.14.0 elsewhere" in error


def test_a_missing_package_differs():
    everyone = ranks()
    del everyone[4].software["deepspeed"]
    assert "deepspeed is missing on node3 (rank 4), 0.19.8 elsewhere" in compare(everyone)[0][0]
    everyone = [dataclasses.replace(one, software={"torch": "2"}) for one in ranks()]
    everyone[1].software["accelerate"] = "1.15"
    assert "accelerate is 1.15 on node1 (rank 1), missing elsewhere" in compare(everyone)[0][0]


def test_another_commit_is_an_error_and_changes_are_a_warning():
    (error,), _ = compare(with_software(ranks(), 2, git="ffffffffffff"))
    assert "git is ffffffffffff on node2 (rank 2), 1a2b3c4d5e6f elsewhere" in error
    errors, (warning,) = compare(change(ranks(), 4, changed=True))
    assert (errors, warning) == ([], "checkout is changed on node3 (rank 4), as committed elsewhere")
    assert compare(change(ranks(), 0, 2, 4, changed=True)) == ([], [])


def test_a_rank_without_a_device_is_named_once_for_its_machine():
    text = "device: process 1 of this machine has no GPU of its own (1 here)"
    everyone = change(ranks(), 0, 1, 2, 4, 5, device="cuda")
    everyone = change(everyone, 3, problem=text)
    assert compare(everyone) == ([f"{text} (node2 (rank 3))"], [])
    errors, _ = compare(change(everyone, 2, 3, 5, problem=text))
    assert errors == [f"{text} (node2 (rank 2))", f"{text} (node3 (rank 5))"]


def test_a_machine_whose_gpus_are_not_seen():
    everyone = with_software(change(ranks(), 0, 1, 4, 5, device="cuda"), 0, 1, 4, 5, cuda="13.0", nccl="2.29")
    (error,), _ = compare(everyone)  # that it has no NCCL either is not said
    assert error.startswith("device is cpu on node2 (ranks 2-3), cuda elsewhere: run nvidia-smi there")


def test_other_gpus_and_drivers_are_warnings():
    everyone = change(ranks(), *range(6), gpu="NVIDIA H100, 80 GiB", driver="580.1")
    everyone = change(everyone, 4, gpu="NVIDIA A100, 40 GiB")
    errors, warnings = compare(change(everyone, 2, 3, driver="575.2"))
    assert errors == []
    assert warnings == [
        "GPU is NVIDIA A100, 40 GiB on node3 (rank 4), NVIDIA H100, 80 GiB elsewhere",
        "driver is 575.2 on node2 (ranks 2-3), 580.1 elsewhere",
    ]


def test_own_facts(monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    own = find_host_info(RankInfo(2, 4, 0, 2), None, "broken")
    assert (own.rank, own.host, own.peers, own.problem) == (2, "node7", (2, 4), "broken")
    assert {"python", "torch", "numpy", "deepspeed"} <= own.software.keys()
    assert "git" not in find_host_info(RankInfo(3, 4, 1, 2), None).software, "one rank of a machine asks git"


# -- who does not come ---------------------------------------------------------------------------------------------------


def test_absentees_by_machine():
    everyone, hosts = ranks(3, 4), ["node1", "node2", "node3"]
    assert absentees(12, everyone, hosts) == ""
    assert absentees(12, everyone[:4] + everyone[8:], hosts) == "ranks 4-7 (node2) have not come"
    assert absentees(12, everyone[:4], hosts) == "ranks 4-11 (node2, node3) have not come"
    assert absentees(12, everyone[:4], []) == "ranks 4-11 have not come"
    assert absentees(12, everyone[:3] + everyone[4:], []) == "rank 3 (node1) has not come"
    some = [everyone[rank] for rank in (0, 3, 8, 9, 10, 11)]
    assert absentees(12, some, hosts) == "ranks 1-2 (node1), ranks 4-7 (node2) have not come"


def test_ranks_that_srun_dealt_out_in_turn():
    """Rank 1's machine is not that of rank 0; who knows only of itself says nothing of others."""
    everyone = change(ranks(1, 4), 2, host="node1", peers=(2, 3))
    everyone = change(everyone, 0, peers=(0, 1))
    assert absentees(4, [everyone[0], everyone[2]], ["node1", "node2"]) == "ranks 1, 3 (node2) have not come"


def test_own_ranks_and_host(monkeypatch):
    task = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_NODEID": "0"}
    task |= {"SLURM_PROCID": "2", "SLURM_LOCALID": "1"}
    assert own_ranks(task, RankInfo(2, 4, 1, 2)) == (2, 3), "srun may deal ranks out in turn"
    assert own_ranks(task, RankInfo(9, 16, 1, 8)) == (8, 16), "torchrun as the task of each node"
    assert own_ranks({}, RankInfo(9, 16, 1, 8)) == (8, 16)
    assert own_host({"SLURMD_NODENAME": "node2"}) == "node2"
    assert own_host({})


def test_slurm_hosts(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda words, **_: SimpleNamespace(stdout=f"{words[-1]}\nnode9\n"))
    assert slurm_hosts({"SLURM_STEP_NODELIST": "a[1-2]", "SLURM_JOB_NODELIST": "b[1-2]"}) == ["a[1-2]", "node9"]
    assert slurm_hosts({"SLURM_JOB_NODELIST": "node3"}) == ["node3"]
    assert slurm_hosts({}) == []
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "/nonexistent")
    assert slurm_hosts({"SLURM_JOB_NODELIST": "a[1-2]"}) == []


def test_rank_names():
    assert [rank_names(some) for some in ([3], [2, 0, 1, 5])] == ["rank 3", "ranks 0-2, 5"]


# -- measurements --------------------------------------------------------------------------------------------------------


def clocks_of(ahead: list[float], delays: random.Random, rounds: int = 5) -> list[list[tuple[float, float]]]:
    """What clocks that are `ahead` show before and after collectives, which each rank enters and leaves with a delay."""
    shown: list[list[tuple[float, float]]] = [[] for _ in ahead]
    now = 1.7e9
    for _ in range(rounds):
        entered = [now + delays.random() * 0.02 for _ in ahead]
        left = [max(entered) + delays.random() * 0.01 for _ in ahead]
        for rank, offset in enumerate(ahead):
            shown[rank].append((entered[rank] + offset, left[rank] + offset))
        now = max(left)
    return shown


def seen(everyone: list[HostInfo], ahead: dict[int, float] | None = None, **changes) -> Survey:
    """Ranks that all measure the same, but for `changes`: name -> value by rank."""
    shown = clocks_of([(ahead or {}).get(rank, 0.0) for rank in range(len(everyone))], random.Random(1))
    usual = {"flops": 1e12, "free_run": 900 * GB, "free_temporary": 90 * GB, "bus": 38 * GB, "links": {}}
    measured = [
        Measured(
            **{name: changes.get(name, {}).get(one.rank, value) for name, value in usual.items()},
            clock=shown[one.rank],
        )
        for one in everyone
    ]
    return Survey(everyone, measured)


def test_clock_bounds_hold_whatever_the_delays():
    """The bounds follow from the order of events alone; times near 1.7e9 s are rounded to 2.4e-7 s, four of them to 1e-6."""
    draw = random.Random(0)
    for _ in range(100):
        ahead = [0.0, *(draw.uniform(-20, 20) for _ in range(3))]
        everyone = ranks(4, 1)
        measured = [Measured(1.0, 1, 1, clock=clock) for clock in clocks_of(ahead, draw)]
        for (found, error), true in zip(Survey(everyone, measured).clocks().values(), ahead, strict=True):
            assert abs(found - true) <= error + 1e-6
            assert error <= 0.03  # of a rank's longest way through a collective


def test_a_clock_that_is_wrong_is_named():
    assert judge(seen(ranks(), ahead={2: 2.9, 3: 2.9})) == []
    (warning,) = judge(seen(ranks(), ahead={2: 5.0, 3: 5.0}))
    assert warning.startswith("the clock of node2 is 5.0 s ahead of that of node")
    (warning,) = judge(seen(ranks(), ahead={0: -7.0, 1: -7.0}))
    assert warning.startswith("the clock of node1 is 7.0 s behind that of node")
    (warning,) = judge(seen(ranks(2, 1), ahead={1: 5.0}))
    assert warning.startswith("the clock of node2 is 5.0 s ahead of that of node1")


def test_slow_ranks_are_named():
    assert judge(seen(ranks(), flops={3: 0.71e12})) == []
    assert judge(seen(ranks(), flops={2: 0.5e12, 3: 0.6e12})) == [
        "ranks 2-3 on node2: a matrix product runs at 0.50 of the median's speed"
    ]
    assert len(judge(seen(ranks(1, 2), flops={1: 0.6e12}))) == 1, "of two the faster one is what is usual"


def test_what_compare_says_is_among_the_warnings():
    assert judge(seen(change(ranks(), 4, changed=True))) == compare(change(ranks(), 4, changed=True))[1]


def test_a_full_temporary_folder_is_named():
    assert judge(seen(ranks(), free_temporary={5: 200 * MB})) == ["200 MB free for temporary files on node3"]


def test_pairings_cover_a_ring_and_no_machine_has_two_links_at_once():
    assert pairings(1) == []
    assert pairings(2) == [[(0, 1)]]
    for count in range(3, 12):
        turns = pairings(count)
        assert sorted(sum(turns, [])) == [(number, (number + 1) % count) for number in range(count)]
        for turn in turns:
            ends = [end for link in turn for end in link]
            assert len(set(ends)) == len(ends)
        assert len(turns) == 2 + count % 2


def linked(machines: int, slow: dict[tuple[int, int], float], each: int = 1) -> Survey:
    """A ring of links of 10 GB/s but for `slow` ones, as both their ends see them."""
    links: dict[int, dict] = {number: {} for number in range(machines)}
    for turn in pairings(machines):
        for link in turn:
            for end in link:
                links[end][link] = slow.get(link, 10.0) * GB
    return seen(ranks(machines, each), links={end * each: rates for end, rates in links.items()})


@pytest.mark.parametrize("machines", [3, 4, 5])
def test_the_machine_with_the_slow_links_is_named(machines):
    assert judge(linked(machines, {})) == []
    assert judge(linked(machines, {(0, 1): 2, (1, 2): 3}, each=2)) == [
        "the links of node2: 3 GB/s where 10 GB/s is usual"
    ]
    assert judge(linked(machines, {(0, 1): 2})) == ["the link between node1 and node2: 2 GB/s where 10 GB/s is usual"]


def test_of_two_machines_neither_has_the_slow_link():
    survey = linked(2, {(0, 1): 1})
    assert judge(survey) == []
    assert "node1 to node2 1 GB/s" in summary(survey)


def test_the_slower_end_of_a_link_counts():
    survey = seen(ranks(2, 1), links={0: {(0, 1): 9.0 * GB}, 1: {(0, 1): 8.0 * GB}})
    assert survey.links() == {("node1", "node2"): 8.0 * GB}


def test_room_for_checkpoints():
    short = seen(ranks(), free_run={4: 20 * GB})
    assert check_room(short, Path("runs/x"), 5 * GB, 15 * GB) == []
    (warning,) = check_room(short, Path("runs/x"), 10 * GB, 30 * GB)
    assert warning == "20 GB free at runs/x on node3; the checkpoints to come take 30 GB (checkpoint.keep)"
    with pytest.raises(UserError, match="run_dir: 20 GB free at runs/x on node3, but a checkpoint takes 21 GB"):
        check_room(short, Path("runs/x"), 21 * GB, 63 * GB)


def test_free_space_where_the_folder_is_not_there_yet(tmp_path):
    assert _free(tmp_path / "runs" / "x") == pytest.approx(_free(tmp_path), rel=0.1)


def test_summary():
    line = summary(seen(ranks(2, 8), flops={9: 0.97e12}, free_run={3: 1.2e12}, bus={1: 37 * GB}))
    assert "\n" not in line
    assert line.startswith(
        "preflight: 2 machines x 8 processes, equal software (torch 2.13.0, git 1a2b3c4); clocks within "
    )
    assert "; 900 GB free for runs; all-reduce of 4 MiB at 37 GB/s" in line
    assert line.endswith("(slowest matmul: node2 (rank 9), 0.97 of the median)")
    uneven = ranks(2, 2)[:3]
    assert summary(seen(uneven)).startswith("preflight: 2 machines, 3 processes, ")
    alone = summary(seen(ranks(1, 1)))
    assert alone == "preflight: 1 machine x 1 process, torch 2.13.0, git 1a2b3c4; 900 GB free for runs"
    assert "clocks within 5.0" in summary(seen(ranks(2, 1), ahead={1: -5.0}))


def test_table_has_a_line_per_machine():
    everyone = change(ranks(3, 2), 2, 3, gpu="NVIDIA H100, 80 GiB", driver="580.1", devices=2)
    header, *lines = table(seen(everyone, flops={5: 0.5e12}, free_run={1: 7 * GB})).splitlines()
    assert header.split() == [
        "machine", "processes", "device", "free", "for", "runs", "temporary", "clock", "matmul", "links"
    ]  # fmt: skip
    assert [line.split()[0] for line in lines] == ["node1", "node2", "node3"]
    assert "2 (ranks 0-1)" in lines[0] and "CPU" in lines[0] and "7 GB" in lines[0] and "1,000 GFLOP/s" in lines[0]
    assert "2 x NVIDIA H100, 80 GiB, driver 580.1" in lines[1]
    assert "500 GFLOP/s" in lines[2]
