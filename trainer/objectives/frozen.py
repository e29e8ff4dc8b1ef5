"""Models that an objective needs and does not train: a teacher, a reference."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from models.base import Hidden, with_hidden

T = TypeVar("T")
Precision = Literal["compute", "nf4"]
PRECISION = "weights of that model's blocks: compute, as the run computes; nf4: 4 bits (bitsandbytes)"


@dataclass(frozen=True)
class FrozenSpec:
    """Which model, and how it is held.

    source: RUN[@STEP], folder of a Hugging Face model, or hf://ORG/NAME; None: the model that init_from names. weights: which ones
    of a run, see trainer/checkpoint/weights.py. precision: compute, as the run computes, or nf4, see models/layers/quantized.py.
    """

    source: str | None
    weights: str = "evaluation"
    precision: Precision = "compute"


def without_history(method: Callable[..., T]) -> Callable[..., T]:
    """A method of FrozenModel that keeps nothing for a backward pass, and computes in the model's own number type on every engine."""

    @functools.wraps(method)
    def call(self: FrozenModel, *args: Any, **kwargs: Any) -> T:
        with torch.no_grad(), torch.autocast(self.device_type, enabled=False):
            return method(self, *args, **kwargs)

    return call


class FrozenModel:
    """A frozen model as an objective calls it: `hidden`, `logits` and `nll` of `LanguageModel`, without gradient or dropout.

    It is no nn.Module, so the module that holds it neither trains it nor stores it in checkpoints.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = with_hidden(model.requires_grad_(False).eval())
        self.device_type = next(model.parameters()).device.type

    @without_history
    def hidden(self, tokens: Tensor, *, documents: Tensor | None = None) -> Hidden:
        """Of tokens [B, T]: states [B, T, D]."""
        return self.model.hidden(tokens, documents=documents)

    @without_history
    def logits(self, hidden: Hidden) -> Tensor:
        """[B, T, V]"""
        return self.model.logits(hidden)

    @without_history
    def nll(self, hidden: Hidden, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Cross-entropy of each target in nats times its weight: fp32 [B, T], 0 at IGNORE."""
        return self.model.nll(hidden, targets, weights)

    def blocks(self) -> list[nn.Module]:
        return self.model.blocks()
