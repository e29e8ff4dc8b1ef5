"""Counts parameters and FLOPs of a model: it is built and run on the meta device, where tensors have shapes but no values."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from models.layers.shapes import shape_for

KEPT = 4096  # number of cached counts per process; the search for a shape needs some hundred


class _NoInitialisers(TorchFunctionMode):
    """Skips torch.nn.init: layers call it in `__init__`. On the meta device it has no effect, but takes half of the time."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def build_on_meta(model_class: Any, config: Any) -> Any:
    """A model with shapes but no memory."""
    with torch.device("meta"), _NoInitialisers():
        return model_class(config)


@functools.lru_cache(maxsize=KEPT)
def parameters_of(model_class: Any, config: Any) -> int:
    """The number of parameters; a parameter with several names counts once."""
    return sum(parameter.numel() for parameter in build_on_meta(model_class, config).parameters())


@functools.lru_cache(maxsize=KEPT)
def parameters_of_kind(model_class: Any, config: Any, kind: str) -> int:
    """The number of parameters of `model_class.parts(config, kind)`."""
    with torch.device("meta"), _NoInitialisers():
        return sum(parameter.numel() for part in model_class.parts(config, kind) for parameter in part.parameters())


def estimate_parameters(model_class: Any, config: Any) -> int:
    """Estimate `parameters_of` from the two shallowest models that the Config allows: every further layer adds their difference.

    This makes the search for a shape fast, which counts many deep models. It is exact if these layers have the same size.
    """
    shallow = 1
    while shallow + 1 < config.n_layers:
        try:
            few, more = (
                parameters_of(model_class, replace(config, n_layers=depth)) for depth in (shallow, shallow + 1)
            )
        except ValueError:  # other choices in the Config need more layers
            shallow *= 2
        else:
            return few + (config.n_layers - shallow) * (more - few)
    return parameters_of(model_class, config)


def _counter() -> FlopCounterMode:
    """Counts matrix products, and the triangular systems of the delta rule, which torch leaves out."""
    systems = {torch.ops.aten.linalg_solve_triangular: _triangular_flops}
    return FlopCounterMode(display=False, custom_mapping=systems)


def _triangular_flops(matrix: Any, right: Any, *args: Any, **kwargs: Any) -> int:
    """Multiply-adds of half a product, each 2. Arguments are shapes: [..., Q, Q] and [..., Q, R]."""
    return math.prod(right) * matrix[-1]


@functools.lru_cache(maxsize=KEPT)
def training_flops_of(model_class: Any, config: Any, length: int) -> int:
    """FLOPs of training on one sequence of `length` tokens: three times the forward pass, without recomputation.

    A multiply-add counts as 2; operations that are not matrix products, such as embedding lookups, count as 0.
    """
    model = build_on_meta(model_class, config).requires_grad_(False)  # otherwise hooks of modules need a graph
    tokens = torch.zeros(1, length, dtype=torch.long, device="meta")
    # Imported here, because it imports models.base, which imports this module.
    from models.layers.linear_cross_entropy import score_nothing, scored_by

    # Scores are not matrix products, and a long sequence would need millions of calls for them.
    with torch.device("meta"), torch.no_grad(), scored_by(score_nothing), _counter() as counter:
        model(tokens, targets=tokens, **{key: torch.zeros(1, length) for key in model.further_keys()})
    return 3 * counter.get_total_flops()


def find_shape(
    model_class: Any,
    vocab_size: int,
    target: int,
    choices: Mapping[str, Any],
    count: Callable[[Any], int] | None = None,
) -> Any:
    """The Config with about `target` parameters: `shape_for` searches over d_model, n_layers and, if the Config has it, n_heads.

    count: of a Config's parameters; by default `estimate_parameters`.

    ValueError if the Config has no d_model and n_layers, or if no shape is near the target.
    """
    names = {field.name for field in fields(model_class.Config)}
    if not {"d_model", "n_layers"} <= names:
        raise ValueError(
            "config_for_scale must be defined: the Config has no fields d_model and n_layers to search over"
        )

    def of_shape(width: int, n_heads: int) -> Any:
        shape = {"vocab_size": vocab_size, "d_model": width, "n_layers": 1}
        shape |= {"n_heads": n_heads} if "n_heads" in names else {}
        return model_class.Config(**{**shape, **choices})

    return shape_for(count or functools.partial(estimate_parameters, model_class), target, of_shape, choices)
