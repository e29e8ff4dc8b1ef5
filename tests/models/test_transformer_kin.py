"""Switches that other decoders are made of, against transformers where it has them: OLMo 2, Gemma, Gemma 3, DeepSeek."""

import math

import pytest
import torch
from conftest import text_only_transformers
from test_switches import build
from test_transformer import draw_tokens, small

from models.layers.mlp import ACTIVATIONS
from models.layers.positions import Rotary
from models.transformer import Transformer
from models.transformer_config import TransformerConfig


@pytest.fixture
def transformers(monkeypatch):
    return text_only_transformers(monkeypatch)


@torch.no_grad()
def test_norms_of_what_branches_add_are_those_of_olmo_2(transformers):
    """Without its norms of queries and keys, which are of all heads together."""
    theirs = transformers.Olmo2ForCausalLM(
        transformers.Olmo2Config(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                 num_attention_heads=4, max_position_embeddings=64, pad_token_id=None)
    ).eval()  # fmt: skip
    for layer in theirs.model.layers:
        layer.self_attn.q_norm = layer.self_attn.k_norm = torch.nn.Identity()
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    weights, names = theirs.state_dict(), {"embedding": "embed_tokens", "norm": "norm"}
    config = TransformerConfig(
        vocab_size=61, d_model=32, d_hidden=48, n_layers=2, n_heads=4, norm_placement="branch", tied=False,
        rope_theta=theirs.config.rope_theta, norm_eps=theirs.config.rms_norm_eps,
    )  # fmt: skip
    ours = Transformer(config)
    values = {f"{name}.weight": weights[f"model.{source}.weight"] for name, source in names.items()}
    values["head.weight"] = weights["lm_head.weight"]
    joined = {
        "attention_post": ("post_attention_layernorm",),
        "mlp_post": ("post_feedforward_layernorm",),
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.out": ("self_attn.o_proj",),
        "mlp.up": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.out": ("mlp.down_proj",),
    }
    for layer in range(2):
        for name, sources in joined.items():
            parts = [weights[f"model.layers.{layer}.{source}.weight"] for source in sources]
            values[f"layers.{layer}.{name}.weight"] = torch.cat(parts)
    ours.load_state_dict(values)
    tokens = draw_tokens(1, 2, 24, vocab=61)
    assert (ours(tokens).logits - theirs(tokens).logits).abs().max() < 1e-4


@torch.no_grad()
def test_a_zero_gain_ends_branches_that_have_a_norm_alone_there():
    model = build(small(norm_placement="branch", zero_init=True))
    ends = [block.mlp_post.weight for block in model.layers] + [block.attention_post.weight for block in model.layers]
    assert all((end == 0).all() for end in ends)
    assert all(block.mlp.out.weight.abs().max() > 0 for block in model.layers)


def test_geglu_tanh_is_gemmas(transformers):
    from transformers.models.gemma.modeling_gemma import GemmaMLP

    theirs = GemmaMLP(transformers.GemmaConfig(hidden_size=16, intermediate_size=24, hidden_act="gelu_pytorch_tanh"))
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    up = torch.cat((theirs.gate_proj.weight, theirs.up_proj.weight))
    ours = theirs.down_proj(ACTIVATIONS["geglu_tanh"].apply(x @ up.T))
    torch.testing.assert_close(ours, theirs(x))
    assert (ours - theirs.down_proj(ACTIVATIONS["geglu"].apply(x @ up.T))).abs().max() > 1e-6


def test_layers_with_a_window_turn_by_a_base_of_their_own_without_the_scaling_of_the_others():
    """As Gemma 3: its local layers have base 10,000, its others 1,000,000 and positions divided by 8."""
    scaling = {"rope_scaling": "interpolate", "rope_factor": 8.0, "rope_theta": 1e6}
    model = build(small(n_layers=3, window=8, window_pattern="SSL", rope_local_theta=1e4, **scaling))
    found = [layer.attention.heads.rotary.bits for layer in model.layers]
    width = model.config.head_width
    wide = Rotary(width, 1e6, scaling="interpolate", factor=8.0).bits
    assert torch.equal(found[0], Rotary(width, 1e4).bits) and torch.equal(found[1], found[0])
    assert torch.equal(found[2], wide)


@torch.no_grad()
@pytest.mark.parametrize("strength", [0.707, 1.0])
def test_the_temperature_of_all_scores_is_deepseeks(transformers, strength):
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_get_mscale

    yarn = {"attention": "latent", "rope_scaling": "yarn", "rope_factor": 40.0, "rope_original_context": 16}
    attention, plain = (build(small(**yarn, **m)).layers[0].attention for m in ({"rope_mscale_all_dim": strength}, {}))
    width = attention.head_dim + attention.rope_dim
    assert attention.scale == pytest.approx(width**-0.5 * yarn_get_mscale(40.0, strength) ** 2)
    x, positions = torch.randn(1, 2, 5, attention.rope_dim), torch.arange(5)
    turned, longer = (a.rotary.rotate_query(x, positions) for a in (attention, plain))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(longer, turned * (0.1 * math.log(40.0) + 1))
    assert plain.scale == width**-0.5
