"""Shapes that the dial chooses: widths of whole tiles of matrix products, or as large a part of one as meets the target; heads."""

import math
from dataclasses import replace

import pytest
from conftest import beyond

from models.base import get_model, load_models
from models.layers.shapes import head_counts
from models.presets import Gpt2
from trainer.planning import dial

load_models()


def tile(width):
    """Channels that products of this width are cut into at best."""
    return 128 if width >= 1024 else 64


@pytest.mark.parametrize("vocab", beyond([50304], [8192, 50304]))
@pytest.mark.parametrize("scale", [4, 8, 16, 32, 148])
@pytest.mark.parametrize("name", ["gpt2", "llama", "modded", "ngpt"])
def test_widths_are_whole_tiles(name, scale, vocab):
    config = get_model(name).config_for_scale(scale, vocab, dial.target_parameters(scale, vocab))
    assert config.d_model % tile(config.d_model) == 0


DEPTHS = [(1, 12), (4, 2), (4, 6), (4, 16), (8, 2), (8, 16), (32, 16)]


@pytest.mark.parametrize("scale, n_layers", beyond([(1, 12), (4, 2), (8, 16)], DEPTHS, several=True))
def test_a_chosen_depth_gets_the_coarsest_width_that_meets_the_target(scale, n_layers):
    """Also where that depth is far from GPT-2's aspect, and where it takes parts of a tile above 1024."""
    target = dial.target_parameters(scale, 8192)

    def meets(width):
        n_heads = width // math.gcd(width, 64)
        config = Gpt2.Config(vocab_size=8192, d_model=width, n_layers=n_layers, n_heads=n_heads)
        return Gpt2.count_parameters(config) == pytest.approx(target, rel=0.03)

    width = Gpt2.config_for_scale(scale, 8192, target, n_layers=n_layers).d_model
    share = math.gcd(width, tile(width)) / tile(width)
    coarser = (w for w in range(16, 8193, 16) if math.gcd(w, tile(w)) / tile(w) > share)
    assert meets(width) and not any(map(meets, coarser))


@pytest.mark.parametrize(
    ("width", "channels"),
    [
        (768, 64),
        (1088, 64),
        (96, 48),
        (104, 52),
        (136, 68),
        (200, 50),
        (224, 56),
        (1072, 134),
        (24, 24),
        (8, 8),
        (63, 63),
    ],
)
def test_heads_are_even_and_near_64_channels(width, channels):
    assert width // head_counts(width)[0] == channels


def test_no_head_is_odd_or_narrower_than_16():
    for width in range(16, 2049, 8):
        channels = [width // n for n in head_counts(width)]
        assert all(c % 2 == 0 and c >= 16 for c in channels), width
        assert channels[0] >= 32 or width < 32, width


@pytest.mark.parametrize(
    ("name", "vocab", "scale", "choices"),
    [
        ("gpt2", 4096, 0.4, {}),
        ("llama", 4096, 0.2, {}),
        ("modded", 4096, 0.5, {}),
        ("ngpt", 4096, 0.2, {}),
        ("gpt2", 8192, 0.1, {"attention": "differential"}),
        ("minimal-sota", 8192, 0.1, {"attention": "differential"}),
        ("llama", 4096, 0.05, {"n_kv_heads": 2}),
        ("llama", 4096, 0.1, {"n_kv_heads": 2}),
        ("llama", 4096, 0.2, {"rope_fraction": 0.25}),
        ("llama", 4096, 0.4, {"attention": "latent"}),
        ("gpt2", 8192, 0.5, {"n_heads": 6}),
        ("ngpt", 8192, 1, {"n_heads": 4}),
        ("ngpt", 8192, 1, {"n_layers": 4}),
    ],
    ids=str,
)
def test_narrow_models_have_usable_heads_and_meet_the_target(name, vocab, scale, choices):
    cls, target = get_model(name), dial.target_parameters(scale, vocab)
    config = cls.config_for_scale(scale, vocab, target, **choices)
    assert cls.count_parameters(config) == pytest.approx(target, rel=0.03)
    assert config.d_model // config.n_heads in range(16, 129, 2)
    assert {key: getattr(config, key) for key in choices} == choices


def test_groups_of_heads_follow_a_chosen_number_of_heads():
    target = dial.target_parameters(4, 8192)
    config = get_model("minimal-sota").config_for_scale(4, 8192, target, n_heads=8)
    assert (config.n_heads, config.n_kv_heads) == (8, 2)


def test_a_chosen_width_is_kept_and_the_depth_follows():
    target = dial.target_parameters(8, 8192)
    for name in ("ngpt", "gpt2"):
        cls = get_model(name)
        config = cls.config_for_scale(8, 8192, target, d_model=512)
        layer = cls.count_parameters(replace(config, n_layers=config.n_layers + 1)) - cls.count_parameters(config)
        assert (config.d_model, config.n_heads) == (512, 8)
        assert abs(cls.count_parameters(config) - target) <= layer / 2


def test_a_target_that_the_choices_put_out_of_reach_is_refused():
    """Three tables of values and 6 layers of 64 channels, the least for 4 heads of 16, are five times too many."""
    cls, target = get_model("modded"), dial.target_parameters(0.1, 257)
    with pytest.raises(
        ValueError, match=rf"{target:,} .*\(d_model 64, n_layers 6\).* set d_model and n_layers"
    ) as error:
        cls.config_for_scale(0.1, 257, target, n_kv_heads=4)
    assert "\n" not in str(error.value)
    chosen = {"n_kv_heads": 4, "d_model": 64, "n_layers": 6}
    assert cls.config_for_scale(0.1, 257, target, **chosen).n_heads == 4
