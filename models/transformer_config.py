"""Every switch of the decoder in `transformer.py`: a field, its values, and the combinations that are impossible or known to fail."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from typing import Any

from models import mup as scaling
from models.config import check_ranges, setting
from models.layers.attention import HEADS, LatentAttention, latent_widths, rope_scaling
from models.layers.block import NORM_PLACES
from models.layers.mlp import ACTIVATIONS, hidden_width
from models.layers.norms import NORMS
from models.layers.positions import SCALINGS, check_rotary
from models.layers.residual import START_SCALES

CHOICES: dict[str, Collection[str]] = {
    "norm": NORMS,
    "norm_placement": tuple(NORM_PLACES),
    "positions": ("learned", "rotary", "alibi", "none"),
    "rope_scaling": SCALINGS,
    "attention": ChainMap[str, Any]({"latent": LatentAttention}, HEADS),  # includes what a plug-in adds to HEADS later
    "attention_bias": ("none", "qkv", "all"),
    "attention_gate": ("none", "head", "channel"),
    "attention_kernel": ("auto", "torch", "sdpa", "cudnn", "flex", "flash", "flash3"),
    "mlp": ACTIVATIONS,
    "pattention_mode": ("l2_norm_gelu", "gelu_l2_norm", "softmax"),
    "kernels": ("auto", "torch", "liger"),
    "block": ("serial", "parallel", "parallel_two_norms"),
    "residual": ("plain", "weighted", "static_hyper", "dynamic_hyper"),
    "residual_dtype": ("auto", "bf16"),
    "hyper_start": tuple(START_SCALES),
    "prediction_heads": ("linear", "transformer"),
    "init": ("gpt2", "normal", "mitchell", "width_scaled"),
}
PATTENTION_OF = ("qkv", "out", "mlp")

# Fields -> the condition under which they have an effect. Without it they must have their defaults, because a user who sets
# such a field expects an effect.
MEANT_FOR: dict[tuple[str, ...], tuple[str, Callable[[Any], Any]]] = {
    ("rope_theta", "rope_fraction", "rope_scaling", "rope_factor", "rope_original_context"): (
        "positions rotary",
        lambda c: c.positions == "rotary",
    ),
    ("rope_low_freq_factor", "rope_high_freq_factor"): ("rope_scaling llama3", lambda c: c.rope_scaling == "llama3"),
    ("rope_local_theta",): ("positions rotary and a window", lambda c: c.positions == "rotary" and c.window),
    ("rope_mscale_all_dim",): (
        "attention latent and rope_scaling yarn",
        lambda c: c.attention == "latent" and c.rope_scaling == "yarn",
    ),
    ("kv_rank", "q_rank", "rope_dim"): ("attention latent", lambda c: c.attention == "latent"),
    ("window_pattern",): ("a window", lambda c: c.window),
    ("mlp", "d_hidden", "hidden_ratio"): ("an MLP without pattention", lambda c: "mlp" not in c.pattention),
    ("pattention_slots",): ("pattention of qkv or out", lambda c: "qkv" in c.pattention or "out" in c.pattention),
    ("pattention_mlp_slots",): ("pattention of mlp", lambda c: "mlp" in c.pattention),
    ("pattention_mode",): ("pattention", lambda c: c.pattention),
    # Hyper-connections mix in fp32, and keep an fp32 copy of bf16 streams for that.
    ("residual_dtype",): ("residual plain or weighted", lambda c: not c.residual.endswith("hyper")),
    ("n_streams", "hyper_start"): ("residual static_hyper or dynamic_hyper", lambda c: c.residual.endswith("hyper")),
    ("prediction_heads", "share_unembedding", "prediction_weights"): ("n_predict above 1", lambda c: c.n_predict > 1),
    scaling.FIELDS[1:]: ("mup", lambda c: c.mup),
}


WIDEST, LONGEST, DEEPEST = 1_000_000, 1_000_000_000, 1_000  # channels, tokens, blocks


def _field(default: Any, text: str, low: float = 0, above: float | None = None, high: float = WIDEST) -> Any:
    return setting(default, text, low, above, high)


@dataclass(frozen=True)
class TransformerConfig:
    # -- shape
    vocab_size: int = _field(50304, "rows of the embedding and of the output projection", low=1, high=LONGEST)
    unpadded_vocab: int = _field(
        0, "tokens that exist; later rows are padding and never predicted (0: all rows exist)", high=LONGEST
    )
    d_model: int = _field(768, "width of the residual stream", low=1)
    n_layers: int = _field(12, "blocks", low=1, high=DEEPEST)
    n_heads: int = _field(12, "attention heads", low=1)
    n_kv_heads: int = _field(0, "heads of keys and values, shared by groups of query heads (0: n_heads; 1: MQA)")
    head_dim: int = _field(0, "channels of a head (0: d_model / n_heads)")
    max_context: int = _field(
        0, "longest sequence (0: any); learned positions need it as the length of their table", high=LONGEST
    )
    bias: bool = _field(False, "bias in every linear layer and LayerNorm")
    # -- norms
    norm: str = _field("rms", "layer, rms (RMSNorm, arXiv 1910.07467) or dyt (DyT, arXiv 2503.10622)")
    norm_placement: str = _field(
        "pre",
        "pre, post (after the sum, as in the first Transformer), pre_post (on both ends of each branch, Gemma 2) or branch (on "
        "the output of a branch, OLMo 2)",
    )
    norm_eps: float = _field(1e-5, "added to the variance", above=0)
    qk_norm: bool = _field(False, "RMSNorm of each query and key head separately, before rotation")
    # -- positions
    positions: str = _field("rotary", "learned, rotary (arXiv 2104.09864), alibi (arXiv 2108.12409) or none")
    rope_theta: float = _field(10000.0, "base of the rotary wavelengths", above=1, high=1e12)
    rope_local_theta: float = _field(
        0.0, "rope_theta in layers with a window, without rope_scaling (Gemma 3; 0: as in all other layers)", high=1e12
    )
    rope_fraction: float = _field(1.0, "part of a head's channels that is rotated")
    rope_scaling: str = _field(
        "none",
        "none, interpolate, ntk (the same for every length, unlike `dynamic` in transformers), yarn, llama3 or xpos",
    )
    rope_factor: float = _field(1.0, "for rope_scaling: length of sequences over the length in training")
    rope_original_context: int = _field(
        0, "length in training, for yarn and llama3; for xpos the scale is 1 at half of it", high=LONGEST
    )
    rope_low_freq_factor: float = _field(
        1.0, "llama3: pairs with fewer turns over the original context are interpolated"
    )
    rope_high_freq_factor: float = _field(4.0, "llama3: pairs with more turns over the original context stay unchanged")
    rope_mscale_all_dim: float = _field(
        0.0, "latent attention with yarn: strength of yarn's temperature on all scores (DeepSeek V2 0.707, V3 1)"
    )
    # -- attention
    attention: str = _field("softmax", "softmax, differential (arXiv 2410.05258) or latent (MLA, arXiv 2405.04434)")
    attention_kernel: str = _field("auto", "auto, torch (plain products), sdpa, flex or flash (flash-attn)")
    window: int = _field(0, "tokens that a query sees, including its own (0: all before it)", high=LONGEST)
    window_pattern: str = _field("", "S: layer with the window, L: without; repeated over the layers (empty: all S)")
    attention_softcap: float = _field(0.0, "c: scores become c tanh(score / c) (Gemma 2: 50; 0: none)")
    attention_bias: str = _field("none", "biases when `bias` is off: qkv (Qwen2), all (also the output) or none")
    attention_gate: str = _field("none", "none, head or channel: sigmoid gate on the heads' output (arXiv 2505.06708)")
    forget_gate: bool = _field(False, "scores decay by learned gates, forgetting attention (arXiv 2503.02130)")
    kv_shift: bool = _field(False, "mix in the keys and values of the previous token (arXiv 2411.19574)")
    value_residual: bool = _field(False, "mix in the first layer's values (ResFormer, arXiv 2410.17897)")
    kv_rank: int = _field(0, "latent attention: width of the cached latent (0: 4 head_dim)")
    q_rank: int = _field(0, "latent attention: width of the queries' latent (0: no latent)")
    rope_dim: int = _field(0, "latent attention: rotated channels in addition to head_dim (0: head_dim / 2)")
    # -- MLP and projections
    mlp: str = _field("swiglu", ", ".join(ACTIVATIONS))
    d_hidden: int = _field(0, "hidden width of the MLP (0: by hidden_ratio)")
    hidden_ratio: float = _field(
        0.0, "hidden width over d_model (0: 4; with gates 8/3 rounded up, about as many weights)"
    )
    hidden_multiple: int = _field(256, "an inferred 8/3 d_model is rounded up to a multiple of this", low=1)
    pattention: str = _field(
        "", "projections that attend to parameters: any of qkv, out, mlp (TokenFormer, 2410.23168)"
    )
    pattention_slots: int = _field(0, "parameter tokens of qkv and out (0: d_model)")
    pattention_mlp_slots: int = _field(0, "parameter tokens of the MLP (0: 4 d_model)")
    pattention_mode: str = _field("l2_norm_gelu", "l2_norm_gelu, gelu_l2_norm or softmax")
    # -- block and residual stream
    block: str = _field("serial", "serial, parallel (PaLM: one norm, fused) or parallel_two_norms")
    residual: str = _field("plain", "plain, weighted, static_hyper or dynamic_hyper (hyper-connections, 2409.19606)")
    residual_dtype: str = _field(
        "auto", "auto (fp32 under autocast, otherwise that of the weights) or bf16 (also under autocast to bf16)"
    )
    n_streams: int = _field(4, "residual streams of hyper-connections", low=1, high=DEEPEST)
    hyper_start: str = _field(
        "plain", "std of the branches' last matrices under hyper-connections: plain, shrunk or grown by sqrt(n_streams)"
    )
    x0_skip: bool = _field(False, "every block's input is a learned mix of the stream and the embedding")
    unet_skips: bool = _field(
        False, "the second half of the blocks also gets the outputs of the first half, in reverse order"
    )
    value_embeddings: int = _field(0, "tables of token embeddings mixed into the values of the first and last layers")
    # -- embedding, head and loss
    tied: bool = _field(True, "the output projection is the embedding")
    embedding_scale: bool = _field(False, "multiply embeddings by sqrt(d_model)")
    final_softcap: float = _field(0.0, "c: logits become c tanh(logit / c) (Gemma 2: 30; 0: none)")
    z_loss: float = _field(0.0, "coefficient of logsumexp^2 (PaLM: 1e-4)")
    neftune_alpha: float = _field(0.0, "noise on the embeddings in training (arXiv 2310.05914)")
    dropout: float = _field(
        0.0,
        "part of the embeddings, and of what each branch adds, that is zero in training (arXiv 1207.0580)",
        high=0.99,
    )
    n_predict: int = _field(
        1, "tokens predicted at once (multi-token prediction, arXiv 2404.19737)", low=1, high=DEEPEST
    )
    prediction_heads: str = _field("linear", "linear (one norm each) or transformer (one block each, as in the paper)")
    share_unembedding: bool = _field(True, "all prediction heads use one output projection")
    prediction_weights: str = _field("", "factor of each head's loss; the first is 1: 1,0.5,0.25 (empty: all 1)")
    kernels: str = _field(
        "auto", "for everything except attention: auto, torch or liger (its RMSNorm, SwiGLU and loss)"
    )
    # -- initialisation
    init: str = _field("gpt2", "gpt2 (residual projections / sqrt(2 L)), normal, mitchell (OLMo) or width_scaled")
    init_std: float = _field(
        0.02, "standard deviation of embeddings (except under mitchell), and of matrices under gpt2 and normal", above=0
    )
    zero_init: bool = _field(
        False, "branches start at zero: their last matrix, or the gain of the norm that follows it"
    )

    # -- the same learning rate at every size: mup.py
    mup: bool = _field(False, "maximal update parametrisation: lr, decay and init of a base for every width and depth")
    mup_base_width: int = _field(0, "mup: d_model at which it equals the standard parametrisation (0: 256)")
    mup_base_depth: int = _field(
        0, "mup: n_layers at which it equals the standard one (0: 2; n_layers with learned mixing)", high=DEEPEST
    )
    mup_base_head_dim: int = _field(0, "mup: channels of a head at the base (0: as here, so heads do not grow)")

    # -- derived ---------------------------------------------------------------------------------------------------

    @property
    def head_width(self) -> int:
        return self.head_dim or self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def hidden(self) -> int:
        by_ratio = round(self.hidden_ratio * self.d_model)
        return self.d_hidden or by_ratio or hidden_width(self.mlp, self.d_model, self.hidden_multiple)

    @property
    def slots(self) -> int:
        return self.pattention_slots or self.d_model

    @property
    def mlp_slots(self) -> int:
        return self.pattention_mlp_slots or 4 * self.d_model

    def inferred(self) -> dict[str, int]:
        """Field -> the number that a 0 in it stands for, for fields that have an effect in this decoder."""
        rope, rank, _ = latent_widths(self)
        latent = {"kv_rank": rank, "rope_dim": rope}
        heads = latent if self.attention == "latent" else {"n_kv_heads": self.kv_heads}
        slots = {"pattention_slots": self.slots} if self.pattention_of else {}
        mlp = {"pattention_mlp_slots": self.mlp_slots} if "mlp" in self.pattention_of else {"d_hidden": self.hidden}
        base = dict(zip(scaling.FIELDS[1:], scaling.base_of(self), strict=True)) if self.mup else {}
        return {"head_dim": self.head_width} | heads | slots | mlp | base

    @property
    def multipliers(self) -> scaling.Multipliers:
        return scaling.Multipliers.of(self)

    @property
    def qkv_has_bias(self) -> bool:
        return self.bias or self.attention_bias != "none"

    @property
    def out_has_bias(self) -> bool:
        return self.bias or self.attention_bias == "all"

    @property
    def streams(self) -> int:
        """Number of residual streams of hyper-connections; 0 without them."""
        return self.n_streams if self.residual.endswith("hyper") else 0

    @property
    def pattention_of(self) -> list[str]:
        return [name for name in self.pattention.replace("+", ",").split(",") if name]

    @property
    def head_weights(self) -> list[float]:
        """Factor of each prediction head's loss."""
        return [float(text) for text in self.prediction_weights.split(",") if text] or [1.0] * self.n_predict

    def window_of(self, layer: int) -> int:
        """The window of a layer; 0 if it has none."""
        pattern = self.window_pattern or "S"
        return self.window if pattern[layer % len(pattern)] == "S" else 0

    def value_table_of(self, layer: int) -> int | None:
        """Which table of value embeddings a layer gets: the first k layers get tables 0 to k - 1, and so do the last k layers."""
        for table in (layer, layer - (self.n_layers - self.value_embeddings)):
            if 0 <= table < self.value_embeddings:
                return table
        return None

    # -- checks ----------------------------------------------------------------------------------------------------

    def __post_init__(self) -> None:
        check_ranges(self)
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        for check in (
            self._check_meanings,
            self._check_heads,
            self._check_attention,
            self._check_block,
            self._check_loss,
        ):
            check()
        scaling.check(self)

    def _check_meanings(self) -> None:
        defaults = {f.name: f.default for f in fields(self)}
        for names, (what, has_meaning) in MEANT_FOR.items():
            for name in names:
                if getattr(self, name) != defaults[name] and not has_meaning(self):
                    raise ValueError(
                        f"{name} has a meaning only with {what}; without that it must be {defaults[name]!r}, its default, "
                        f"not {getattr(self, name)!r}"
                    )

    def _check_heads(self) -> None:
        if not self.head_dim and self.d_model % self.n_heads:
            raise ValueError(
                f"n_heads must divide d_model ({self.d_model}), but {self.n_heads} does not; or set head_dim"
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_kv_heads must divide n_heads ({self.n_heads}), but {self.kv_heads} does not")
        if self.positions == "learned" and not self.max_context:
            raise ValueError("max_context must be set with learned positions: it is the length of their table")
        if self.positions == "rotary":
            width = latent_widths(self)[0] if self.attention == "latent" else self.head_width
            check_rotary(width, self.rope_theta, self.rope_fraction, rope_scaling(self))
            if 0 < self.rope_local_theta <= 1:
                raise ValueError(f"rope_local_theta must be above 1, not {self.rope_local_theta}")

    def _check_attention(self) -> None:
        if set(self.window_pattern) - {"S", "L"}:
            raise ValueError(f"window_pattern must be letters S and L, not {self.window_pattern!r}")
        if self.max_context and self.window > self.max_context:
            raise ValueError(f"window must be at most max_context ({self.max_context}), not {self.window}")
        if self.value_residual and self.value_embeddings:
            raise ValueError("value_residual and value_embeddings both mix into the values; choose one")
        if 2 * self.value_embeddings > self.n_layers:
            raise ValueError(f"value_embeddings must be at most n_layers / 2 ({self.n_layers // 2})")
        if self.attention == "differential" and self.kv_heads % 2:
            raise ValueError(f"n_kv_heads must be even for differential attention, but {self.kv_heads} is not")
        if self.attention_kernel == "sdpa" and self.attention_softcap:
            raise ValueError("attention_kernel must not be sdpa with attention_softcap: sdpa has no soft-cap")
        if self.attention_kernel == "flash" and (self.forget_gate or self.positions == "alibi"):
            raise ValueError(
                "attention_kernel must not be flash with alibi or forget_gate: flash does not support their biases"
            )
        if self.attention == "latent":
            self._check_latent()

    def _check_latent(self) -> None:
        if self.positions != "rotary":
            raise ValueError("positions must be rotary with latent attention, which has separate channels for rotation")
        for name in ("n_kv_heads", "qk_norm", "kv_shift", "value_residual", "value_embeddings"):
            if getattr(self, name):
                raise ValueError(f"{name} cannot be used with latent attention: its keys and values share one latent")
        if self.attention_gate != "none" or self.forget_gate:
            raise ValueError("attention_gate and forget_gate cannot be used with latent attention")

    def _check_block(self) -> None:
        unknown = set(self.pattention_of) - set(PATTENTION_OF)
        if unknown:
            raise ValueError(
                f"pattention must name some of {', '.join(PATTENTION_OF)}, not {', '.join(sorted(unknown))}"
            )
        if self.hidden_ratio and round(self.hidden_ratio * self.d_model) < 1:
            raise ValueError(
                f"hidden_ratio must give the MLP at least one channel: {self.d_model} (d_model) times {self.hidden_ratio} rounds to 0"
            )
        if self.pattention_of and self.attention == "latent":
            raise ValueError(
                "pattention cannot be used with latent attention: its projections are products of two matrices"
            )
        if {"out", "mlp"} & set(self.pattention_of) and self.zero_init:
            if self.norm_placement not in ("pre_post", "branch"):
                raise ValueError(
                    "zero_init must be off with pattention of out or mlp, unless norm_placement is pre_post or branch"
                )
        if self.block != "serial":
            if self.norm_placement != "pre":
                raise ValueError(f"norm_placement must be pre with block {self.block}: its two branches share one sum")
            if self.streams:
                raise ValueError(f"residual must be plain or weighted with block {self.block}, not {self.residual}")
        if self.block == "parallel" and (self.pattention_of or self.attention == "latent"):
            raise ValueError("block parallel can only fuse plain projections; use parallel_two_norms")
        if self.block == "parallel" and self.attention_bias != "none" and not self.bias:
            raise ValueError(
                "attention_bias must be none with block parallel: attention and MLP share its matrices; set bias instead"
            )
        if self.norm_placement == "post" and self.streams:
            raise ValueError(f"norm_placement must not be post with residual {self.residual}")

    def _check_loss(self) -> None:
        if self.unpadded_vocab > self.vocab_size:
            raise ValueError(
                f"unpadded_vocab must be at most vocab_size ({self.vocab_size}), not {self.unpadded_vocab}"
            )
        try:
            weights = self.head_weights
        except ValueError:
            weights = []
        usable = all(0 <= weight < math.inf for weight in weights)
        if len(weights) != self.n_predict or weights[0] != 1 or not usable:
            raise ValueError(
                f"prediction_weights must be n_predict ({self.n_predict}) finite numbers, not negative, with 1 as the first, "
                f"not {self.prediction_weights!r}"
            )
