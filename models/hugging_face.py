"""Sizes and weights of the Hugging Face models that the decoder of transformer.py computes: GPT-2, Llama, Qwen3. All families, also
those of hugging_face_mamba.py, are in FAMILIES.

`Family` joins what one of them needs. `theirs` is the config of transformers, or an object with the fields of a config.json.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from models.hugging_face_checks import fitting, refuse_leftovers, refuse_others
from models.hugging_face_mamba import mamba2_config, mamba2_weights, zamba2_config, zamba2_weights
from models.presets import Gpt2, Llama
from models.transformer import Transformer


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
    refuse_others(theirs, needed)
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
    refuse_others(theirs, {"model_type": "llama", "hidden_act": "silu", "partial_rotary_factor": 1.0})
    if biases == (False, True):
        raise ValueError("mlp_bias without attention_bias is not implemented")
    return Llama.Config(
        bias=biases == (True, True),
        attention_bias="all" if biases == (True, False) else "none",
        **_llama_sizes(theirs),
    )


def qwen3_config(theirs: Any) -> Any:
    """The Config of a `llama` with `qk_norm` that computes the same as a Hugging Face `Qwen3ForCausalLM` with the config `theirs`.

    ValueError, with the name of their field, if it needs something that this decoder does not have.
    """
    refuse_others(theirs, {"model_type": "qwen3", "hidden_act": "silu", "use_sliding_window": False})
    return Llama.Config(qk_norm=True, attention_bias="all" if theirs.attention_bias else "none", **_llama_sizes(theirs))


def _llama_sizes(theirs: Any) -> dict[str, Any]:
    """The fields that a Llama and its kin have in common."""
    return dict(
        vocab_size=theirs.vocab_size,
        d_model=theirs.hidden_size,
        d_hidden=theirs.intermediate_size,
        n_layers=theirs.num_hidden_layers,
        n_heads=theirs.num_attention_heads,
        n_kv_heads=theirs.num_key_value_heads or 0,
        head_dim=getattr(theirs, "head_dim", None) or 0,
        norm_eps=theirs.rms_norm_eps,
        tied=theirs.tie_word_embeddings,
        **_rope_choices(theirs),
    )


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


def openai_sources(n_layers: int) -> dict[str, str]:
    """Our module -> OpenAI's, without `transformer.`."""
    sources = {"embedding": "wte", "positions": "wpe", "norm": "ln_f"}
    for layer in range(n_layers):
        sources |= {f"layers.{layer}.{ours}": f"h.{layer}.{theirs}" for ours, theirs in OPENAI_NAMES.items()}
    return sources


def load_openai_weights(model: Transformer, weights: Mapping[str, Tensor]) -> None:
    """Copy OpenAI's weights from the state dict of a Hugging Face `GPT2LMHeadModel` into a `gpt2` of the same sizes; see
    `gpt2_config` and `openai_weights`."""
    _load(model, openai_weights(model, weights))


