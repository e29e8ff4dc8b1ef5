"""FSDP2 (torch's fully_shard): weights, gradients and optimiser state are sharded over all ranks, or, with HSDP, over the
ranks of a group, and each group holds a copy of the model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from models.base import Batch
from trainer.engine.base import Engine
from trainer.engine.matrices import Update, update_shards
from trainer.optim import trained_parameters
from trainer.runtime.compat import as_shard


class FsdpEngine(Engine):
    """fsdp and hsdp. Each block is gathered for its forward and backward; the rest of the model is one more unit.

    fp32: everything fp32. bf16: fp32 shards; blocks are gathered and computed in bf16, gradients summed in fp32. pure_bf16: bf16
    shards and optimiser state, gradients summed in fp32.
    The optimiser works on the local tensors of the shards, which are plain tensors. This avoids the cost of DTensor dispatch.
    """

    lockstep = True
    whole_tensors = False

    def parallelize(self, meta: Any) -> Any:
        engine = self.config.engine
        self.mesh = device_mesh(self.device, self.world.size, engine.shard_size if self.strategy == "hsdp" else None)
        self._shard_group = self.mesh.get_group("shard")
        self.world.limit_groups()
        self.prepare_blocks(meta)
        options: dict[str, Any] = {
            "mesh": self.mesh,
            "reshard_after_forward": engine.reshard_after_forward,
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=None if self.precision == "fp32" else torch.bfloat16, reduce_dtype=torch.float32
            ),
            "offload_policy": CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
            if engine.offload
            else OffloadPolicy(),
        }
        for block in meta.blocks():
            fully_shard(block, **options)
        # Parameters outside of the blocks are needed at the end of the forward and at the start of the backward, so they stay
        # gathered in between.
        # The batch keeps its number types: weights of targets and a teacher's log-probabilities need more than bf16.
        as_given = dataclasses.replace(options["mp_policy"], cast_forward_inputs=False)
        root = {"reshard_after_forward": False, "mp_policy": as_given}
        self.joined = fully_shard(self.join(meta), **options | root)
        model = meta
        assert all(isinstance(module, FSDPModule) for module in (self.joined, *model.blocks()))
        place = torch.device("cpu") if engine.offload else self.device
        self.initialise(model, place)
        # `to` makes FSDP notice the new storage of its modules. Call it on `joined`: the model itself is not an FSDP module, and
        # its parameters outside of the blocks belong to `joined`.
        self.joined.to(place)
        for module in model.modules() if engine.offload else ():  # FSDP moves parameters to the device, but not buffers
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))
        self._shards = trained_parameters(model)
        self.local = {name: nn.Parameter(shard.detach().to_local()) for name, shard in self._shards.items()}
        return model

    def shard_frozen(self, meta: Any) -> None:
        """Each block by itself; what is outside of the blocks stays whole."""
        for block in meta.blocks():
            fully_shard(block, mesh=self.mesh, reshard_after_forward=True)

    def autocast(self) -> Any:
        """No autocast, because gathered weights already have the compute type."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """A context in which each block is gathered once instead of in every pass, if every rank has memory for all blocks."""
        releases = self.config.engine.reshard_after_forward
        blocks = self.model.blocks() if releases and self.whole_weights_fit() else []
        for block in blocks:
            block.set_reshard_after_forward(False)
        try:
            yield
        finally:
            for block in blocks:
                block.set_reshard_after_forward(True)
                block.reshard()

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        super().set_weights(weights)
        for module in (self.joined, *self.model.blocks()):
            module.reshard()  # weights that are still gathered have the old values

    def backward(self, batch: Batch, scale: float | Tensor, sync: bool) -> Tensor:
        self.joined.set_requires_gradient_sync(sync)
        self.joined.set_is_last_backward(sync)
        output = self.joined(self.with_documents(batch))
        (output.sum * (scale * self.world.size)).backward()  # FSDP averages over ranks; we want the sum
        return self.losses(output)

    def collect_gradients(self) -> None:
        for name, shard in self._shards.items():
            self.local[name].grad = None if shard.grad is None else shard.grad.to_local()

    def gradient_norm(self) -> Tensor:
        squares = self.local_norms().square().sum()
        dist.all_reduce(squares, group=self._shard_group)
        return squares.sqrt()

    def update_matrices(self, names: list[str], update: Update) -> dict[str, Tensor]:
        tensors = {name: (self._shards[name].grad, self._shards[name].detach()) for name in names}
        return update_shards(tensors, update, self.owners(names), self.mesh)

    def clear_gradients(self) -> None:
        super().clear_gradients()
        for shard in self._shards.values():
            shard.grad = None

    def as_stored(self, name: str, value: Tensor) -> Tensor:
        """State with the parameter's shape is sharded like the parameter; the step count is a plain scalar."""
        if value.shape != self.local[name].shape or value.dim() == 0:
            return value
        return as_shard(value, self._shards[name])


def device_mesh(device: torch.device, size: int, shard_size: int | None) -> DeviceMesh:
    """All ranks in one dimension, or [copies, shards], where `shard_size` neighbouring ranks hold one copy of the model."""
    if shard_size is None:
        return init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (size // shard_size, shard_size), mesh_dim_names=("replicate", "shard"))
