"""Rotary positions: their definition, every way to a longer context, and angles that are never in half precision."""

import copy
import math

import pytest
import torch
from conftest import text_only_transformers
from torch.utils._python_dispatch import TorchDispatchMode

from models.layers.positions import SCALINGS, Rotary, alibi_slopes, to_half_split, to_interleaved

D = 16
KINDS = {
    "none": {},
    "partial": {"fraction": 0.25},
    "interpolate": {"scaling": "interpolate", "factor": 4.0},
    "ntk": {"scaling": "ntk", "factor": 4.0},
    "yarn": {"scaling": "yarn", "factor": 4.0, "original_context": 64},
    "llama3": {"scaling": "llama3", "factor": 4.0, "original_context": 64},
    "xpos": {"scaling": "xpos", "original_context": 128},
}
every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def turned_frequencies(rotary, pairs, dtype=torch.float64):
    """Radians per token of each pair, read off the rotation of (1, 0) by one token."""
    q = torch.zeros(1, 1, 1, 2 * pairs, dtype=dtype)
    q[..., :pairs] = 1
    turned = rotary.rotate_query(q, torch.tensor([1]))[0, 0, 0]
    return torch.atan2(turned[pairs:], turned[:pairs])


# -- definition --------------------------------------------------------------------------------------------------------


