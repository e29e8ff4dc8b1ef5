"""Rank and world size of this process, from the environment variables of its launcher.

torchrun, `accelerate launch` and `deepspeed` set RANK, WORLD_SIZE and so on; srun sets Slurm's own variables. This module does
not import torch, because the command line needs its rank before anything else.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from trainer.core.errors import UserError
from trainer.core.text import printable

Environment = Mapping[str, str]


class RankInfo(NamedTuple):
    """Rank of this process and number of processes: in the whole run, and on this machine (local)."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # torchrun's names for the fields of a RankInfo
REMEDY = "start with torchrun, accelerate launch, deepspeed or srun"


def find_rank_info(environ: Environment) -> RankInfo:
    """The RankInfo of this process. UserError if the environment is incomplete or contradicts itself."""
    stated = {name: count(environ, name) for name in NAMES if environ.get(name)}
    if "RANK" in stated and "LOCAL_WORLD_SIZE" not in stated and environ.get("LOCAL_SIZE"):
        stated["LOCAL_WORLD_SIZE"] = count(environ, "LOCAL_SIZE")  # the name that the deepspeed launcher uses
    task = slurm_task(environ)
    if task is None or len(stated) == len(NAMES):  # if srun started a launcher, the launcher's values are right
        return _checked(stated, environ)
    for name, value in zip(NAMES, task, strict=True):
        if stated.get(name, value) != value:
            raise UserError(f"{name}: is {stated[name]}, but srun says {value} ({task.size} tasks); unset {name}")
    return task


def _checked(stated: dict[str, int], environ: Environment) -> RankInfo:
    """The RankInfo from the standard names. UserError if one of them is missing or if they contradict each other."""
    if not stated:
        for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
            if environ.get(name, "1") not in ("", "1"):
                raise UserError(f"{name}: mpirun started {environ[name]} processes, which is not supported; {REMEDY}")
    if stated and "WORLD_SIZE" not in stated:
        raise UserError(f"WORLD_SIZE: not set, although {next(iter(stated))} is; {REMEDY}")
    if stated.get("WORLD_SIZE", 1) == 1:
        stated = dict(zip(NAMES, RankInfo(), strict=True)) | stated
    for name in NAMES:
        if name not in stated:
            raise UserError(f"{name}: not set, although WORLD_SIZE is {stated['WORLD_SIZE']}; {REMEDY}")
    for lesser, greater in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if stated[lesser] >= stated[greater]:
            raise UserError(f"{lesser}: {stated[lesser]} is not below {greater}, {stated[greater]}; {REMEDY}")
    return RankInfo(*(stated[name] for name in NAMES))


def count(environ: Environment, name: str, default: int | None = None, remedy: str = REMEDY) -> int:
    """The integer in a variable. UserError if it holds something else, or if it is empty and there is no default."""
    text = environ.get(name, "")
    if not text and default is not None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise UserError(f"{name}: {f'{printable(repr(text), 60)} is not a number' if text else 'not set'}; {remedy}")
    return int(text)


def restarts(environ: Environment) -> int:
    """How often Slurm has restarted this job."""
    return count(environ, "SLURM_RESTART_COUNT", 0, "unset it; Slurm sets it when it restarts a job")


