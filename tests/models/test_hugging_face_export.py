"""The way back to transformers' classes: it is exact, or it is not taken."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import text_only_transformers

from models.base import get_model, load_models, model_names
from models.bitnet import with_linear
from models.counting import build_on_meta
from models.hugging_face import family_of
from models.hugging_face_export import TARGETS, native
from models.mamba2 import Mamba2
from models.presets import Gpt2, Llama
from models.transformer import Transformer
from models.zamba2 import Zamba2

SMALL = {"vocab_size": 70, "d_model": 32, "n_layers": 2, "n_heads": 4}
GPT2, LLAMA = Gpt2.Config(**SMALL, max_context=16), Llama.Config(**SMALL, n_kv_heads=2, d_hidden=48)
MAMBA = {"vocab_size": 70, "d_model": 32, "n_layers": 5, "state_size": 8, "ssm_head_dim": 16}
ZAMBA = {"hybrid_every": 2, "attention_head_dim": 16, "adapter_rank": 4}
EXACT = {
    "gpt2": (Gpt2, GPT2),
    "gpt2-tanh": (Gpt2, replace(GPT2, mlp="gelu_tanh", d_hidden=80, norm_eps=1e-3, dropout=0.1, z_loss=1e-4)),
    "llama": (Llama, LLAMA),
    "llama-biases": (Llama, replace(LLAMA, bias=True, head_dim=16, kernels="torch", init="mitchell")),
    "llama-tied": (Llama, replace(LLAMA, attention_bias="all", tied=True, rope_theta=500.0, max_context=32)),
    "llama-yarn": (Llama, replace(LLAMA, rope_scaling="yarn", rope_factor=4.0, rope_original_context=16)),
    "llama-llama3": (Llama, replace(LLAMA, rope_scaling="llama3", rope_factor=4.0, rope_original_context=16)),
    "llama-linear": (Llama, replace(LLAMA, rope_scaling="interpolate", rope_factor=2.0)),
    "qwen3": (Llama, replace(LLAMA, qk_norm=True, attention_bias="all")),
    "mamba2": (Mamba2, Mamba2.Config(**MAMBA, expand=3, norm_eps=1e-3)),
    "mamba2-untied": (Mamba2, Mamba2.Config(**MAMBA, tied=False, conv_size=3, dropout=0.1)),
    "zamba2": (Zamba2, Zamba2.Config(**MAMBA | ZAMBA, attention_adapter=True, rope_theta=500.0, n_groups=2)),
    "zamba2-untied": (Zamba2, Zamba2.Config(**MAMBA | ZAMBA, tied=False, mlp_ratio=2, shared_blocks=3)),
    "llama-transformer": (Transformer, Transformer.Config(**SMALL)),  # its defaults are those of a tied Llama
}


@pytest.mark.parametrize("kind", EXACT)
def test_weights_that_go_there_and_back_are_the_same(kind):
    model_class, config = EXACT[kind]
    found, why = native(model_class, config)
    assert found is not None and why == "" and found.kind == kind.partition("-")[0]
    model = build_on_meta(model_class, config).to_empty(device="cpu")
    model.init_weights(torch.Generator().manual_seed(0))
    ours = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    theirs = dict(pair for name, value in ours.items() for pair in found.convert(name, value))
    family, back = family_of(found.config)
    again = get_model(family.name)(back)
    read = dict(family.weights(again, theirs))
    assert read.keys() == ours.keys()
    assert all(torch.equal(read[name], ours[name]) for name in ours)


@pytest.mark.parametrize(
    "model_class, config, why",
    [
        (Gpt2, replace(GPT2, tied=False), "tied False"),
        (Gpt2, replace(GPT2, mlp="relu2"), "mlp 'relu2'"),
        (Gpt2, replace(GPT2, bias=False), "bias False"),
        (Llama, replace(LLAMA, attention_bias="qkv"), "attention_bias 'qkv'"),
        (Llama, replace(LLAMA, final_softcap=30.0), "final_softcap 30.0"),
        (Llama, replace(LLAMA, window=8), "window 8"),
        (Llama, replace(LLAMA, rope_scaling="ntk", rope_factor=2.0), "rope_scaling 'ntk'"),
        (Llama, replace(LLAMA, qk_norm=True, bias=True), "qk_norm True"),
        (Llama, replace(LLAMA, embedding_scale=True), "embedding_scale True"),
        (with_linear(Llama), with_linear(Llama).Config(**vars(LLAMA), linear="sign"), "linear 'sign'"),
        (Mamba2, Mamba2.Config(**MAMBA, n_groups=2), "n_groups 2"),
        (Zamba2, Zamba2.Config(**MAMBA | ZAMBA, norm_eps=1e-6), "norm_eps 1e-06"),
        (Zamba2, Zamba2.Config(**MAMBA | ZAMBA | {"hybrid_every": 9}), "hybrid_every 9"),
        (with_linear(Mamba2), with_linear(Mamba2).Config(**MAMBA, linear="sign"), "linear 'sign'"),
        (type("Mine", (Llama,), {"__module__": "mine"}), LLAMA, "computes Mine"),
    ],
)
def test_what_no_class_computes_is_named(model_class, config, why):
    found, said = native(model_class, config)
    assert found is None and said.endswith(why)


def test_which_of_our_models_have_a_class():
    load_models()
    small = {"vocab_size": 70, "n_layers": 2}
    kinds = {}
    for name in ("gpt2", "llama", "minimal-sota", "transformer", "transformer++", "pico", "blagpt", "blagpt-best"):
        found, _ = native(get_model(name), get_model(name).Config(**small))
        kinds[name] = None if found is None else found.kind
    assert kinds == {
        "gpt2": "gpt2",
        "llama": "llama",
        "minimal-sota": "llama",  # Llama with grouped queries
        "transformer": "llama",
        "transformer++": "llama",  # Llama with biases in attention
        "pico": None,
        "blagpt": None,
        "blagpt-best": None,
    }
    for name in ("mamba2", "zamba2"):
        found, _ = native(get_model(name), get_model(name).Config())
        assert found is not None and found.kind == name
    for name in set(model_names()) - kinds.keys() - {"mamba2", "zamba2"}:
        assert native(get_model(name), get_model(name).Config())[0] is None, name


def test_padding_and_further_heads_are_cut_off():
    config = replace(LLAMA, unpadded_vocab=65, n_predict=3)
    found, _ = native(Llama, config)
    assert found is not None and found.config["vocab_size"] == 65 and found.left_out == "2 heads for later tokens"
    model = build_on_meta(Llama, config)
    theirs = dict(pair for name, value in model.state_dict().items() for pair in found.convert(name, value))
    assert theirs["model.embed_tokens.weight"].shape == theirs["lm_head.weight"].shape == (65, 32)
    family, back = family_of(found.config)
    assert [name for name, _ in family.weights(build_on_meta(Llama, back), theirs)]


def test_a_field_that_nobody_thought_of_is_not_lost(monkeypatch):
    """A config whose field means something new is not the class's, whatever `llama_fields` writes."""
    fields = TARGETS["llama"].config
    monkeypatch.setitem(
        TARGETS, "llama", replace(TARGETS["llama"], config=lambda c: {**fields(c), "rms_norm_eps": 0.1})
    )
    assert native(Llama, LLAMA)[0] is None


def test_the_config_of_transformers_says_the_same(monkeypatch):
    transformers = text_only_transformers(monkeypatch)
    for kind, (model_class, config) in EXACT.items():
        found, _ = native(model_class, config)
        theirs = transformers.AutoConfig.for_model(**found.config)
        said = theirs.to_dict()
        held = found.config.keys() & said.keys() | said.keys() & {
            "rope_parameters"
        }  # of 5, for rope_theta and rope_scaling
        assert found.config.keys() - held <= ({"rope_theta", "rope_scaling"} if "rope_parameters" in held else set())
        assert family_of(found.config)[1] == family_of({key: said[key] for key in held})[1], kind
        assert SimpleNamespace(**theirs.to_dict()).model_type == found.kind
