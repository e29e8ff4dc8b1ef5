"""Width and depth for a number of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

WIDTHS = 128  # of each step: up to 8192


def fit_depth(count: Callable[[Any], int], config: Any, target: int) -> Any:
    """`config`, deeper by the number of layers that brings count(config) nearest the target."""
    deeper = replace(config, n_layers=config.n_layers + 1)
    first, per_layer = count(config), count(deeper) - count(config)
    return replace(config, n_layers=config.n_layers + max(0, round((target - first) / per_layer)))


def nearest_shape(count: Callable[[Any], int], target: int, of_width: Callable[[int], Any]) -> Any:
    """The shape nearest GPT-2's aspect (width = 64 depth) whose count is within 3 % of the target.

    of_width: the config of a width, or ValueError where there is none. Widths go by 64, for the tiles of matrix products;
    where none of these meets the target without being four times too deep or shallow (few parameters, most of them
    embeddings), by 8. ValueError if no width will do.
    """

    def miss(config: Any) -> float:
        return abs(count(config) / target - 1)

    def aspect(config: Any) -> float:
        return abs(math.log(config.d_model / (64 * config.n_layers)))

    shapes: list[Any] = []
    refusal = ValueError("no shape is possible")
    for step in (64, 8):
        for width in range(step, WIDTHS * step + 1, step):
            try:
                shapes.append(of_width(width))
            except ValueError as error:
                refusal = error
        met = [config for config in shapes if miss(config) < 0.03]
        if met and aspect(min(met, key=aspect)) < math.log(4):
            break
    if not shapes:
        raise refusal
    return min(met, key=aspect) if met else min(shapes, key=miss)
