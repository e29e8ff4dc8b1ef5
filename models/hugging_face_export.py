"""The way back of hugging_face.py: config and weights of a class of transformers that computes exactly what a model of ours computes.

`native` finds the class. A field of our Config that it does not know would be lost, so the result is read back with the adapter of
hugging_face.py: it must give the same Config, except for fields that change no logits (`WITHOUT_EFFECT`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from models.hugging_face import ROPE_TYPES, family_of, llama_sources, openai_sources
from models.hugging_face_mamba import mamba2_converted, mamba2_fields, zamba2_converted, zamba2_fields
from models.mamba2 import Mamba2Config
from models.mup import folded, folded_config
from models.presets import Gpt2
from models.transformer import Transformer
from models.transformer_config import TransformerConfig
from models.zamba2 import Zamba2Config

Converted = Iterator[tuple[str, Tensor]]


@dataclass(frozen=True)
class Target:
    """A class of transformers that some of our models can become.

    architecture: its name; config: our Config -> the fields of its config.json; weights: (our Config, our name, value) -> (their name,
    value) of each matrix in it. `value` may be on the meta device. own: the Config whose fields it knows; modules: of our classes.
    """

    architecture: str
    config: Callable[[Any], dict[str, Any]]
    weights: Callable[[Any, str, Tensor], Converted]
    own: type = TransformerConfig
    modules: tuple[str, ...] = (Transformer.__module__, Gpt2.__module__)


@dataclass(frozen=True)
class Native:
    """What `native` found. config: all fields of config.json that say what is computed; left_out: parts that only training needs."""

    kind: str
    config: dict[str, Any]
    left_out: str
    convert: Callable[[str, Tensor], Converted]


# Fields that have no effect on logits, that `native` handles itself (the vocabulary, the further heads), or that another field
# repeats: d_hidden is compared after it was inferred.
WITHOUT_EFFECT = (
    *("vocab_size", "unpadded_vocab", "n_predict", "prediction_heads", "share_unembedding", "prediction_weights"),
    *("init", "init_std", "zero_init", "z_loss", "neftune_alpha", "dropout", "residual_dtype"),
    *("kernels", "attention_kernel", "scan_kernel", "conv_kernel", "hidden_ratio", "hidden_multiple"),
)
FURTHER = "further."  # begins the names of the heads that predict later tokens


def native(model_class: type, config: Any) -> tuple[Native | None, str]:
    """(the class of transformers that computes the same logits, and its weights; why there is none, as a sentence or "").

    Rows of the vocabulary that are never predicted (`unpadded_vocab`) are cut off. Heads that predict later tokens are left out.
    The multipliers of mup go into the weights.
    """
    own, config = config, folded_config(config)
    targets = {kind: target for kind, target in TARGETS.items() if model_class.__module__ in target.modules}
    if not targets:
        return None, f"no class of transformers computes {model_class.__name__}"
    known = {field.name for target in targets.values() for field in fields(target.own)}
    for field in fields(config):
        if field.name not in known:  # of a model that was changed, as by model.linear
            return (
                None,
                f"no class of transformers computes a decoder with {field.name} {getattr(config, field.name)!r}",
            )
    nearest: list[str] | None = None
    for kind, target in targets.items():
        theirs = {"model_type": kind, "architectures": [target.architecture], **target.config(config)}
        differing = different_fields(config, theirs)
        if not differing:
            return _native(kind, target, own, theirs), ""
        if nearest is None or len(differing) < len(nearest):
            nearest = differing
    said = ", ".join(f"{name} {getattr(config, name)!r}" for name in (nearest or [])[:4])
    return None, f"no class of transformers computes a decoder with {said}"


def _native(kind: str, target: Target, own: Any, theirs: dict[str, Any]) -> Native:
    config = folded_config(own)
    rows = getattr(config, "unpadded_vocab", 0) or config.vocab_size
    further = getattr(config, "n_predict", 1) - 1

    def convert(name: str, value: Tensor) -> Converted:
        if name.startswith(FURTHER):
            return iter(())
        if name in ("embedding.weight", "head.weight"):
            value = value[:rows]
        return target.weights(config, name, folded(own, name, value))

    heads = f"{further} heads for later tokens" if further else ""
    return Native(kind, theirs, heads, convert)


def different_fields(config: Any, theirs: dict[str, Any]) -> list[str]:
    """Fields of `config` that the adapter of hugging_face.py would give another value, or all in doubt."""
    try:
        _, back = family_of(theirs)
    except ValueError:
        return ["rope_scaling"]  # the only field whose values the families cannot all write
    here, there = (replace(one, **getattr(one, "inferred", dict)()) for one in (config, back))
    ignored = WITHOUT_EFFECT if theirs["model_type"] == "gpt2" else (*WITHOUT_EFFECT, "max_context")
    # `bias` and `attention_bias` together say which layers have one.
    here, there = (_with_plain_bias(one) for one in (here, there))
    names = [field.name for field in fields(TARGETS[theirs["model_type"]].own) if field.name not in ignored]
    return [name for name in names if getattr(here, name) != getattr(there, name)]


def _with_plain_bias(config: Any) -> Any:
    """`attention_bias` has no effect beside `bias`."""
    return replace(config, attention_bias="none") if getattr(config, "bias", False) else config


# -- GPT-2 -------------------------------------------------------------------------------------------------------------


def gpt2_fields(c: Any) -> dict[str, Any]:
    """The config of a `GPT2LMHeadModel`."""
    return {
        "vocab_size": c.unpadded_vocab or c.vocab_size,
        "n_embd": c.d_model,
        "n_layer": c.n_layers,
        "n_head": c.n_heads,
        "n_inner": c.hidden,
        "n_positions": c.max_context or 1,  # without a limit there are no learned positions: another field says so
        "layer_norm_epsilon": c.norm_eps,
        "activation_function": "gelu" if c.mlp == "gelu" else "gelu_new",
        "embd_pdrop": c.dropout,
        "resid_pdrop": c.dropout,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": True,
    }


def gpt2_weights(c: Any, name: str, value: Tensor) -> Converted:
    """OpenAI's linear layers hold [in, out]."""
    owner, _, kind = name.rpartition(".")
    source = openai_sources(c.n_layers)[owner]
    linear = source.rpartition(".")[2] in ("c_attn", "c_proj", "c_fc") and kind == "weight"
    yield f"transformer.{source}.{kind}", value.t() if linear else value


