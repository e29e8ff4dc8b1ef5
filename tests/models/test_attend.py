"""Attention kernels against a plain fp64 reference, forward and backward, and the choice among them."""

import gc
import sys
import types
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import (
    SDPBackend,
    _registry,
    current_flash_attention_impl,
    restore_flash_attention_impl,
    sdpa_kernel,
)
from torch.nn.attention.flex_attention import FlexKernelOptions, create_block_mask
from torch.profiler import profile

from models.layers import attend, flex
from models.layers.attend import KERNELS, AttentionMask, choose_kernel, make_attention_mask

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
needs_gpu = [
    pytest.mark.gpu("kernels"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(autouse=True)
def torchs_own_flash_kernel():
    """flash3 replaces it for the whole process."""
    yield
    if current_flash_attention_impl() is not None:
        restore_flash_attention_impl()


def reference(q, k, v, *, scale, window=0, softcap=0.0, attention_bias=None, documents=None):
    """In fp64, one query head at a time, query i of Tq standing at position Tk - Tq + i."""
    n_heads, n_queries, n_keys = q.shape[1], q.shape[2], k.shape[2]
    q, k, v = q.double(), k.double(), v.double()
    position = torch.arange(n_keys, device=q.device)
    away = position[n_keys - n_queries :, None] - position
    visible = (away >= 0) & (away < (window or n_keys))
    if documents is not None:
        visible = visible & (documents[:, :, None] == documents[:, None, :])
    heads = []
    for h in range(n_heads):
        g = h * k.shape[1] // n_heads
        scores = q[:, h] @ k[:, g].transpose(1, 2) * scale
        if softcap:
            scores = (scores / softcap).tanh() * softcap
        if attention_bias is not None:
            scores = (
                scores
                + attention_bias.double()[:, h, n_keys - n_queries :, None]
                - attention_bias.double()[:, h, None, :]
            )
        heads.append(scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v[:, g])
    return torch.stack(heads, dim=1)


def draw(n_queries=37, n_keys=None, heads=4, kv_heads=4, head_dim=16, value_dim=16, device="cpu", batch=2):
    """q, k, v of fp32, with scores of a few units so that a soft-cap of 2 bends them."""
    generator = torch.Generator().manual_seed(7)
    n_keys = n_keys or n_queries
    shapes = (heads, n_queries, head_dim), (kv_heads, n_keys, head_dim), (kv_heads, n_keys, value_dim)
    return [(1.5 * torch.randn(batch, *shape, generator=generator)).to(device) for shape in shapes]


def draw_attention_bias(batch, heads, n_keys, device="cpu"):
    """A running sum of log forget gates."""
    gates = torch.randn(batch, heads, n_keys, generator=torch.Generator().manual_seed(8)) + 2
    return torch.nn.functional.logsigmoid(gates).cumsum(-1).to(device)


def with_gradients(kernel, tensors, **options):
    """The output and the gradients for every tensor (the last may be attention_bias), for one random gradient of the output."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    q, k, v = leaves[:3]
    out = kernel(q, k, v, attention_bias=leaves[3] if len(leaves) > 3 else None, **options)
    towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, towards)]


def run_kernel(name, window=0, documents=None):
    def kernel(q, k, v, **options):
        start = k.shape[2] - q.shape[2]
        return KERNELS[name](
            q, k, v, make_attention_mask(name, start, q.shape[2], window, documents, q.device), **options
        )

    return kernel


def assert_equal(kernel, tensors, *, window=0, documents=None, tolerance=1e-5, **options):
    """tolerance: relative to the largest entry. fp32 rounds to 6e-8, and sums of < 200 terms of size 1 .. 10 add up."""
    expected = with_gradients(reference, tensors, window=window, documents=documents, **options)
    got = with_gradients(run_kernel(kernel, window, documents), tensors, **options)
    for want, have in zip(expected, got, strict=True):
        assert have.shape == want.shape
        assert (have.double() - want).abs().max() <= tolerance * want.abs().max().clamp(min=1)


@pytest.fixture
def flex_trains_on_cpu(monkeypatch):
    """Eager Flex has a backward pass; only this check refuses it."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)


def documents_of(batch, length):
    """Unequal documents, other ones in each row; a number may come again only in another row."""
    return torch.stack([(torch.arange(length) + 3 * row) // (5 + row) for row in range(batch)])


CASES = {
    "plain": {},
    "gqa": {"kv_heads": 2},
    "mqa": {"kv_heads": 1},
    "wider values": {"value_dim": 24, "kv_heads": 2},
    "narrower values": {"value_dim": 8},
    "window": {"window": 5, "kv_heads": 2},
    "window as long as half": {"window": 20},
    "window beyond": {"window": 60},
    "window of one": {"window": 1},
    "documents": {"documents": True, "kv_heads": 2},
    "documents and window": {"documents": True, "window": 4},
    "softcap": {"softcap": 2.0, "kv_heads": 2},
    "softcap and window": {"softcap": 2.0, "window": 7, "value_dim": 24},
    "attention_bias": {"attention_bias": 2, "kv_heads": 2},
    "attention bias of all rows": {"attention_bias": 1},
    "attention bias, softcap and window": {"attention_bias": 2, "softcap": 2.0, "window": 5},
    "attention bias, softcap and documents": {"attention_bias": 1, "softcap": 2.0, "documents": True},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernel", ["torch", "sdpa", "flex"])
def test_kernel_equals_reference(flex_trains_on_cpu, kernel, case):
    sizes = dict(CASES[case])
    options = {"softcap": sizes.pop("softcap", 0.0), "window": sizes.pop("window", 0)}
    if kernel == "sdpa" and options["softcap"]:
        pytest.skip("sdpa has no soft-cap")
    documents = documents_of(2, 37) if sizes.pop("documents", False) else None
    attention_bias_rows = sizes.pop("attention_bias", 0)
    tensors = draw(**sizes)
    if attention_bias_rows:
        tensors.append(draw_attention_bias(attention_bias_rows, 4, 37))
    assert_equal(kernel, tensors, documents=documents, scale=0.3, **options)


@pytest.mark.parametrize("window", [0, 4, 12])
@pytest.mark.parametrize("n_queries", [1, 7])
@pytest.mark.parametrize("kernel", ["torch", "sdpa"])
def test_fewer_queries_than_keys_are_the_last(kernel, n_queries, window):
    """The trap: is_causal aligns a rectangle to the top left, so the first decoded token would see one key."""
    tensors = draw(n_queries, 19, kv_heads=2)
    assert_equal(kernel, tensors, window=window, scale=0.25)
    if kernel == "torch":
        assert_equal(kernel, [*tensors, draw_attention_bias(2, 4, 19)], window=window, scale=0.25, softcap=3.0)


def test_sdpa_refuses_a_rectangle_without_mask_and_a_softcap():
    with pytest.raises(ValueError, match="needs a mask"):
        KERNELS["sdpa"](*draw(3, 9), AttentionMask(), scale=1.0, softcap=0.0, attention_bias=None)
    with pytest.raises(ValueError, match="soft-cap"):
        KERNELS["sdpa"](*draw(9), AttentionMask(), scale=1.0, softcap=30.0, attention_bias=None)


@pytest.mark.parametrize("kernel", ["torch", "sdpa", "flex"])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_gqa_equals_mha_with_tiled_keys_and_values(kernel, kv_heads):
    """Query head h reads head h // (H / G): neighbours share, not every G-th."""
    q, k, v = draw(kv_heads=kv_heads)
    tiled = [x.repeat_interleave(4 // kv_heads, dim=1) for x in (k, v)]
    shared, full = (run_kernel(kernel)(q, *kv, scale=0.25, softcap=0.0, attention_bias=None) for kv in ((k, v), tiled))
    assert (shared - full).abs().max() <= 1e-5  # fp32, outputs below 5


@pytest.mark.parametrize("kernel", ["torch", "sdpa", "flex"])
def test_bf16_has_fp32_statistics(kernel):
    """Products 200 and 202, exact in bf16, become scores 60.0 and 60.6; kept in bf16, steps of 0.25, they err by 2 %."""
    q, k, v = torch.zeros(3, 1, 1, 2, 16).bfloat16()
    q[..., 0], k[..., 0], v[..., 1, :] = 1, torch.tensor([200, 202]), 1
    out = run_kernel(kernel)(q, k, v, scale=0.3, softcap=0.0, attention_bias=None)[0, 0, 1, 0]
    assert out.dtype == torch.bfloat16
    assert abs(out.item() - torch.tensor(0.6).sigmoid().item()) <= 2**-8  # probability and result rounded, 2^-9 each


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"attention_bias": True, "softcap": 3.0}], ids=str)
@pytest.mark.parametrize("kernel", ["torch", "sdpa", "flex"])
def test_bf16_is_within_its_rounding(flex_trains_on_cpu, kernel, options):
    """bf16 rounds to 2^-9: scores of up to 8 move by 2^-6, so probabilities and what follows by 2^-6 of themselves.

    Twice that is allowed (both of q k^T and of the products with v are rounded); bf16 positions would err by 0.1.
    """
    if kernel == "sdpa" and options:
        pytest.skip("sdpa has neither in half precision")
    tensors = [x.bfloat16() for x in draw(kv_heads=2, n_queries=100)]
    if options.get("attention_bias"):
        tensors.append(draw_attention_bias(2, 4, 100) * 20)
    assert_equal(kernel, tensors, tolerance=2**-5, scale=0.25, softcap=options.get("softcap", 0.0))


@pytest.mark.parametrize("kernel", ["torch", "flex"])
def test_softcap_bounds_scores_before_the_mask(flex_trains_on_cpu, kernel):
    """Scores of +-4000 become +-5: of two visible keys the worse one keeps 1 / (1 + e^10), the unseen third nothing.

    Capped after the mask, the unseen key would come in at -5 as well.
    """
    q = torch.tensor([[[[0.0], [200.0], [0.0]]]])
    k = torch.tensor([[[[20.0], [-20.0], [20.0]]]])
    v = torch.tensor([[[[0.0], [1.0], [1e6]]]])
    q, k, v = (torch.nn.functional.pad(x, (0, 15)) for x in (q, k, v))
    out, *gradients = with_gradients(run_kernel(kernel), (q, k, v), scale=1.0, softcap=5.0)
    assert out[0, 0, 1, 0].item() == pytest.approx(torch.tensor(-10.0).sigmoid().item(), rel=1e-4)  # e^10 amplifies
    assert all(gradient.isfinite().all() for gradient in gradients)  # in-place capping breaks the backward pass


def test_softcap_is_the_identity_for_small_scores():
    """tanh(x) = x - x^3 / 3 + ...: with |score| < 10 and a cap of 1e4 it moves by less than 4e-6."""
    tensors = draw()
    capped, plain = (run_kernel("torch")(*tensors, scale=0.25, softcap=cap, attention_bias=None) for cap in (1e4, 0.0))
    assert (capped - plain).abs().max() <= 1e-4


@pytest.mark.parametrize("kernel", ["torch", "sdpa", "flex"])
def test_a_longer_sequence_after_a_short_one(flex_trains_on_cpu, kernel):
    """The trap: a mask kept from the first length seen."""
    for length in (16, 41):
        for window in (0, 9):
            assert_equal(kernel, draw(length), window=window, scale=0.25)


@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("kernel", ["torch", "sdpa", "flex"])
def test_packed_documents_equal_those_run_alone(kernel, window):
    q, k, v = draw(30, batch=1)
    documents = torch.tensor([[0] * 11 + [1] * 1 + [2] * 18])
    options = {"scale": 0.25, "softcap": 0.0, "attention_bias": None}
    packed = run_kernel(kernel, window, documents)(q, k, v, **options)
    for one in (slice(0, 11), slice(11, 12), slice(12, 30)):
        alone = run_kernel(kernel, window)(*(x[:, :, one] for x in (q, k, v)), **options)
        assert (packed[:, :, one] - alone).abs().max() <= 1e-5  # fp32, outputs below 5


@pytest.mark.parametrize("kernel", ["torch", "sdpa"])
def test_a_window_costs_no_square(kernel):
    """4096 tokens, 32 of window: no tensor of more than a tenth of T^2 entries is made, forward or backward."""
    length = 4096
    tensors = draw(length, heads=1, kv_heads=1, head_dim=8, value_dim=8, batch=1)
    with profile(record_shapes=True) as seen:
        with_gradients(run_kernel(kernel, window=32), tensors, scale=0.3, softcap=0.0)
    shapes = [shape for event in seen.events() for shape in event.input_shapes or [] if shape]
    largest = max(torch.Size(shape).numel() for shape in shapes if all(isinstance(n, int) for n in shape))
    assert 0 < largest <= length**2 / 10


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["torch", "sdpa"])
@pytest.mark.parametrize("window", [0, 5])
def test_one_compilation_serves_all_lengths(kernel, window):
    counter = CompileCounterWithBackend("eager")

    @torch.compile(dynamic=True, fullgraph=True, backend=counter)
    def compiled(q, k, v, attention_mask):
        return KERNELS[kernel](q, k, v, attention_mask, scale=0.25, softcap=0.0, attention_bias=None)

    for length in (24, 39):
        tensors = draw(length, kv_heads=2)
        attention_mask = make_attention_mask(kernel, 0, length, window, None, CPU)
        leaves = [x.requires_grad_() for x in tensors]
        out = compiled(*leaves, attention_mask)
        gradients = torch.autograd.grad(out.square().sum(), leaves)
        eager = KERNELS[kernel](*leaves, attention_mask, scale=0.25, softcap=0.0, attention_bias=None)
        assert (out - eager).abs().max() <= 1e-5
        for a, b in zip(gradients, torch.autograd.grad(eager.square().sum(), leaves), strict=True):
            assert (a - b).abs().max() <= 1e-4  # sums of up to 39 products of size 10
    assert counter.frame_count == 1


def test_a_mask_holds_only_what_its_kernel_needs():
    documents = documents_of(2, 40)
    assert make_attention_mask("sdpa", 0, 40, 0, None, CPU) == AttentionMask()
    assert make_attention_mask("sdpa", 30, 1, 0, None, CPU) == AttentionMask()  # a decoded token sees all
    assert make_attention_mask("sdpa", 30, 1, 31, None, CPU) == AttentionMask()
    assert make_attention_mask("sdpa", 0, 40, 8, None, CPU) == AttentionMask(window=8)
    assert make_attention_mask("sdpa", 30, 1, 8, None, CPU).mask.tolist() == [[False] * 23 + [True] * 8]
    assert make_attention_mask("sdpa", 0, 40, 0, documents, CPU).mask.shape == (2, 1, 40, 40)
    assert make_attention_mask("flash", 5, 40, 8, None, CPU) == AttentionMask(window=8)
    for window, given in ((0, None), (8, None), (0, documents), (8, documents)):
        attention_mask = make_attention_mask("flex", 0, 40, window, given, CPU)
        assert attention_mask.window == 0 and attention_mask.mask is None and attention_mask.blocks is not None
    assert (
        make_attention_mask("flex", 0, 40, 8, None, CPU).blocks
        is make_attention_mask("flex", 0, 40, 8, None, CPU).blocks
    )
    assert (
        make_attention_mask("flex", 0, 40, 8, None, CPU).blocks
        is not make_attention_mask("flex", 0, 40, 9, None, CPU).blocks
    )
    with pytest.raises(ValueError, match="attention_kernel flash cannot keep documents apart"):
        make_attention_mask("flash", 0, 40, 0, documents, CPU)
    with pytest.raises(ValueError, match="attention_kernel flex cannot follow cached"):
        make_attention_mask("flex", 4, 40, 0, None, CPU)


@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("n_queries", [5, 23])
def test_flash_is_called_as_it_wants(monkeypatch, n_queries, window):
    """A stand-in with flash-attn's layout and conventions: [B, T, heads, D], window (left, right) beside the token."""

    def flash_attn_func(q, k, v, *, softmax_scale, causal, window_size, softcap, deterministic):
        assert causal and not deterministic and window_size[1] == (0 if window else -1)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        options = {"scale": softmax_scale, "window": window_size[0] + 1, "softcap": softcap}
        return reference(q, k, v, **options).transpose(1, 2).to(v.dtype)

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_func=flash_attn_func))
    tensors = draw(n_queries, 23, kv_heads=2)
    assert_equal("flash", tensors, window=window, scale=0.25, softcap=3.0)
    with pytest.raises(ValueError, match="attention bias"):
        KERNELS["flash"](
            *tensors, AttentionMask(), scale=1.0, softcap=0.0, attention_bias=draw_attention_bias(1, 4, 23)
        )


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize(("kernel", "flags"), [("cudnn", (True, False, False)), ("flash3", (False, True, False))])
def test_the_named_kernel_is_the_only_one_that_torch_may_use(monkeypatch, kernel, flags, kv_heads):
    """For cudnn, keys and values come with as many heads as the queries; flash3 shares them."""
    allowed, plain = [], F.scaled_dot_product_attention

    def watched(q, k, v, *rest, **options):
        cuda = torch.backends.cuda
        allowed.append((cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.math_sdp_enabled()))
        assert k.shape[1] == v.shape[1] == (q.shape[1] if kernel == "cudnn" else kv_heads)
        with sdpa_kernel(SDPBackend.MATH):
            return plain(q, k, v, *rest, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    assert_equal(kernel, draw(23, kv_heads=kv_heads), scale=0.25)
    assert allowed and set(allowed) == {flags}
    for mask, options in ((AttentionMask(window=8), {}), (AttentionMask(), {"softcap": 3.0})):
        with pytest.raises(ValueError, match="plain causal attention only"):
            KERNELS[kernel](*draw(23), mask, scale=0.25, **options)


# -- the choice ------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """A machine that looks like an H100 with Triton, flash-attn 2.8 and flash-attn-3, for the choice alone. torch's registry of
    flash kernels is real, but its FA3 registers nothing."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(attend, "_flash_version", lambda: (2, 8))
    offer_flash3(monkeypatch, lambda: types.SimpleNamespace(remove=lambda: None))
    return monkeypatch


def offer_flash3(monkeypatch, register):
    monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "FA3", register)


def choose(wanted="auto", **changes):
    case = {
        "head_dim": 64,
        "value_dim": 64,
        "softcap": 0.0,
        "attention_bias": False,
        "window": False,
        "documents": False,
    }
    case |= {"cached": False, "length": 1024, "dtype": torch.bfloat16, "device": CUDA}
    return choose_kernel(wanted, **(case | changes))


@pytest.mark.parametrize(
    ("changes", "name", "why"),
    [
        ({}, "sdpa", "plain causal"),
        ({"cached": True}, "sdpa", "plain causal"),
        ({"value_dim": 128}, "sdpa", "plain causal"),
        ({"window": True}, "flash", "no [T, T]"),
        ({"softcap": 30.0}, "flash", "no [T, T]"),
        ({"softcap": 30.0, "dtype": torch.float32}, "flex", "flash: it computes in fp16 and bf16, not float32"),
        ({"window": True, "value_dim": 128}, "flex", "same width"),
        ({"documents": True}, "flex", "flash: it takes no documents"),
        ({"attention_bias": True}, "flex", "flash: it takes no position biases"),
        ({"documents": True, "length": 128}, "sdpa", "flex: fewer than 129 tokens"),
        ({"attention_bias": True, "length": 128}, "torch", "flex: fewer than 129 tokens"),
        ({"attention_bias": True, "head_dim": 512}, "torch", "16 to 256 channels"),
        ({"attention_bias": True, "value_dim": 8}, "torch", "16 to 256 channels"),
        ({"attention_bias": True, "head_dim": 160, "value_dim": 160}, "flex", "no [T, T]"),
        ({"attention_bias": True, "head_dim": 160, "dtype": torch.float32}, "torch", "16 to 128 channels in fp32"),
        ({"attention_bias": True, "value_dim": 128}, "flex", "no [T, T]"),
        ({"attention_bias": True, "head_dim": 128, "value_dim": 256}, "torch", "values wider than queries"),
        ({"softcap": 30.0, "cached": True}, "torch", "decoding"),
        ({"window": True, "cached": True}, "sdpa", "decoding"),
    ],
    ids=str,
)
def test_automatic_choice_on_a_gpu(gpu, changes, name, why):
    chosen, said = choose(**changes)
    assert chosen == name
    assert why in said


def test_automatic_choice_on_a_lesser_gpu(gpu):
    gpu.setattr(attend, "_flash_version", lambda: (2, 5))  # no soft-cap yet
    assert choose(softcap=30.0)[0] == "flex"
    assert "flash-attn >= 2.6" in choose(softcap=30.0)[1]
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose(softcap=30.0)[0] == "torch"
    assert "compute capability 8.0" in choose(window=True)[1]


def test_deterministic_mode_refuses_flex_only_where_gradients_are_added_up(gpu):
    torch.use_deterministic_algorithms(True)
    try:
        assert choose(documents=True)[0] == "flex"
        assert choose(attention_bias=True)[0] == "torch"
        assert "no fixed order" in choose(attention_bias=True)[1]
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("changes", "name", "why"),
    [
        ({}, "sdpa", "plain causal"),
        ({"window": True, "documents": True}, "sdpa", "no kernel that trains on cpu"),
        ({"softcap": 30.0}, "torch", "sdpa: no soft-cap"),
        ({"attention_bias": True}, "torch", "sdpa: no fused kernel takes a bias in fp32"),
    ],
    ids=str,
)
def test_automatic_choice_on_a_cpu(changes, name, why):
    chosen, said = choose(device=CPU, dtype=torch.float32, **changes)
    assert chosen == name
    assert why in said


