"""Checks of what an objective promises, on a small model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from models.base import IGNORE, Batch, with_hidden
from models.objective_layers import with_layers
from trainer.objectives import Loss, build_objective, resolve_objective
from trainer.objectives.base import ModelAndObjective
from trainer.testing.strategies import SAME
from trainer.testing.subject import Check, Subject, require, require_close


def joined(subject: Subject) -> ModelAndObjective:
    """With small models of other weights in place of the frozen ones that the objective asks for, and with its layers."""
    settings = resolve_objective(subject.objective)
    frozen = {name: subject.build(seed=1) for name in build_objective(settings).frozen_models()}
    objective, model = build_objective(settings, frozen), subject.model
    layers = objective.linear_layers(with_hidden(model), subject.batch)
    if layers:
        model = replace(subject, model_class=with_layers(subject.model_class, layers)).model
    return ModelAndObjective(model, objective)


def loss_of(module: ModelAndObjective, batch: Batch) -> Loss:
    loss = module(batch)
    assert isinstance(loss, Loss)
    return loss


def gradients_of(module: ModelAndObjective, batches: list[Batch]) -> dict[str, Tensor]:
    """Gradients of the sum over all batches, divided by the sum of their counts."""
    module.zero_grad()
    losses = [loss_of(module, batch) for batch in batches]
    count = sum(loss.count for loss in losses)
    for loss in losses:
        (loss.sum / count).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in module.model.named_parameters()}


def losses_are_finite_scalars(subject: Subject) -> None:
    loss = loss_of(joined(subject), subject.batch)
    for name, value in (("sum", loss.sum), ("count", loss.count), *(loss.parts or {}).items()):
        require(value.shape == () and value.isfinite(), f"{name} is {value}, not a finite scalar")
    require(loss.sum.dtype == torch.float32, f"sum is {loss.sum.dtype}, not fp32")
    for name, gradient in gradients_of(joined(subject), [subject.batch]).items():
        require(gradient.isfinite().all(), f"the gradient of {name} is not finite")


def count_is_that_of_the_targets(subject: Subject) -> None:
    """The count is the sum of the weights of the targets that are not IGNORE; without weights, their number."""
    module, batch = joined(subject), subject.batch
    weighted = batch["weights"][batch["targets"] != IGNORE].double().sum()
    require_close(loss_of(module, batch).count.double(), weighted, "count and the weights of the targets")
    del batch["weights"]
    number = (batch["targets"] != IGNORE).sum().double()
    require_close(loss_of(module, batch).count.double(), number, "count and the number of the targets without weights")
    before = module.objective.count(batch).double()
    require_close(before, number, "count(batch), called before the forward pass, and that number")


def what_does_not_count_changes_nothing(subject: Subject) -> None:
    module, batch = joined(subject), subject.batch
    batch["weights"][1, 2] = 0
    other: Batch = {**batch, "targets": batch["targets"].clone()}
    other["targets"][1, 2] = IGNORE
    first, second = (gradients_of(module, [b]) for b in (batch, other))
    require_close(
        loss_of(module, batch).sum, loss_of(module, other).sum, "sums with a target of weight 0 and with IGNORE"
    )
    for name, gradient in first.items():
        require_close(second[name], gradient, f"gradients of {name} with a target of weight 0 and with IGNORE", SAME)


def microbatches_change_nothing(subject: Subject) -> None:
    """The gradient of sum / count is the same for the whole batch and for microbatches with different counts."""
    module, batch = joined(subject), subject.batch
    whole = {name: gradient.clone() for name, gradient in gradients_of(module, [batch]).items()}
    for cuts in ([1, 3], [1, 1, 1, 1]):
        split: list[Any] = [{} for _ in cuts]
        for key, value in batch.items():
            for part, values in zip(split, value.split(cuts), strict=True):  # type: ignore[attr-defined]
                part[key] = values
        for name, gradient in gradients_of(module, split).items():
            require_close(gradient, whole[name], f"gradients of {name} in {len(cuts)} microbatches and in one", SAME)


CHECKS = [
    Check("finite", "loss and gradients are finite", losses_are_finite_scalars, True),
    Check("count", "count is that of the weighted targets", count_is_that_of_the_targets),
    Check("nothing", "targets that do not count change nothing", what_does_not_count_changes_nothing),
    Check("microbatches", "microbatches do not change the gradient of sum / count", microbatches_change_nothing),
]
