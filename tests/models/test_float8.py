"""fp8 linear layers against nn.Linear: errors within what the formats lose, and nothing else changed.

e4m3 rounds to 3 bits behind the point, a relative error of at most 2^-4; e5m2 to 2 bits, at most 2^-3. Entries that scaling
leaves below the normal numbers have an absolute error instead, at most 2^-10 and 2^-17 where the largest entry is in
[224, 448) and [28672, 57344): the largest times 2^-17 or less in both.
"""

import copy

import pytest
import torch
from torch import nn

from models.layers.float8 import E4M3, E5M2, convert_to_float8, float8_refusal, scale_of

ROUNDING = {E4M3: 2**-4, E5M2: 2**-3}
IN, OUT = 64, 96
inf, nan = float("inf"), float("nan")


def pair(bias=True, dtype=torch.float32):
    """(nn.Linear, the same in fp8)"""
    torch.manual_seed(0)
    plain = nn.Linear(IN, OUT, bias=bias, dtype=dtype)
    fp8 = copy.deepcopy(plain)
    assert convert_to_float8(fp8) == (1, [])
    return plain, fp8


def numbers(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def results(layer, x, gradient, autocast=False):
    """(output, gradients of x, weight and bias)"""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        out = layer(x)
    out.backward(gradient.to(out.dtype))
    return out.detach(), x.grad, layer.weight.grad, None if layer.bias is None else layer.bias.grad


def assert_close(got, a, b, types, rounding=0.0):
    """got: a b^T [m, n] from a [m, k] and b [n, k] in the two fp8 `types`, then rounded with relative error `rounding`.

    Each term a b errs by a relative (1 + r_a) (1 + r_b) - 1 < 1.01 (r_a + r_b) + r_a r_b at most, with 1 % for fp32 sums,
    and by the subnormals' absolute error of one factor times the other. Over all entries errors of random sign add up like
    the terms themselves, so that their relative norm is at most sqrt(r_a^2 + r_b^2); far below r_a / 8 it was not fp8.
    """
    got, a, b = got.double(), a.double(), b.double()
    r_a, r_b = (ROUNDING[dtype] for dtype in types)
    tiny_a, tiny_b = 2**-17 * a.abs().max(), 2**-17 * b.abs().max()
    exact = a @ b.t()
    terms = a.abs() @ b.abs().t()
    most = (1.01 * (r_a + r_b) + r_a * r_b + 2 * rounding) * terms
    most += 2 * (tiny_b * a.abs().sum(1, keepdim=True) + tiny_a * b.abs().sum(1)) + tiny_a * tiny_b * a.shape[1]
    assert ((got - exact).abs() <= most).all()
    error = (got - exact).norm() / exact.norm()
    assert r_a / 8 < error < (r_a**2 + r_b**2 + rounding**2) ** 0.5


BF16 = 2**-8  # half a unit in the last of bf16's 8 bits
COMPUTE = {"fp32": (torch.float32, False), "autocast": (torch.float32, True), "bf16": (torch.bfloat16, False)}


@pytest.mark.parametrize("shape", [(64,), (3, 11)], ids=["64", "33"])
@pytest.mark.parametrize("compute", COMPUTE)
def test_errors_are_those_of_the_formats(compute, shape):
    dtype, autocast = COMPUTE[compute]
    plain, fp8 = pair(dtype=dtype)
    x, gradient = numbers(*shape, IN).to(dtype), numbers(*shape, OUT, seed=2).bfloat16().to(dtype)
    expected, got = results(plain, x, gradient, autocast), results(fp8, x, gradient, autocast)
    assert [t.dtype for t in got] == [t.dtype for t in expected]
    assert [t.shape for t in got] == [t.shape for t in expected]

    out, dx, dweight, dbias = got
    x, gradient, weight = x.reshape(-1, IN), gradient.reshape(-1, OUT), plain.weight.detach()
    rounding = 0.0 if compute == "fp32" else BF16
    ones = x.new_ones(len(x), 1)
    # The bias is added in the output's type: that rounds the sum, which may be larger than the product.
    bias = plain.bias.detach().to(out.dtype)
    assert_close(out.reshape(-1, OUT) - bias, x, weight, (E4M3, E4M3), 4 * rounding)
    assert_close(dx.reshape(-1, IN), gradient, weight.t(), (E5M2, E4M3), rounding)
    assert_close(dweight, gradient.t(), x.t(), (E5M2, E4M3), rounding if dtype == torch.bfloat16 else 0.0)
    assert torch.allclose(dbias.float(), (gradient.float().t() @ ones.float())[:, 0], rtol=2 * BF16, atol=1e-2)


def test_powers_of_two_are_exact():
    """2^-3 to 2^3 are numbers of both formats at any scale, and fp32 holds their products' sums exactly."""
    plain, fp8 = pair()

    def powers(*shape, seed):
        draw = torch.Generator().manual_seed(seed)
        return 2.0 ** torch.randint(-3, 4, shape, generator=draw) * numbers(*shape, seed=seed).sign()

    x, gradient = powers(32, IN, seed=1), powers(32, OUT, seed=2)
    with torch.no_grad():
        for layer in (plain, fp8):
            layer.weight.copy_(powers(OUT, IN, seed=3))
            layer.bias.copy_(powers(OUT, seed=4))
    for got, expected in zip(results(fp8, x, gradient), results(plain, x, gradient), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("factor", [1.0, 1.0 + 2**-23, 2.0 - 2**-22, 1.75, 1.3])
@pytest.mark.parametrize("exponent", [-80, -1, 0, 90])
def test_scale(dtype, factor, exponent):
    most = torch.finfo(dtype).max
    for start in (1.0, most):
        x = torch.tensor([0.1, -1.0]) * start * factor * 2.0**exponent
        scale = scale_of(x, dtype)
        assert scale.dtype == torch.float32 and scale.shape == ()
        assert torch.frexp(scale).mantissa == 0.5
        assert most / 2 <= (x / scale).abs().max() < most
        assert scale_of(x.bfloat16(), dtype) in (scale, 2 * scale)  # it may have been rounded up, past a power of two


def test_magnitudes_do_not_matter():
    """The scale takes up any power of two: even of gradients that would vanish in fp8 (below 2^-16) or overflow."""
    _, fp8 = pair(bias=False)
    x, gradient = numbers(32, IN), numbers(32, OUT, seed=2)
    out, dx, dweight, _ = results(fp8, x, gradient)
    big_out, small_dx, scaled_dweight, _ = results(fp8, x * 2.0**40, gradient * 2.0**-60)
    assert torch.equal(big_out, out * 2.0**40)
    assert torch.equal(small_dx, dx * 2.0**-60)
    assert torch.equal(scaled_dweight, dweight * 2.0**-20)


@pytest.mark.parametrize("shape", [(1,), (7,), (17,), (3, 5), ()])
def test_any_number_of_tokens(shape):
    """Those that fill up to 16 are zeros: bit for bit what the same rows give among rows of zeros."""
    _, fp8 = pair()
    # Small, so that anything but zeros would set the scale.
    x, gradient = numbers(*shape, IN) * 2**-10, numbers(*shape, OUT, seed=2)
    out, dx, dweight, dbias = results(fp8, x, gradient)
    assert out.shape == (*shape, OUT) and dx.shape == x.shape

    rows = x.reshape(-1, IN)
    full, n = -(-len(rows) // 16) * 16, len(rows)
    wide, wide_gradient = torch.zeros(full, IN), torch.zeros(full, OUT)
    wide[:n], wide_gradient[:n] = rows, gradient.reshape(-1, OUT)
    expected = results(fp8, wide, wide_gradient)
    assert torch.equal(out.reshape(-1, OUT), expected[0][:n])
    assert torch.equal(dx.reshape(-1, IN), expected[1][:n])
    assert torch.equal(dweight, expected[2])
    assert torch.allclose(dbias, expected[3], rtol=1e-5, atol=1e-5)  # fp32 sums of 17 terms, in another order


def test_zeros_give_zeros():
    _, fp8 = pair()
    out, _, dweight, _ = results(fp8, torch.zeros(16, IN), numbers(16, OUT))
    assert torch.equal(out, fp8.bias.detach().expand(16, OUT)) and not dweight.any()
    _, dx, dweight, _ = results(fp8, numbers(16, IN), torch.zeros(16, OUT))
    assert torch.equal(dx, torch.zeros(16, IN)) and not dweight.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [inf, -inf, nan])
def test_inf_and_nan_are_not_swallowed(dtype, bad):
    """One is enough, at any place: fp8 could clip it to a number, and the trainer's guard would not see it."""
    _, fp8 = pair(dtype=dtype)
    x, gradient = numbers(32, IN).to(dtype), numbers(32, OUT, seed=2).to(dtype)
    spoilt = gradient.clone()
    spoilt[5, 7] = bad
    out, dx, dweight, dbias = results(fp8, x, spoilt)
    assert out.isfinite().all()
    assert not dx.isfinite().any() and not dweight.isfinite().any() and not dbias[7].isfinite()
    spoilt = x.clone()
    spoilt[5, 7] = bad
    assert not results(fp8, spoilt, gradient)[0].isfinite().any()
    with torch.no_grad():
        fp8.weight[5, 7] = bad
    assert not results(fp8, x, gradient)[0].isfinite().any()


def test_gradients_of_any_layout():
    """Sums give expanded gradients, attention's heads transposed ones."""
    _, fp8 = pair()
    x = numbers(2, 16, IN).transpose(0, 1)
    for gradient in (torch.ones(()).expand(16, 2, OUT), numbers(OUT, 2, 16, seed=2).permute(2, 1, 0)):
        got, expected = results(fp8, x, gradient), results(fp8, x.contiguous(), gradient.contiguous())
        assert all(torch.equal(a, b) for a, b in zip(got[:3], expected[:3], strict=True))
        assert torch.allclose(got[3], expected[3], rtol=1e-5, atol=1e-5)  # fp32 sums of 32 terms, in another order


def test_only_what_needs_a_gradient_gets_one():
    _, fp8 = pair()
    fp8.weight.requires_grad_(False)
    out, dx, dweight, _ = results(fp8, numbers(16, IN), numbers(16, OUT))
    assert dx is not None and dweight is None
    fp8.weight.requires_grad_(True)
    fp8(numbers(16, IN)).sum().backward()
    assert fp8.weight.grad.any()


def test_evaluation_is_the_model_that_is_trained():
    _, fp8 = pair()
    x = numbers(32, IN)
    trained = fp8(x).detach()
    fp8.eval()
    with torch.no_grad():
        assert torch.equal(fp8(x), trained)


def test_kept_for_the_backward_pass():
    """The input in one byte per number, and of the weight nothing but the parameter."""
    _, fp8 = pair()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fp8(numbers(32, IN))
    own = fp8.weight.data_ptr()
    assert any(t.data_ptr() == own for t in kept)
    scales = 2 * 4
    assert sum(t.nbytes for t in kept if t.data_ptr() != own) == 32 * IN + scales


@pytest.mark.parametrize(
    "capability, refused", [((8, 0), True), ((8, 6), True), ((8, 9), False), ((9, 0), False), ((12, 0), False)]
)
def test_which_devices_have_fp8(monkeypatch, capability, refused):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Thing")
    why = float8_refusal(torch.device("cuda", 0))
    assert ("needs 8.9 (Ada, Hopper)" in str(why)) if refused else (why is None)
    assert "CPU" in str(float8_refusal(torch.device("cpu")))


# -- compiled, on a GPU -----------------------------------------------------------------------------------------------


def test_two_layers_of_a_block_are_one_graph_of_any_length():
    """As training compiles blocks. Its inputs are the tokens and the weights: a global float as an input would make the second
    layer fail."""
    block = nn.Sequential(nn.Linear(IN, OUT, bias=False), nn.Linear(OUT, IN, bias=False))
    assert convert_to_float8(block) == (2, [])
    shapes = []

    def eager(graph, inputs):
        shapes.append([tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor)])
        return graph.forward

    compiled = torch.compile(block.forward, backend=eager, fullgraph=True, dynamic=True)
    for n in (32, 48):
        x = numbers(n, IN).requires_grad_()
        compiled(x).sum().backward()
        assert x.grad.isfinite().all()
    assert shapes == [[(32, IN), (OUT, IN), (IN, OUT)]]


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [True])
def test_compiled_layer_is_one_graph_and_gives_the_same_bits(dynamic):
    """Scaling is exact and the cast is rounded alike, so that the products have the same factors."""
    _, fp8 = pair(bias=False)
    torch._dynamo.reset()
    compiled = torch.compile(fp8, fullgraph=True, dynamic=dynamic)
    for autocast in (False, True):
        for n in (32, 21):
            x, gradient = numbers(n, IN), numbers(n, OUT, seed=2).bfloat16()
            expected = results(fp8, x, gradient, autocast)
            fp8.zero_grad()
            again = x.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = compiled(again)
            out.backward(gradient.to(out.dtype))
            for got, plain in zip((out.detach(), again.grad, fp8.weight.grad), expected[:3], strict=True):
                assert torch.equal(got, plain)
    spoilt = numbers(32, IN).requires_grad_()
    compiled(spoilt).backward(torch.full((32, OUT), 0.0).index_fill_(0, torch.tensor([3]), inf))
    assert not spoilt.grad.isfinite().any() and not fp8.weight.grad.isfinite().any()


@pytest.mark.gpu("kernels")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("n", [64, 33])
def test_on_a_gpu(compute, n):
    """As on the CPU; fast accumulation's 14 bits are 2^-14 of a partial sum, far below the factors' errors."""
    if why := float8_refusal(torch.device("cuda")):
        pytest.skip(why)
    dtype, autocast = COMPUTE[compute]
    _, fp8 = pair(bias=False, dtype=dtype)
    fp8.cuda()
    x, gradient = numbers(n, IN).to("cuda", dtype), numbers(n, OUT, seed=2).bfloat16().to("cuda", dtype)
    out, dx, dweight, _ = results(fp8, x, gradient, autocast)
    weight, rounding = fp8.weight.detach(), 0.0 if compute == "fp32" else BF16
    assert_close(out, x, weight, (E4M3, E4M3), rounding)
    assert_close(dx, gradient, weight.t(), (E5M2, E4M3), rounding)
    assert_close(dweight, gradient.t(), x.t(), (E5M2, E4M3), rounding)
    assert dweight.dtype == weight.dtype
    gradient[5, 7] = inf
    _, dx, dweight, _ = results(fp8, x, gradient, autocast)
    assert not dx.isfinite().any() and not dweight.isfinite().any()
