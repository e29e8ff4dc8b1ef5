"""The processes of a run: who we are, and the few collectives the loop needs. One process makes no process group."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from trainer import launcher
from trainer.errors import UserError

T = TypeVar("T")


@dataclass
class World:
    """This process's place among all of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1  # processes on this machine

    @property
    def leader(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print a line to stderr, on rank 0 alone."""
        if self.leader:
            print(text, file=sys.stderr, flush=True)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def on_leader(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, on every rank; its UserError or OSError too, so that no rank waits for another."""
        if self.size == 1:
            return work()
        box: list[Any] = [None, None]
        if self.leader:
            try:
                box[0] = work()
            except UserError as error:
                box[1] = str(error)
            except OSError as error:
                box[1] = f"{error.filename or 'input or output'}: {error.strerror or error}"
        dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise UserError(box[1])
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def stop(self) -> None:
        """Leave the process group, all together. Only for success: a rank that failed must end and let the launcher know."""
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


def read_world() -> World:
    """This process's place, whatever the launcher; sees to it that MASTER_ADDR and MASTER_PORT are set if there are several.

    UserError where the environment is incomplete, or accelerate started fewer processes than it was asked for.
    """
    world = World(*launcher.find_place(os.environ))
    if world.size > 1:
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = launcher.find_meeting_point(os.environ)
        return world
    launcher.refuse_lost_processes(os.environ)
    note = launcher.unused_tasks(os.environ)
    if note:
        world.say(note)
    return world


def join(world: World, wanted_device: str, timeout_minutes: float = 30.0, alone: bool = False) -> None:
    """Enter the process group. One process makes none, unless `alone` asks for a group of one (fsdp, zero0 to zero3).

    timeout_minutes: how long a collective, and the first meeting, may take. UserError where the processes do not meet.
    """
    if world.size == 1 and not alone:
        return
    from trainer.device import choose_device

    # FSDP and DeepSpeed call functions that torch has renamed since; it is not for a user to hear of on every rank.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    device = choose_device(wanted_device, world.local_rank)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    # Libraries ask the environment, which srun sets otherwise and a single process not at all.
    place = (world.rank, world.size, world.local_rank, world.local_size)
    os.environ.update(zip(launcher.NAMES, map(str, place), strict=True))
    timeout = timedelta(minutes=timeout_minutes)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",  # offloaded tensors and checkpoints need gloo beside a GPU
            store=_attempt_store(world.size, timeout) if world.size > 1 else dist.HashStore(),
            rank=world.rank,
            world_size=world.size,
            timeout=timeout,
            device_id=device if on_gpu else None,
        )
    except RuntimeError as error:
        meeting_point = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise UserError(
            f"process group: the {world.size} processes do not meet at {meeting_point}; see that all were started and "
            f"that no other program has the port: {str(error).splitlines()[0]}"
        ) from None


def _attempt_store(size: int, timeout: timedelta) -> dist.Store | None:
    """Under torchrun, its store with keys of this attempt alone: after a restart the dead ranks' addresses are still in it."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, size, is_master=False, timeout=timeout)
    return dist.PrefixStore("attempt" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
