"""The contract of objectives, and the module that joins one with a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from models.base import IGNORE, Batch, Output, WithColumns, logits_at, with_hidden
from trainer.data.dataset import LOSS_MASK, ColumnInfo
from trainer.objectives.frozen import FrozenModel, FrozenSpec


class Loss(NamedTuple):
    """What an objective computes on a batch. It is a tuple because FSDP and DeepSpeed search it for tensors.

    sum: fp32 scalar, the sum of the losses of the targets that count. count: fp64 scalar, as in `Objective.count`.
    parts: further losses by name, already included in `sum` (None: there are none).
    measures: what else is printed by name as a mean over the count, such as an accuracy: sums that are not part of `sum`.
    """

    sum: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which is not needed
    parts: dict[str, Tensor] | None = None
    measures: dict[str, Tensor] | None = None


@dataclass(frozen=True)
class NoConfig:
    """The Config of an objective without settings."""


class Objective(nn.Module):
    """Base of every objective. A step minimises the sum of `Loss.sum` over all microbatches and ranks, divided by the sum of
    `count`. So the result does not depend on how the batch is divided.

    An objective that needs other models, which are not trained, says which (`frozen_models`) and finds them in `frozen`:

        def frozen_models(self):
            return {"teacher": FrozenSpec(self.config.teacher)}  # teacher: the field of Config that names it

        def forward(self, model, batch):
            teacher = self.frozen["teacher"]
            hidden = teacher.hidden(batch["tokens"], documents=batch.get("documents"))
            logits = teacher.logits(hidden)  # no gradient, no dropout; bf16 unless the run is fp32
    """

    Config: ClassVar[type] = NoConfig
    counts_every_token: ClassVar[bool] = (
        False  # True: without weights every token counts 1, so a step's count is its size
    )

    # Fields of Config that name tokens. The plan sets the field `ids` to their ids, and to that of the end of a text behind them.
    token_fields: ClassVar[tuple[str, ...]] = ()
    records: ClassVar[tuple[str, ...]] = ("text", "chat")  # kinds of data that it can train on, of RECORDS

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.frozen: dict[str, FrozenModel] = {}  # as `frozen_models` asks; set before the first forward pass

    def frozen_models(self) -> dict[str, FrozenSpec]:
        """The models that `forward` needs besides the trained one: name of the field of Config that names the model -> which."""
        return {}

    def linear_layers(self, model: Any, batch: Batch) -> dict[str, tuple[int, int]]:
        """Linear layers without bias that are trained with the model, as the role matrix: name -> (inputs, outputs). `forward` finds
        them in `model.objective_layers`; they are no part of what is exported. model, batch: as in `forward`, before there are layers.
        The plan calls this on tensors without values."""
        return {}

    def check_columns(self, columns: Mapping[str, ColumnInfo]) -> None:
        """ValueError, which begins with the name of a field of Config, if a dataset with these columns lacks what `forward` reads."""

    def example(self, tokens: Tensor) -> Batch:
        """A batch with these tokens [B, T] and all keys that `forward` needs; its values do not matter. The plan computes with it."""
        return {"tokens": tokens, "targets": tokens}

    def forward(self, model: Any, batch: Batch) -> Loss:
        """model: has the methods hidden, logits, nll and loss of `LanguageModel`, and can be called like it; batch: tensors [B, T]."""
        raise NotImplementedError

    def targets(self, batch: Batch) -> Tensor:
        """The targets that are trained on, and that validation measures: [B, T], IGNORE for the others; by default the batch's."""
        return batch["targets"]

    def count(self, batch: Batch) -> Tensor:
        """The count that `forward` returns for this batch, computed from the batch alone: fp64 scalar on its device.

        The trainer calls it before the first backward pass, so that all gradients are gradients of the mean. By default it is
        the sum of the weights of the `targets` that are not IGNORE (without weights: their number).
        """
        counted = self.targets(batch) != IGNORE
        weights = batch.get("weights")
        return (
            counted.sum(dtype=torch.float64) if weights is None else weights.where(counted, 0).sum(dtype=torch.float64)
        )


def example_batch(objective: Objective, model: Any, tokens: Tensor) -> Batch:
    """`objective.example`, with what the model reads besides."""
    further: Any = {key: torch.zeros(tokens.shape, device=tokens.device) for key in model.further_keys()}
    return objective.example(tokens) | further


def answers_alone(batch: Batch) -> Tensor:
    """The targets of a batch of chat or preference data, with IGNORE for those that are not of an answer: [..., T]"""
    return batch["targets"].where(batch[LOSS_MASK] != 0, IGNORE)  # type: ignore[literal-required]


REGISTRY: dict[str, type[Objective]] = {}


def register_objective(name: str) -> Any:
    """Class decorator: register an objective as `name`. Raises TypeError if it defines no forward, ValueError if the name is taken."""

    def add(cls: type[Objective]) -> type[Objective]:
        if cls.forward is Objective.forward:
            raise TypeError(f"{cls.__name__} must define forward: see Objective in trainer/objectives/base.py")
        if name in REGISTRY and REGISTRY[name].__qualname__ != cls.__qualname__:
            raise ValueError(f"objective name {name!r} is taken by {REGISTRY[name].__module__}")
        REGISTRY[name] = cls
        return cls

    return add


class ModelAndObjective(nn.Module):
    """The module that DDP, FSDP and DeepSpeed wrap: they see every forward pass, whichever methods of the model the objective calls."""

    def __init__(self, model: Any, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch, cache: Any = None) -> Loss | Output:
        """For a batch with targets, the objective's Loss; for one without, the model's Output with the logits, all of them or those at
        "positions"."""
        if "targets" in batch:
            model = with_hidden(self.model)
            return self.objective(WithColumns(model, batch) if self.model.further_keys() else model, batch)
        if "positions" in batch:
            return Output(
                logits=logits_at(self.model, batch["tokens"], batch.get("documents"), batch["positions"])  # type: ignore[typeddict-item]
            )
        return self.model(batch["tokens"], documents=batch.get("documents"), cache=cache)
