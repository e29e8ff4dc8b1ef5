"""The contract of objectives, and the module that joins one with a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from models.base import IGNORE, Batch, Output, with_hidden


class Loss(NamedTuple):
    """What an objective computes on a batch: a tuple, since FSDP and DeepSpeed look for the tensors in it.

    sum: fp32 scalar, the sum of the losses of what counts. count: fp64 scalar, what counts, as `Objective.count` says.
    parts: further losses by name, already inside `sum` (None: there are none).
    """

    sum: Tensor
    count: Tensor  # type: ignore[assignment]  # a tuple's own `count` is not missed
    parts: dict[str, Tensor] | None = None


@dataclass(frozen=True)
class NoConfig:
    """Of an objective without settings."""


class Objective(nn.Module):
    """Base of every objective. A step minimises the sum of `Loss.sum` over all microbatches and ranks, divided by the sum of
    `count`: how the batch is divided changes nothing.
    """

    Config: ClassVar[type] = NoConfig
    counts_every_token: ClassVar[bool] = (
        False  # True: without weights, all tokens of a step count 1, so its size says it
    )

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self, model: Any, batch: Batch) -> Loss:
        """model: has hidden, logits, nll and loss of `LanguageModel`, and can be called as one; batch: tensors [B, T]."""
        raise NotImplementedError

    def count(self, batch: Batch) -> Tensor:
        """What `forward` counts in this batch, from the batch alone: fp64 scalar on its device.

        It is known before the first backward pass, so that gradients are of the mean from the beginning. By default the sum
        of the weights of the targets that are not IGNORE.
        """
        counted = batch["targets"] != IGNORE
        weights = batch.get("weights")
        return (
            counted.sum(dtype=torch.float64) if weights is None else weights.where(counted, 0).sum(dtype=torch.float64)
        )


REGISTRY: dict[str, type[Objective]] = {}


def register_objective(name: str) -> Any:
    """Class decorator: make an objective known under `name`, which can be taken once. TypeError where it defines no forward."""

    def add(cls: type[Objective]) -> type[Objective]:
        if cls.forward is Objective.forward:
            raise TypeError(f"{cls.__name__} must define forward: see Objective in trainer/objectives/base.py")
        if name in REGISTRY and REGISTRY[name].__qualname__ != cls.__qualname__:
            raise ValueError(f"objective name {name!r} is taken by {REGISTRY[name].__module__}")
        REGISTRY[name] = cls
        return cls

    return add


class ModelAndObjective(nn.Module):
    """What DDP, FSDP and DeepSpeed wrap: they see every forward pass, whichever methods of the model the objective calls."""

    def __init__(self, model: Any, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch, cache: Any = None) -> Loss | Output:
        """The objective's Loss of a batch with targets; of one without, the model's Output with the logits."""
        if "targets" in batch:
            return self.objective(with_hidden(self.model), batch)
        return self.model(batch["tokens"], documents=batch.get("documents"), cache=cache)
