"""Norms: their definitions, fp32 inside whatever goes in, and the norm behind a branch that starts at zero."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.layers.norms import NORMS, DyT, LayerNorm, RMSNorm, make_norm, set_gain

WIDTH = 64
BF16_EPS = 2**-8  # the largest relative error of one rounding to bf16


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(norm):
    """The same norm with random parameters near those it starts with."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return norm


def exact(norm, x):
    """What the norm is by definition, in fp64."""
    x = x.double()
    if isinstance(norm, DyT):
        y = torch.tanh(norm.alpha.double() * x)
    else:
        if isinstance(norm, nn.LayerNorm):
            x = x - x.mean(-1, keepdim=True)
        y = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    y = y * norm.weight.double()
    bias = getattr(norm, "bias", None)
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", NORMS)
def test_definition(kind, bias):
    norm = randomised(make_norm(kind, WIDTH, 1e-3, bias))
    x = 0.1 * randn(3, 5, WIDTH) + 0.2  # mean square 0.05, so that eps counts
    # Sums of 64 numbers and a handful of operations on numbers below 5.
    torch.testing.assert_close(norm(x).double(), exact(norm, x), rtol=0, atol=1e-5)
    assert all(p.ndim == 1 for p in norm.parameters())


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"^norm must be layer, rms or dyt, not 'batch'$"):
        make_norm("batch", WIDTH, 1e-5)


def test_rms_norm_does_not_see_the_scale_and_layer_norm_is_it_without_a_mean():
    x = randn(4, WIDTH)
    rms, layer = make_norm("rms", WIDTH, 1e-12), make_norm("layer", WIDTH, 1e-12)
    torch.testing.assert_close(rms(1000 * x), rms(x), rtol=1e-6, atol=1e-6)
    centred = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(rms(centred), layer(centred), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", NORMS)
def test_set_gain_fills_everything(kind, bias, value):
    with torch.device("meta"):
        norm = make_norm(kind, WIDTH, 1e-5, bias)
    norm.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.fill_(float("nan"))
    set_gain(norm, value)
    for name, parameter in norm.named_parameters():
        assert (parameter == {"weight": value, "bias": 0.0, "alpha": 0.5}[name]).all()
        assert parameter.requires_grad and parameter.grad_fn is None


@pytest.mark.parametrize("norm", [RMSNorm(WIDTH, 1e-5), DyT(WIDTH), DyT(WIDTH, bias=False)], ids=repr)
def test_reset_gives_what_construction_gave(norm):
    expected = copy.deepcopy(norm.state_dict())
    randomised(norm).reset()
    for name, value in norm.state_dict().items():
        assert torch.equal(value, expected[name])


# -- precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("setting", ["bf16 weights", "autocast of fp32", "autocast of bf16"])
def test_statistics_are_fp32(kind, setting):
    """Rows of 4096 numbers around 100: in bf16 their variance or their mean square would be off by far more."""
    norm = make_norm(kind, 4096, 1e-5)
    x = randn(8, 4096) + (0 if kind == "dyt" else 100)
    if setting == "bf16 weights":
        norm = norm.to(torch.bfloat16)
    if setting != "autocast of fp32":
        x = x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=setting.startswith("autocast")):
        y = norm(x)
    assert y.dtype == x.dtype
    expected = exact(norm, x)
    # One rounding, of the normed x: to multiply by 1 and to add 0 is exact. fp32 statistics add 1e-4 at most: the mean of
    # 4096 numbers of 100, each with an error of 2^-24, in a row whose deviation is 1.
    roundings = 0 if x.dtype == torch.float32 else 1
    error = (y.double() - expected).abs()
    assert (error <= roundings * BF16_EPS * expected.abs() + 1e-4).all(), error.max()


@pytest.mark.parametrize(("norm", "function"), [(RMSNorm(WIDTH, 1e-5), "rms_norm"), (LayerNorm(WIDTH), "layer_norm")])
def test_a_norm_leaves_autocast(norm, function, monkeypatch):
    """On a GPU autocast would compute it from an fp32 copy of x; a CPU's does not, so only the state can be seen here."""
    original, states = getattr(F, function), []

    def watched(*args, **options):
        states.append(torch.is_autocast_enabled("cpu"))
        return original(*args, **options)

    monkeypatch.setattr(F, function, watched)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(randn(8, WIDTH).bfloat16()).dtype == torch.bfloat16
        assert torch.is_autocast_enabled("cpu")
    assert states == [False]


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_is_torchs(bias):
    """Bit for bit where x and the weights have one dtype; otherwise the weights take that of x."""
    ours, theirs = randomised(LayerNorm(WIDTH, bias=bias)), nn.LayerNorm(WIDTH, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    x = randn(8, WIDTH)
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours(x.bfloat16()), theirs.bfloat16()(x.bfloat16()))