@pytest.mark.parametrize(
    ("wanted", "changes", "message"),
    [
        ("fused", {}, "attention_kernel must be one of auto, torch, sdpa, cudnn, flex, flash, flash3, not 'fused'"),
        ("sdpa", {"softcap": 30.0}, "attention_kernel sdpa .* no soft-cap; use auto, torch or flex or flash"),
        ("sdpa", {"attention_bias": True}, "must not be half precision; use auto, torch or flex"),
        ("flex", {"device": CPU}, "attention_kernel flex .* trains on cpu; use auto, torch or sdpa"),
        ("cudnn", {"device": CPU}, "it needs CUDA"),
        ("cudnn", {"documents": True}, "plain causal attention only; use auto, torch or sdpa or flex"),
        ("cudnn", {"window": True}, "plain causal attention only"),
        ("cudnn", {"dtype": torch.float32}, "not float32"),
        ("cudnn", {"head_dim": 192, "value_dim": 192}, "at most 128"),
        ("flash", {"device": CPU}, "it needs CUDA"),
        ("flash", {"documents": True}, "it takes no documents; use auto, torch or sdpa or flex"),
        ("flash", {"attention_bias": True}, "forget gates"),
        ("flash", {"dtype": torch.float32}, "not float32"),
        ("flash", {"value_dim": 128}, "same width"),
        ("flash3", {"device": CPU}, "it needs CUDA"),
        ("flash3", {"window": True}, "plain causal attention only; use auto, torch or sdpa or flex or flash"),
        ("flash3", {"dtype": torch.float32}, "not float32"),
        ("flash3", {"value_dim": 128}, "same width"),
    ],
)
def test_a_named_kernel_that_cannot_is_an_error(gpu, wanted, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        choose(wanted, **changes)
    assert "\n" not in str(caught.value)


def test_a_named_kernel_is_used_where_it_can_be(gpu):
    for name in KERNELS:
        assert choose(name) == (name, "asked for")
    assert choose("torch", softcap=30.0, attention_bias=True, documents=True, device=CPU)[0] == "torch"
    assert choose("sdpa", attention_bias=True, dtype=torch.float32)[0] == "sdpa"
    assert choose("flex", length=100) == ("sdpa", "flex: fewer than 129 tokens")
    assert choose("flex", attention_bias=True, cached=True, length=1) == ("torch", "flex: decoding")
    assert choose("flash", cached=True, length=1) == ("sdpa", "flash: decoding")
    assert choose("flash", length=100)[0] == "flash"  # knows no shortest sequence
    assert choose("cudnn", cached=True, length=1) == ("sdpa", "cudnn: decoding")
    assert choose("flash3", cached=True, length=1) == ("sdpa", "flash3: decoding")


def test_flash3_replaces_the_flash_kernel_of_torch_when_it_is_chosen_and_only_then(gpu):
    registered = []
    offer_flash3(gpu, lambda: registered.append(1) or types.SimpleNamespace(remove=lambda: None))
    for name in ("auto", *KERNELS.keys() - {"flash3"}):
        choose(name)
    assert registered == [] and current_flash_attention_impl() is None
    for _ in range(2):  # as in every forward pass
        assert choose("flash3") == ("flash3", "asked for")
    assert registered == [1] and current_flash_attention_impl() == "FA3"


@pytest.mark.parametrize("capability", [(8, 0), (10, 0)])
def test_flash3_is_refused_on_other_gpus(gpu, capability):
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(ValueError, match="attention_kernel flash3 cannot be used: it needs compute capability 9.0"):
        choose("flash3")


def test_flash3_is_refused_without_its_package(gpu):
    gpu.setattr("importlib.util.find_spec", lambda name: None if name == "flash_attn_interface" else name)
    with pytest.raises(ValueError, match="it needs the package flash-attn-3 "):
        choose("flash3")


@pytest.mark.parametrize("error", [ImportError("undefined symbol: X\nmore"), RuntimeError("no backward kernels\nmore")])
def test_flash3_is_refused_where_torch_cannot_load_it(gpu, error):
    def register():
        raise error

    offer_flash3(gpu, register)
    with pytest.raises(
        ValueError, match=r"torch cannot load it \((undefined symbol: X|no backward kernels)\)"
    ) as caught:
        choose("flash3")
    assert "\n" not in str(caught.value) and current_flash_attention_impl() is None


def test_flash3_is_refused_by_a_torch_that_does_not_know_it(gpu):
    gpu.delitem(_registry._FLASH_ATTENTION_IMPLS, "FA3")
    with pytest.raises(ValueError, match="Unknown flash attention impl 'FA3'"):
        choose("flash3")


# -- on a GPU ----------------------------------------------------------------------------------------------------------


GPU_CASES = {
    "plain": {},
    "window": {"window": 100},
    "softcap": {"softcap": 3.0},
    "softcap and window": {"softcap": 3.0, "window": 100},
    "documents": {"documents": True},
    "documents and window": {"documents": True, "window": 50},
    "attention_bias": {"attention_bias": True},
    "attention bias, softcap and wider values": {"attention_bias": True, "softcap": 3.0, "value_dim": 128},
}


@pytest.mark.parametrize("case", GPU_CASES)
@pytest.mark.parametrize("kernel", ["sdpa", "cudnn", "flex", "flash", "flash3"])
def test_fused_kernel_on_a_gpu(kernel, case):
    """Of two lengths, so that both use one compiled kernel if it can have any length."""
    for length in (256, 777):
        check_on_a_gpu(kernel, length, **GPU_CASES[case])


def check_on_a_gpu(kernel, length, documents=False, attention_bias=False, window=0, softcap=0.0, value_dim=64):
    """Against fp64: a fused kernel in bf16 may be as far from it as twice `torch` in bf16, and a little."""
    documents = documents_of(2, length).to(CUDA) if documents else None
    tensors = [x.bfloat16() for x in draw(length, kv_heads=2, head_dim=64, value_dim=value_dim, device=CUDA)]
    case_of = {
        "softcap": softcap,
        "attention_bias": attention_bias,
        "window": bool(window),
        "documents": documents is not None,
    }
    try:
        choose(kernel, value_dim=value_dim, length=length, **case_of)
    except ValueError as refusal:
        pytest.skip(str(refusal))
    if attention_bias:
        tensors.append(draw_attention_bias(2, 4, length, CUDA))
    options = {"scale": 0.125, "softcap": softcap}
    expected = with_gradients(reference, tensors, window=window, documents=documents, **options)
    plain, fused = (
        with_gradients(run_kernel(name, window, documents), tensors, **options) for name in ("torch", kernel)
    )
    for want, a, b in zip(expected, plain, fused, strict=True):
        allowed = 2 * (a.double() - want).abs().max() + 2**-8 * want.abs().max()
        assert (b.double() - want).abs().max() <= allowed, length


test_fused_kernel_on_a_gpu.pytestmark += needs_gpu


# -- options of FlexAttention's kernels ------------------------------------------------------------------------------------------


def test_torch_knows_every_kernel_option():
    """One that it does not know would be ignored in silence."""
    named = {name.removeprefix("fwd_").removeprefix("bwd_") for entry in flex.KERNEL_OPTIONS.values() for name in entry}
    assert named <= set(FlexKernelOptions.__annotations__)


@pytest.mark.parametrize(("dtype", "warps"), [(torch.bfloat16, 8), (torch.float32, 0)])
def test_kernel_options_are_known_when_a_block_is_compiled(monkeypatch, dtype, warps):
    """In one graph, for lengths and heads that the compiler does not know. The GPU's answer is a stand-in that, like the answer
    itself, the compiler cannot trace."""

    def capability(device):
        torch._dynamo.graph_break()
        return 9, 0

    @torch.compile(fullgraph=True, backend="eager", dynamic=True)
    def warps_of(q):
        return q.new_full((), (flex.kernel_options(q, q) or {}).get("fwd_num_warps", 0))

    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    for heads, length in ((4, 256), (6, 777)):
        assert warps_of(torch.ones(2, heads, length, 64, dtype=dtype)) == warps


def test_only_a_gpu_gets_kernel_options(monkeypatch):
    given = []
    monkeypatch.setattr(flex, "flex_attention", lambda *tensors, **options: given.append(options))
    flex.attention(*draw(), scale=1.0)
    assert given == [{"scale": 1.0}]


# -- block masks -----------------------------------------------------------------------------------------------------------------


def assert_same_blocks(made, visible, rows, length):
    """`made` has the blocks of torch's create_block_mask, which looks at every pair of tokens."""
    expected = create_block_mask(visible, rows, None, length, length, device="cpu")
    assert made.seq_lengths == expected.seq_lengths and made.BLOCK_SIZE == expected.BLOCK_SIZE
    names = (f"{full}{side}_{what}" for full in ("", "full_") for side in "kq" for what in ("num_blocks", "indices"))
    for name in (name.replace("k_", "kv_") for name in names):
        assert torch.equal(getattr(made, name), getattr(expected, name)), name


@pytest.mark.parametrize("length", [20, 128, 129, 300, 512])
def test_blocks_are_those_that_see_something(length):
    """Made of block numbers alone, without a [T, T] tensor and without compiling."""
    assert_same_blocks(flex.causal_blocks(length, CPU), lambda batch, head, i, j: j <= i, None, length)
    for window in (1, 100, 128, 129, 200, 1000):
        made = flex.window_blocks(length, window, CPU)
        assert_same_blocks(made, lambda batch, head, i, j, w=window: (j <= i) & (i - j < w), None, length)


@pytest.mark.parametrize("window", [0, 100, 300])
@pytest.mark.parametrize("length", [129, 300, 512])
def test_blocks_of_documents_are_those_that_see_something(length, window):
    draw = torch.Generator().manual_seed(length)
    documents = (torch.rand(3, length, generator=draw) < torch.tensor([[0.0], [0.005], [0.1]])).cumsum(1)

    def visible(batch, head, i, j):
        return (j <= i) & (i - j < (window or length)) & (documents[batch, i] == documents[batch, j])

    assert_same_blocks(flex.document_blocks(documents, window), visible, 3, length)


def test_documents_may_have_numbers_in_any_order():
    """Then some blocks are looked at in vain, but no visible pair is left out, and no other becomes visible."""
    documents = torch.tensor([3, 1, 2, 1]).repeat_interleave(80)[None]  # [1, 320]
    made = flex.document_blocks(documents)
    i = torch.arange(384).clamp(max=319)
    pairs = (documents[0][i] == documents[0][i[:, None]]) & (i <= i[:, None])
    pairs = pairs.unflatten(1, (3, 128)).unflatten(0, (3, 128))  # [3, 128, 3, 128]
    full = torch.zeros(3, 3, dtype=torch.bool)
    for row in range(3):
        full[row, made.full_kv_indices[0, 0, row, : made.full_kv_num_blocks[0, 0, row]].long()] = True
    assert not (pairs.any(3).any(1) & ~made.to_dense()[0, 0].bool()).any()
    assert not (full & ~pairs.all(3).all(1)).any()


# -- masks that are kept -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [flex.causal_blocks, lambda length, device: flex.window_blocks(length, 2, device)])
def test_masks_are_made_once_but_not_all_are_kept(make, monkeypatch):
    """Text may have any number of lengths; what is being recorded keeps its own."""

    class Mask:
        pass

    def mask(*arguments, **options):
        new = Mask()
        made.append(weakref.ref(new))
        return new

    made: list = []
    monkeypatch.setattr(flex, "_block_mask", mask)
    with flex.masks_read() as read:
        first = make(1001, CPU)
    assert make(1001, CPU) is first and len(made) == 1 and read == [first]
    del first
    for length in range(1002, 1002 + flex.MASKS_KEPT + 5):
        make(length, CPU)
    gc.collect()
    assert made[0]() is read[0], "what has been read in a recording stays"
    assert sum(one() is not None for one in made) == flex.MASKS_KEPT + 1
    for maker in (flex.causal_blocks, flex.window_blocks):
        maker.cache_clear()
