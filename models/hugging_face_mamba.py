"""Mamba-2 and Zamba2 of transformers, both ways: sizes and weights of `Mamba2ForCausalLM` and `Zamba2ForCausalLM`.

`theirs` is the config of transformers, or an object with the fields of a config.json. What their class cannot have is written as
what it has, so that whoever reads it back sees the difference.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import inf
from typing import Any

import torch
from torch import Tensor

from models.hugging_face_checks import fitting, refuse_leftovers, refuse_others
from models.mamba2 import Mamba2Config
from models.zamba2 import Zamba2Config

GATE_EPS = 1e-5  # of the norm after the gate, in Zamba2ForCausalLM
# Zamba2ForCausalLM takes no time step below `time_step_min`, whose logarithm it also wants; ours are bounded by 0. So is, in fp32,
# every softplus(x) with x > -69.
NO_BOUND = 1e-30
UNBOUNDED = ((0.0, inf), (0.0, {"__float__": "Infinity"}))  # of time_step_limit; the second as a config.json says it
MIXER = ("in_proj.weight", "out_proj.weight", "norm.weight", "conv.weight", "conv.bias", "A_log", "D", "dt_bias")


def mixer_names(ours: str, theirs: str) -> dict[str, tuple[str, ...]]:
    """Our parameters of a mixer -> theirs; `ours` and `theirs` begin the names."""
    return {f"{ours}.{name}": (f"{theirs}.{name.replace('conv.', 'conv1d.')}",) for name in MIXER}


def converted(sources: Mapping[str, tuple[str, ...]], name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(their name, value) of our parameter: rows are divided, or the same value has several names (`.A.`); theirs of the convolution
    has a channel in between, [C, 1, K]."""
    theirs = sources[name]
    if name.endswith("conv.weight"):
        value = value.unsqueeze(1)
    whole = len(theirs) == 1 or name.endswith(".A.weight")
    parts = [value] * len(theirs) if whole else value.chunk(len(theirs))
    yield from zip(theirs, (part.clone() for part in parts), strict=True)


def read(
    model: Any, sources: Mapping[str, tuple[str, ...]], weights: Mapping[str, Tensor], copies: Mapping[str, list[str]]
) -> Iterator[tuple[str, Tensor]]:
    """(our name, value) of every parameter. copies: their name -> all names under which the file may hold it.

    KeyError or RuntimeError if names or shapes do not match, if copies differ, or if weights are left over.
    """
    left = set(weights)
    for name, parameter in model.named_parameters():
        parts = [_once(key, weights, copies.get(key, [key]), left) for key in sources[name]]
        said = " + ".join(sources[name])
        if name.endswith(".A.weight"):
            if any(not torch.equal(part, parts[0]) for part in parts):
                raise RuntimeError(f"{said} differ; here queries, keys and values share the first factor of a change")
            parts = parts[:1]
        value = torch.cat(parts)
        yield name, fitting(value.squeeze(1) if name.endswith("conv.weight") else value, parameter, said)
    refuse_leftovers(left, model, weights, sources["embedding.weight"][0])


def _once(key: str, weights: Mapping[str, Tensor], names: list[str], left: set[str]) -> Tensor:
    """The weight that the file holds under one or several of `names`."""
    held = [name for name in names if name in weights] or [key]
    value = weights[held[0]]
    for name in held[1:]:
        if not torch.equal(weights[name], value):
            raise RuntimeError(f"{held[0]} and {name} differ, but they are one weight of a shared block")
    left -= set(held)
    return value


# -- Mamba-2 -----------------------------------------------------------------------------------------------------------


def mamba2_config(theirs: Any) -> Mamba2Config:
    """The Config of a `mamba2` that computes the same as a `Mamba2ForCausalLM` with the config `theirs`.

    ValueError, with the name of their field, if it needs something that this model does not have.
    """
    needed = {"hidden_act": "silu", "use_bias": False, "use_conv_bias": True, "rms_norm": True, "n_groups": 1}
    refuse_others(theirs, {"model_type": "mamba2", **needed})  # their norm after the gate is over all groups
    limit = tuple(getattr(theirs, "time_step_limit", UNBOUNDED[0]))
    if limit not in UNBOUNDED:
        raise ValueError(f"time_step_limit {limit} is not implemented here, only {UNBOUNDED[0]}")
    if theirs.expand * theirs.hidden_size != theirs.num_heads * theirs.head_dim:
        raise ValueError("num_heads times head_dim must be expand times hidden_size")
    return Mamba2Config(
        vocab_size=theirs.vocab_size,
        d_model=theirs.hidden_size,
        n_layers=theirs.num_hidden_layers,
        state_size=theirs.state_size,
        ssm_head_dim=theirs.head_dim,
        expand=theirs.expand,
        conv_size=theirs.conv_kernel,
        norm_eps=theirs.layer_norm_epsilon,
        tied=theirs.tie_word_embeddings,
    )


