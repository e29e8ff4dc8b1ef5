"""hlb against its specification: the block, the position bias and its bf16 emulation, the kernels, the initial loss."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from models.base import Cache
from models.hlb import Hlb, HlbConfig
from models.layers.distance_attention import Reach, attend_dense, attend_flex
from models.layers.flex import causal_blocks
from trainer.planning import dial

SMALL = HlbConfig(vocab_size=101, d_model=64, n_layers=3)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="the compiled Flex kernel trains on CUDA only")


def build(config, seed=0):
    model = Hlb(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def exact_reach(length, device="cpu"):
    t = torch.arange(length, device=device)
    return Reach(t - t[:, None], t <= t[:, None])


def quantised_distances(length):
    reach = Hlb(replace(SMALL, position_bias_quantised=True))._reach(
        torch.zeros(1, length, dtype=torch.long), None, None
    )
    assert reach.distance.dtype == torch.bfloat16
    return reach


# -- sizes and initial state


@pytest.mark.parametrize(
    ("scale", "count"),
    [(1, 46_009_736), (2, 97_678_093), (8, 353_410_969), (32, 1_114_846_120), (148, 3_022_430_842)],
)
def test_parameter_counts(scale, count):
    config = HlbConfig.for_scale(scale, 50304)
    assert (config.d_model, config.n_layers) == dial.dimensions(scale)
    assert Hlb.count_parameters(config) == count
    with torch.device("meta"):
        assert sum(p.numel() for p in Hlb(config).parameters()) == count


@pytest.mark.parametrize("expand", [2, 5])
def test_initial_weights_have_the_stated_deviations(expand):
    config = HlbConfig(vocab_size=2048, d_model=256, n_layers=4, expand_factor=expand)
    model, d = build(config), 256
    for block in model.blocks():
        assert block.expand.weight.std().item() == pytest.approx(0.5 * d**-0.5 / expand, rel=0.02)
        assert block.project.weight.std().item() == pytest.approx(d**-0.5 / expand / 4, rel=0.02)
        assert block.position_bias.item() == 1 and (block.norm.weight == 1).all()
    assert model.embedding.weight.std().item() == pytest.approx(0.25 * d**-0.5, rel=0.02)
    assert model.head.weight.std().item() == pytest.approx(0.5 * d**-0.5, rel=0.02)


@torch.no_grad()
def test_initial_loss_at_scale_1():
    """ln 50304 + 0.5^2 / 2 = 10.951: the final LayerNorm has unit rms, so the logits' deviation is 0.5."""
    model, generator = build(HlbConfig.for_scale(1, 50304)), torch.Generator().manual_seed(1)
    losses = []
    for _ in range(8):
        tokens, targets = torch.randint(50304, (2, 8, 32), generator=generator)
        losses.append(model(tokens, targets).loss.item())
    assert sum(losses) / len(losses) == pytest.approx(10.95, abs=0.02)


