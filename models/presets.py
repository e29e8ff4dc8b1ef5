"""Well-known decoders: named sets of the switches of `transformer.py`."""

from __future__ import annotations

from dataclasses import field, fields, make_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.base import register
from models.transformer import Transformer
from models.transformer_config import TransformerConfig


def with_defaults(name: str, base: type[TransformerConfig] = TransformerConfig, **choices: Any) -> Any:
    """A Config class called `name`: `base` with `choices` as defaults."""
    own = [(f.name, f.type, field(default=choices.pop(f.name, f.default), metadata=f.metadata)) for f in fields(base)]
    if choices:
        raise TypeError(f"no such fields: {', '.join(choices)}")
    config = make_dataclass(name, own, bases=(base,), frozen=True)
    config.__module__ = __name__
    return config


@register("gpt2")
class Gpt2(Transformer):
    """GPT-2 (Radford et al. 2019), after OpenAI's code: learned positions, pre-norm blocks, biases, tied head.

    OpenAI's weights need mlp gelu_tanh and vocab_size 50257.
    """

    Config = with_defaults("Gpt2Config", norm="layer", bias=True, positions="learned", max_context=1024, mlp="gelu")


@register("llama")
class Llama(Transformer):
    """Llama (arXiv 2302.13971): RMSNorm, rotary positions, SwiGLU, no bias, untied head; default sizes as in transformers."""

    Config = with_defaults("LlamaConfig", tied=False)


@register("minimal-sota")
class MinimalSota(Transformer):
    """Minimal-SoTA-LLM: Llama with a quarter of the key and value heads, as in Mistral 7B (arXiv 2310.06825), but without Mistral's
    window of 4,096 tokens and MLP of 3.5 d_model. That project has no public weights or code to compare with.
    """

    Config = with_defaults("MinimalSotaConfig", tied=False, n_kv_heads=3)


@register("pico")
class Pico(Transformer):
    """picoGPT: GPT-2's MLP, RMSNorm, rotary positions, grouped queries, one standard deviation for every matrix. Here channels i
    and i + D/2 rotate together, in picoGPT 2i and 2i + 1: the same network with its channels in another order. No dropout.
    """

    Config = with_defaults("PicoConfig", mlp="gelu", n_kv_heads=6, init="normal")


@register("transformer++")
class TransformerPlusPlus(Transformer):
    """GPT2_Reproduction's Transformer++: rotary positions, RMSNorm, SwiGLU of 4 d_model, biases only in attention.

    At GPT-2's dimensions it has 151,935,744 parameters, so at 124 M the dial makes it narrower. hidden_ratio 0 gives 8/3.
    """

    Config = with_defaults("TransformerPlusPlusConfig", hidden_ratio=4.0, attention_bias="all")


@register("blagpt")
class BlaGpt(Transformer):
    """BlaGPT's default of November 2024: grouped queries, QK-norm, norms on both ends of a branch, SwiGLU of 4 d_model, biases on
    q, k, v; rope_theta 10,000 and no z-loss (some later commits of BlaGPT have 1e6 and 1e-4).
    """

    Config = with_defaults(
        "BlaGptConfig",
        n_kv_heads=4,
        qk_norm=True,
        norm_placement="pre_post",
        zero_init=True,
        hidden_ratio=4.0,
        attention_bias="qkv",
    )


@register("blagpt-best")
class BlaGptBest(Transformer):
    """The best of BlaGPT's ablations of November 2024 (BlaGPT reports 3.2993): pre-norm, biases everywhere, branches that start at
    zero. BlaGPT's later records use other parts.
    """

    Config = with_defaults("BlaGptBestConfig", n_kv_heads=4, qk_norm=True, zero_init=True, hidden_ratio=4.0, bias=True)


@register("tokenformer")
class TokenFormer(Transformer):
    """TokenFormer (arXiv 2410.23168) in BlaGPT's block: every projection attends to parameter tokens. The paper's own block has
    LayerNorms without parameters and rotates a quarter of the channels.
    """

    Config = with_defaults(
        "TokenFormerConfig", pattention="qkv,out,mlp", qk_norm=True, norm_placement="pre_post", init="normal"
    )


