"""Layers of an objective beside a model: how they begin, and that the model's own methods do not see them."""

import dataclasses

import pytest
import torch

from models.base import get_model, load_models
from models.objective_layers import is_objective_layer, with_layers
from trainer.engine.meta import build_meta
from trainer.optim import names_by_role
from trainer.testing.subject import Subject

load_models()
LAYERS = {"wider": (32, 48), "narrower": (48, 32)}
NAMES = [f"objective_layers.{name}.weight" for name in LAYERS]
SMALL = {"n_layers": 2, "d_model": 32, "n_heads": 2}


@pytest.mark.parametrize("name", ["gpt2", "ngpt", "hlb"])
def test_a_model_is_the_same_beside_them(name):
    """Its weights, roles, projections (nGPT normalises all matrices that it has) and FLOPs; they are counted and have a role."""
    plain = Subject(name, get_model(name), {key: SMALL[key] for key in SMALL if key != "n_heads" or name != "hlb"})
    more = dataclasses.replace(plain, model_class=with_layers(plain.model_class, LAYERS))
    one, two = plain.model, more.model
    own = two.state_dict()
    layers = {key: own.pop(key) for key in NAMES}
    assert own.keys() == one.state_dict().keys()
    assert all(torch.equal(own[key], value) for key, value in one.state_dict().items())
    expected = names_by_role(one)
    assert names_by_role(two) == {**expected, "matrix": [*expected["matrix"], *NAMES]}
    assert two.projections().keys() == one.projections().keys()
    assert two.fused_matrices() == one.fused_matrices()
    assert two.flops_per_token(16) == one.flops_per_token(16)
    counts = [subject.model_class.count_parameters(subject.config_at(0.2)) for subject in (plain, more)]
    assert counts[1] - counts[0] == sum(layer.numel() for layer in layers.values()) == 2 * 32 * 48


def test_they_are_orthonormal_and_follow_from_the_seed():
    """Within the rounding of fp32: 48 products of entries below 1 are off by less than 48 * 2^-23 = 6e-6."""
    subject = Subject("gpt2", with_layers(get_model("gpt2"), LAYERS), SMALL)
    wider, narrower = (subject.build(3).get_parameter(name) for name in NAMES)
    assert wider.shape == (48, 32) and narrower.shape == (32, 48)
    for small in (wider.T @ wider, narrower @ narrower.T):
        torch.testing.assert_close(small, torch.eye(32), rtol=0, atol=6e-6)
    assert torch.equal(wider, subject.build(3).get_parameter(NAMES[0]))
    assert not torch.equal(wider, subject.build(4).get_parameter(NAMES[0]))


def test_the_class_is_made_once():
    """So that what is cached by class is found again."""
    gpt2 = get_model("gpt2")
    assert with_layers(gpt2, LAYERS) is with_layers(gpt2, dict(LAYERS)) and with_layers(gpt2, {}) is gpt2
    config = gpt2.Config(vocab_size=64, **SMALL)
    named = [name for name, _ in build_meta(with_layers(gpt2, LAYERS), config).named_parameters()]
    assert [name for name in named if is_objective_layer(name)] == NAMES
