"""Initial weights of the decoder of switches: the loss they give, branches that start at zero, policies by name."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_switches import build, distance
from test_transformer import draw_tokens, small

from models.transformer_config import TransformerConfig


@torch.no_grad()
@pytest.mark.parametrize(("tied", "expected"), [(True, 15.37), (False, 10.97)])
@pytest.mark.parametrize("placement", ["pre", "pre_post"])
def test_initial_loss(tied, expected, placement):
    """Tied, it predicts the present token: its logit is 0.02 sqrt(768) sqrt(768). A loss of ln V is wrongly wired."""
    config = TransformerConfig(
        n_layers=1,
        tied=tied,
        zero_init=True,
        norm_placement=placement,
        d_hidden=64,
        mlp="gelu",
        norm_eps=1e-8,  # BlaGPT's; 1e-5 is 2.5 % of an embedding's variance, and so much smaller is the logit
    )
    model = build(config)
    tokens, targets = draw_tokens(1, 2, 128, vocab=50304), draw_tokens(2, 2, 128, vocab=50304)
    # The mean of 256 targets' logits, of standard deviation 0.02 sqrt(768) each, is within 3 x 0.035 of 0.
    assert model(tokens, targets).loss.item() == pytest.approx(expected, abs=0.1)


PROJECTIONS = ("attention.out.weight", "mlp.out.weight")


@pytest.mark.parametrize(
    ("block", "residual"),
    [("serial", "plain"), ("serial", "static_hyper"), ("parallel", "weighted"), ("parallel_two_norms", "plain")],
)
def test_zero_init_is_the_identity_and_only_the_ends_of_branches_learn(block, residual):
    # With an eps this small it does not matter that the streams of hyper-connections are summed.
    config = small(zero_init=True, tied=False, block=block, residual=residual, norm_eps=1e-8)
    model, tokens = build(config), draw_tokens(1)
    expected = model.head(model.norm(model.embedding(tokens)))
    assert distance(model(tokens).logits, expected) < 1e-5
    model(tokens, draw_tokens(2)).loss.backward()
    for name, parameter in model.named_parameters():
        learns = name.endswith((*PROJECTIONS, "0.out.weight", "1.out.weight", "2.out.weight")) or not name.startswith(
            "layers"
        )
        if "join" not in name:
            assert (parameter.grad.abs().max() > 0) == learns, name


def branch_gradient(model, kinds):
    model(draw_tokens(1), draw_tokens(2)).loss.backward()
    return sum(p.grad.norm() for name, p in model.named_parameters() if name.endswith(kinds)).item()


def test_a_zero_gain_has_a_gradient_of_the_size_of_a_zero_projection():
    """A zero projection under a norm has one 1 / sqrt(eps) as large."""
    ends = ("attention_post.weight", "mlp_post.weight")
    pre = build(small(zero_init=True))
    safe = build(small(zero_init=True, norm_placement="pre_post"))
    assert all((p == 0).all() == name.endswith(ends) for name, p in safe.named_parameters() if "layers" in name)
    tokens = draw_tokens(1)
    assert distance(safe(tokens).logits, F.linear(safe.norm(safe.embedding(tokens)), safe.embedding.weight)) < 1e-6
    usual = branch_gradient(pre, PROJECTIONS)
    assert 0.1 < branch_gradient(safe, ends) / usual < 10
    trap = build(small(norm_placement="pre_post"))
    with torch.no_grad():
        for name, parameter in trap.named_parameters():
            if name.endswith(PROJECTIONS):
                parameter.zero_()
    assert branch_gradient(trap, PROJECTIONS) / usual > 30


EXPECTED_STDS = {  # name of the policy -> (matrix with d inputs, the end of branch `layer` of n, untied head)
    "gpt2": (lambda d: 0.02, lambda d, layer, n: 0.02 / math.sqrt(2 * n), lambda d: 0.02),
    "normal": (lambda d: 0.02, lambda d, layer, n: 0.02, lambda d: 0.02),
    "mitchell": (lambda d: d**-0.5, lambda d, layer, n: (2 * d * (layer + 1)) ** -0.5, lambda d: d**-0.5),
    "width_scaled": (lambda d: d**-0.5, lambda d, layer, n: (2 * d * n) ** -0.5, lambda d: 1 / d),
}


@pytest.mark.parametrize("pattention", ["", "qkv,out,mlp"])
@pytest.mark.parametrize("policy", EXPECTED_STDS)
def test_every_matrix_has_the_standard_deviation_of_its_policy(policy, pattention):
    config = TransformerConfig(
        vocab_size=512, d_model=128, n_layers=2, n_heads=4, mlp="swiglu" if pattention else "gelu", tied=False, init=policy,
        n_predict=2, share_unembedding=False, pattention=pattention, pattention_slots=192 if pattention else 0, attention_gate="channel", forget_gate=True,
    )  # fmt: skip
    plain, end, head = EXPECTED_STDS[policy]
    for name, weight in build(config).named_parameters():
        if weight.ndim < 2:
            continue
        if name == "embedding.weight":
            expected = 128**-0.5 if policy == "mitchell" else 0.02
        elif name == "head.weight" or "unembedding" in name:
            expected = head(128)
        else:
            inputs = weight.shape[0] if name.endswith("values") else weight.shape[1]
            ends = name.endswith((*PROJECTIONS, "attention.out.values", "mlp.values"))
            expected = end(inputs, int(name.split(".")[1]), 2) if ends else plain(inputs)
        if policy == "mitchell":  # OLMo's: cut off at 3 standard deviations, which leaves 0.9866 of it
            assert 2.5 * expected < weight.abs().max() <= 3 * expected, name
            expected *= 0.9866
        # The standard deviation of n draws is off by 1 / sqrt(2 n); 5 of them.
        assert weight.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * weight.numel())), name


@pytest.mark.parametrize(("start", "exponent"), [("plain", 0), ("shrunk", -0.5), ("grown", 0.5)])
def test_the_ends_of_branches_may_start_smaller_or_larger_by_the_root_of_the_streams(start, exponent):
    config = small(d_model=64, residual="static_hyper", n_streams=4, hyper_start=start)
    plain = dict(build(replace(config, hyper_start="plain")).named_parameters())
    for name, weight in build(config).named_parameters():
        expected = plain[name] * 4**exponent if name.endswith(PROJECTIONS) else plain[name]
        torch.testing.assert_close(weight, expected)


def test_keys_and_values_start_as_a_mean_of_two_tokens_with_weights_drawn_evenly():
    """arXiv 2411.19574: alpha_1 from U(0, 1), alpha_2 = 1 - alpha_1."""
    model = build(small(d_model=512, n_heads=128, kv_shift=True, n_layers=1))
    shift = model.layers[0].attention.heads.shift
    own, before = shift.own.detach(), shift.before.detach()
    assert torch.equal(before, 1 - own) and 0 <= own.min() < 0.05 and 0.95 < own.max() <= 1
    # A mean of 256 draws is within 0.018 of 0.5, 4 times.
    assert own.mean().item() == pytest.approx(0.5, abs=0.072)