def slurm_task(environ: Environment) -> RankInfo | None:
    """The RankInfo among the tasks that one srun started; None outside of srun, and for a single task.

    A batch script is one process, although it has SLURM_PROCID and SLURM_NTASKS. Only srun sets SLURM_STEP_ID.
    """
    if not environ.get("SLURM_STEP_ID"):
        return None
    size = count(environ, "SLURM_STEP_NUM_TASKS" if environ.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS")
    if size == 1:
        return None
    per_node: list[int] = []
    for part in environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):  # 8(x2),4 means 8, 8 and 4
        numbers = re.fullmatch(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?", part)
        if numbers:
            per_node += [int(numbers[1])] * int(numbers[2] or 1)
    node = count(environ, "SLURM_NODEID")
    if node >= len(per_node):
        raise UserError(
            f"SLURM_STEP_TASKS_PER_NODE: has no entry for node {node}; start with srun, or torchrun on each node"
        )
    return RankInfo(count(environ, "SLURM_PROCID"), size, count(environ, "SLURM_LOCALID"), per_node[node])


def find_meeting_point(environ: Environment) -> tuple[str, str]:
    """Address and port where the processes meet: MASTER_ADDR and MASTER_PORT.

    srun sets neither. Then the address is the first host of the step, and the port is computed from the numbers of the job
    and the step, so that two jobs on one machine have different ports.
    """
    address, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    if slurm_task(environ) is not None:
        address = address or _first_host(environ)
        parts = (count(environ, name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        mixed = sum(parts, restarts(environ) * 1000)
        port = port or str(10_000 + mixed % 20_000)  # below the ports that the system assigns automatically
    for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", port)):
        if not value:
            raise UserError(f"{name}: not set, although WORLD_SIZE is {environ.get('WORLD_SIZE')}; {REMEDY}")
    if not re.fullmatch("[0-9]{1,5}", str(port)) or not 0 < int(str(port)) < 2**16:
        raise UserError(f"MASTER_PORT: {printable(repr(port), 60)} is not a port number (1 to 65535)")
    return str(address), str(port)


def _first_host(environ: Environment) -> str:
    hosts = slurm_hosts(environ)
    if not hosts:
        raise UserError(
            f"MASTER_ADDR: `scontrol show hostnames {_slurm_nodes(environ)}` prints no name; set MASTER_ADDR to the name of "
            "the first node"
        )
    return hosts[0]


def _slurm_nodes(environ: Environment) -> str:
    """Slurm's list of node names, such as node[1-2,5]; "" outside of Slurm."""
    return environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")


def slurm_hosts(environ: Environment) -> list[str]:
    """Names of the machines of the step or the job; empty outside of Slurm and if scontrol fails."""
    nodes = _slurm_nodes(environ)
    if not any(mark in nodes for mark in ",["):
        return [nodes] if nodes else []
    import subprocess

    try:
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split()


def own_host(environ: Environment) -> str:
    """The name of this machine: Slurm's name if Slurm started this process, else its host name."""
    return environ.get("SLURMD_NODENAME") or platform.node()


def own_ranks(environ: Environment, rank_info: RankInfo) -> tuple[int, int]:
    """First rank on this machine, and its last rank plus 1.

    Launchers number ranks machine by machine. srun may use another order, so under srun only this process's rank is known.
    """
    if slurm_task(environ) == rank_info:
        return rank_info.rank, rank_info.rank + 1
    first = rank_info.rank - rank_info.local_rank
    return first, first + rank_info.local_size


def refuse_lost_processes(environ: Environment) -> None:
    """For a single process: UserError if accelerate was asked for several processes but started one, as it does on a CPU.

    accelerate sets MASTER_ADDR when it was asked for several. If accelerate's own environment already had MASTER_ADDR, this
    proves nothing.
    """
    if "ACCELERATE_MIXED_PRECISION" not in environ or "MASTER_ADDR" not in environ or environ.get("WORLD_SIZE"):
        return
    with contextlib.suppress(OSError):
        if b"\0MASTER_ADDR=" in b"\0" + Path(f"/proc/{os.getppid()}/environ").read_bytes():
            return
    raise UserError(
        "accelerate launch: several processes were asked for, but it started only one, as it does on a CPU (--cpu, "
        "MULTI_CPU); use `torchrun --standalone --nproc_per_node N -m trainer ...`, or ask for one process"
    )


def unused_tasks(environ: Environment) -> str | None:
    """For a single process: a note for the user if it runs in the batch script of a Slurm job with more tasks, else None."""
    tasks = environ.get("SLURM_NTASKS") or environ.get("SLURM_JOB_NUM_NODES") or "1"
    if environ.get("SLURM_STEP_ID") or not re.fullmatch("[0-9]{1,9}", tasks) or int(tasks) == 1:
        return None
    return f"Slurm gave this job {tasks} tasks and this is one process; `srun python -m trainer ...` uses them all"