def mamba2_fields(c: Any) -> dict[str, Any]:
    """The config of a `Mamba2ForCausalLM`."""
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "num_hidden_layers": c.n_layers,
        "state_size": c.state_size,
        "head_dim": c.ssm_head_dim,
        "num_heads": c.expand * c.d_model // c.ssm_head_dim,
        "expand": c.expand,
        "n_groups": 1,
        "conv_kernel": c.conv_size,
        "layer_norm_epsilon": c.norm_eps,
        "hidden_act": "silu",
        "use_bias": False,
        "use_conv_bias": True,
        "tie_word_embeddings": c.tied,
    }


def mamba2_sources(n_layers: int) -> dict[str, tuple[str, ...]]:
    """Our parameter -> theirs."""
    sources: dict[str, tuple[str, ...]] = {
        "embedding.weight": ("backbone.embeddings.weight",),
        "norm.weight": ("backbone.norm_f.weight",),
        "head.weight": ("lm_head.weight",),
    }
    for layer in range(n_layers):
        theirs = f"backbone.layers.{layer}"
        sources[f"layers.{layer}.norm.weight"] = (f"{theirs}.norm.weight",)
        sources |= mixer_names(f"layers.{layer}.mixer", f"{theirs}.mixer")
    return sources


def mamba2_weights(model: Any, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(our name, value) of every parameter of a `mamba2`, from the weights of a `Mamba2ForCausalLM`; errors as of `read`."""
    return read(model, mamba2_sources(model.config.n_layers), weights, {})


def mamba2_converted(c: Any, name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(their name, value) of each matrix in our parameter."""
    return converted(mamba2_sources(c.n_layers), name, value)


# -- Zamba2 ------------------------------------------------------------------------------------------------------------


def zamba2_config(theirs: Any) -> Zamba2Config:
    """The Config of a `zamba2` that computes the same as a `Zamba2ForCausalLM` with the config `theirs`.

    ValueError, with the name of their field, if it needs something that this model does not have.
    """
    heads, d = theirs.num_attention_heads, theirs.hidden_size
    needed = {"hidden_act": "gelu", "use_conv_bias": True, "add_bias_linear": False, "use_long_context": False}
    needed |= {"rms_norm_eps": GATE_EPS, "attention_hidden_size": 2 * d, "attention_head_dim": 2 * d // heads}
    refuse_others(theirs, {"model_type": "zamba2", **needed})
    if theirs.time_step_min > NO_BOUND:
        raise ValueError(
            f"time_step_min {theirs.time_step_min} is not implemented here: no time step has a lower bound"
        )
    if (theirs.num_key_value_heads or heads) != heads:
        raise ValueError(f"num_key_value_heads {theirs.num_key_value_heads} is not implemented here, only {heads}")
    hidden = theirs.intermediate_size or 4 * d
    inner = theirs.mamba_expand * d
    for name, value, divisor in (("intermediate_size", hidden, d), ("n_mamba_heads", inner, theirs.n_mamba_heads)):
        if value % divisor:
            raise ValueError(f"{name} {getattr(theirs, name)} is not implemented here: {divisor} must divide {value}")
    return Zamba2Config(
        vocab_size=theirs.vocab_size,
        d_model=d,
        n_layers=theirs.num_hidden_layers,
        hybrid_every=_hybrid_every(theirs),
        shared_blocks=theirs.num_mem_blocks,
        attention_head_dim=2 * d // heads,
        rope_theta=_rope_theta(theirs),
        mlp_ratio=hidden // d,
        adapter_rank=theirs.adapter_rank,
        attention_adapter=theirs.use_shared_attention_adapter,
        state_size=theirs.mamba_d_state,
        ssm_head_dim=inner // theirs.n_mamba_heads,
        expand=theirs.mamba_expand,
        n_groups=theirs.mamba_ngroups,
        conv_size=theirs.mamba_d_conv,
        norm_eps=theirs.rms_norm_eps,
        tied=theirs.tie_word_embeddings,
    )


def _hybrid_every(theirs: Any) -> int:
    """After how many layers the next one uses a shared block. ValueError if they are not spread evenly."""
    kinds = list(theirs.layers_block_type or [])
    if "hybrid" in kinds and set(kinds) <= {"hybrid", "mamba"}:
        every = kinds.index("hybrid") + 1
        if all((kind == "hybrid") == ((layer + 1) % every == 0) for layer, kind in enumerate(kinds)):
            return every
    raise ValueError("layers_block_type is not implemented here, unless the last of every N layers is hybrid")


def _rope_theta(theirs: Any) -> float:
    """The base of the rotary positions; 0 if there are none."""
    if not theirs.use_mem_rope:
        return 0.0
    given = dict(getattr(theirs, "rope_parameters", None) or {})  # of transformers 5
    refuse_others(theirs, {"rope_scaling": None})
    if given.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type {given['rope_type']!r} is not implemented here")
    return float(given.get("rope_theta") or theirs.rope_theta)


def zamba2_fields(c: Any) -> dict[str, Any]:
    """The config of a `Zamba2ForCausalLM`."""
    heads, hybrids = 2 * c.d_model // c.attention_head_dim, c.hybrids
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "num_hidden_layers": c.n_layers,
        "layers_block_type": ["hybrid" if layer in hybrids else "mamba" for layer in range(c.n_layers)],
        "num_mem_blocks": c.shared_blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "attention_dropout": 0.0,
        "use_mem_rope": c.rope_theta > 0,
        "rope_theta": c.rope_theta or 10000.0,
        "intermediate_size": c.mlp_ratio * c.d_model,
        "hidden_act": "gelu",
        "adapter_rank": c.adapter_rank,
        "use_shared_attention_adapter": c.attention_adapter,
        "mamba_d_state": c.state_size,
        "mamba_d_conv": c.conv_size,
        "mamba_expand": c.expand,
        "mamba_ngroups": c.n_groups,
        "n_mamba_heads": c.expand * c.d_model // c.ssm_head_dim,
        "time_step_min": NO_BOUND,
        "use_conv_bias": True,
        "add_bias_linear": False,
        "rms_norm_eps": GATE_EPS,
        "tie_word_embeddings": c.tied,
    }


def zamba2_sources(c: Any) -> dict[str, tuple[str, ...]]:
    """Our parameter -> theirs, of which ours joins the rows (or, for the first factor of a change, equals each). A shared block has
    the names of the first layer that uses it."""
    sources: dict[str, tuple[str, ...]] = {
        "embedding.weight": ("model.embed_tokens.weight",),
        "norm.weight": ("model.final_layernorm.weight",),
        "head.weight": ("lm_head.weight",),
    }
    for layer in range(c.n_layers):
        theirs = f"model.layers.{layer}"
        if layer in c.hybrids:
            sources[f"layers.{layer}.linear.weight"] = (f"{theirs}.linear.weight",)
            theirs += ".mamba_decoder"
        sources[f"layers.{layer}.norm.weight"] = (f"{theirs}.input_layernorm.weight",)
        sources |= mixer_names(f"layers.{layer}.mixer", f"{theirs}.mamba")
    for block, layers in enumerate(_uses(c)):
        theirs, ours = f"model.layers.{layers[0]}.shared_transformer", f"shared.{block}"
        for name, source in {
            "norm": "input_layernorm",
            "mlp_norm": "pre_ff_layernorm",
            "attention.out": "self_attn.o_proj",
            "up": "feed_forward.gate_up_proj",
            "down": "feed_forward.down_proj",
        }.items():
            sources[f"{ours}.{name}.weight"] = (f"{theirs}.{source}.weight",)
        sources[f"{ours}.attention.qkv.weight"] = tuple(f"{theirs}.self_attn.{x}_proj.weight" for x in "qkv")
        for use, layer in enumerate(layers):
            number = c.hybrids.index(layer)
            for name, part in (("A", 0), ("B", 1)):
                end = f"{number}.{part}.weight"
                changes = f"{theirs}.feed_forward.gate_up_proj_adapter_list.{end}"
                sources[f"{ours}.adapters.{use}.{name}.weight"] = (changes,)
                lists = tuple(f"{theirs}.self_attn.linear_{x}_adapter_list.{end}" for x in "qkv")
                sources[f"{ours}.attention_adapters.{use}.{name}.weight"] = lists
    return sources


def _uses(c: Any) -> list[list[int]]:
    """The layers that use each shared block."""
    return [layers for block in range(c.shared_blocks) if (layers := c.hybrids[block :: c.shared_blocks])]


def zamba2_weights(model: Any, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(our name, value) of every parameter of a `zamba2`, from the weights of a `Zamba2ForCausalLM`; errors as of `read`."""
    c = model.config
    first = {layer: layers[0] for layers in _uses(c) for layer in layers}
    copies: dict[str, list[str]] = {}
    for name in sorted(weights):
        found = re.match(r"model\.layers\.(\d+)\.shared_transformer\.", name)
        layer = int(found[1]) if found else -1
        key = name if found is None else f"model.layers.{first.get(layer, layer)}." + name.split(".", 3)[3]
        copies.setdefault(key, []).append(name)
    return read(model, zamba2_sources(c), weights, copies)


def zamba2_converted(c: Any, name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(their name, value) of each matrix in our parameter."""
    return converted(zamba2_sources(c), name, value)