# -- Llama and Qwen3 ---------------------------------------------------------------------------------------------------


def llama_fields(c: Any) -> dict[str, Any]:
    """The config of a `LlamaForCausalLM`."""
    return {**_llama_sizes(c), "mlp_bias": c.bias}


def qwen3_fields(c: Any) -> dict[str, Any]:
    """The config of a `Qwen3ForCausalLM`."""
    return {**_llama_sizes(c), "use_sliding_window": False}


def _llama_sizes(c: Any) -> dict[str, Any]:
    return {
        "vocab_size": c.unpadded_vocab or c.vocab_size,
        "hidden_size": c.d_model,
        "intermediate_size": c.hidden,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_width,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": _rope_scaling(c),
        "hidden_act": "silu",
        "attention_bias": c.bias or c.attention_bias == "all",
        "tie_word_embeddings": c.tied,
    }


def _rope_scaling(c: Any) -> dict[str, Any] | None:
    for kind, (ours, names) in ROPE_TYPES.items():
        if c.rope_scaling == ours:
            numbers = {theirs: getattr(c, field) for theirs, field in names.items()}
            return None if ours == "none" else {"rope_type": kind, **numbers}
    return {"rope_type": c.rope_scaling}  # which no family knows


def llama_weights(c: Any, name: str, value: Tensor) -> Converted:
    """Our qkv and mlp.up hold the rows of several of their matrices."""
    owner, _, kind = name.rpartition(".")
    theirs = llama_sources(c.n_layers)[owner]
    width = c.head_width
    rows = {3: [c.n_heads * width, c.kv_heads * width, c.kv_heads * width], 2: [c.hidden, c.hidden]}
    parts = value.split(rows[len(theirs)]) if len(theirs) > 1 else (value,)
    for source, part in zip(theirs, parts, strict=True):
        yield f"{source}.{kind}", part


TARGETS = {
    "gpt2": Target("GPT2LMHeadModel", gpt2_fields, gpt2_weights),
    "llama": Target("LlamaForCausalLM", llama_fields, llama_weights),
    "qwen3": Target("Qwen3ForCausalLM", qwen3_fields, llama_weights),
    "mamba2": Target("Mamba2ForCausalLM", mamba2_fields, mamba2_converted, Mamba2Config, (Mamba2Config.__module__,)),
    "zamba2": Target("Zamba2ForCausalLM", zamba2_fields, zamba2_converted, Zamba2Config, (Zamba2Config.__module__,)),
}