def test_a_pair_turns_by_position_times_frequency():
    x = randn(1, 1, 1, D, dtype=torch.float64)
    position, theta = 37, 500.0
    expected = torch.empty(D, dtype=torch.float64)
    for i in range(D // 2):
        angle = position * theta ** (-2 * i / D)
        a, b = x[0, 0, 0, i], x[0, 0, 0, i + D // 2]
        expected[i] = a * math.cos(angle) - b * math.sin(angle)
        expected[i + D // 2] = b * math.cos(angle) + a * math.sin(angle)
    for rotate in (Rotary(D, theta).rotate_query, Rotary(D, theta).rotate_key):
        # The frequencies are fp32: 2^-24 of an angle of 37.
        torch.testing.assert_close(rotate(x, torch.tensor([position]))[0, 0, 0], expected, rtol=0, atol=1e-5)


@every_kind
def test_scores_depend_on_the_distance_alone(options):
    rotary = Rotary(D, **options)
    q, k = randn(1, 3, 1, D, dtype=torch.float64), randn(1, 3, 1, D, seed=1, dtype=torch.float64)

    def scores(m, n):
        return (rotary.rotate_query(q, torch.tensor([m])) * rotary.rotate_key(k, torch.tensor([n]))).sum(-1)

    for distance in (0, 1, 7, 100):
        for n in (1, 50, 1000):
            torch.testing.assert_close(scores(n + distance, n), scores(distance, 0), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(scores(7, 0), scores(6, 0), rtol=1e-3)


@every_kind
def test_shape_and_type_stay(options):
    rotary = Rotary(D, **options)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = randn(2, 3, 5, D, dtype=dtype)
        for rotate in (rotary.rotate_query, rotary.rotate_key):
            y = rotate(x, torch.arange(5))
            assert y.shape == x.shape and y.dtype == dtype


def test_a_part_of_the_channels_turns_and_the_rest_is_left_alone():
    x = randn(2, 3, 5, D)
    turned = Rotary(D, fraction=0.25).rotate_query(x, torch.arange(5))
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert torch.equal(turned[..., :4], Rotary(4).rotate_query(x[..., :4], torch.arange(5)))
    assert not torch.equal(turned[..., :4], x[..., :4])


@every_kind
def test_positions_may_restart_in_every_row(options):
    rotary, x = Rotary(D, **options), randn(2, 3, 6, D)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 0, 1, 2, 3, 4]])
    for rotate in (rotary.rotate_query, rotary.rotate_key):
        packed = rotate(x, positions)
        torch.testing.assert_close(packed[0, :, 3:], rotate(x[:1, :, 3:], torch.arange(3))[0])
        torch.testing.assert_close(packed[1, :, 1:], rotate(x[1:, :, 1:], torch.arange(5))[0])
        torch.testing.assert_close(packed[:1], rotate(x[:1], positions[0]))


@every_kind
def test_decoding_one_token_at_a_time_gives_the_same_keys(options):
    """xPos with a centre in the middle of what has been seen so far would not."""
    rotary, x = Rotary(D, **options), randn(1, 2, 9, D)
    whole = rotary.rotate_key(x, torch.arange(9))
    for t in range(9):
        key = rotary.rotate_key(x[:, :, t : t + 1], torch.tensor([t]))
        # Equal but for the last bit: a CPU's exp2 of one number is not its exp2 of eight.
        torch.testing.assert_close(key, whole[:, :, t : t + 1], rtol=1e-6, atol=1e-7)


@every_kind
def test_gradients(options):
    rotary, x = Rotary(D, **options), randn(1, 2, 3, D, dtype=torch.float64).requires_grad_()
    positions = torch.tensor([0, 5, 90])
    assert torch.autograd.gradcheck(lambda x: rotary.rotate_key(rotary.rotate_query(x, positions), positions), x)


# -- longer contexts ---------------------------------------------------------------------------------------------------


def test_interpolation_is_the_plain_rotation_at_a_fraction_of_the_position():
    x, positions = randn(2, 3, 20, D), torch.arange(20)
    longer = Rotary(D, scaling="interpolate", factor=8.0)
    torch.testing.assert_close(longer.rotate_query(x, 8 * positions), Rotary(D).rotate_query(x, positions))


def test_ntk_keeps_the_fastest_pair_and_slows_the_slowest_by_the_factor():
    for factor, theta in ((2.0, 20221.3), (4.0, 40889.9), (8.0, 82684.6)):
        plain, ntk = (turned_frequencies(r, 64) for r in (Rotary(128), Rotary(128, scaling="ntk", factor=factor)))
        assert ntk[0] == plain[0]
        assert ntk[-1].item() == pytest.approx(plain[-1].item() / factor, rel=1e-6)
        # theta^(-126/128) is the slowest; the constants have six digits.
        assert ntk[-1].item() ** (-128 / 126) == pytest.approx(theta, rel=2e-6)


def test_yarn_keeps_fast_pairs_and_interpolates_slow_ones():
    context, factor = 2048, 8.0
    plain = turned_frequencies(Rotary(128), 64)
    yarn = turned_frequencies(Rotary(128, scaling="yarn", factor=factor, original_context=context), 64)
    turns = plain * context / (2 * math.pi)
    # The ramp's ends are rounded to whole pairs, away from each other.
    kept, slowed = turns > 32 * 1.2, turns < 1 / 1.2
    torch.testing.assert_close(yarn[kept], plain[kept], rtol=1e-6, atol=0)
    torch.testing.assert_close(yarn[slowed], plain[slowed] / factor, rtol=1e-6, atol=0)
    between = (yarn / plain)[~kept & ~slowed]
    assert (between.diff() <= 1e-6).all() and between[0] > 0.9 and between[-1] < 0.2


def test_yarn_lengthens_queries_and_keys_by_its_temperature():
    x, rotary = randn(1, 1, 1, D), Rotary(D, scaling="yarn", factor=8.0, original_context=64)
    for rotate in (rotary.rotate_query, rotary.rotate_key):
        ratio = rotate(x, torch.tensor([9])).norm() / x.norm()
        assert ratio.item() == pytest.approx(0.1 * math.log(8) + 1, rel=1e-5)


def test_xpos_is_its_definition_and_its_centre_does_not_matter():
    q, k = randn(1, 1, 1, D, dtype=torch.float64), randn(1, 1, 1, D, seed=1, dtype=torch.float64)
    m, n = torch.tensor([700]), torch.tensor([100])
    plain, half = Rotary(D), D // 2
    zeta = (2 * torch.arange(half, dtype=torch.float64) + 0.4 * D) / (1.4 * D)
    products = (plain.rotate_query(q, m) * plain.rotate_key(k, n)).flatten()
    expected = ((products[:half] + products[half:]) * zeta ** ((700 - 100) / 512)).sum()
    for context in (0, 128, 2000):
        rotary = Rotary(D, scaling="xpos", original_context=context)
        score = (rotary.rotate_query(q, m) * rotary.rotate_key(k, n)).sum()
        torch.testing.assert_close(score, expected, rtol=1e-6, atol=1e-6)
        centre = torch.tensor([context // 2])
        assert torch.equal(rotary.rotate_query(q, centre), plain.rotate_query(q, centre))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_xpos_holds_far_from_its_centre(dtype):
    rotary, x = Rotary(D, scaling="xpos"), torch.ones(1, 1, 1, D, dtype=dtype)
    q, k = (rotate(x, torch.tensor([35_000])) for rotate in (rotary.rotate_query, rotary.rotate_key))
    # Both at one place: 16 products of 1, each of two numbers rounded to the type, fp32 exponents up to 124 before that.
    assert (q.double() * k.double()).sum().item() == pytest.approx(D, rel=2e-2 if dtype == torch.bfloat16 else 1e-4)


# -- precision ---------------------------------------------------------------------------------------------------------


@every_kind
def test_bf16_at_position_4096_is_near_fp32(options):
    """Positions in bf16, 16 apart there, would be off by whole radians."""
    rotary, x = Rotary(D, **options), randn(1, 2, 9, D, dtype=torch.bfloat16)
    positions = torch.arange(4092, 4101)
    for rotate in (rotary.rotate_query, rotary.rotate_key):
        half, whole = rotate(x, positions), rotate(x.float(), positions)
        assert torch.equal(half, whole.bfloat16()), "all but the last rounding is to be in fp32"
        # One rounding, 2^-8 of the number; of the longest number, for the pairs that cancel.
        assert (half.float() - whole).abs().max() < 1e-2 * whole.abs().max()


@pytest.mark.parametrize("position", [257, 4097, 100_001])
def test_neighbours_far_out_have_angles_of_their_own(position):
    """Above 256 bf16 gives neighbouring tokens one angle; fp32 errs by 2^-24 of it."""
    q = randn(1, 1, 1, D, dtype=torch.bfloat16).expand(1, 1, 2, D)
    at = torch.tensor([position, position + 1])
    turned = Rotary(D).rotate_query(q, at)
    assert (turned[:, :, 0] - turned[:, :, 1]).abs().max() > 0.1
    exact = Rotary(D).rotate_query(q.double(), at)
    assert (turned.double() - exact).abs().max() < 2**-8 * exact.abs().max() + position * 2**-22


class HalfPrecision(TorchDispatchMode):
    """Collects the operators that take or give a half-precision tensor."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in (*args, result):
            if isinstance(x, torch.Tensor) and x.dtype in (torch.bfloat16, torch.float16):
                self.seen.add(function.overloadpacket)
        return result


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_casts_of_the_model_leave_angles_in_fp32(options, dtype):
    rotary, x, positions = Rotary(D, **options), randn(1, 2, 4, D, dtype=dtype), torch.arange(500, 504)
    expected = rotary.rotate_query(x, positions)
    cast = copy.deepcopy(rotary).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), HalfPrecision() as watched:
        again = cast.rotate_query(x, positions)
    assert torch.equal(again, expected)
    aten = torch.ops.aten
    assert not watched.seen & {aten.cos, aten.sin, aten.exp2}
    if dtype == torch.float32:
        assert not watched.seen


@pytest.mark.gpu("kernels")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_kind
def test_a_gpu_under_autocast_agrees_with_the_cpu(options):
    rotary, x, positions = Rotary(D, **options), randn(1, 2, 4, D, dtype=torch.bfloat16), torch.arange(4096, 4100)
    expected = rotary.rotate_key(x, positions).float()
    with torch.autocast("cuda", torch.bfloat16):
        ours = rotary.cuda().rotate_key(x.cuda(), positions.cuda()).cpu().float()
    assert (ours - expected).abs().max() < 1e-2 * expected.abs().max()


# -- being a module ----------------------------------------------------------------------------------------------------


@every_kind
def test_built_on_the_meta_device_and_reset_it_is_the_same(options):
    with torch.device("meta"):
        rotary = Rotary(D, **options)
    rotary.to_empty(device="cpu")
    rotary.bits.zero_()
    rotary.reset()
    assert torch.equal(rotary.bits, Rotary(D, **options).bits)
    assert not list(rotary.parameters()) and not rotary.state_dict()


@every_kind
def test_one_graph_serves_every_length(options):
    rotary, graphs = Rotary(D, **options), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def both(x, positions):
        return rotary.rotate_query(x, positions) @ rotary.rotate_key(x, positions).transpose(-1, -2)

    compiled = torch.compile(both, backend=backend, dynamic=True, fullgraph=True)
    try:
        for length in (4, 7, 19):
            x, positions = randn(2, 3, length, D), torch.arange(length)
            assert torch.equal(compiled(x, positions), both(x, positions))
    finally:
        torch._dynamo.reset()
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"theta": 1.0}, "rope_theta"),
        ({"theta": math.nan}, "rope_theta"),
        ({"fraction": 0.0}, "rope_fraction"),
        ({"fraction": 1.5}, "rope_fraction"),
        ({"fraction": 0.3}, "rope_fraction"),
        ({"fraction": 3 / 16}, "rope_fraction"),
        ({"scaling": "dynamic"}, "rope_scaling must be none, interpolate, ntk, yarn, llama3 or xpos, not 'dynamic'"),
        ({"scaling": "ntk", "fraction": 0.125}, "rope_scaling"),
        ({"scaling": "interpolate", "factor": 0.5}, "rope_factor"),
        ({"scaling": "interpolate", "factor": math.inf}, "rope_factor"),
        ({"factor": 2.0}, "rope_factor"),
        ({"scaling": "xpos", "factor": 2.0}, "rope_factor"),
        ({"scaling": "yarn", "factor": 2.0}, "rope_original_context"),
        ({"scaling": "llama3", "factor": 2.0}, "rope_original_context"),
        (
            {"scaling": "llama3", "original_context": 8, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
            "rope_low_freq_factor must be above 0 and below rope_high_freq_factor",
        ),
        ({"scaling": "xpos", "original_context": -1}, "rope_original_context"),
        ({"scaling": "ntk", "factor": 2.0, "original_context": 64}, "rope_original_context"),
    ],
    ids=str,
)
def test_impossible_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        Rotary(D, **options)
    assert "\n" not in str(error.value)


def test_every_scaling_is_tested():
    assert {options.get("scaling", "none") for options in KINDS.values()} == set(SCALINGS)


# -- Hugging Face and foreign layouts ----------------------------------------------------------------------------------


def llama(monkeypatch, width, context, scaling=None):
    """(q, positions) -> q turned by Hugging Face's Llama."""
    transformers = text_only_transformers(monkeypatch)
    from transformers.models.llama import modeling_llama

    config = transformers.LlamaConfig(
        hidden_size=2 * width, num_attention_heads=2, max_position_embeddings=context, rope_scaling=scaling
    )
    embedding = modeling_llama.LlamaRotaryEmbedding(config)

    def rotate(q, positions):
        cos, sin = embedding(q, positions[None])
        return modeling_llama.apply_rotary_pos_emb(q, q, cos, sin)[0]

    return rotate


@pytest.mark.parametrize("width", [64, 128])
def test_plain_rotation_is_that_of_hugging_face(monkeypatch, width):
    q, positions = randn(1, 2, 128, width), torch.arange(128)
    theirs = llama(monkeypatch, width, 128)(q, positions)
    torch.testing.assert_close(
        Rotary(width).rotate_query(q, positions), theirs, rtol=0, atol=1e-5 * q.abs().max().item()
    )


@pytest.mark.parametrize(("factor", "context"), [(4.0, 128), (16.0, 2048), (2.0, 32)])
@pytest.mark.parametrize("width", [64, 128])
def test_yarn_is_that_of_hugging_face(monkeypatch, width, factor, context):
    options = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": context}
    q, positions = randn(1, 2, 128, width), torch.arange(128)
    theirs = llama(monkeypatch, width, int(context * factor), options)(q, positions)
    ours = Rotary(width, scaling="yarn", factor=factor, original_context=context).rotate_query(q, positions)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize(("factor", "context", "low", "high"), [(8.0, 8192, 1.0, 4.0), (32.0, 128, 0.5, 6.0)])
def test_llama3_is_that_of_hugging_face(monkeypatch, factor, context, low, high):
    bands = {"low_freq_factor": low, "high_freq_factor": high}
    options = {"rope_type": "llama3", "factor": factor, "original_max_position_embeddings": context, **bands}
    q, positions = randn(1, 2, 128, 64), torch.arange(128) * 100
    theirs = llama(monkeypatch, 64, int(context * factor), options)(q, positions)
    ours = Rotary(64, scaling="llama3", factor=factor, original_context=context, **bands).rotate_query(q, positions)
    # Angles up to 12,700 in fp32, of frequencies that differ by 2^-24 of themselves.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3 * theirs.abs().max().item())


def interleaved_rotation(x, positions):
    """The pairs (2i, 2i + 1) as complex numbers, as in Meta's and Mistral's code; x [B, H, T, D] of fp64."""
    width = x.shape[-1]
    frequencies = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = positions[:, None] * frequencies  # [T, D/2]
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def test_permuted_weights_give_the_scores_of_the_other_layout():
    n_heads, width, positions = 3, 8, torch.arange(10)
    x = randn(2, 10, 20, dtype=torch.float64)
    weights = [randn(n_heads * width, 20, seed=seed, dtype=torch.float64) for seed in (1, 2)]
    biases = [randn(n_heads * width, seed=seed, dtype=torch.float64) for seed in (3, 4)]

    def heads(weight, bias):
        return (x @ weight.T + bias).unflatten(-1, (n_heads, width)).transpose(1, 2)

    theirs = [interleaved_rotation(heads(w, b), positions) for w, b in zip(weights, biases, strict=True)]
    split = [heads(to_half_split(w, n_heads), to_half_split(b, n_heads)) for w, b in zip(weights, biases, strict=True)]
    ours = [Rotary(width).rotate_query(split[0], positions), Rotary(width).rotate_key(split[1], positions)]
    # Our frequencies are fp32: 2^-24 of angles up to 9, in scores up to a few hundred.
    torch.testing.assert_close(ours[0] @ ours[1].mT, theirs[0] @ theirs[1].mT, rtol=1e-5, atol=1e-3)
    unpermuted = Rotary(width).rotate_query(heads(weights[0], biases[0]), positions)
    assert not torch.allclose(unpermuted @ ours[1].mT, theirs[0] @ theirs[1].mT, atol=1.0)


def test_layouts_are_each_others_inverse():
    weight = torch.arange(16)
    assert to_half_split(weight, 2).tolist() == [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]
    assert torch.equal(to_interleaved(to_half_split(weight, 2), 2), weight)


# -- ALiBi -------------------------------------------------------------------------------------------------------------


def test_alibi_slopes():
    assert alibi_slopes(8) == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert alibi_slopes(1) == [2**-8]
    assert alibi_slopes(6) == pytest.approx([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])
    twelve = [2 ** -(i + 1) for i in range(8)] + [2 ** -(i + 0.5) for i in range(4)]
    assert alibi_slopes(12) == pytest.approx(twelve)
    for n_heads in range(1, 70):
        slopes = alibi_slopes(n_heads)
        assert len(set(slopes)) == n_heads and all(0 < slope < 1 for slope in slopes)
