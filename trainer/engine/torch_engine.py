"""Plain PyTorch: one device, or DistributedDataParallel over several."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.device import choose_device, keep_freed_memory
from trainer.engine.distributed import World


class TorchEngine:
    """Holds the model; turns microbatches into one global gradient per optimiser step.

    fp32: everything fp32 (on a GPU with TF32 products). bf16: fp32 weights and gradients, bf16 compute by autocast. pure_bf16: bf16 weights and optimiser
    state; gradients still add up in fp32 over the microbatches and ranks of a step.
    """

    def __init__(self, plan: Any, world: World, strategy: str) -> None:
        self.world, self.strategy = world, strategy
        self.device = choose_device(plan.config.device, world.local_rank)
        self.precision = plan.config.precision
        if plan.config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
            torch.use_deterministic_algorithms(True)
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True
        else:
            keep_freed_memory()
        self.model = build_model(plan, self.device)
        self._fp32_gradients: dict[nn.Parameter, Tensor] = {}
        # bf16 gradients would be summed in bf16 by DDP: there the fp32 sums are reduced by hand after the last microbatch.
        self._wrapped = strategy == "ddp" and self.precision != "pure_bf16"
        self.module: nn.Module = self.model
        if self._wrapped:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.module = DistributedDataParallel(self.model, device_ids=ids, gradient_as_bucket_view=True)

    def describe(self) -> str:
        """One line: what this engine really is."""
        where = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        tf32 = " (products in TF32)" if self.device.type == "cuda" and self.precision == "fp32" else ""
        return f"{self.strategy} on {self.world.size} x {where}{threads}, {self.precision}{tf32}"

    def autocast(self) -> Any:
        """Context of every forward pass."""
        return autocast(self.device, self.precision)

    def backward(self, tokens: Tensor, targets: Tensor, scale: float, last: bool) -> Tensor:
        """Add the gradient of scale * (sum of token losses); ranks are summed at the `last` microbatch.

        tokens, targets: [B, T] on the device. Returns the sum of token losses of this rank, a detached fp32 scalar.
        """
        quiet = self._wrapped and not last
        with self.module.no_sync() if quiet else contextlib.nullcontext():  # type: ignore[operator]
            with self.autocast():
                loss = self.module(tokens, targets=targets, reduction="sum").loss
            # DDP averages over ranks; we want the sum.
            (loss * (scale * self.world.size if self._wrapped else scale)).backward()
        if self.precision == "pure_bf16":
            self._collect(last)
        return loss.detach()

    def _collect(self, last: bool) -> None:
        """pure_bf16: move the microbatch's gradients into fp32 sums, and back to bf16 once they are complete."""
        for parameter in self.model.parameters():
            if parameter.grad is None:
                continue
            sums = self._fp32_gradients
            sums[parameter] = sums[parameter].add_(parameter.grad) if parameter in sums else parameter.grad.float()
            parameter.grad = None
        if last:
            for parameter, total in self._fp32_gradients.items():
                parameter.grad = self.world.sum(total).to(parameter.dtype)
            self._fp32_gradients = {}


def autocast(device: torch.device, precision: str) -> Any:
    """bf16 compute where the weights are fp32; nothing for the other precisions."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


def build_model(plan: Any, device: torch.device) -> Any:
    """The model of a plan on `device` with its initial weights: the same for a seed on every device and number of ranks."""
    from trainer.memory import build_meta

    model = build_meta(plan.model_class, plan.model_config).to_empty(device=device)
    model.init_weights(torch.Generator().manual_seed(plan.config.seed))
    return model.to(torch.bfloat16) if plan.config.precision == "pure_bf16" else model
