"""Maximal update parametrisation of the decoder (`model.mup`): a learning rate, a weight decay and initial weights that suit a small
base also suit every other width and depth.

With m = width / base width and l = depth / base depth (width: arXiv 2203.03466; depth: CompleteP, 2505.01618, with alpha 1):

    hidden matrices            initial std / sqrt(m); lr / m and weight decay * m (of AdamW), Adam's epsilon / (m l)
    norms, biases in blocks    as at the base, Adam's epsilon / (m l)
    embedding, head, last norm as at the base, Adam's epsilon / m
    each branch                its output / l
    input of the head          / m, also where the head is the embedding's matrix
    scores of attention        with heads wider than the base's: sqrt(base head) / head instead of 1 / sqrt(head)

Where m = l = 1 nothing changes. lr * decay of hidden matrices stays: the weights' memory (2405.13698) does not depend on the width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

# The base where the config names none: that of CompleteP's experiments.
BASE_WIDTH, BASE_DEPTH = 256, 2
FIELDS = ("mup", "mup_base_width", "mup_base_depth", "mup_base_head_dim")
INITS = ("gpt2", "normal")


@dataclass(frozen=True)
class Multipliers:
    """How many times wider and deeper a decoder is than its base, and its heads than the base's. All are 1 without mup."""

    width: float = 1.0
    depth: float = 1.0
    head: float = 1.0

    @classmethod
    def of(cls, config: Any) -> Multipliers:
        base_width, base_depth, base_head = base_of(config)
        return cls(config.d_model / base_width, config.n_layers / base_depth, config.head_width / base_head)

    @property
    def branch(self) -> float:
        """Factor of what a branch adds to the residual stream."""
        return 1 / self.depth

    @property
    def output(self) -> float:
        """Factor of the head's input."""
        return 1 / self.width

    @property
    def hidden_std(self) -> float:
        """Factor of a hidden matrix's initial standard deviation."""
        return self.width**-0.5

    @property
    def scores(self) -> float:
        """Factor of attention's scores besides 1 / sqrt(head width)."""
        return self.head**-0.5


class Transfer(NamedTuple):
    """How the optimizer treats some parameters of a decoder with mup. what: their name in the plan; width: that of the model over the
    base's for a hidden matrix, 1 for all others; eps: factor of Adam's epsilon."""

    what: str
    width: float
    eps: float


def base_of(config: Any) -> tuple[int, int, int]:
    """(width, depth, width of a head) at which nothing changes. Without mup these are the model's own."""
    if not config.mup:
        return config.d_model, config.n_layers, config.head_width
    depth = config.n_layers if learned_mixing(config) else BASE_DEPTH
    head = config.mup_base_head_dim or config.head_width
    return config.mup_base_width or BASE_WIDTH, config.mup_base_depth or depth, head


def learned_mixing(config: Any) -> list[str]:
    """The switches of a decoder by which it learns how to mix its stream. They have no rule over depth: its own depth is the base's."""
    mixing = {"residual": config.residual != "plain", "x0_skip": config.x0_skip, "unet_skips": config.unet_skips}
    return [name for name, used in mixing.items() if used]


def check(config: Any) -> None:
    """ValueError for switches whose rule over width or depth is not known."""
    if not config.mup:
        return
    if config.attention == "latent":
        raise ValueError("mup cannot be used with latent attention: its ranks say which matrices grow with the width")
    if config.init not in INITS:
        raise ValueError(
            f"init must be {' or '.join(INITS)} with mup, not {config.init!r}, which has another rule over the size"
        )
    scales = Multipliers.of(config)
    if scales.head != 1 and config.attention != "softmax":
        raise ValueError(
            f"mup_base_head_dim must be that of the model with attention {config.attention}: its heads have no rule for growth"
        )
    named = learned_mixing(config)
    if scales.depth != 1 and named:
        raise ValueError(
            f"mup_base_depth must be n_layers ({config.n_layers}) with {' and '.join(named)}: learned mixing of the stream has no rule "
            "over depth; leave mup_base_depth out"
        )


def transfers(model: Any) -> dict[str, Transfer]:
    """Name of each parameter of a decoder -> how the optimizer treats it; {} where nothing changes."""
    scales = Multipliers.of(model.config)
    if scales == Multipliers():
        return {}
    inside = 1 / (scales.width * scales.depth)
    hidden = Transfer("hidden matrices", scales.width, inside)
    kinds = {True: Transfer("in blocks", 1.0, inside), False: Transfer("outside of blocks", 1.0, 1 / scales.width)}
    return {
        name: hidden if role == "matrix" else kinds[name.startswith("layers.") or ".block." in name]
        for role, names in model.parameter_groups().items()
        for name in names
    }


# -- for programs that do not know the multipliers ---------------------------------------------------------------------


def folded_config(config: Any) -> Any:
    """The Config without mup, of a decoder that computes the same with `folded` weights."""
    off: Mapping[str, Any] = {"mup": False, "mup_base_width": 0, "mup_base_depth": 0, "mup_base_head_dim": 0}
    return replace(config, **off) if getattr(config, "mup", False) else config


def folded(config: Any, name: str, value: Tensor) -> Tensor:
    """The weight `name` with the multiplier that follows or precedes its product. config: with mup or without; pre-norm blocks."""
    if not getattr(config, "mup", False):
        return value
    scales = Multipliers.of(config)
    owner, _, kind = name.rpartition(".")
    if owner == "norm":
        return value * scales.output  # the head reads x / m
    if owner.endswith((".attention.out", ".mlp.out")):
        return value * scales.branch
    if owner.endswith(".heads.query_norm"):
        return value * scales.scores
    if owner.endswith(".attention.qkv") and not config.qk_norm:
        value = value.clone()
        value[: config.n_heads * config.head_width] *= scales.scores
    return value
