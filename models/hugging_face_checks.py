"""What every adapter to transformers checks: an option that is not computed, a shape, or a weight without a place is an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def refuse_others(theirs: Any, needed: dict[str, Any]) -> None:
    """ValueError, with the name of the field, if the config `theirs` has another value than the one that is computed here."""
    for name, value in needed.items():
        found = getattr(theirs, name, value)
        if found != value:
            raise ValueError(f"{name} {found!r} is not implemented here, only {value!r}")


def fitting(value: Tensor, parameter: Tensor, source: str) -> Tensor:
    """`value`. RuntimeError if it has not the shape of `parameter`."""
    if value.shape != parameter.shape:
        raise RuntimeError(f"{source} is {tuple(value.shape)}, not {tuple(parameter.shape)}")
    return value


def refuse_leftovers(left: set[str], model: Any, weights: Mapping[str, Tensor], embedding: str) -> None:
    """RuntimeError if any name is left; for a tied model, a head that equals the embedding is allowed."""
    if model.head is None and torch.equal(weights.get("lm_head.weight", weights[embedding]), weights[embedding]):
        left = left - {"lm_head.weight"}
    if left:
        named, more = sorted(left)[:5], f" and {len(left) - 5} more" if len(left) > 5 else ""
        raise RuntimeError(f"the model has no place for {', '.join(named)}{more}")
