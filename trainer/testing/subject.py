"""The small model that is checked, and the results of a check."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from models.base import IGNORE, Batch, LanguageModel
from models.materialise import materialise
from trainer.engine.meta import build_meta
from trainer.planning import dial

MOVED = 0.1  # standard deviation of what moves each weight from its initial value
VOCAB, SCALE = 257, 0.2  # the smallest scale at which the zoo's models have more than one block
ROWS, LENGTH = 2, 24


class Failed(AssertionError):
    """A promise is not kept; one line says which and how."""


class Skipped(Exception):
    """A promise that this model does not make, or that cannot be tested here; one line says why."""


@dataclass(frozen=True)
class Check:
    """A promise and the function that tests it. needed: if this check fails, all later ones are skipped.

    run: raises Failed or Skipped; its argument is a Subject or, in optimizers.py, a RuleSubject.
    """

    name: str
    promise: str
    run: Callable[[Any], None]
    needed: bool = False


@dataclass
class Subject:
    """The model that is checked, or that an objective is checked with.

    choices: fields of its Config that the user has set; objective: section `objective` of a config; weighted: whether targets
    have weights; lacks: the promise of a needed check that failed, or "".
    """

    name: str
    model_class: type[LanguageModel]
    choices: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=lambda: {"name": "next_token"})
    weighted: bool = False
    lacks: str = ""

    @property
    def plugin_class(self) -> type:
        return self.model_class

    def config_at(self, scale: float, vocab_size: int = VOCAB) -> Any:
        target = dial.target_parameters(scale, vocab_size)
        return self.model_class.config_for_scale(scale, vocab_size, target, **self.choices)

    def meta_at(self, scale: float, vocab_size: int = VOCAB) -> Any:
        """The model without storage."""
        return build_meta(self.model_class, self.config_at(scale, vocab_size))

    def build(self, seed: int = 0) -> Any:
        """A small model with weights from `seed`, built as the trainer does it."""
        return materialise(self.meta_at(SCALE), torch.device("cpu"), torch.Generator().manual_seed(seed))

    @functools.cached_property
    def _moved(self) -> Any:
        model, generator = self.build(), torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += MOVED * torch.randn(parameter.shape, generator=generator)
        model.post_step()
        return model

    @property
    def model(self) -> Any:
        """A fresh copy of the small model, its weights moved at random: what begins at zero would hide the faults behind it."""
        return copy.deepcopy(self._moved)

    @property
    def length(self) -> int:
        return min(LENGTH, self._moved.max_context or LENGTH)

    @property
    def tokens(self) -> Tensor:
        """[B, T]"""
        return torch.randint(VOCAB, (ROWS, self.length), generator=torch.Generator().manual_seed(1))

    @property
    def targets(self) -> Tensor:
        """[B, T]"""
        return torch.randint(VOCAB, (ROWS, self.length), generator=torch.Generator().manual_seed(2))

    @property
    def batch(self) -> Batch:
        """`tokens` and `targets`; if weighted, repeated twice, with weights and with some targets that do not count."""
        if not self.weighted:
            return {"tokens": self.tokens, "targets": self.targets}
        tokens, targets = self.tokens.repeat(2, 1), self.targets.repeat(2, 1)
        targets[0, ::3] = targets[2] = IGNORE
        weights = torch.rand(targets.shape, generator=torch.Generator().manual_seed(3))
        return {"tokens": tokens, "targets": targets, "weights": weights}


def require(kept: Any, told: str) -> None:
    """Raise Failed with the message `told` unless `kept` is true."""
    if not kept:
        raise Failed(told)


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference of entries; infinite if an entry is a number in only one of the two."""
    differing = (a - b)[a != b].abs().nan_to_num(torch.inf)
    return differing.max().item() if len(differing) else 0.0


def require_close(a: Tensor, b: Tensor, told: str, tolerance: float = 1e-5) -> None:
    """Raise Failed if two results differ by more than the tolerance, times their largest entry if that is above 1."""
    size = max(1.0, b[b.isfinite()].abs().max().item() if b.isfinite().any() else 1.0)
    apart = distance(a, b)
    require(apart <= tolerance * size, f"{told}: they differ by {apart:.3g}")


def gradients(model: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor | None]]:
    """(loss, gradient by parameter) of one forward and backward pass."""
    model.zero_grad()
    loss = model(*args, **kwargs).loss
    loss.backward()
    return loss.detach(), {
        name: None if parameter.grad is None else parameter.grad.clone() for name, parameter in model.named_parameters()
    }


def train(model: Any, tokens: Tensor, targets: Tensor, steps: int, lr: float = 1e-2) -> list[float]:
    """The losses of some steps of AdamW on one batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(tokens, targets).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.post_step()
        losses.append(loss.item())
    return losses
