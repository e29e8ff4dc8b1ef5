"""Pattention: attention to learned key and value tokens in the place of a matrix (TokenFormer, arXiv 2410.23168)."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.layers import normal_
from models.layers.pattention import EPS, MODES, Pattention, grown

D_IN, D_OUT, SLOTS = 24, 12, 40
GROWING = ["l2_norm_gelu", "gelu_l2_norm"]


def build(mode="l2_norm_gelu", slots=SLOTS, std=0.3, dtype=torch.float32):
    """As models are built: on the meta device, then filled."""
    with torch.device("meta"):
        layer = Pattention(D_IN, D_OUT, slots, mode)
    layer = layer.to(dtype).to_empty(device="cpu")
    with torch.no_grad():
        layer.tau.fill_(math.nan)
    generator = torch.Generator().manual_seed(0)
    normal_(layer.keys, std, generator)
    normal_(layer.values, std, generator)
    layer.reset()
    return layer


def rows(*shape, dtype=torch.float32):
    return torch.randn(*shape, D_IN, generator=torch.Generator().manual_seed(1)).to(dtype)


def dense(layer, x):
    """The paper's formula in fp64, sum by sum."""
    keys, values = layer.keys.double(), layer.values.double()
    n = keys.shape[0]
    scores = torch.einsum("...i,ni->...n", x.double(), keys)

    def gelu(z):
        return z / 2 * (1 + torch.special.erf(z / math.sqrt(2)))

    def to_length(z):
        return z * math.sqrt(n) / torch.einsum("...n,...n->...", z, z).sqrt().unsqueeze(-1)

    weights = {
        "l2_norm_gelu": lambda: gelu(to_length(scores)),
        "gelu_l2_norm": lambda: to_length(gelu(scores)),
        "softmax": lambda: n * scores.exp() / scores.exp().sum(-1, keepdim=True),
    }[layer.mode]()
    return torch.einsum("...n,no->...o", weights, values)


@pytest.mark.parametrize("mode", MODES)
def test_it_is_the_formula(mode):
    """Exact GELU (tanh's is 1e-4 off), no 1/sqrt(d), tau sqrt(n)."""
    layer, x = build(mode, dtype=torch.float64), rows(2, 5, dtype=torch.float64)
    # tau is sqrt(n) cast to fp64 with the layer; EPS is beside mean squares of 0.3^2 24 / 4 or so.
    assert torch.allclose(layer(x), dense(layer, x), rtol=1e-8, atol=1e-8)
    layer = build(mode)
    assert layer(rows(2, 5)).shape == (2, 5, D_OUT)
    # Sums of 24 and 40 terms in fp32: some ten eps of the largest entry.
    expected = dense(layer, rows(2, 5))
    assert (layer(rows(2, 5)) - expected).abs().max() < 20 * torch.finfo().eps * expected.abs().max()


def test_modes_differ_and_an_unknown_one_is_refused():
    x = rows(3)
    outputs = [build(mode)(x) for mode in MODES]
    assert all((a - b).abs().max() > 0.01 for i, a in enumerate(outputs) for b in outputs[:i])
    with pytest.raises(ValueError, match=r"^mode must be one of l2_norm_gelu, gelu_l2_norm, softmax, not 'relu'$"):
        Pattention(2, 2, 2, "relu")


@pytest.mark.parametrize("factor", [1e-2, 0.5, 3.0, 1e4])
def test_the_scale_of_a_row_does_not_matter(factor):
    layer, x = build(dtype=torch.float64), rows(16, dtype=torch.float64)
    plain, scaled = layer(x), layer(factor * x)
    # EPS shrinks a row of mean square m by EPS / 2 m: m > 0.1 here. Twice that, for gelu's slope of up to 1.13.
    allowed = 2 * EPS / 2 / (0.1 * min(1, factor) ** 2)
    assert ((plain - scaled).abs().max() < allowed * plain.abs().max()).item()
    assert (layer(-x) - plain).abs().max() > 0.1  # the sign does


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_a_row_of_zeros_is_finite_and_so_are_the_gradients(mode, dtype):
    layer, x = build(mode, dtype=dtype), rows(4, dtype=dtype)
    x[1] = 0
    x.requires_grad_()
    out = layer(x)
    out.float().square().sum().backward()
    if mode != "softmax":
        assert torch.equal(out[1], torch.zeros_like(out[1]))
    for tensor in (out, x.grad, layer.keys.grad, layer.values.grad):
        assert tensor.isfinite().all()
    out = layer(torch.zeros_like(x).requires_grad_())
    out.sum().backward()
    assert layer.keys.grad.isfinite().all()