@register("modded")
class Modded(Transformer):
    """Ideas of modded-nanogpt's records of December 2024 in this decoder: QK-norm, squared ReLU, three value embeddings, skips
    from the embedding and between halves, soft-cap. It is none of these records: models/README.md lists the differences.
    """

    Config = with_defaults(
        "ModdedConfig",
        qk_norm=True,
        mlp="relu2",
        value_embeddings=3,
        x0_skip=True,
        unet_skips=True,
        final_softcap=30.0,
        zero_init=True,
        tied=False,
    )


# -- weights and sizes from transformers -----------------------------------------------------------------------------------


def gpt2_config(theirs: Any) -> Any:
    """The Config of a `gpt2` that computes the same as a Hugging Face `GPT2LMHeadModel` with the config `theirs`.

    ValueError, with the name of their field, if it needs something that this decoder does not have.
    """
    needed = {
        "model_type": "gpt2",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    }
    _refuse_others(theirs, needed)
    activations = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
    if theirs.activation_function not in activations:
        raise ValueError(
            f"activation_function {theirs.activation_function!r} of {theirs.model_type} is not implemented"
        )
    return Gpt2.Config(
        vocab_size=theirs.vocab_size,
        d_model=theirs.n_embd,
        d_hidden=theirs.n_inner or 0,
        n_layers=theirs.n_layer,
        n_heads=theirs.n_head,
        max_context=theirs.n_positions,
        norm_eps=theirs.layer_norm_epsilon,
        mlp=activations[theirs.activation_function],
    )


def llama_config(theirs: Any) -> Any:
    """The Config of a `llama` that computes the same as a Hugging Face `LlamaForCausalLM` with the config `theirs`, including
    its `rope_scaling`.

    ValueError, with the name of their field, if it needs something that this decoder does not have.
    """
    biases = bool(theirs.attention_bias), bool(getattr(theirs, "mlp_bias", False))
    _refuse_others(theirs, {"model_type": "llama", "hidden_act": "silu", "partial_rotary_factor": 1.0})
    if biases == (False, True):
        raise ValueError("mlp_bias without attention_bias is not implemented")
    return Llama.Config(
        vocab_size=theirs.vocab_size,
        d_model=theirs.hidden_size,
        d_hidden=theirs.intermediate_size,
        n_layers=theirs.num_hidden_layers,
        n_heads=theirs.num_attention_heads,
        n_kv_heads=theirs.num_key_value_heads or 0,
        head_dim=getattr(theirs, "head_dim", None) or 0,
        norm_eps=theirs.rms_norm_eps,
        tied=theirs.tie_word_embeddings,
        bias=biases == (True, True),
        attention_bias="all" if biases == (True, False) else "none",
        **_rope_choices(theirs),
    )


def _refuse_others(theirs: Any, needed: dict[str, Any]) -> None:
    for name, value in needed.items():
        found = getattr(theirs, name, value)
        if found != value:
            raise ValueError(f"{name} {found!r} is not implemented here, only {value!r}")


# rope_type of transformers -> (our rope_scaling, their key -> our field).
_ORIGINAL = {"factor": "rope_factor", "original_max_position_embeddings": "rope_original_context"}
_BANDS = {"low_freq_factor": "rope_low_freq_factor", "high_freq_factor": "rope_high_freq_factor"}
ROPE_TYPES: dict[str, tuple[str, dict[str, str]]] = {
    "default": ("none", {}),
    "linear": ("interpolate", {"factor": "rope_factor"}),
    "yarn": ("yarn", _ORIGINAL),
    "llama3": ("llama3", _ORIGINAL | _BANDS),
}


def _rope_choices(theirs: Any) -> dict[str, Any]:
    """Our fields for `rope_theta` and `rope_scaling` of transformers 4, or `rope_parameters` of transformers 5."""
    given = dict(getattr(theirs, "rope_parameters", None) or getattr(theirs, "rope_scaling", None) or {})
    theta = given.pop("rope_theta", None) or theirs.rope_theta
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_scaling: {kind!r} is not implemented here, only {', '.join(ROPE_TYPES)}")
    scaling, names = ROPE_TYPES[kind]
    if kind == "yarn":
        given.setdefault("original_max_position_embeddings", theirs.max_position_embeddings)
    numbers = {names[name]: given.pop(name) for name in names if name in given}
    further = [name for name, value in given.items() if value is not None]
    if further:
        raise ValueError(f"rope_scaling: {', '.join(further)} of {kind} is not implemented here")
    if len(numbers) < len(names):
        raise ValueError(f"rope_scaling: {kind} needs {', '.join(names)}")
    return {"rope_theta": float(theta), "rope_scaling": scaling, **numbers}


