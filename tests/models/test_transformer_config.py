"""Configurations of the decoder of switches that cannot be, or in which a switch does nothing: refused in one line."""

import math

import pytest
from test_transformer import small

from models.presets import TokenFormer, with_defaults
from models.transformer import Transformer
from models.transformer_config import MEANT_FOR


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"n_heads": 3}, "n_heads"),
        ({"n_kv_heads": 3}, "n_kv_heads"),
        ({"n_heads": 12, "d_model": 786}, "n_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"n_heads": 32}, "head_dim"),
        ({"attention": "latent", "rope_dim": 7}, "rope_dim"),
        ({"head_dim": 10, "rope_fraction": 0.5}, "rope_fraction"),
        ({"norm": "batch"}, "norm"),
        ({"residual_dtype": "fp16"}, "residual_dtype"),
        ({"rope_local_theta": 0.5, "window": 8}, "rope_local_theta"),
        ({"rope_scaling": "llama3"}, "rope_original_context"),
        ({"d_model": 10**7}, "d_model"),
        ({"head_dim": 2**63}, "head_dim"),
        ({"n_layers": 10**9}, "n_layers"),
        ({"window": -(2**63)}, "window"),
        ({"rope_theta": 1e300}, "rope_theta"),
        ({"z_loss": -math.inf}, "z_loss"),
        ({"positions": "learned"}, "max_context"),
        ({"window": 8, "window_pattern": "SX"}, "window_pattern"),
        ({"window": 65, "max_context": 64}, "window"),
        ({"attention": "differential", "n_kv_heads": 1}, "n_kv_heads"),
        ({"attention": "latent", "positions": "alibi"}, "positions"),
        ({"attention": "latent", "n_kv_heads": 2}, "n_kv_heads"),
        ({"attention": "latent", "qk_norm": True}, "qk_norm"),
        ({"attention": "latent", "forget_gate": True}, "forget_gate"),
        ({"attention": "latent", "pattention": "qkv"}, "pattention"),
        ({"attention_kernel": "sdpa", "attention_softcap": 50.0}, "attention_kernel"),
        ({"attention_kernel": "flash", "forget_gate": True}, "attention_kernel"),
        ({"value_residual": True, "value_embeddings": 1}, "value_residual"),
        ({"value_embeddings": 2}, "value_embeddings"),
        ({"hidden_ratio": 0.01}, "hidden_ratio"),
        ({"pattention": "qkv,gate"}, "pattention"),
        ({"pattention": "out", "zero_init": True}, "zero_init"),
        ({"block": "parallel", "norm_placement": "post"}, "norm_placement"),
        ({"block": "parallel", "norm_placement": "pre_post"}, "norm_placement"),
        ({"block": "parallel", "residual": "static_hyper"}, "residual"),
        ({"block": "parallel", "attention_bias": "qkv"}, "attention_bias"),
        ({"norm_placement": "post", "residual": "dynamic_hyper"}, "norm_placement"),
        ({"unpadded_vocab": 62}, "unpadded_vocab"),
        ({"n_predict": 2, "prediction_weights": "1"}, "prediction_weights"),
        ({"n_predict": 2, "prediction_weights": "0.5,1"}, "prediction_weights"),
        ({"n_predict": 2, "prediction_weights": "1,one"}, "prediction_weights"),
        ({"n_predict": 2, "prediction_weights": "1,-1"}, "prediction_weights"),
        ({"n_predict": 2, "prediction_weights": "1,nan"}, "prediction_weights"),
        ({"n_predict": 2, "prediction_weights": "1,inf"}, "prediction_weights"),
        ({"final_softcap": -1.0}, "final_softcap"),
        ({"final_softcap": math.nan}, "final_softcap"),
        ({"init_std": math.inf}, "init_std"),
    ],
    ids=str,
)
def test_impossible_configurations_are_one_line_that_names_the_field(changes, field):
    with pytest.raises(ValueError, match=rf"\b{field}\b") as error:
        small(**changes)
    assert "\n" not in str(error.value)


