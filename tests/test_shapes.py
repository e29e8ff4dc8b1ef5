"""Widths that the dial chooses: whole tiles of matrix products, or as large a part of one as meets the target."""

import math

import pytest

from models.base import get_model, load_models
from models.presets import Gpt2
from trainer import scaling

load_models()


def tile(width):
    """Channels that products of this width are cut into at best."""
    return 128 if width >= 1024 else 64


@pytest.mark.parametrize("vocab", [8192, 50304])
@pytest.mark.parametrize("scale", [4, 8, 16, 32, 148])
@pytest.mark.parametrize("name", ["gpt2", "llama", "modded", "ngpt"])
def test_widths_are_whole_tiles(name, scale, vocab):
    config = get_model(name).config_for_scale(scale, vocab, scaling.target_parameters(scale, vocab))
    assert config.d_model % tile(config.d_model) == 0


@pytest.mark.parametrize("scale, n_layers", [(1, 12), (4, 2), (4, 6), (4, 16), (8, 2), (8, 16), (32, 16)])
def test_a_chosen_depth_gets_the_coarsest_width_that_meets_the_target(scale, n_layers):
    """Also where that depth is far from GPT-2's aspect, and where it takes parts of a tile above 1024."""
    target = scaling.target_parameters(scale, 8192)

    def meets(width):
        n_heads = width // math.gcd(width, 64)
        config = Gpt2.Config(vocab_size=8192, d_model=width, n_layers=n_layers, n_heads=n_heads)
        return Gpt2.count_parameters(config) == pytest.approx(target, rel=0.03)

    width = Gpt2.config_for_scale(scale, 8192, target, n_layers=n_layers).d_model
    share = math.gcd(width, tile(width)) / tile(width)
    coarser = (w for w in range(16, 8193, 16) if math.gcd(w, tile(w)) / tile(w) > share)
    assert meets(width) and not any(map(meets, coarser))