def test_embedding_gradient_can_be_divided_by_the_counts():
    """The original's `scale_grad_by_freq`, which a trainer may switch on."""
    model, tokens = build(SMALL), torch.tensor([[1, 2, 2, 3, 2, 3]])
    model(tokens, tokens).loss.backward()
    plain = model.embedding.weight.grad.clone()
    model.zero_grad()
    model.embedding.scale_grad_by_freq = True
    model(tokens, tokens).loss.backward()
    counts = torch.bincount(tokens[0], minlength=101).clamp(min=1)
    assert torch.allclose(model.embedding.weight.grad, plain / counts[:, None], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_divisor": 65}, r"qk_divisor must be at most d_model \(64\), not 65"),
        ({"expand_factor": 0}, "expand_factor must be at least 1"),
        ({"norm_eps": 0.0}, "norm_eps must be above 0"),
        ({"attention_kernel": "fused"}, "attention_kernel must be auto, flex or torch"),
        ({"attention_kernel": "flex", "position_bias_quantised": True}, "attention_kernel must be auto or torch"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


def test_no_local_channels_and_narrow_queries_still_count_right():
    config = replace(SMALL, expand_factor=1, qk_divisor=16)
    assert sum(p.numel() for p in Hlb(config).parameters()) == Hlb.count_parameters(config)


# -- the block


@torch.no_grad()
def test_block_equals_a_step_by_step_reference_in_fp64():
    model = build(SMALL).double()
    block, d, d_qk = model.blocks()[1], 64, 8
    block.position_bias.fill_(0.3)
    x = torch.randn(2, 10, d, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    h = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    rows = (h @ block.expand.weight.t()).unbind(-1)
    query, key = torch.stack(rows[:d_qk], -1), torch.stack(rows[d_qk : 2 * d_qk], -1)
    linear = torch.stack(rows[2 * d_qk : 2 * d_qk + 2 * d], -1)
    gate = torch.stack(rows[2 * d_qk + 2 * d :], -1)
    u = linear * gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    attended = torch.zeros_like(x)
    for i in range(10):
        products = torch.stack([(query[:, i] * key[:, j]).sum(-1) for j in range(i + 1)])  # [i + 1, B]
        scores = products / math.sqrt(d_qk) + math.log(1 + math.exp(0.3)) * torch.arange(-i, 1)[:, None]
        weights = scores.exp() / scores.exp().sum(0)
        attended[:, i] = sum(weights[j, :, None] * u[:, j, d:] for j in range(i + 1))
    expected = x + torch.cat((u[..., :d], attended), -1) @ block.project.weight.t()
    assert (block(x, exact_reach(10)) - expected).abs().max() < 1e-6  # softmax statistics are fp32


def test_bias_gradient_reaches_m():
    model = build(SMALL)
    tokens = torch.randint(101, (2, 12), generator=torch.Generator().manual_seed(3))
    model(tokens, tokens).loss.backward()
    for block in model.blocks():
        m, gradient = block.position_bias, block.position_bias.grad.item()
        losses = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                m += step
                losses.append(model.double()(tokens, tokens).loss.item())
                model.float()
                m -= step
        assert gradient == pytest.approx((losses[0] - losses[1]) / 2e-2, rel=0.02, abs=1e-7)


@torch.no_grad()
def test_without_slope_the_order_of_the_context_is_unknown():
    block = build(SMALL).blocks()[0]
    block.position_bias.fill_(-60.0)
    x = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(4))
    shuffled = torch.cat((x[:, torch.randperm(15, generator=torch.Generator().manual_seed(5))], x[:, 15:]), 1)
    last = block(x, exact_reach(16))[:, -1]
    assert (block(shuffled, exact_reach(16))[:, -1] - last).abs().max() < 1e-6
    block.position_bias.fill_(1.0)
    assert (block(shuffled, exact_reach(16))[:, -1] - block(x, exact_reach(16))[:, -1]).abs().max() > 1e-4


# -- the position bias


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_is_exact_in_every_precision(dtype):
    """Zero scores, one-hot values: the output is softmax(M), rows of a geometric series."""
    length, slope = 768, torch.tensor([0.02])
    zeros, one_hot = torch.zeros(1, length, 8, dtype=dtype), torch.eye(length, dtype=dtype)[None]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        weights = attend_dense(zeros, zeros, one_hot, slope, exact_reach(length))[0].double()
    ratio = math.exp(-slope.item())
    for i in (0, 1, 5, 300, 767):
        series = ratio ** torch.arange(i, -1, -1, dtype=torch.float64) * (1 - ratio) / (1 - ratio ** (i + 1))
        rounding = 2**-8 if dtype == torch.bfloat16 else 1e-5  # of the weights themselves, once
        assert torch.allclose(weights[i, : i + 1], series, rtol=rounding, atol=0)
        assert (weights[i, i + 1 :] == 0).all()


def test_distances_are_integers_that_no_wrapper_rounds():
    reach = Hlb(SMALL)._reach(torch.zeros(1, 1500, dtype=torch.long), None, None)
    assert not reach.distance.is_floating_point()
    assert torch.equal(reach.distance[1:, 1:], reach.distance[:-1, :-1])  # Toeplitz
    assert reach.distance[1499, 0] == -1499 and reach.distance[7, 6] == -1


def test_quantised_bias_repeats_the_original_at_32():
    previous = quantised_distances(32).distance.diagonal(-1).tolist()
    assert {value: previous.count(value) for value in set(previous)} == {0: 23, -4: 8}


@pytest.mark.parametrize("length", [32, 64, 128, 256, 512, 1024])
def test_quantised_bias_is_wrong_as_often_as_the_original(length):
    """22 to 24 % of the distances are right up to 512 tokens, 31 % at 1024, and none is wrong by more than 4."""
    distance, visible = quantised_distances(length)
    error = (distance.float() - exact_reach(length).distance)[visible]
    right = (error == 0).float().mean().item()
    assert round(right, 2) == 0.31 if length == 1024 else 0.215 < right < 0.245
    assert error.abs().max() <= 4


@torch.no_grad()
def test_quantised_slope_is_bf16():
    """softplus(1) = 1.3132617 becomes 1.3125."""
    zeros, one_hot = torch.zeros(1, 8, 8), torch.eye(8)[None]
    slope = F.softplus(torch.ones(1))
    _, visible = exact_reach(8)
    weights = attend_dense(zeros, zeros, one_hot, slope, Reach(exact_reach(8).distance.bfloat16(), visible))[0]
    assert (weights[7, 7] / weights[7, 6]).log().item() == pytest.approx(1.3125, abs=1e-5)
    weights = attend_dense(zeros, zeros, one_hot, slope, exact_reach(8))[0]
    assert (weights[7, 7] / weights[7, 6]).log().item() == pytest.approx(1.3132617, abs=1e-5)


@torch.no_grad()
def test_quantised_decoding_equals_the_full_forward():
    model = build(replace(SMALL, position_bias_quantised=True))
    tokens, cache = torch.randint(101, (1, 40), generator=torch.Generator().manual_seed(6)), Cache()
    parts = [model(part, cache=cache).logits for part in tokens.split([30] + [1] * 10, dim=1)]
    assert (torch.cat(parts, 1) - model(tokens).logits).abs().max() < 1e-5
    assert model.max_context == 1024


# -- the kernels


def output_and_gradients(attend, inputs, where):
    """[output, gradients of q, k, v and slope]"""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = attend(*inputs, where)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out))
    return [x.float() for x in (out.detach(), *(x.grad for x in inputs))]


