"""The decoder of switches: sizes, the block, several predictions, FLOPs.

What every combination must keep is in test_switches.py; initial weights, attention and wrong configurations have files of
their own.
"""

import contextlib
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import beyond
from test_switches import build, distance, stirred
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.base import IGNORE, Hidden, get_model, load_models, model_names
from models.layers.mlp import hidden_width
from models.presets import BlaGpt, BlaGptBest, Gpt2, Llama, Pico, TokenFormer, TransformerPlusPlus
from models.transformer import Transformer
from models.transformer_config import TransformerConfig
from trainer.planning import dial

load_models()
PRESETS = [
    name
    for name in model_names()
    if issubclass(get_model(name), Transformer) and get_model(name).__module__[:7] == "models."
]
VOCAB, B, T = 61, 2, 20

small = functools.partial(
    TransformerConfig, vocab_size=VOCAB, d_model=32, n_layers=3, n_heads=4, hidden_multiple=8, attention_kernel="torch"
)


def draw_tokens(seed, *shape, vocab=VOCAB):
    return torch.randint(vocab, shape or (B, T), generator=torch.Generator().manual_seed(seed))


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "changes", "count"),
    [
        (TransformerPlusPlus, {}, 151_935_744),
        (TransformerPlusPlus, {"hidden_ratio": 0.0}, 123_624_192),
        (Pico, {"d_model": 384, "n_layers": 6, "n_heads": 4, "n_kv_heads": 2}, 9_737_088 + 50304 * 384),
        (TokenFormer, {"pattention_slots": 1024, "pattention_mlp_slots": 1024}, 133.0e6),
        (BlaGpt, {"mlp": "gelu"}, 114.2e6),
        (BlaGpt, {}, 142.5e6),
        (BlaGpt, {"mlp": "maxout"}, 142.5e6),
        (BlaGptBest, {"mlp": "geglu"}, 142.6e6),
    ],
)
def test_parameter_counts_are_the_published(model, changes, count):
    exact = isinstance(count, int)
    assert model.count_parameters(model.Config(**changes)) == pytest.approx(count, rel=0 if exact else 0.0005)


def test_gated_hidden_widths_are_llamas():
    sizes = {768: 2048, 1024: 2816, 2048: 5632, 4096: 11008}
    assert {width: hidden_width("swiglu", width, 256) for width in sizes} == sizes
    assert TransformerConfig(mlp="gelu").hidden == TransformerConfig(hidden_ratio=4.0).hidden == 3072


def test_gated_and_plain_mlps_cost_the_same():
    """Exactly where 8/3 of the width is a multiple of 256."""
    assert Transformer.count_parameters(TransformerConfig()) == Transformer.count_parameters(
        TransformerConfig(mlp="gelu")
    )


@pytest.mark.parametrize("model", [Gpt2, Llama, BlaGpt], ids=lambda model: model.__name__)
@pytest.mark.parametrize(
    "choices",
    [
        {"mlp": "gelu"},
        {"mlp": "maxout"},
        {"n_kv_heads": 1},
        {"d_model": 512},
        {"n_layers": 9},
        {"value_embeddings": 2},
        {"residual": "dynamic_hyper"},
        {"attention": "differential"},
        {"n_predict": 2, "prediction_heads": "transformer"},
        {"qk_norm": False, "attention": "latent", "n_kv_heads": 0, "positions": "rotary"},
    ],
    ids=str,
)
def test_choices_are_kept_and_the_count_meets_the_target(model, choices):
    target = dial.target_parameters(4, 8192)
    config = model.config_for_scale(4, 8192, target, **choices)
    assert {name: getattr(config, name) for name in choices} == choices
    assert model.count_parameters(config) == pytest.approx(target, rel=0.03)


