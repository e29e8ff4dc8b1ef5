"""The processes of a run: who we are, and the few collectives the loop needs. One process makes no process group."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from trainer.errors import UserError

T = TypeVar("T")


@dataclass
class World:
    """This process's place among all of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

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
        if self.size > 1 and dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


def read_world() -> World:
    """This process's place, from the launcher's environment (torchrun, accelerate)."""
    size = _environment("WORLD_SIZE", 1)
    return World() if size == 1 else World(_environment("RANK"), size, _environment("LOCAL_RANK", 0))


def join(world: World, wanted_device: str) -> None:
    """Enter the process group, where there are several processes."""
    if world.size == 1:
        return
    from trainer.device import choose_device

    device = choose_device(wanted_device, world.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=_attempt_store(world.size),
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(minutes=30),
    )


def _environment(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "")
    if text.isdigit():
        return int(text)
    if default is None or text:
        raise UserError(
            f"{name}: the launcher set WORLD_SIZE but {name} is {text!r}; start with torchrun or accelerate"
        )
    return default


def _attempt_store(size: int) -> dist.Store | None:
    """Under torchrun, its store with keys of this attempt alone: after a restart the dead ranks' addresses are still in it."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, size, is_master=False)
    return dist.PrefixStore("attempt" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