def test_rms_norm_rounds_before_the_gain_not_after():
    """Llama's order, which its checkpoints were trained with: normed to bf16, then the product in bf16."""
    norm, x = randomised(RMSNorm(WIDTH, 1e-5)), randn(16, WIDTH).bfloat16()
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).bfloat16()
    expected = normed * norm.weight.bfloat16()
    # Two ways to sum in fp32 may fall on two sides of a tie of bf16, now and then.
    assert (norm(x) != expected).float().mean() < 0.01


@pytest.mark.parametrize("kind", NORMS)
def test_gradients_are_those_of_the_definition(kind):
    norm, x = randomised(make_norm(kind, WIDTH, 1e-5)), randn(8, WIDTH).requires_grad_()
    weights = randn(8, WIDTH, seed=1)
    inputs = [x, *norm.parameters()]
    ours = torch.autograd.grad((norm(x) * weights).sum(), inputs)
    theirs = torch.autograd.grad((exact(norm, x) * weights.double()).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# -- a norm behind a branch: x + norm(W_out f(x)) ------------------------------------------------------------------------


class Branch(nn.Module):
    """x + norm(W_out gelu(W_in x)), without a norm where `kind` is None."""

    def __init__(self, kind, eps, gain, zero_projection):
        super().__init__()
        self.inner, self.out = (nn.Parameter(randn(WIDTH, WIDTH, seed=s) / WIDTH**0.5) for s in (1, 2))
        if zero_projection:
            nn.init.zeros_(self.out)
        self.norm = make_norm(kind, WIDTH, eps) if kind else nn.Identity()
        if kind:
            set_gain(self.norm, gain)

    def forward(self, x):
        return x + self.norm(F.gelu(x @ self.inner) @ self.out)


def branch_gradients(*args):
    """Norm of the gradient of each parameter, for one and the same loss."""
    branch, x = Branch(*args), randn(32, WIDTH, seed=3)
    y = branch(x)
    assert torch.equal(y, x), "the branch is no identity at initialisation"
    F.mse_loss(y, randn(32, WIDTH, seed=4), reduction="sum").div(32).backward()
    return {name: parameter.grad.norm().item() for name, parameter in branch.named_parameters()}


@pytest.mark.parametrize("eps", [1e-8, 1e-5])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_zero_projection_under_a_norm_blows_its_gradient_up(kind, eps):
    """The trap that the zero gain is for: the slope of a norm at 0 is 1 / sqrt(eps)."""
    plain = branch_gradients(None, eps, 1.0, True)["out"]
    trapped = branch_gradients(kind, eps, 1.0, True)["out"]
    # LayerNorm takes the mean out of the gradient, one direction of 64, and so a little off its length.
    assert trapped / plain == pytest.approx(eps**-0.5, rel=0.05 if kind == "layer" else 1e-4)


@pytest.mark.parametrize("kind", NORMS)
def test_a_zero_gain_is_the_identity_with_sane_gradients(kind):
    plain = branch_gradients(None, 1e-8, 1.0, True)["out"]
    safe = branch_gradients(kind, 1e-8, 0.0, False)
    # A gain has 1/64 of the projection's entries: of the same loss it gets an eighth of the length or so, never thousands.
    assert 0.02 < safe["norm.weight"] / plain < 2
    assert max(safe.values()) / plain < 2
    other = branch_gradients(kind, 1e-5, 0.0, False)
    assert other["norm.weight"] == pytest.approx(safe["norm.weight"], rel=1e-3), "eps should not matter"


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_post_norm_makes_the_gain_the_size_of_the_branch(kind):
    branch, x = Branch(kind, 1e-8, 0.3, False), randn(32, WIDTH, seed=3)
    rms = (branch(x) - x).square().mean(-1).sqrt()
    torch.testing.assert_close(rms, torch.full((32,), 0.3), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", NORMS)
def test_a_zero_gain_learns(kind):
    branch, x, target = Branch(kind, 1e-6, 0.0, False), randn(32, WIDTH, seed=3), randn(32, WIDTH, seed=4)
    before = branch.out.detach().clone()
    optimizer = torch.optim.SGD(branch.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        loss = F.mse_loss(branch(x), target, reduction="sum") / 32
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert not torch.equal(branch.out, before)