# -- block and residual stream -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"bias": True, "n_kv_heads": 2}, {"mlp": "gelu", "norm": "layer"}], ids=str)
def test_a_parallel_block_is_the_sum_of_its_branches(changes):
    """x + A(N x) + F(N x) from slices of the fused matrices, forward and gradients, in fp64 (the softmax is fp32)."""
    model = stirred(small(block="parallel", **changes)).double()
    block, context = model.layers[0], model.context(draw_tokens(1), None, None)
    x = torch.randn(B, T, 32, dtype=torch.double, generator=torch.Generator().manual_seed(3), requires_grad=True)
    weight = torch.randn(B, T, 32, dtype=torch.double, generator=torch.Generator().manual_seed(4))

    def unfused():
        h = block.norm(x)
        (into_a, into_f), (bias_a, bias_f) = (
            (None, None) if y is None else y.split(block.widths) for y in (block.up.weight, block.up.bias)
        )
        attended, _ = block.heads(F.linear(h, into_a, bias_a), h, None, context, None)
        hidden = F.linear(h, into_f, bias_f)
        gate, *value = hidden.split(model.config.hidden, dim=-1)
        hidden = F.silu(gate) * value[0] if value else F.gelu(gate)
        out_a, out_f = block.out.weight.split([32, model.config.hidden], dim=1)
        return x + F.linear(attended, out_a) + F.linear(hidden, out_f, block.out.bias)

    def results(y):
        return [y.detach(), *torch.autograd.grad((y * weight).sum(), [x, *block.parameters()])]

    for ours, expected in zip(results(block(x, None, context)[0]), results(unfused()), strict=True):
        assert distance(ours, expected) < 1e-6 * max(1, expected.abs().max())


def test_a_parallel_block_has_one_norm_fewer():
    def norms(block):
        return sum("norm" in name for name, _ in build(small(block=block)).layers[0].named_parameters())

    assert (norms("serial"), norms("parallel"), norms("parallel_two_norms")) == (2, 1, 2)


@torch.no_grad()
def test_two_norms_in_parallel_and_norms_after_the_sum():
    for changes, expected in (
        ({"block": "parallel_two_norms"}, lambda b, x, a: x + a(b.attention_norm(x)) + b.mlp(b.mlp_norm(x))),
        ({"norm_placement": "post"}, lambda b, x, a: b.mlp_last((y := b.attention_last(x + a(x))) + b.mlp(y))),
        (
            {"norm_placement": "pre_post"},
            lambda b, x, a: (y := x + b.attention_post(a(b.attention_norm(x)))) + b.mlp_post(b.mlp(b.mlp_norm(y))),
        ),
    ):
        model = stirred(small(**changes))
        context, block = model.context(draw_tokens(1), None, None), model.layers[0]
        x = torch.randn(B, T, 32, generator=torch.Generator().manual_seed(3))
        by_hand = expected(block, x, lambda h: block.attention(h, None, context, None)[0])  # noqa: B023
        assert distance(block(x, None, context)[0], by_hand) < 1e-5
    assert isinstance(stirred(small(norm_placement="post")).norm, torch.nn.Identity)


@torch.no_grad()
def test_skips_and_value_tables_reach_the_layers_they_are_meant_for():
    model = stirred(small(n_layers=5, x0_skip=True, unet_skips=True, value_embeddings=2, kv_shift=True))
    tokens = draw_tokens(1)
    context, x0 = model.context(tokens, None, None), model.embedding(tokens)
    x, outputs = x0, []
    for layer, (block, table) in enumerate(zip(model.layers, (0, 1, None, 0, 1), strict=True)):
        x = model.keep_weights[layer] * x + model.x0_weights[layer] * x0
        if layer >= 3:
            x = x + model.skip_weights[4 - layer] * outputs[4 - layer]
        values = None if table is None else model.value_tables[table](tokens)
        assert (block.attention.heads.value_mix is None) == (table is None)
        x = block(x, values, context)[0]
        outputs.append(x)
    assert distance(model(tokens).logits, model.logits(Hidden(model.norm(x)))) < 1e-4