def openai_weights(model: Transformer, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(our name, value) of every parameter of a `gpt2`, from the weights of a `GPT2LMHeadModel`, of which each is read once.

    The names may lack `transformer.`, as in OpenAI's files on the hub. KeyError or RuntimeError if names or shapes do not match,
    or if weights are left over. Attention masks are ignored.
    """
    start = "transformer." if "transformer.wte.weight" in weights else ""
    sources = openai_sources(model.config.n_layers)
    left = set(weights)
    for name, parameter in model.named_parameters():
        owner, _, kind = name.rpartition(".")
        source = f"{start}{sources[owner]}.{kind}"
        value = weights[source]
        # OpenAI's linear layers hold [in, out].
        linear = isinstance(model.get_submodule(owner), nn.Linear) and kind == "weight"
        yield name, fitting(value.t() if linear else value, parameter, source)
        left.remove(source)
    masks = {f"{start}h.{layer}.{mask}" for layer in range(model.config.n_layers) for mask in OPENAI_MASKS}
    refuse_leftovers(left - masks, model, weights, f"{start}wte.weight")


LLAMA_NAMES = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention.out": "self_attn.o_proj",
    "mlp.out": "mlp.down_proj",
    "attention.heads.query_norm": "self_attn.q_norm",  # of Qwen3
    "attention.heads.key_norm": "self_attn.k_norm",
}
# Each of ours is one matrix: the rows of their matrices, concatenated in this order.
LLAMA_JOINED = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.up": ("mlp.gate_proj", "mlp.up_proj"),
}


def llama_sources(n_layers: int) -> dict[str, tuple[str, ...]]:
    """Our module -> theirs, of which ours joins the rows."""
    sources: dict[str, tuple[str, ...]] = {
        "embedding": ("model.embed_tokens",),
        "norm": ("model.norm",),
        "head": ("lm_head",),
    }
    for layer in range(n_layers):
        for ours, theirs in LLAMA_NAMES.items():
            sources[f"layers.{layer}.{ours}"] = (f"model.layers.{layer}.{theirs}",)
        for ours, several in LLAMA_JOINED.items():
            sources[f"layers.{layer}.{ours}"] = tuple(f"model.layers.{layer}.{theirs}" for theirs in several)
    return sources


def load_llama_weights(model: Transformer, weights: Mapping[str, Tensor]) -> None:
    """Copy the state dict of a Hugging Face `LlamaForCausalLM` or `Qwen3ForCausalLM` into a `llama` of the same sizes.

    Build the model with `llama_config` or `qwen3_config`: weights do not contain the rotary settings. See `llama_weights`.
    """
    _load(model, llama_weights(model, weights))


def llama_weights(model: Transformer, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(our name, value) of every parameter of a `llama`, from the weights of a `LlamaForCausalLM` or `Qwen3ForCausalLM`, of which each
    is read once.

    Both models rotate channels i and i + head_dim / 2 together. KeyError or RuntimeError if names or shapes do not match, or if
    weights are left over.
    """
    sources = llama_sources(model.config.n_layers)
    left = set(weights)
    for name, parameter in model.named_parameters():
        owner, _, kind = name.rpartition(".")
        keys = [f"{source}.{kind}" for source in sources[owner]]
        yield name, fitting(torch.cat([weights[key] for key in keys]), parameter, " + ".join(keys))
        left -= set(keys)
    refuse_leftovers(left, model, weights, "model.embed_tokens.weight")


@torch.no_grad()
def _load(model: Transformer, weights: Iterator[tuple[str, Tensor]]) -> None:
    for name, value in weights:
        model.get_parameter(name).copy_(value)


# -- a config.json -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """How a model of transformers becomes one of ours.

    name: of our model; config: theirs -> our Config; weights: (our model, also without storage; their weights) -> (our name, value)
    of each; absent_means: values of fields that a config.json may lack, as transformers has them.
    """

    name: str
    config: Callable[[Any], Any]
    weights: Callable[[Any, Mapping[str, Tensor]], Iterator[tuple[str, Tensor]]]
    absent_means: dict[str, Any]


_LLAMA_ABSENT = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "attention_bias": False,
}
FAMILIES = {
    "gpt2": Family(
        "gpt2",
        gpt2_config,
        openai_weights,
        {
            "vocab_size": 50257,
            "n_positions": 1024,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "n_inner": None,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
        },
    ),
    "llama": Family(
        "llama",
        llama_config,
        llama_weights,
        _LLAMA_ABSENT
        | {
            "vocab_size": 32000,
            "intermediate_size": 11008,
            "num_key_value_heads": None,
            "max_position_embeddings": 2048,
        },
    ),
    "qwen3": Family(
        "llama",
        qwen3_config,
        llama_weights,
        _LLAMA_ABSENT
        | {
            "vocab_size": 151936,
            "intermediate_size": 22016,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "max_position_embeddings": 32768,
        },
    ),
    "mamba2": Family(
        "mamba2",
        mamba2_config,
        mamba2_weights,
        {
            "vocab_size": 32768,
            "hidden_size": 4096,
            "num_hidden_layers": 64,
            "state_size": 128,
            "num_heads": 128,
            "head_dim": 64,
            "expand": 2,
            "n_groups": 8,
            "conv_kernel": 4,
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": False,
        },
    ),
    "zamba2": Family(
        "zamba2",
        zamba2_config,
        zamba2_weights,
        {
            "vocab_size": 32000,
            "hidden_size": 2560,
            "num_hidden_layers": 54,
            "layers_block_type": None,
            "num_mem_blocks": 1,
            "num_attention_heads": 32,
            "num_key_value_heads": None,
            "use_mem_rope": False,
            "rope_theta": 10000,
            "intermediate_size": None,
            "adapter_rank": 128,
            "use_shared_attention_adapter": False,
            "mamba_d_state": 64,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "mamba_ngroups": 1,
            "n_mamba_heads": 8,
            "time_step_min": 0.001,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
        },
    ),
}


def family_of(content: Mapping[str, Any]) -> tuple[Family, Any]:
    """The family of a config.json, and our Config. ValueError if it is none of FAMILIES, or needs what this decoder does not have."""
    kind = content.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"model_type {kind!r} is not implemented here, only {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    return family, family.config(SimpleNamespace(**(family.absent_means | dict(content))))
