"""Linear layers of three or two values: the values, integer products, straight-through gradients, and every model with them."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.base import get_model, load_models, model_names
from models.bitnet import with_linear
from models.layers.attention import LatentAttention
from models.layers.bit_linear import LEVELS, ROUNDINGS, BitLinear, eight_bits, normed, of_rows, to_bit_linear
from models.layers.quantized import QuantizedLinear
from models.lora import with_lora
from models.quantization import matrix_layers, quantize_matrices
from trainer.inference.reader import why_not_incremental
from trainer.testing import numbers, sizes
from trainer.testing.subject import Subject, gradients, train

load_models()
OURS = [name for name in model_names() if get_model(name).__module__.startswith("models.")]
WITHOUT = ("tokenformer",)  # no linear layer of the role matrix
ROWS = (8, 12)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(kind: str, bias: bool = True) -> BitLinear:
    layer = nn.Linear(96, 20, bias=bias)
    layer.weight.data = drawn(20, 96)
    layer.weight.data[8:] *= 5
    to_bit_linear(layer, kind, ROWS)
    return layer


def subject(name: str, kind: str = "bitnet", **choices) -> Subject:
    return Subject(name, with_linear(get_model(name)), {"linear": kind, **choices})


@pytest.mark.parametrize("kind, values", [("bitnet", 3), ("sign", 2)])
def test_the_values_are_those_of_the_papers(kind, values):
    weight = drawn(20, 96)
    rounded, scales = ROUNDINGS[kind](weight, ROWS)
    for part, found, scale in zip(weight.split(ROWS), rounded.split(ROWS), scales, strict=True):
        assert len(found.unique()) == values
        torch.testing.assert_close(scale, part.abs().mean())
        if kind == "sign":
            assert torch.equal(found, torch.where(part > part.mean(), 1.0, -1.0))
        else:
            assert torch.equal(found, (part / scale).round().clamp(-1, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ROUNDINGS)
def test_the_output_is_an_integer_product_times_scales(kind, dtype):
    layer, x = layer_of(kind, bias=False).to(dtype), drawn(2, 3, 96, seed=1).to(dtype)
    integers, size = eight_bits(normed(x))
    assert integers.dtype == torch.int8 and integers.abs().amax(-1).eq(LEVELS).all()
    rounded, scales = ROUNDINGS[kind](layer.weight, ROWS)
    exact = integers.long() @ rounded.long().t()  # [2, 3, 20], by integers
    # A result in bf16 is rounded before the scales, the scaled one again: 2 of 2^-8. In fp32 both integers are exact.
    expected = exact * (size * of_rows(scales, ROWS))
    tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(layer(x).float(), expected.float(), rtol=tolerance, atol=0)


@pytest.mark.parametrize("kind", ROUNDINGS)
def test_gradients_pass_the_rounding_unchanged(kind):
    """As autograd computes them where what rounding changed is a constant that is added."""
    layer, x = layer_of(kind), drawn(4, 96, seed=1).requires_grad_()
    given = drawn(4, 20, seed=2)
    found = torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), given)
    rounded, scales = ROUNDINGS[kind](layer.weight, ROWS)
    weight = layer.weight + (rounded * of_rows(scales, ROWS)[:, None] - layer.weight).detach()
    inputs = normed(x)
    integers, size = eight_bits(inputs)
    inputs = inputs + (integers * size - inputs).detach()
    expected = torch.autograd.grad(F.linear(inputs, weight, layer.bias), (x, layer.weight, layer.bias), given)
    for one, other in zip(found, expected, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)  # sums of 96 terms in another order


def test_zeros_make_no_nan():
    for kind in ROUNDINGS:
        layer = layer_of(kind)
        nn.init.zeros_(layer.weight)
        out = layer(torch.zeros(2, 96).requires_grad_())
        out.sum().backward()
        assert out.isfinite().all() and layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("name", [name for name in OURS if name not in WITHOUT])
def test_every_model_can_have_them(name):
    """All of its matrices are rounded, all parameters get a gradient, it learns, and it is the same model otherwise."""
    case = subject(name)
    model = case.model
    layers, left = matrix_layers(model)
    assert layers and all(type(layer) is BitLinear for layer, _ in layers.values())
    plain = Subject(name, get_model(name))
    config = {field.name: getattr(plain.model.config, field.name) for field in dataclasses.fields(plain.model.config)}
    assert case.model_class.Config(**config, linear="bitnet") == model.config
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in plain.model.named_parameters()}
    assert model.flops_per_token(16) == plain.model.flops_per_token(16)
    before, found = gradients(model, case.tokens, case.targets)
    reference = gradients(plain.model, case.tokens, case.targets)[1]
    # Where the end of a branch starts at zero, what is before it has no gradient in the first step, with any kind of layer.
    for weight, gradient in found.items():
        assert gradient is not None and gradient.isfinite().all(), weight
        assert gradient.any() or not reference[weight].any(), weight
    assert train(model, case.tokens, case.targets, 4, lr=3e-3)[-1] < before


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(ValueError, match="^linear: no linear layer of this model has the role `matrix`"):
        subject("tokenformer").config_at(0.2)
    with pytest.raises(ValueError, match="^linear must be torch, bitnet or sign, not 'three'"):
        subject("gpt2", "three").config_at(0.2)


@pytest.mark.parametrize("kind, format", [("bitnet", "ternary"), ("sign", "sign")])
def test_packed_it_computes_the_same_to_the_bit(kind, format):
    case = subject("llama", kind)
    model, packed = case.model.eval(), case.model.eval()
    assert quantize_matrices(packed, format) == {}
    assert any(isinstance(module, QuantizedLinear) for module in packed.modules())
    assert torch.equal(model(case.tokens).logits, packed(case.tokens).logits)
    with pytest.raises(ValueError, match=f"trained as {kind} is packed as {format}, not as int8"):
        quantize_matrices(case.model, "int8")


class Runner:
    """What decoding asks of an engine."""

    def __init__(self, model) -> None:
        self.model, self.device, self.precision = model, torch.device("cpu"), "fp32"
        self.autocast = lambda: torch.no_grad()
        self.predict = lambda tokens, cache=None: model(tokens, cache=cache).logits


def test_it_decodes_with_a_cache():
    """Also with latent attention, whose decoding otherwise multiplies by the weight of a layer instead of calling it."""
    for choices in ({}, {"attention": "latent"}):
        case = subject("llama", **choices)
        assert why_not_incremental(Runner(case.model.eval()), 257) == "", choices
    assert any(isinstance(module, LatentAttention) for module in case.model.modules())


def test_under_compilation_it_computes_the_same():
    torch.compiler.reset()
    layer, x = layer_of("bitnet"), drawn(4, 96, seed=1)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found, expected = (one(x.clone().requires_grad_()) for one in (compiled, layer))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    found.sum().backward()
    assert layer.weight.grad.any()


def test_lora_comes_before_or_not_at_all():
    """A class of both exists only so that a config with both is read and refused in one line."""
    fields = {field.name for field in dataclasses.fields(with_lora(with_linear(get_model("gpt2"))).Config)}
    assert {"linear", "lora_rank"} <= fields


@pytest.mark.parametrize(
    "promise",
    ["count", "config as JSON", "roles", "shards", "copies", "causality", "decoding", "bf16", "flops", "recomputation"],
)
def test_the_contract_of_models_holds(promise):
    [check] = [check for check in (*sizes.CHECKS, *numbers.CHECKS) if check.name == promise]
    check.run(subject("hlb"))
