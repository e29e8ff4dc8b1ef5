"""The contract of `models/base.py`, checked on every registered model: a new model gets all of this by existing.

What `python -m trainer check` asks of any model stands in trainer/testing/. Here is what only the zoo promises besides.
"""

import contextlib
import copy
import functools
from dataclasses import replace

import pytest
import torch
from conftest import beyond

from models.base import get_model, load_models, model_names
from models.materialise import materialise
from trainer.planning import dial
from trainer.testing import numbers, sizes
from trainer.testing.subject import SCALE, VOCAB, Skipped, Subject, distance, gradients

load_models()

# Without what other tests have registered, whichever were read first.
ZOO = [name for name in model_names() if get_model(name).__module__.startswith("models.")]
CHECKS = {check.name: check for check in (*sizes.CHECKS, *numbers.CHECKS)}


@functools.cache
def subject_of(name):
    return Subject(name, get_model(name))


def build(name, scale=SCALE, vocab=VOCAB, **choices):
    """A small model with initial weights. choices: fields of its config."""
    subject = replace(subject_of(name), choices=choices)
    return materialise(subject.meta_at(scale, vocab), torch.device("cpu"), torch.Generator().manual_seed(0))


@pytest.fixture
def tokens():
    return subject_of("gpt2").tokens


@pytest.fixture
def targets():
    return subject_of("gpt2").targets


@pytest.fixture(params=ZOO)
def name(request):
    return request.param


@pytest.fixture
def subject(name):
    return subject_of(name)


@pytest.fixture
def model(subject):
    return subject.model


@pytest.mark.parametrize("check", CHECKS)
def test_contract(subject, check):
    try:
        CHECKS[check].run(subject)
    except Skipped as why:
        pytest.skip(str(why))


# -- sizes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", beyond([50304], [8192, 50304]))
@pytest.mark.parametrize("scale", sizes.SCALES)
def test_shapes_are_neither_needles_nor_pancakes(name, scale, vocab):
    cls, target = get_model(name), dial.target_parameters(scale, vocab)
    config = cls.config_for_scale(scale, vocab, target)
    assert cls.count_parameters(config) == pytest.approx(target, rel=0.03)
    assert 1 / 8 <= config.d_model / (64 * config.n_layers) <= 4


@pytest.mark.parametrize("vocab", [257, 8192, 50304])
@pytest.mark.parametrize("scale", [0.02, 0.05, 0.1, 0.3])
def test_tiny_scales_give_a_model_of_about_the_size(name, scale, vocab):
    target = dial.target_parameters(scale, vocab)
    if vocab == VOCAB and scale < 0.3 and name in ("rwkv7", "zamba2"):  # low-rank parts of 32 and 128 channels at least
        with pytest.raises(ValueError, match="no shape comes near the target"):
            get_model(name).config_for_scale(scale, vocab, target)
        return
    config = get_model(name).config_for_scale(scale, vocab, target)
    assert get_model(name).count_parameters(config) == pytest.approx(target, rel=0.1)


def test_config_rejects_unknown_fields(name):
    with pytest.raises(TypeError, match="no_such_field"):
        get_model(name).Config(no_such_field=1)


# -- numbers -------------------------------------------------------------------------------------------------------------


# rwkv7 scales a block of tokens to the one in its middle, so a later token changes the rounding of earlier ones: about 1e-6.
@pytest.mark.parametrize("name", [name for name in ZOO if name != "rwkv7"])
def test_causality_is_exact(subject):
    numbers.no_token_sees_the_future(subject, tolerance=0)


def test_every_gradient_is_another_than_zero(subject, model):
    for key, gradient in gradients(model, subject.tokens, subject.targets)[1].items():
        assert gradient.abs().max() > 0, key


def test_flops_are_those_counted(subject):
    numbers.flops_are_those_counted(subject, may_leave_out=False)


def test_flops_grow_with_the_length_of_the_sequence(name, model):
    if name in ("spacebyte", "aunet", "hnet"):
        pytest.skip(
            "the room that every row has besides is a smaller share of a longer row; test_counting.py has the formula"
        )
    attention = model.flops_per_token(256) - model.flops_per_token(64)
    assert attention > 0.05 * model.flops_per_token(64), "attention is too small a part here for the count to be a test"


@pytest.mark.nightly  # half a minute each; test_compilation.py compiles blocks, as training does
@pytest.mark.parametrize("name", ZOO)
def test_compiled_equals_eager(subject, model):
    loss, eager = gradients(model, subject.tokens, subject.targets)
    compiled = copy.deepcopy(model)
    with contextlib.closing(_reset_dynamo()):
        again = torch.compile(compiled)(subject.tokens, subject.targets).loss
        again.backward()
    # fp32 sums in another order: some hundred eps of the loss, and of the largest entry of each gradient.
    eps = 200 * torch.finfo(torch.float32).eps
    assert (again - loss).abs() < eps * loss.abs()
    for key, parameter in compiled.named_parameters():
        assert distance(parameter.grad, eager[key]) < eps * max(1e-2, eager[key].abs().max().item()), key


class _reset_dynamo:
    close = staticmethod(torch._dynamo.reset)