def sizes(results):
    """What to hold errors against: the largest entry; for the slope, a sum of both signs, its deviation if random."""
    *largest, _ = (max(1.0, x.abs().max().item()) for x in results)
    return [*largest, results[0].numel() ** 0.5]


def random_inputs(batch, length, d_qk, d_v, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(8)
    widths = (d_qk, d_qk, d_v)
    qkv = [torch.randn(batch, length, w, generator=generator).to(device=device, dtype=dtype) for w in widths]
    return *qkv, torch.tensor([0.7], device=device)


@pytest.fixture
def flex_trains_on_cpu(monkeypatch):
    """Eager FlexAttention computes its backward on a CPU quite well, and refuses to only by this check."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("length", "d_qk", "d_v"), [(20, 8, 64), (150, 40, 320), (256, 48, 384)])
def test_flex_equals_dense(flex_trains_on_cpu, length, d_qk, d_v):
    """Odd lengths, queries padded from 8, values in chunks and the last of them padded (320 = 128 + 128 + 64)."""
    inputs, mask = random_inputs(2, length, d_qk, d_v), causal_blocks(length, torch.device("cpu"))
    dense = output_and_gradients(attend_dense, inputs, exact_reach(length))
    flex = output_and_gradients(attend_flex, inputs, mask)
    for a, b, size in zip(dense, flex, sizes(dense), strict=True):
        assert (a - b).abs().max() < 1e-5 * size


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_flex_model_equals_dense_model_with_documents():
    dense, flex = (build(replace(SMALL, attention_kernel=kernel)) for kernel in ("torch", "flex"))
    tokens = torch.randint(101, (2, 40), generator=torch.Generator().manual_seed(7))
    documents = (torch.arange(40) >= torch.tensor([[13], [29]])).long()
    for given in (None, documents):
        assert (dense(tokens, documents=given).logits - flex(tokens, documents=given).logits).abs().max() < 1e-5


def test_mask_made_while_evaluating_serves_in_training():
    causal_blocks.cache_clear()
    with torch.inference_mode():
        mask = causal_blocks(20, torch.device("cpu"))
    assert not mask.kv_indices.is_inference()


def test_kernels_are_described():
    assert Hlb(SMALL).describe_kernels() == "attention: torch (flex: it has no kernel that trains on cpu)"
    assert "torch (asked for)" in Hlb(replace(SMALL, attention_kernel="torch")).describe_kernels()
    assert "quantised" in Hlb(replace(SMALL, position_bias_quantised=True)).describe_kernels()
    with pytest.raises(ValueError, match="attention_kernel flex cannot be used: .* on cpu; use auto or torch"):
        Hlb(replace(SMALL, attention_kernel="flex")).describe_kernels()


@pytest.mark.gpu("kernels")
@needs_cuda
@pytest.mark.parametrize("d_model", [384, 2752])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_flex_equals_dense(d_model, dtype):
    """Both against dense in fp32: flex may be as far from it as twice dense in `dtype`, and a little."""
    inputs = random_inputs(2, 512, d_model // 8, d_model, dtype, "cuda")
    reach, mask = exact_reach(512, "cuda"), causal_blocks(512, torch.device("cuda"))
    reference = output_and_gradients(attend_dense, [x.float() for x in inputs], reach)
    dense, flex = output_and_gradients(attend_dense, inputs, reach), output_and_gradients(attend_flex, inputs, mask)
    little = 1e-2 if dtype == torch.bfloat16 else 1e-4
    for expected, a, b, size in zip(reference, dense, flex, sizes(reference), strict=True):
        assert (b - expected).abs().max() <= 2 * (a - expected).abs().max() + little * size


@pytest.mark.gpu("kernels")
@needs_cuda
def test_flex_trains_at_the_lengths_of_a_run():
    """Growing lengths, batches of other sizes, evaluation between them, documents: the kernel adapts to each."""
    config = HlbConfig(vocab_size=101, d_model=128, n_layers=2)
    fused, dense = (build(replace(config, attention_kernel=kernel)).cuda() for kernel in ("flex", "torch"))
    for length in (256, 512, 1024):
        tokens = torch.randint(101, (2048 // length, length), device="cuda")
        documents = (torch.arange(length, device="cuda") > length // 3).long().expand_as(tokens)
        for given in (None, documents):
            losses = [model(tokens, tokens, documents=given).loss for model in (fused, dense)]
            for model, loss in zip((fused, dense), losses, strict=True):
                model.zero_grad()
                loss.backward()
            assert (losses[0] - losses[1]).abs() < 1e-4
            for a, b in zip(fused.parameters(), dense.parameters(), strict=True):
                assert (a.grad - b.grad).abs().max() < 1e-3 * b.grad.abs().max() + 1e-7
            with torch.inference_mode():
                assert (fused(tokens[:1]).logits - dense(tokens[:1]).logits).abs().max() < 1e-3