# -- embedding and head ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_noise_on_embeddings_is_bounded_uniform_and_of_training_alone():
    alpha, length, model = 5.0, 64, build(small(neftune_alpha=5.0, embedding_scale=True))
    tokens, before = draw_tokens(1, 8, 64), model.embedding.weight.clone()
    context, reach = model.context(tokens, None, None), alpha / math.sqrt(length * 32)
    torch.manual_seed(0)
    noise = model.train().embed(tokens, context) - model.eval().embed(tokens, context)
    assert 0.99 * reach < noise.abs().max() < reach + 1e-6
    # Of 16384 draws: the standard deviation is off by sqrt(0.8 / 4 / 16384) = 0.35 %; 4 of them.
    assert noise.std().item() == pytest.approx(reach / math.sqrt(3), rel=0.014)
    assert noise.flatten(1).norm(dim=1).div(alpha).mean().item() == pytest.approx(3**-0.5, rel=0.014)
    plain = build(small(embedding_scale=True))
    assert torch.equal(model(tokens).logits, plain(tokens).logits)
    assert not torch.equal(model.train()(tokens).logits, plain(tokens).logits)
    assert torch.equal(model.embedding.weight, before), "the tied head was disturbed"


@torch.no_grad()
def test_embeddings_are_scaled_by_the_root_of_the_width_and_positions_are_not():
    model, tokens = stirred(small(embedding_scale=True, positions="learned", max_context=T)), draw_tokens(1)
    expected = model.embedding.weight[tokens] * math.sqrt(32) + model.positions.weight
    assert distance(model.embed(tokens, model.context(tokens, None, None)), expected) < 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_padding_of_the_vocabulary_is_never_predicted_and_never_learns(tied):
    padded = stirred(small(unpadded_vocab=50, final_softcap=10.0, z_loss=1e-2, tied=tied))
    tokens, targets = draw_tokens(1, vocab=50), draw_tokens(2, vocab=50)
    logits = padded(tokens).logits
    assert (logits[..., 50:] == -math.inf).all() and logits[..., :50].isfinite().all()
    padded(tokens, targets).loss.backward()
    for weight in {padded.embedding.weight, padded.unembedding()}:
        assert (weight.grad[50:] == 0).all() and weight.grad[:50].abs().max() > 0


# -- several predictions -----------------------------------------------------------------------------------------------


def hidden_states(model, tokens):
    """What every prediction head hands to the loss."""
    return model.states_of_heads(model.hidden(tokens))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "transformer"])
def test_further_heads_are_causal_and_leave_the_first_alone(kind):
    model = stirred(small(n_predict=3, prediction_heads=kind, prediction_weights="1,0.5,0.25"))
    tokens, targets = draw_tokens(1), draw_tokens(2)
    states, changed = hidden_states(model, tokens), tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % VOCAB
    assert len(states) == 3
    for before, after in zip(states, hidden_states(model, changed), strict=True):
        assert torch.equal(before[:, :7], after[:, :7]) and not torch.equal(before[:, 7:], after[:, 7:])

    plain = build(small())
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("further")})
    assert torch.equal(plain(tokens).logits, model(tokens).logits)
    output = model(tokens, targets)
    assert list(output.parts) == ["head_2", "head_3"]
    assert output.loss - sum(output.parts.values()) == pytest.approx(plain(tokens, targets).loss.item(), rel=1e-5)
    for i, factor in ((1, 0.5), (2, 0.25)):
        labels = F.pad(targets[:, i:], (0, i), value=IGNORE).flatten()
        logits = model.logits(Hidden(states[i])).flatten(0, 1)
        expected = factor * F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum") / targets.numel()
        assert output.parts[f"head_{i + 1}"].item() == pytest.approx(expected.item(), rel=1e-5)