OPENAI_NAMES = {
    "attention_norm": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.out": "mlp.c_proj",
}
# Buffers of each layer in older files: the causal mask and its fill value.
OPENAI_MASKS = ("attn.bias", "attn.masked_bias")


@torch.no_grad()
def load_openai_weights(model: Transformer, weights: dict[str, Tensor]) -> None:
    """Copy OpenAI's weights from the state dict of a Hugging Face `GPT2LMHeadModel` into a `gpt2` of the same sizes; see
    `gpt2_config`.

    KeyError or RuntimeError if names or shapes do not match, or if weights are left over. Attention masks are ignored.
    """
    sources = {"embedding": "wte", "positions": "wpe", "norm": "ln_f"}
    for layer in range(model.config.n_layers):
        sources |= {f"layers.{layer}.{ours}": f"h.{layer}.{theirs}" for ours, theirs in OPENAI_NAMES.items()}
    left = set(weights)
    for name, parameter in model.named_parameters():
        owner, _, kind = name.rpartition(".")
        source = f"transformer.{sources[owner]}.{kind}"
        value = weights[source]
        # OpenAI's linear layers hold [in, out].
        linear = isinstance(model.get_submodule(owner), nn.Linear) and kind == "weight"
        _copy(parameter, value.t() if linear else value, source)
        left.remove(source)
    masks = {f"transformer.h.{layer}.{mask}" for layer in range(model.config.n_layers) for mask in OPENAI_MASKS}
    _refuse_leftovers(left - masks, model, weights, "transformer.wte.weight")


LLAMA_NAMES = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention.out": "self_attn.o_proj",
    "mlp.out": "mlp.down_proj",
}
# Each of ours is one matrix: the rows of their matrices, concatenated in this order.
LLAMA_JOINED = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.up": ("mlp.gate_proj", "mlp.up_proj"),
}


@torch.no_grad()
def load_llama_weights(model: Transformer, weights: dict[str, Tensor]) -> None:
    """Copy the state dict of a Hugging Face `LlamaForCausalLM` into a `llama` of the same sizes.

    Build the model with `llama_config`: weights do not contain the rotary settings. Both models rotate channels i and
    i + head_dim / 2 together. KeyError or RuntimeError if names or shapes do not match, or if weights are left over.
    """
    names = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
    sources: dict[str, tuple[str, ...]] = {
        ours: (theirs,) for ours, theirs in names.items() if ours != "head" or model.head is not None
    }
    for layer in range(model.config.n_layers):
        for ours, theirs in LLAMA_NAMES.items():
            sources[f"layers.{layer}.{ours}"] = (f"model.layers.{layer}.{theirs}",)
        for ours, several in LLAMA_JOINED.items():
            sources[f"layers.{layer}.{ours}"] = tuple(f"model.layers.{layer}.{theirs}" for theirs in several)
    left = set(weights)
    for name, parameter in model.named_parameters():
        owner, _, kind = name.rpartition(".")
        keys = [f"{source}.{kind}" for source in sources[owner]]
        _copy(parameter, torch.cat([weights[key] for key in keys]), " + ".join(keys))
        left -= set(keys)
    _refuse_leftovers(left, model, weights, "model.embed_tokens.weight")


def _refuse_leftovers(left: set[str], model: Transformer, weights: dict[str, Tensor], embedding: str) -> None:
    """RuntimeError if any name is left; for a tied model, a head that equals the embedding is allowed."""
    if model.head is None and torch.equal(weights.get("lm_head.weight", weights[embedding]), weights[embedding]):
        left = left - {"lm_head.weight"}
    if left:
        named, more = sorted(left)[:5], f" and {len(left) - 5} more" if len(left) > 5 else ""
        raise RuntimeError(f"the model has no place for {', '.join(named)}{more}")


def _copy(parameter: Tensor, value: Tensor, source: str) -> None:
    if value.shape != parameter.shape:
        raise RuntimeError(f"{source} is {tuple(value.shape)}, not {tuple(parameter.shape)}")
    parameter.copy_(value)