def test_a_row_that_gelu_rounds_to_zero_is_finite():
    layer = build("gelu_l2_norm")
    with torch.no_grad():
        layer.keys.copy_(-layer.keys.abs())
    x = torch.full((1, D_IN), 100.0, requires_grad=True)
    assert torch.equal(torch.nn.functional.gelu(x @ layer.keys.t()), torch.zeros(1, SLOTS))
    layer(x).sum().backward()
    assert x.grad.isfinite().all() and layer.keys.grad.isfinite().all()


@pytest.mark.parametrize("mode", GROWING)
def test_growing_keeps_the_function(mode):
    layer, x = build(mode), rows(2, 5)
    larger = grown(layer, torch.randn(24, D_OUT))
    assert larger.keys.shape == (SLOTS + 24, D_IN) and larger.values.shape == (SLOTS + 24, D_OUT)
    assert torch.equal(larger.tau, layer.tau) and layer.tau.item() == pytest.approx(math.sqrt(SLOTS))
    expected = layer(x)
    assert (larger(x) - expected).abs().max() < 1e-6 * expected.abs().max()
    assert (grown(larger, torch.randn(8, D_OUT))(x) - expected).abs().max() < 1e-6 * expected.abs().max()
    larger.reset()  # tau of its new size: the trap
    assert (larger(x) - expected).abs().max() > 0.01 * expected.abs().max()


@pytest.mark.parametrize("mode", GROWING)
def test_new_slots_learn_and_the_old_layer_is_left_alone(mode):
    layer = build(mode)
    larger = grown(layer, 0.02 * torch.randn(8, D_OUT))
    optimizer = torch.optim.SGD(larger.parameters(), lr=0.1)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    for _ in range(2):
        optimizer.zero_grad()
        (larger(rows(16)) - 1).square().mean().backward()
        optimizer.step()
    assert (larger.keys.grad[SLOTS:].abs() > 0).all() and (larger.values.grad[SLOTS:].abs() > 0).all()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_a_softmax_does_not_grow():
    with pytest.raises(ValueError, match="mode softmax cannot grow"):
        grown(build("softmax"), torch.randn(4, D_OUT))


def test_the_state_dict_keeps_tau():
    larger, x = grown(build(), torch.randn(24, D_OUT)), rows(5)
    other = build(slots=SLOTS + 24)
    assert not torch.equal(other.tau, larger.tau)
    assert larger.state_dict()["tau"].dtype == torch.float32 and larger.state_dict()["tau"].shape == (1,)
    other.load_state_dict(larger.state_dict())
    assert torch.equal(other(x), larger(x))


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_in_bf16_the_norm_of_a_row_is_fp32(how):
    """A factor rounded to bf16 puts all entries of a row off alike, by 2^-8 = 4e-3 at most (2e-3 for these). With a
    factor in fp32 each entry rounds for itself, and most of that averages out over 4096 of them: 1.7e-4 is left."""
    slots = 4096
    layer, x = build(slots=slots, dtype=torch.float32 if how == "autocast" else torch.bfloat16), rows(64).bfloat16()
    scores = x @ layer.keys.bfloat16().t()  # [64, slots]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        weights = layer.weigh(scores, layer.tau)
        assert weights.dtype == layer(x).dtype == torch.bfloat16
    exact = scores.double()
    exact = torch.nn.functional.gelu(exact * math.sqrt(slots) / exact.norm(dim=-1, keepdim=True))
    off = (weights.double() * exact).sum(-1) / exact.square().sum(-1) - 1  # [64]
    assert off.square().mean().sqrt() < 5e-4


def test_training_and_evaluation_compute_the_same():
    layer, x = build(), rows(3, 5)
    assert torch.equal(layer.train()(x), layer.eval()(x))


def test_counts():
    layer, x = build(), rows(7).requires_grad_()
    weights = sum(p.numel() for p in layer.parameters())
    assert weights == SLOTS * (D_IN + D_OUT)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 7 * 6 * weights


@pytest.mark.parametrize("mode", MODES)
def test_compiled_equals_eager(mode):
    """Traced whole, with a length that varies; the slow test of the zoo generates code too."""
    layer, compiled = build(mode), build(mode)
    traced = torch.compile(compiled, dynamic=True, fullgraph=True, backend="aot_eager")
    for length in (3, 5):
        layer(rows(2, length)).square().sum().backward()
        traced(rows(2, length)).square().sum().backward()
    torch._dynamo.reset()
    for expected, got in zip(layer.parameters(), compiled.parameters(), strict=True):
        assert torch.allclose(got.grad, expected.grad, rtol=1e-5, atol=1e-5 * expected.grad.abs().max().item())
