"""Packed weights: the levels of each format, products and gradients, and which weights of every model are packed."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.base import get_model, load_models, model_names
from models.layers import quantized
from models.layers.quantized import FORMATS, QuantizedLinear, packed_bytes, quantize_linear
from models.quantization import matrix_bytes, matrix_layers, packable, packed_layers, packed_tensors, quantize_matrices
from trainer.testing.subject import Subject

load_models()
# Quantiles of N(0, 1), from the definition in appendix E of the paper (QLoRA), computed with scipy.
LEVELS = [-1, -0.6961928, -0.5250730, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0]
LEVELS += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229567, 1]
OURS = [name for name in model_names() if get_model(name).__module__.startswith("models.")]


def needs(format: str) -> None:
    if format == "nf4":
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (the extra quantize)")


def packed(format: str, weight: torch.Tensor, rows=None) -> QuantizedLinear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data = weight.clone()
    quantize_linear(layer, format, rows or [len(weight)])
    return layer


def drawn(out: int = 20, width: int = 96) -> torch.Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(0))


def test_nf4_takes_the_nearest_level_of_each_block():
    """Each block is a stretch of 64 weights. Its scale has 8 bits; what the scales are, the block's largest weight tells."""
    needs("nf4")
    weight = drawn()
    found, blocks = packed("nf4", weight).weight.view(-1, 64), weight.view(-1, 64)  # 30 blocks
    scales = found.abs().amax(1, keepdim=True)  # the largest weight is on the level 1 or -1
    levels = torch.tensor(LEVELS) * scales[..., None]
    # The levels were chosen by the scale before its rounding, so the nearest one is tested for scaled weights.
    exact = blocks / blocks.abs().amax(1, keepdim=True) * scales
    nearest = levels.expand(-1, 64, -1).gather(-1, (exact[..., None] - levels).abs().argmin(-1, keepdim=True))[..., 0]
    torch.testing.assert_close(found, nearest, rtol=1e-6, atol=1e-8)
    # The scale of a scale is the largest distance from their mean / 127; half a step is 1/254 of that distance.
    offsets = blocks.abs().amax(1) - blocks.abs().amax(1).mean()
    assert (scales[:, 0] - blocks.abs().amax(1)).abs().max() <= offsets.abs().max() / 254 * (1 + 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out, width", [(64, 64), (20, 96), (96, 32), (7, 34), (1, 130)])
def test_nf4_has_blocks_across_rows(out, width, dtype):
    """Every weight is its level times its block's scale, whatever the width and the CPU: on one with AVX-512 bitsandbytes 0.50 takes
    another block's scale if a row is not a whole number of blocks."""
    needs("nf4")
    tensors = FORMATS["nf4"].pack(drawn(out, width), [out])
    codes = torch.stack([tensors["packed"] >> 4, tensors["packed"] & 15], -1).flatten().long()
    scales = tensors["scales"] * tensors["scales_of_scales"].repeat_interleave(256)[: len(tensors["scales"])]
    scales = (scales + tensors["offset"]).repeat_interleave(64)[: out * width]
    expected = (torch.tensor(LEVELS)[codes] * scales).view(out, width)
    found, _ = FORMATS["nf4"].matrix(tensors, width, [out], dtype)
    # LEVELS have 7 digits; a type's eps is twice the error of rounding to it
    torch.testing.assert_close(found.float(), expected, rtol=1e-6 + torch.finfo(dtype).eps, atol=1e-7)


def test_bitsandbytes_fetches_no_kernel_from_a_hub(tmp_path):
    """On CPUs with bf16 its import asks the package `kernels` for one, if that is installed."""
    needs("nf4")
    (tmp_path / "kernels.py").write_text("raise SystemExit('kernels was imported')")
    code = (
        "import sys; from models.layers.quantized import FORMATS; import torch; FORMATS['nf4'].pack(torch.ones(2, 64), [2]); "
        "assert 'bitsandbytes' in sys.modules and 'kernels' not in sys.modules"
    )
    path = os.pathsep.join([str(tmp_path), os.getcwd()])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_a_frozen_base_in_4_bits_compiles_in_one_piece():
    """Each break of the graph would cost every product of a compiled run."""
    needs("nf4")
    layer, x = packed("nf4", drawn()), drawn(3).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_zeros_and_their_scale_are_exact():
    needs("nf4")
    for format in FORMATS:
        if format != "sign":  # which has no zero
            found = packed(format, torch.zeros(4, 64)).weight
            assert found.abs().max() == 0, format


def test_a_block_of_zeros_among_others_stays_zero():
    needs("nf4")
    weight = drawn(4, 64)
    weight[1] = 0
    assert not packed("nf4", weight).weight[1].any()


def test_an_odd_number_of_columns_is_no_nf4():
    """Named as what stays whole, in a model as in a layer."""
    model = Subject("gpt2", get_model("gpt2")).build()
    layer = model.layers[0].mlp.out
    layer.in_features -= 1
    layer.weight.data = layer.weight.data[:, :-1]
    left = packable(model, "nf4")[1]
    assert left == {"layers.0.mlp.out.weight": f"has {layer.in_features} columns, and nf4 packs two in a byte"}


def test_int8_is_off_by_half_a_step_at_most():
    weight = drawn()
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((packed("int8", weight).weight - weight).abs() <= step * (0.5 + 1e-5)).all()


@pytest.mark.parametrize("format, values", [("ternary", 3), ("sign", 2)])
def test_each_fused_matrix_has_its_own_few_values(format, values):
    weight = drawn()
    weight[8:] *= 10
    parts = packed(format, weight, [8, 12]).weight.split([8, 12])
    for part, whole in zip(parts, weight.split([8, 12]), strict=True):
        assert len(part.unique()) == values
        torch.testing.assert_close(part.abs().max(), whole.abs().mean())
    mean = weight[:8].mean()
    if format == "sign":
        assert torch.equal(parts[0] > 0, weight[:8] > mean)
    else:
        assert torch.equal(parts[0] != 0, (weight[:8] / weight[:8].abs().mean()).abs() > 0.5)


@pytest.mark.parametrize("width", [1, 7, 64])
@pytest.mark.parametrize("bits", [1, 2])
def test_bits_are_packed_for_every_width(bits, width):
    codes = torch.randint(2**bits, (3, width), generator=torch.Generator().manual_seed(0))
    found = quantized.pack_bits(codes, bits)
    assert found.shape == (3, -(-width * bits // 8))
    assert torch.equal(quantized.unpack_bits(found, bits, width).long(), codes)


@pytest.mark.parametrize("format", FORMATS)
def test_a_product_is_that_of_the_unpacked_weight_and_gradients_pass(format):
    needs(format)
    layer, x = packed(format, drawn(), [8, 12]), drawn(5).requires_grad_()
    room = FORMATS[format].room(20, 96, [8, 12])
    assert {name: (tuple(t.shape), t.dtype) for name, t in layer.packed.items()} == room
    assert packed_bytes(format, 20, 96, [8, 12]) == sum(tensor.nbytes for tensor in layer.packed.values())
    out, expected = layer(x), F.linear(x, layer.weight, layer.bias)
    # Scales are multiplied before or after a sum of 96 products: 96 roundings of fp32, relative to the largest terms.
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)
    [gradient], [same] = torch.autograd.grad(out.square().sum(), x), torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(gradient, same, rtol=1e-4, atol=1e-3)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", OURS)
def test_every_model_computes_with_its_packed_weights(name):
    """Packed in int8, it computes what the plain model computes with the unpacked weights; what is not packed is named."""
    case = Subject(name, get_model(name), {})
    plain, model = case.build(), case.build()
    layers, left = matrix_layers(model)
    matrices = set(model.names_by_role()["matrix"])
    assert layers.keys() | left.keys() == matrices and not layers.keys() & left.keys()
    count, size = matrix_bytes(model, "int8")
    assert quantize_matrices(model, "int8") == left
    found = packed_layers(model)
    assert found.keys() == layers.keys()
    assert size == sum(tensor.nbytes for tensor in packed_tensors(model).values())
    assert count == sum(layer.weight.numel() for layer in found.values())
    for weight, layer in found.items():
        plain.get_parameter(weight).data = layer.weight
    logits = [one.eval()(case.tokens).logits for one in (plain, model)]
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-4)
    if name == "tokenformer":
        assert not found and "is no weight of a linear layer, but of Pattention" in next(iter(left.values()))