def test_a_misspelt_switch_is_refused():
    with pytest.raises(TypeError, match="qk_nrom"):
        with_defaults("Wrong", qk_nrom=True)
    with pytest.raises(TypeError, match="qk_nrom"):
        Transformer.config_for_scale(1, 8192, 10_000_000, qk_nrom=True)


YARN = {"rope_scaling": "yarn", "rope_original_context": 16}
IDLE = {  # field -> (a value, a choice beside which it does nothing, one beside which it does something)
    "rope_theta": (5e5, {"positions": "alibi"}, {}),
    "rope_fraction": (0.5, {"positions": "none"}, {}),
    "rope_scaling": ("xpos", {"positions": "none"}, {}),
    "rope_factor": (2.0, {"positions": "none"}, {"rope_scaling": "ntk"}),
    "rope_original_context": (64, {"positions": "none"}, {"rope_scaling": "xpos"}),
    "rope_low_freq_factor": (0.5, YARN, {**YARN, "rope_scaling": "llama3"}),
    "rope_high_freq_factor": (8.0, YARN, {**YARN, "rope_scaling": "llama3"}),
    "rope_local_theta": (500.0, {}, {"window": 8}),
    "rope_mscale_all_dim": (1.0, YARN, {**YARN, "attention": "latent"}),
    "residual_dtype": ("bf16", {"residual": "static_hyper"}, {"residual": "weighted"}),
    "hyper_start": ("shrunk", {"residual": "weighted"}, {"residual": "dynamic_hyper"}),
    "kv_rank": (8, {}, {"attention": "latent"}),
    "q_rank": (8, {"attention": "differential"}, {"attention": "latent"}),
    "rope_dim": (8, {}, {"attention": "latent"}),
    "window_pattern": ("SL", {}, {"window": 8}),
    "mlp": ("gelu", {"pattention": "mlp"}, {"pattention": "qkv"}),
    "d_hidden": (64, {"pattention": "out,mlp"}, {"pattention": "out"}),
    "hidden_ratio": (2.0, {"pattention": "mlp"}, {}),
    "pattention_slots": (8, {"pattention": "mlp"}, {"pattention": "out"}),
    "pattention_mlp_slots": (8, {"pattention": "qkv,out"}, {"pattention": "mlp"}),
    "pattention_mode": ("softmax", {}, {"pattention": "qkv"}),
    "n_streams": (2, {"residual": "weighted"}, {"residual": "static_hyper"}),
    "prediction_heads": ("transformer", {}, {"n_predict": 2}),
    "share_unembedding": (False, {}, {"n_predict": 2}),
    "prediction_weights": ("1,0.5", {}, {"n_predict": 2}),
    "mup_base_width": (16, {}, {"mup": True}),
    "mup_base_depth": (1, {}, {"mup": True}),
    "mup_base_head_dim": (2, {}, {"mup": True}),
}


def test_every_field_that_may_do_nothing_is_tried():
    assert set(IDLE) == {name for names in MEANT_FOR for name in names}


@pytest.mark.parametrize("field", IDLE)
def test_a_switch_that_does_nothing_is_refused(field):
    value, without, with_ = IDLE[field]
    small(**without)
    with pytest.raises(ValueError, match=f"^{field} has a meaning only with ") as error:
        small(**without, **{field: value})
    assert "\n" not in str(error.value)
    assert getattr(small(**with_, **{field: value}), field) == value


def test_what_does_nothing_may_be_what_it_is_by_default_in_its_class():
    own = with_defaults("OwnConfig", TokenFormer.Config, mlp="gelu")
    assert own(mlp="gelu").mlp == "gelu"
    with pytest.raises(ValueError, match="^mlp .* must be 'gelu'"):
        own(mlp="swiglu")
