"""Finds width, depth and number of heads for a given number of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

STEPS = (64, 32, 16, 8)
WIDTHS = 128  # widths to try per step: up to 8192, 4096, ...; at any depth, one is within 3 % of most targets
HEAD_DIM = 64  # preferred channels of a head, if they divide the width
GUESSES = 8  # of the depth
FAR = 1.5  # a count above FAR times or below 1 / FAR of the target is too far from it


def shape_for(
    count: Callable[[Any], int], target: int, of_shape: Callable[[int, int], Any], choices: Mapping[str, Any]
) -> Any:
    """The config with a count near `target`. It keeps d_model, n_layers and n_heads if they are in `choices`.

    of_shape: width and number of heads -> the shallowest possible config with `choices`; ValueError if there is none.
    The number of heads is the best one (see `head_counts`) that of_shape accepts. ValueError if it accepts none, or if
    no config is near the target.
    """

    def of_width(width: int) -> Any:
        refusals = []
        for n_heads in [choices["n_heads"]] if "n_heads" in choices else head_counts(width):
            try:
                config = of_shape(width, n_heads)
            except ValueError as error:
                refusals.append(error)
            else:
                return config if "n_layers" in choices else fit_depth(count, config, target)
        raise refusals[0]

    if "d_model" in choices:
        return of_width(choices["d_model"])
    return nearest_shape(count, target, of_width)


def head_counts(width: int) -> list[int]:
    """Numbers of heads, best first, that divide `width` into heads of an even width of at least 16; [1] if there are none.

    Heads of at least 32 channels come before smaller ones; among them, the nearest to 64 comes first.
    """
    small = [n for n in range(1, math.isqrt(max(width, 0)) + 1) if width % n == 0]
    channels = {c for n in small for c in (n, width // n) if c % 2 == 0 and c >= 16}
    return [width // c for c in sorted(channels, key=lambda c: (c < 32, abs(c - HEAD_DIM)))] or [1]


def fit_depth(count: Callable[[Any], int], config: Any, target: int) -> Any:
    """`config` with the number of added layers that brings count(config) nearest to the target."""
    first, least = count(config), config.n_layers
    deeper = replace(config, n_layers=least + 1)
    for _ in range(GUESSES):  # where all layers have the same size, the first guess is right
        per_layer = (count(deeper) - first) / (deeper.n_layers - least)
        guess = max(0, round((target - first) / per_layer))
        if guess == 0:
            return config
        if least + guess == deeper.n_layers:
            break
        deeper = replace(config, n_layers=least + guess)
    around = [replace(config, n_layers=n) for n in range(max(least, deeper.n_layers - 1), deeper.n_layers + 2)]
    return min(around, key=lambda near: abs(count(near) - target))


def nearest_shape(count: Callable[[Any], int], target: int, of_width: Callable[[int], Any]) -> Any:
    """The shape nearest to GPT-2's aspect ratio (width = 64 depth) whose count is within 3 % of the target.

    of_width: returns the config of a width, or raises ValueError if there is none. Widths are whole tiles of matrix products:
    multiples of 64, from 1024 on of 128. Finer steps (parts of tiles, the largest first) are used only if no coarser width meets
    the target, or if all that do are more than twice too deep or too shallow and finer ones are not (few parameters, most of
    them embeddings). If no width meets the target, the nearest is taken; ValueError if its count is off by more than a
    factor FAR, or if no width is possible.
    """

    def miss(config: Any) -> float:
        return abs(count(config) / target - 1)

    def aspect(config: Any) -> float:
        return abs(math.log(config.d_model / (64 * config.n_layers)))

    shapes: list[Any] = []
    best: Any = None
    refusal = ValueError("no shape is possible")
    for step in STEPS:
        depth = None
        for width in range(step, WIDTHS * step + 1, step):
            try:
                config = of_width(width)
            except ValueError as error:
                refusal = error
                continue
            shapes.append(config)
            # Count only when the depth no longer falls, because counting a deep model takes long.
            if config.n_layers == depth and count(config) > FAR * target:
                break  # wider configs have even more parameters
            depth = config.n_layers
        if not shapes:
            raise refusal  # every width was refused, so the width is not the reason
        shapes.sort(key=aspect)
        best = next((config for config in shapes if miss(config) < 0.03), None)
        if best is not None and aspect(best) < math.log(2):
            break
    if best is None:
        return _near_enough(min(shapes, key=miss), count, target)
    # With a chosen depth all candidates have nearly the same aspect: widths within 3 % of a count differ by 6 % at most.
    most = max(math.log(2), aspect(best) + 0.1)
    near = [config for config in shapes if aspect(config) < most and miss(config) < 0.03]
    return min(near, key=lambda config: (_parts_of_tile(config.d_model), aspect(config)))


def _near_enough(config: Any, count: Callable[[Any], int], target: int) -> Any:
    """Return `config`; ValueError if its count is off by more than a factor FAR."""
    n = count(config)
    if not target / FAR <= n <= target * FAR:
        raise ValueError(
            f"no shape comes near the target of {target:,} parameters: the nearest (d_model {config.d_model}, "
            f"n_layers {config.n_layers}) has {n:,}; set d_model and n_layers yourself"
        )
    return config


def _parts_of_tile(width: int) -> int:
    """1 for whole tiles (64 channels, from 1024 on 128), 2 for multiples of half a tile, 4, 8, ..."""
    tile = 128 if width >= 1024 else 64
    return tile // math.gcd(width, tile)
