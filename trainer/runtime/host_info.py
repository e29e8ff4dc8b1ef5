"""Facts about each process before it joins the process group, and a check that they fit together.

Every process posts its facts to the store (`distributed.meet`). `compare` finds machines whose software or devices differ.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from trainer.runtime import launcher
from trainer.runtime.environment import git_state, package_versions
from trainer.runtime.launcher import RankInfo


@dataclass(frozen=True)
class HostInfo:
    """What one rank knows about itself. It is posted to the store as JSON."""

    rank: int
    host: str
    peers: tuple[int, int]  # known ranks of this machine: the first one, and the last one plus 1
    device: str = "cpu"  # or cuda
    problem: str = ""  # why this rank cannot take part
    software: dict[str, str] = field(default_factory=dict)
    changed: bool = False  # whether the checkout has uncommitted changes
    devices: int = 0  # number of GPUs that this process sees
    gpu: str = ""  # name and memory
    driver: str = ""


def find_host_info(rank_info: RankInfo, device: torch.device | None, problem: str = "") -> HostInfo:
    """The HostInfo of this process. device: None if the process has none; `problem` then gives the reason."""
    software = {"python": platform.python_version(), **package_versions()}
    # Only one process per machine calls git, which reads the whole checkout, perhaps over a network.
    git = git_state() if rank_info.local_rank == 0 else None
    if git is not None:
        software["git"] = git["sha"][:12]
    on_gpu = device is not None and device.type == "cuda"
    gpu = ""
    if on_gpu:
        properties = torch.cuda.get_device_properties(device)
        gpu = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        software["cuda"] = str(torch.version.cuda)
        software["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return HostInfo(
        rank=rank_info.rank,
        host=launcher.own_host(os.environ),
        peers=launcher.own_ranks(os.environ, rank_info),
        device="cuda" if on_gpu else "cpu",
        problem=problem,
        software=software,
        changed=git is not None and git["dirty"],
        devices=torch.cuda.device_count(),
        gpu=gpu,
        driver=_driver(),
    )


def _driver() -> str:
    """Version of the NVIDIA driver; "" if there is none."""
    with contextlib.suppress(OSError):
        found = re.search(r"\d+\.\d+[.\d]*", Path("/proc/driver/nvidia/version").read_text())
        return found.group() if found else ""
    return ""


def compare(everyone: Sequence[HostInfo]) -> tuple[list[str], list[str]]:
    """(errors, warnings). Errors: ranks that cannot take part, different devices or software. Warnings: other differences.

    The most common value counts as right; if several are equally common, the one of the lowest rank.
    """
    first_of_machine = {one.host: one for one in reversed(everyone) if one.problem}.values()
    errors = [f"{one.problem} ({where([one])})" for one in reversed(first_of_machine)]
    able = [one for one in everyone if not one.problem]
    kinds = _differing(able, "device", lambda one: one.device)
    if kinds:
        errors.append(f"{'; '.join(kinds)}: run nvidia-smi there; leave that machine out, or use --device cpu")
    keys = {key: None for one in able for key in one.software if key not in ("cuda", "nccl") or not kinds}
    software = []
    for key in keys:
        # Only some ranks call git, but every rank knows which packages are installed.
        asked = [one for one in able if key != "git" or key in one.software]
        software += _differing(asked, key, lambda one, key=key: one.software.get(key, "missing"))  # type: ignore[misc]
    if software:
        errors.append(f"preflight: {'; '.join(software)}: make them equal on all machines, or leave these machines out")
    warnings = _differing(able, "GPU", lambda one: one.gpu) + _differing(able, "driver", lambda one: one.driver)
    asked = [one for one in able if "git" in one.software]
    warnings += _differing(asked, "checkout", lambda one: "changed" if one.changed else "as committed")
    return errors, warnings


def _differing(everyone: Sequence[HostInfo], name: str, value: Callable[[HostInfo], str]) -> list[str]:
    """ "NAME is VALUE on WHERE, USUAL elsewhere" for each value except the most common one."""
    values = [value(one) for one in everyone]
    (usual, _), *others = Counter(values).most_common() or [("", 0)]
    return [
        f"{name} is {odd or 'none'} on {where(one for one in everyone if value(one) == odd)}, {usual or 'none'} elsewhere"
        for odd, _ in others
    ]


def where(some: Iterable[HostInfo]) -> str:
    """`node2 (ranks 8-15), node3 (rank 17)`."""
    ranks: dict[str, list[int]] = {}
    for one in some:
        ranks.setdefault(one.host, []).append(one.rank)
    return ", ".join(f"{host} ({rank_names(at)})" for host, at in ranks.items())


def absentees(size: int, present: Sequence[HostInfo], hosts: Sequence[str]) -> str:
    """`ranks 8-15 (node2) have not come`, with the machines that are known; "" if all ranks have come.

    hosts: names of the job's machines, or empty. If no present rank shares a machine with a missing rank, the missing rank
    is on one of the `hosts` from which no rank has come.
    """
    missing = sorted(set(range(size)) - {one.rank for one in present})
    home = {rank: one.host for one in present for rank in range(*one.peers)}
    silent = ", ".join(host for host in hosts if host not in {one.host for one in present})
    places: dict[str, list[int]] = {}
    for rank in missing:
        places.setdefault(home.get(rank, silent), []).append(rank)
    who = ", ".join(rank_names(ranks) + (f" ({rank_info})" if rank_info else "") for rank_info, ranks in places.items())
    return who and f"{who} {'has' if len(missing) == 1 else 'have'} not come"


def machines(everyone: Sequence[HostInfo]) -> dict[str, list[int]]:
    """Host name -> its ranks."""
    found: dict[str, list[int]] = {}
    for one in everyone:
        found.setdefault(one.host, []).append(one.rank)
    return found


def rank_names(ranks: Iterable[int]) -> str:
    """`rank 3`, or `ranks 0-2, 5`."""
    ordered = sorted(ranks)
    runs: list[list[int]] = []
    for rank in ordered:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1] = [runs[-1][0], rank]
        else:
            runs.append([rank])
    return ("rank " if len(ordered) == 1 else "ranks ") + ", ".join("-".join(map(str, run)) for run in runs)