@torch.no_grad()
def test_transformer_heads_read_what_the_trunks_last_block_reads():
    """The paper's: one trunk, on which the heads stand side by side, each a block; the first is that of the next token."""
    model, tokens = stirred(small(n_predict=2, prediction_heads="transformer")), draw_tokens(1)
    context, trunk = model.context(tokens, None, None), model.embedding(tokens)
    for block in model.layers[:-1]:
        trunk = block(trunk, None, context)[0]
    states = hidden_states(model, tokens)
    for state, block in zip(states, (model.layers[-1], model.further[0].block), strict=True):
        assert distance(state, model.norm(block(trunk, None, context)[0])) < 1e-5


def test_a_shared_unembedding_keeps_the_tie():
    plain = Transformer.count_parameters(small())
    assert Transformer.count_parameters(small(n_predict=4)) == plain + 3 * 32
    assert Transformer.count_parameters(small(n_predict=4, share_unembedding=False)) == plain + 3 * (32 + VOCAB * 32)
    model = build(small(n_predict=2))
    assert model.tied_embedding() and model.unembedding() is model.embedding.weight


# -- FLOPs, types, compilation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"n_kv_heads": 1},
        {"attention": "latent"},
        {"attention": "latent", "q_rank": 24, "kv_rank": 20},
        {"attention": "differential"},
        {"attention_gate": "channel", "forget_gate": True, "kv_shift": True},
        {"attention_softcap": 5.0, "head_dim": 24},
        {"pattention": "qkv,out,mlp", "pattention_slots": 40},
        {"residual": "static_hyper"},
        {"residual": "dynamic_hyper", "n_streams": 3},
        {"n_predict": 3},
        {"n_predict": 3, "tied": False, "share_unembedding": False},
        {"n_predict": 2, "prediction_heads": "transformer"},
        {"block": "parallel", "mlp": "gelu"},
        {"mlp": "maxout", "tied": False},
        {"value_embeddings": 1, "x0_skip": True, "unet_skips": True, "n_kv_heads": 2},
    ],
    ids=str,
)
def test_declared_flops_are_those_counted(changes):
    model, length = build(small(d_model=64, **changes)), 64
    tokens = draw_tokens(1, 2, length)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, tokens).loss.backward()
    assert counter.get_total_flops() / (2 * length) == pytest.approx(model.flops_per_token(length), rel=0.02)


@torch.no_grad()
@pytest.mark.parametrize("name", PRESETS)
def test_bf16_weights_give_a_loss_near_that_of_fp32(name):
    cls = get_model(name)
    config = cls.config_for_scale(0.2, VOCAB, dial.target_parameters(0.2, VOCAB))
    with torch.device("meta"):
        model = cls(config)
    model.to_empty(device="cpu").init_weights(torch.Generator().manual_seed(0))
    tokens, targets = draw_tokens(1), draw_tokens(2)
    exact = model(tokens, targets).loss
    loss = model.to(torch.bfloat16)(tokens, targets).loss
    # A relative error of 2^-8 in every logit, of size 1 and less here, makes less than that in a loss of ln V.
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=0.01)
    assert model(tokens).logits.isfinite().all()


COMPILED = [
    {},
    {"block": "parallel"},
    {"block": "parallel_two_norms", "n_kv_heads": 2, "qk_norm": True},
    {"norm_placement": "pre_post", "attention": "differential"},
    {"attention": "latent"},
    {"residual": "dynamic_hyper", "kv_shift": True, "forget_gate": True},
]


@pytest.mark.slow
@pytest.mark.parametrize("changes", beyond(COMPILED[1:2], COMPILED), ids=str)
def test_a_compiled_block_equals_eager_at_every_length(changes):
    model = stirred(small(**changes))
    block = model.layers[0]
    with contextlib.closing(_reset_dynamo()):
        compiled = torch.compile(block, dynamic=True, fullgraph=True)
        for length in (T, T + 5, T + 9):
            tokens = draw_tokens(1, B, length)
            context = model.context(tokens, None, None)
            x = model.embed(tokens, context).detach()
            expected, again = block(x, None, context)[0], compiled(x, None, context)[0]
            assert distance(again, expected) < 1e-5 * max(1, expected.abs().max())


class _reset_dynamo:
    close = staticmethod(torch._dynamo.reset)
