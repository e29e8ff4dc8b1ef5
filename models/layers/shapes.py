"""Width and depth for a number of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

STEPS = (64, 32, 16, 8)
WIDTHS = 128  # of each step: up to 8192, 4096, ..., which at any depth leaves one within 3 % of most targets


def fit_depth(count: Callable[[Any], int], config: Any, target: int) -> Any:
    """`config`, deeper by the number of layers that brings count(config) nearest the target."""
    deeper = replace(config, n_layers=config.n_layers + 1)
    first, per_layer = count(config), count(deeper) - count(config)
    return replace(config, n_layers=config.n_layers + max(0, round((target - first) / per_layer)))


def nearest_shape(count: Callable[[Any], int], target: int, of_width: Callable[[int], Any]) -> Any:
    """The shape nearest GPT-2's aspect (width = 64 depth) whose count is within 3 % of the target.

    of_width: the config of a width, or ValueError where there is none. Widths are whole tiles of matrix products: multiples
    of 64, from 1024 on of 128. Parts of tiles, as large as can be, are for targets that no coarser width meets, or only
    at four times too deep or shallow where finer ones are not (few parameters, most of them embeddings). ValueError if no
    width will do.
    """

    def miss(config: Any) -> float:
        return abs(count(config) / target - 1)

    def aspect(config: Any) -> float:
        return abs(math.log(config.d_model / (64 * config.n_layers)))

    shapes: list[Any] = []
    met: list[Any] = []
    refusal = ValueError("no shape is possible")
    for step in STEPS:
        for width in range(step, WIDTHS * step + 1, step):
            try:
                shapes.append(of_width(width))
            except ValueError as error:
                refusal = error
        met = [config for config in shapes if miss(config) < 0.03]
        if met and min(map(aspect, met)) < math.log(4):
            break
    if not shapes:
        raise refusal
    if not met:
        return min(shapes, key=miss)
    # At a chosen depth all have nearly one aspect, whatever it is: widths within 3 % of a count differ by 6 % at most.
    most = max(math.log(4), min(map(aspect, met)) + 0.1)
    near = [config for config in met if aspect(config) < most]
    return min(near, key=lambda config: (_parts_of_tile(config.d_model), aspect(config)))


def _parts_of_tile(width: int) -> int:
    """1 for whole tiles (64 channels, from 1024 on 128), 2 for multiples of half a tile, 4, 8, ..."""
    tile = 128 if width >= 1024 else 64
    return tile // math.gcd(width, tile)
