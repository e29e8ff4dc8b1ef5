"""Writes a run's checkpoints, either at once or from a copy of the tensors while training continues."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainer.checkpoint.format import save, together
from trainer.runtime.distributed import World

Copied = tuple[torch.device, torch.cuda.Event]  # the GPU, and the event after which its copies are complete


class Saver:
    """Writes the checkpoints of a run, one at a time. All ranks create a Saver and make the same calls.

    asynchronous: `save` only copies the tensors to CPU memory. A thread writes the copies and uses its own process group.
    If writing fails, it fails on all ranks, and their next `save` or `finish` raises the UserError. If `failed` is true on
    some ranks, the training loop makes all ranks call `finish` at the same step.
    """

    def __init__(self, folder: Path, world: World, keep: Callable, asynchronous: bool) -> None:
        self.folder, self.world, self.keep, self.asynchronous = folder, world, keep, asynchronous
        several = asynchronous and world.size > 1
        self._group = dist.new_group(backend="gloo", timeout=world.timeout) if several else None
        self._copies: dict[str, Tensor] = {}  # of the last save; the next save overwrites them
        self._thread: threading.Thread | None = None
        self._problem: BaseException | None = None

    def save(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Like the function `save`. It first waits for the previous save. With `asynchronous` it does not wait for this one."""
        self.finish()
        if not self.asynchronous:
            save(self.folder, step, tensors, facts, self.world, self.keep)
            return
        copies, copied = self._snapshot(share_out(tensors, self.world, self._group))
        arguments = (copied, step, copies, copy.deepcopy(facts))
        # A daemon thread does not keep the process alive after training has failed.
        self._thread = threading.Thread(target=self._write, args=arguments, daemon=True, name="checkpoint")
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether the current save has failed, as far as this rank knows; `finish` raises the error."""
        return self._problem is not None

    def finish(self) -> None:
        """Wait for the current save, if there is one, and raise its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._problem is not None:
            problem, self._problem = self._problem, None
            raise problem

    @torch.no_grad()
    def _snapshot(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Copied | None]:
        """Copies in CPU memory, and (GPU, event after which they are complete). Kernels launched later run after the copies."""
        copies = {}
        for name, tensor in tensors.items():
            held = self._copies.get(name)
            if held is None or (held.shape, held.dtype) != (tensor.shape, tensor.dtype):
                held = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            _local(held).copy_(_local(tensor), non_blocking=True)
            copies[name] = held
        self._copies = copies
        gpu = next((tensor.device for tensor in tensors.values() if tensor.is_cuda), None)
        return copies, None if gpu is None else (gpu, torch.cuda.current_stream(gpu).record_event())

    def _write(self, copied: Copied | None, step: int, copies: dict[str, Tensor], facts: dict) -> None:
        try:
            if copied is not None:
                gpu, event = copied
                torch.cuda.set_device(gpu)  # else a new thread would initialise the first GPU and take memory there
                event.synchronize()
            save(self.folder, step, copies, facts, self.world, self.keep, self._group)
        except BaseException as problem:  # the main thread raises it
            self._problem = problem


def share_out(tensors: dict[str, Tensor], world: World, group: Any = None) -> dict[str, Tensor]:
    """The tensors that this rank writes: its own shards, and an even share of the tensors that several ranks hold whole."""
    whole = {name: tensor.nbytes for name, tensor in tensors.items() if not isinstance(tensor, DTensor)}
    held = together(lambda: whole, world, group)
    loads, mine = [0] * world.size, set()
    for size, name in sorted({(size, name) for sizes in held for name, size in sizes.items()}, reverse=True):
        rank = min((rank for rank, sizes in enumerate(held) if name in sizes), key=lambda rank: loads[rank])
        loads[rank] += size
        if rank == world.rank:
            mine.add(name)
    return {name: tensor for name, tensor in tensors.items() if name in mine or name not in whole}


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
