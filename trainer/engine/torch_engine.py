"""Plain PyTorch: one device, or a copy of the model on each of several devices (DistributedDataParallel)."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.base import Batch
from trainer.engine.base import Engine
from trainer.engine.cuda_graphs import CudaGraphRecorder, CudaGraphRunner, GraphRecorder
from trainer.optim import trained_parameters


class TorchEngine(Engine):
    """single and ddp. Every rank holds everything.

    fp32: everything fp32 (on a GPU with TF32 products). bf16: fp32 weights and gradients, bf16 compute by autocast.
    pure_bf16: bf16 weights and optimiser state; gradients are still summed in fp32 over the microbatches and ranks of a step.
    """

    def parallelize(self, meta: Any) -> Any:
        self._fp32_gradients: dict[nn.Parameter, Tensor] = {}
        model = self.initialise(meta, self.device)
        self.prepare_blocks(model)
        self.local = trained_parameters(model)
        # DDP would sum bf16 gradients in bf16. So for pure_bf16 `collect_gradients` reduces the fp32 sums.
        self._wrapped = self.strategy == "ddp" and self.precision != "pure_bf16"
        self.joined = self.join(model)
        self._module: nn.Module = self.joined
        if self._wrapped:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self._module = DistributedDataParallel(self.joined, device_ids=ids, gradient_as_bucket_view=True)
        self._graph_runner: CudaGraphRunner | None = None
        if self.config.engine.cuda_graphs:
            self.replay_microbatches(CudaGraphRecorder())
        return model

    def replay_microbatches(self, recorder: GraphRecorder) -> None:
        """From now on, `recorder` records forward and backward of microbatches and replays them."""
        self._graph_runner = CudaGraphRunner(self._forward_and_backward, recorder)

    def backward(self, batch: Batch, scale: float | Tensor, sync: bool) -> Tensor:
        if self._graph_runner is not None:
            if not isinstance(scale, Tensor):
                scale = torch.full((), scale, device=self.device)
            return self._graph_runner(batch, scale)
        quiet = self._wrapped and not sync
        with self._module.no_sync() if quiet else contextlib.nullcontext():  # type: ignore[operator]
            # DDP averages over ranks; we want the sum.
            losses = self._forward_and_backward(batch, scale * self.world.size if self._wrapped else scale)
        if self.precision == "pure_bf16":
            self._add_up()
        return losses

    def _forward_and_backward(self, batch: Batch, scale: float | Tensor) -> Tensor:
        with self.autocast():
            output = self._module(self.with_documents(batch))
        (output.sum * scale).backward()
        return self.losses(output)

    def clear_gradients(self) -> None:
        # DDP's gradients are views of its buckets. Set to None, the next microbatch without sync would allocate new ones.
        # Recorded microbatches add to the gradient tensors that existed at the recording.
        self.optimizer.zero_grad(set_to_none=not self._wrapped and self._graph_runner is None)

    def _add_up(self) -> None:
        """pure_bf16: add the microbatch's gradients to fp32 sums of this rank."""
        for parameter in self.local.values():
            if parameter.grad is None:
                continue
            sums = self._fp32_gradients
            sums[parameter] = sums[parameter].add_(parameter.grad) if parameter in sums else parameter.grad.float()
            parameter.grad = None

    def collect_gradients(self) -> None:
        """pure_bf16: the fp32 sums of all ranks, converted to bf16."""
        for parameter, total in self._fp32_gradients.items():
            parameter.grad = self.world.sum(total).to(parameter.dtype)
        self._fp32_gradients = {}

    def norm_so_far(self) -> Tensor:
        if self.precision != "pure_bf16":
            return super().norm_so_far()
        # Copies: the sums of this rank go on growing.
        totals = (self.world.sum(total.clone()) for total in self._fp32_gradients.values())
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(total) for total in totals]))
