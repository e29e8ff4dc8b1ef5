"""Well-known decoders: named sets of the switches of `transformer.py`."""

from __future__ import annotations

from dataclasses import field, fields, make_dataclass
from typing import Any

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
