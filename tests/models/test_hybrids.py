"""Zamba2, Rene and LFM2: transformers' logits where it has them, the order of their layers, and the traps of BlaGPT's versions."""

import copy
import math

import pytest
import torch
from conftest import text_only_transformers

from models.base import get_model, load_models
from models.hugging_face import family_of
from models.hugging_face_mamba import NO_BOUND, zamba2_config, zamba2_converted, zamba2_fields, zamba2_weights
from models.lfm2 import Lfm2, Lfm2Config
from models.rene import Rene, ReneConfig
from models.zamba2 import Zamba2, Zamba2Config

load_models()
ZAMBA = {"vocab_size": 64, "d_model": 32, "n_layers": 6, "hybrid_every": 2, "attention_head_dim": 16, "state_size": 16,
         "ssm_head_dim": 16, "adapter_rank": 4}  # fmt: skip
RENE = {"vocab_size": 64, "d_model": 32, "n_layers": 12, "attention_head_dim": 8, "state_size": 16, "ssm_head_dim": 16,
        "window": 8}  # fmt: skip
LFM = {
    "vocab_size": 64,
    "d_model": 32,
    "n_layers": 6,
    "attention_head_dim": 8,
    "attention_kv_heads": 2,
    "hidden_ratio": 2.0,
}
TOKENS = torch.randint(64, (3, 70), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def transformers(monkeypatch):
    return text_only_transformers(monkeypatch)


def model_of(cls, config):
    model = cls(config)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.eval()


def disturbed(model):
    """No weight stays zero or one."""
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    return model.eval()


@torch.no_grad()
def assert_same_logits(ours, theirs):
    expected = theirs(TOKENS).logits
    assert (ours(TOKENS).logits - expected).abs().max() < 1e-4 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("adapter", [False, True])
def test_zamba2_is_that_of_transformers(transformers, adapter):
    """Layers 1, 3 and 5 use the blocks A, B, A."""
    theirs = disturbed(
        transformers.Zamba2ForCausalLM(
            transformers.Zamba2Config(
                vocab_size=64, hidden_size=32, num_hidden_layers=6, layers_block_type=["mamba", "hybrid"] * 3,
                mamba_d_state=16, mamba_d_conv=4, mamba_expand=2, mamba_ngroups=1, n_mamba_heads=4, mamba_headdim=16,
                intermediate_size=128, num_attention_heads=4, num_key_value_heads=4, num_mem_blocks=2, adapter_rank=4,
                use_shared_attention_adapter=adapter, use_mem_rope=adapter, pad_token_id=0, hidden_act="gelu",
                time_step_min=NO_BOUND,
            )
        )
    )  # fmt: skip
    for name, value in theirs.state_dict().items():
        if adapter and "adapter_list" in name and name.endswith(".0.weight"):  # as in ours, the same for all three
            value.copy_(theirs.state_dict()[name.replace("linear_k", "linear_q").replace("linear_v", "linear_q")])
    config = zamba2_config(theirs.config)
    assert config == Zamba2Config(**ZAMBA, attention_adapter=adapter, rope_theta=10000.0 * adapter)
    ours = model_of(Zamba2, config)
    ours.load_state_dict(dict(zamba2_weights(ours, theirs.state_dict())))
    assert_same_logits(ours, theirs)


@torch.no_grad()
def test_lfm2_is_that_of_transformers(transformers):
    kinds = ["conv", "conv", "full_attention"] * 2
    theirs = disturbed(
        transformers.Lfm2ForCausalLM(
            transformers.Lfm2Config(
                vocab_size=64, hidden_size=32, num_hidden_layers=6, layer_types=kinds, num_attention_heads=4,
                num_key_value_heads=2, intermediate_size=64, block_auto_adjust_ff_dim=False, conv_bias=False, conv_L_cache=3,
                norm_eps=1e-5, rope_theta=1e6, tie_word_embeddings=True, pad_token_id=0,
            )
        )
    )  # fmt: skip
    ours, weights = model_of(Lfm2, Lfm2Config(**LFM)), theirs.state_dict()
    values = {
        "embedding.weight": weights["model.embed_tokens.weight"],
        "norm.weight": weights["model.embedding_norm.weight"],
    }
    for i, kind in enumerate(kinds):
        source, to = f"model.layers.{i}.", f"layers.{i}."
        values[f"{to}mixer_norm.weight"] = weights[f"{source}operator_norm.weight"]
        values[f"{to}mlp_norm.weight"] = weights[f"{source}ffn_norm.weight"]
        values[f"{to}up.weight"] = torch.cat([weights[f"{source}feed_forward.w{n}.weight"] for n in (1, 3)])
        values[f"{to}down.weight"] = weights[f"{source}feed_forward.w2.weight"]
        if kind == "conv":
            values[f"{to}mixer.qkv.weight"] = weights[f"{source}conv.in_proj.weight"]
            values[f"{to}mixer.conv.weight"] = weights[f"{source}conv.conv.weight"].squeeze(1)
            values[f"{to}mixer.out.weight"] = weights[f"{source}conv.out_proj.weight"]
        else:
            names = [f"{source}self_attn.{x}_proj.weight" for x in "qkv"]
            values[f"{to}mixer.qkv.weight"] = torch.cat([weights[name] for name in names])
            values[f"{to}mixer.out.weight"] = weights[f"{source}self_attn.out_proj.weight"]
            for ours_name, name in (("query_norm", "q_layernorm"), ("key_norm", "k_layernorm")):
                values[f"{to}mixer.{ours_name}.weight"] = weights[f"{source}self_attn.{name}.weight"]
    ours.load_state_dict(values)
    assert_same_logits(ours, theirs)


# -- Zamba2 ----------------------------------------------------------------------------------------------------------------


def test_a_shared_block_counts_once_and_learns_from_every_use():
    model = disturbed(model_of(Zamba2, Zamba2Config(**ZAMBA)))
    assert len(model.shared) == 2 and list(model.turn.values()) == [(0, 0), (0, 1), (1, 0)]  # A, B, A
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == len(set(names)) and sum(".down." in name for name in names) == 2
    untied = copy.deepcopy(model)
    untied.shared.append(copy.deepcopy(model.shared[0]))
    untied.turn[5] = 1, 2
    for one in (model, untied):
        one(TOKENS, TOKENS).loss.backward()
    first, last = (untied.shared[i].down.weight.grad for i in (0, 2))
    assert first.abs().max() > 0 and last.abs().max() > 0
    torch.testing.assert_close(model.shared[0].down.weight.grad, first + last)


@torch.no_grad()
def test_without_its_projections_zamba2_is_a_stack_of_mamba2():
    """In BlaGPT's Zamba2 no shared block was ever built."""
    model = disturbed(model_of(Zamba2, Zamba2Config(**ZAMBA)))
    with_blocks = model(TOKENS).logits
    for layer in model.layers:
        if layer.linear is not None:
            layer.linear.weight.zero_()
    plain = get_model("mamba2")
    shape = {key: ZAMBA[key] for key in ("vocab_size", "d_model", "n_layers", "state_size", "ssm_head_dim")}
    other = plain(plain.Config(**shape))
    own = {
        name: value for name, value in model.state_dict().items() if ".linear." not in name and "shared." not in name
    }
    other.load_state_dict(own)
    torch.testing.assert_close(model(TOKENS).logits, other(TOKENS).logits)
    assert (with_blocks - other(TOKENS).logits).abs().max() > 1e-3


@torch.no_grad()
def test_two_uses_of_a_block_differ_only_by_their_adapters():
    model = disturbed(model_of(Zamba2, Zamba2Config(**ZAMBA)))
    block, x = model.shared[0], torch.randn(1, 6, 32)
    context = model.context(TOKENS[:1, :6], None, None)
    outputs = [block(x, x, use, 1, context) for use in (0, 1)]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-4
    for adapter in block.adapters:
        adapter.B.weight.zero_()
    outputs = [block(x, x, use, 1, context) for use in (0, 1)]
    assert torch.equal(*outputs)


# -- all three -------------------------------------------------------------------------------------------------------------

HYBRIDS = {
    "zamba2": (Zamba2, Zamba2Config(**ZAMBA)),
    "rene": (Rene, ReneConfig(**RENE)),
    "lfm2": (Lfm2, Lfm2Config(**LFM)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", HYBRIDS)
def test_permuting_the_batch_permutes_the_output(name):
    """BlaGPT's Zamba2 scanned over the batch."""
    model, order = disturbed(model_of(*HYBRIDS[name])), torch.tensor([2, 0, 1])
    torch.testing.assert_close(model(TOKENS[order]).logits, model(TOKENS).logits[order])


@pytest.mark.parametrize("scale", [1, 64])
@pytest.mark.parametrize("name", HYBRIDS)
def test_parameters_counted_by_kind_are_those_of_the_model(name, scale):
    cls = get_model(name)
    config = cls.config_for_scale(scale, 8192, int(4e6 * scale))
    assert cls.count_by_kind(config) == cls.count_parameters(config)


@torch.no_grad()
@pytest.mark.parametrize("window", [8, 0, 70, 100])
def test_decoding_with_a_window_equals_the_whole_beyond_two_windows(window):
    """And with none, with one as long as the text, and a longer one. (Causality aligned to the top left sees the first key only.)"""
    model = disturbed(model_of(Rene, ReneConfig(**RENE | {"window": window})))
    state = model.new_state(3, None, torch.device("cpu"), torch.float32)
    parts = [model(part, cache=state).logits for part in TOKENS.split([9] + [1] * 61, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(TOKENS).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 2, 8, 70, 0])
def test_renes_window_is_a_mask_of_the_last_tokens(window):
    """Token i sees token j if 0 <= i - j < window; 0: all that came before. Its attention without a kernel, in fp64."""
    model = disturbed(model_of(Rene, ReneConfig(**RENE | {"window": window}))).double()
    [layer] = [layer for layer in model.layers if layer.kind == "attention"]
    x = torch.randn(2, 70, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = layer.mixer(x, model.context(TOKENS[:2], None, None), layer.layer)
    q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in layer.mixer.qkv(x).chunk(3, dim=-1))
    apart = torch.arange(70)[:, None] - torch.arange(70)  # i - j
    hidden = (apart < 0) | (apart >= window if window else apart < 0)
    scores = (q @ k.mT / math.sqrt(8)).masked_fill(hidden, -torch.inf).softmax(-1)
    torch.testing.assert_close(found, layer.mixer.out((scores @ v).transpose(1, 2).flatten(2)), rtol=1e-12, atol=1e-12)


def test_the_order_of_renes_layers_is_blagpts():
    kinds = Rene.kinds(ReneConfig())
    assert [i for i, kind in enumerate(kinds) if kind == "attention"] == [6]
    assert [i for i, kind in enumerate(kinds) if kind == "mlp"] == [2, 5, 8, 11]
    assert Rene.kinds(ReneConfig(n_layers=4)).count("attention") == 1


def test_renes_last_matrices_are_divided_by_the_root_of_the_depth():
    model = model_of(Rene, ReneConfig(**RENE))
    for layer in model.layers:
        last = layer.mixer.out_proj if layer.kind == "mamba" else layer.mixer.out
        bound = 1 / math.sqrt(12 * last.in_features)
        assert 0.9 * bound < last.weight.abs().max() <= bound


def test_what_zamba2_does_not_compute_is_refused_by_name():
    plain = {"model_type": "zamba2", **zamba2_fields(Zamba2Config(**ZAMBA))}
    assert family_of(plain)[1] == Zamba2Config(**ZAMBA)
    for changes, words in (
        ({"time_step_min": 0.001}, "time_step_min 0.001 .* no time step has a lower bound"),
        ({"layers_block_type": ["mamba", "hybrid", "hybrid"]}, "layers_block_type is not implemented here, unless"),
        ({"layers_block_type": None}, "layers_block_type is not implemented here, unless"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps 1e-06 is not implemented here, only 1e-05"),
        ({"num_key_value_heads": 2}, "num_key_value_heads 2 is not implemented here, only 4"),
        ({"intermediate_size": 100}, "intermediate_size 100 is not implemented here: 32 must divide 100"),
        ({"use_long_context": True}, "use_long_context True is not implemented"),
    ):
        with pytest.raises(ValueError, match=words):
            family_of({**plain, **changes})
    ours = Zamba2(Zamba2Config(**ZAMBA, attention_adapter=True))
    theirs = dict(
        pair for name, value in ours.state_dict().items() for pair in zamba2_converted(ours.config, name, value)
    )
    copied = next(name for name in theirs if name.endswith("o_proj.weight")).replace("layers.1.", "layers.5.")
    first = next(name for name in theirs if "linear_k_adapter_list" in name and name.endswith(".0.weight"))
    for changed, words in (
        ({copied: torch.ones(32, 64)}, "differ, but they are one weight of a shared block"),
        ({first: torch.ones(4, 64)}, "queries, keys and values share the first factor"),
        ({"model.more": torch.ones(1)}, "the model has no place for model.more"),
    ):
        with pytest.raises(RuntimeError, match=words):
            dict(zamba2_weights(ours, theirs | changed))


@pytest.mark.parametrize(
    ("config", "changes", "line"),
    [
        (
            Zamba2Config,
            {"attention_head_dim": 80},
            r"attention_head_dim must divide 2 d_model \(1536\), but 80 does not",
        ),
        (ReneConfig, {"attention_head_dim": 80}, "attention_head_dim must divide 1024 channels, but 80 does not"),
        (Zamba2Config, {"ssm_head_dim": 80}, r"ssm_head_dim must divide expand \* d_model \(1536\), but 80 does not"),
        (ReneConfig, {"n_groups": 3}, "n_groups must divide the 32 heads, but 3 does not"),
    ],
)
def test_heads_that_do_not_fit_are_refused(config, changes, line):
    """BlaGPT's Zamba2 has heads of 80 channels in a width of 768."""
    with pytest.raises(ValueError, match=f"^{line}$"):
        config(**changes)
