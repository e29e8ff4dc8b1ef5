"""Hourglass transformers (arXiv 2110.13711): blocks at full length, blocks over every k-th token, and blocks at full length again.

    x = pre(x);  x = x + upsampled(inner(shortened(x)));  x = post(x)

`inner` is a stack of blocks, or an hourglass with a further factor. `hierarchy` lists the path in the paper's notation, blocks at a
factor: "3@1,9@4,3@1", or "2@1,2@2,8@6,2@2,2@1" with factors of 2 and 3.

Coarse token i stands at position ik. It is made of the k tokens ik - k + 1 ... ik (zeros before the start), so it may inform
position ik and later ones, and no other token is computed late or early:

- `shortening`: avg, their mean; linear, one matrix for all k; attention, that matrix, then attention of it to all tokens up to ik.
- `upsampling`: what token t gets of coarse token t // k: repeat; linear, through a matrix for each of the k places; attention,
  that added to x, then attention of the sum to the coarse tokens up to t // k. (x is added once, unlike in BlaGPT.)

As in the paper an MLP follows each of these attentions. Positions are those of the text at every level, rotary, also between levels.
The text may have any length. BlaGPT's default is 3@1,9@4,3@1 (it builds 3 more blocks) with both attentions, biases of queries, keys
and values, embeddings times sqrt(d_model), and no norm before the head, which has a bias; here are no biases, and a final norm.

Where documents are kept apart, a coarse token belongs to the document of its position: it is made of that document's tokens alone,
and informs only these. A token whose document has no coarse token yet gets nothing added.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Hidden, register
from models.config import check_choice, check_ranges, setting
from models.layers.attend import KERNELS
from models.layers.causal import Context, with_earlier
from models.layers.mlp import ACTIVATIONS, hidden_width
from models.layers.norms import RMSNorm
from models.layers.patches_fixed import HierarchicalStack, Level, check_state
from models.layers.plain_attention import visible
from models.layers.plain_block import CrossAttention, Feedforward, PlainBlock, Seen, Shape, reset_parts
from models.layers.positions import number_documents
from models.state import DecodingState


@dataclass(frozen=True)
class HourglassConfig:
    vocab_size: int = setting(50304, "rows of the embedding and of the output projection", low=1, high=10**9)
    d_model: int = setting(768, "width of the residual stream", low=1, high=10**6)
    n_layers: int = setting(15, "blocks, of all levels", low=1, high=1000)
    n_heads: int = setting(12, "attention heads; must divide d_model into heads of even width", low=1, high=10**4)
    shorten_factor: int = setting(
        4, "tokens for which one stands in the middle (k), without a hierarchy", low=1, high=1000
    )
    hierarchy: str = setting(
        "", 'blocks at each level, such as "3@1,9@4,3@1"; empty: a fifth, the rest at shorten_factor, a fifth'
    )
    shortening: str = setting("attention", "avg, linear or attention")
    upsampling: str = setting("attention", "repeat, linear or attention")
    rope_theta: float = setting(1e4, "base of the rotary wavelengths", above=1, high=1e12)
    qk_norm: bool = setting(True, "queries and keys of the blocks pass an RMSNorm of their own")
    mlp: str = setting("swiglu", "activation of the MLPs, see layers/mlp.py; they are as wide as there")
    norm_eps: float = setting(1e-6, "added to the mean square in RMSNorm", above=0, high=1)
    init_std: float = setting(0.02, "standard deviation of the initial matrices", above=0, high=1)
    tied: bool = setting(True, "the output projection is the embedding")
    dropout: float = setting(0.0, "part of what each branch adds that is zero in training", low=0, high=0.99)
    attention_kernel: str = setting("auto", "of the blocks: auto, torch, sdpa, cudnn, flex, flash or flash3")

    def __post_init__(self) -> None:
        check_ranges(self)
        check_choice(self, "attention_kernel", ("auto", *KERNELS))
        for name, known in (
            ("shortening", ("avg", "linear", "attention")),
            ("upsampling", ("repeat", "linear", "attention")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be {', '.join(known[:-1])} or {known[-1]}, not {getattr(self, name)!r}")
        if self.mlp not in ACTIVATIONS:
            raise ValueError(f"mlp must be one of {', '.join(ACTIVATIONS)}, not {self.mlp!r}")
        self.shape.check("n_heads")
        blocks = sum(count for count, _ in self.path)
        if blocks != self.n_layers:
            raise ValueError(
                f"n_layers must be {blocks}, the blocks of hierarchy {self.hierarchy}, not {self.n_layers}"
            )

    @property
    def path(self) -> list[tuple[int, int]]:
        """(blocks, factor) of each level, down and up again."""
        if self.hierarchy:
            return parse_hierarchy(self.hierarchy)
        outer = (self.n_layers + 2) // 5
        return [(outer, 1), (self.n_layers - 2 * outer, self.shorten_factor), (outer, 1)]

    @property
    def factors(self) -> list[int]:
        """Of the levels, each as a multiple of the one above."""
        down = [factor for _, factor in self.path[: len(self.path) // 2 + 1]]
        return [lower // upper for upper, lower in pairwise(down)]

    @property
    def shape(self) -> Shape:
        hidden = hidden_width(self.mlp, self.d_model, 8)
        numbers = self.rope_theta, self.norm_eps, self.init_std, self.n_layers, self.dropout, self.qk_norm
        return Shape(self.d_model, self.n_heads, self.mlp, hidden, *numbers)


def parse_hierarchy(text: str) -> list[tuple[int, int]]:
    """[(blocks, factor)] of "3@1,9@4,3@1"; ValueError, which begins with `hierarchy`, if it is not such a path."""
    told = f'hierarchy must be like "3@1,9@4,3@1" (blocks@factor: from factor 1 down to multiples, and back up), not {text!r}'
    try:
        path = [(int(blocks), int(factor)) for blocks, factor in (part.split("@") for part in text.split(","))]
    except ValueError:
        raise ValueError(told) from None
    factors = [factor for _, factor in path]
    down = factors[: len(factors) // 2 + 1]
    falls = all(0 < upper <= lower and lower % upper == 0 for upper, lower in pairwise(down))
    if len(path) < 3 or factors[0] != 1 or not falls or factors != [*down, *down[-2::-1]]:
        raise ValueError(told)
    if min(blocks for blocks, _ in path) < 0 or path[len(path) // 2][0] < 1:
        raise ValueError(
            f"hierarchy must have at least one block in the middle, and nowhere fewer than 0, not {text!r}"
        )
    return path


class Stage(NamedTuple):
    """The tokens of one level that a forward pass computes: `length` from number `start` on. factor: tokens of the text for which one
    stands; documents: [B, length] or None; state: of decoding."""

    start: int
    length: int
    factor: int
    documents: Tensor | None = None
    state: DecodingState | None = None

    def below(self, k: int) -> Stage:
        """The next level, where every k-th token has one."""
        first, stop = -(-self.start // k), -(-(self.start + self.length) // k)
        documents = None if self.documents is None else self.documents[:, ::k]
        return Stage(first, stop - first, self.factor * k, documents, self.state)

    def positions(self, device: torch.device, whole: bool = False) -> Tensor:
        """In the text; whole: from the first token on."""
        return torch.arange(0 if whole else self.start, self.start + self.length, device=device) * self.factor


class Resampling(nn.Module):
    """What shortening and upsampling have in common: attention between two levels, and an MLP after it."""

    def __init__(self, config: HourglassConfig, level: int, k: int, attends: bool) -> None:
        super().__init__()
        shape = config.shape
        self.shape, self.k, self.key = shape, k, (type(self).__name__, level)
        self.kernel = "torch" if config.attention_kernel == "torch" else "sdpa"
        self.attention = CrossAttention(shape, config.rope_theta) if attends else None
        self.norm, self.source_norm, self.mlp_norm = (
            RMSNorm(shape.width, shape.norm_eps) if attends else None for _ in range(3)
        )
        self.mlp = Feedforward(shape) if attends else None
        self.dropout = nn.Dropout(shape.dropout)

    def attend(self, x: Tensor, source: Tensor, queries: Stage, keys: Stage, some: Tensor | None) -> Tensor:
        """x + attention to source, then + MLP. Queries see keys at their position and before, of their document; some: see Seen."""
        assert self.attention is not None and self.mlp is not None and self.norm is not None
        assert self.source_norm is not None and self.mlp_norm is not None
        device, state = x.device, queries.state
        at, new = queries.positions(device), keys.positions(device)
        if not queries.length:  # there is only something to remember
            self.attention.keys_values(self.source_norm(source), new, state, self.key)
            return x
        mask = self.may_see(at, keys.positions(device, whole=True))
        if queries.documents is not None and keys.documents is not None:
            mask = (mask & (queries.documents[:, :, None] == keys.documents[:, None, :])).unsqueeze(1)
        if some is not None:
            mask = mask | ~some.unsqueeze(1)
        seen = Seen(mask, self.kernel, some, at, new)
        x = x + self.dropout(self.attention(self.norm(x), self.source_norm(source), seen, state, self.key))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))

    def may_see(self, queries: Tensor, keys: Tensor) -> Tensor:
        """[Tq, Tk] bool, of positions in the text."""
        return keys <= queries[:, None]

    def reset(self, generator: torch.Generator | None) -> None:
        reset_parts(self, self.shape, generator)


class Shortening(Resampling):
    """x [B, T, D] -> [B, m, D], one for each k-th token."""

    def __init__(self, config: HourglassConfig, level: int, k: int) -> None:
        super().__init__(config, level, k, config.shortening == "attention")
        d = config.d_model
        self.matrix = None if config.shortening == "avg" else nn.Linear(k * d, d, bias=False)

    def forward(self, x: Tensor, fine: Stage, coarse: Stage) -> Tensor:
        groups = self.groups(x, fine, coarse)  # [B, m, k, D]
        short = groups.mean(2) if self.matrix is None else self.matrix(groups.flatten(2))
        return short if self.attention is None else self.attend(short, x, coarse, fine, None)

    def groups(self, x: Tensor, fine: Stage, coarse: Stage) -> Tensor:
        """The k tokens of which each coarse token is made, [B, m, k, D]: zeros before the start, and for those of another document."""
        k = self.k
        held = with_earlier(x, k - 1, Context(state=fine.state), (self.key, "tail")) if k > 1 else x
        if not coarse.length:
            return x.new_zeros(len(x), 0, k, x.shape[2])
        groups = held[:, coarse.start * k - fine.start :].unfold(1, k, k).transpose(2, 3)
        if fine.documents is None or coarse.documents is None:
            return groups
        numbers = F.pad(fine.documents, (k - 1, 0), value=-1).unfold(1, k, k)  # [B, m, k]
        return groups * (numbers == coarse.documents.unsqueeze(-1)).unsqueeze(-1).to(x.dtype)


class Upsampling(Resampling):
    """x [B, T, D] of the upper level, and the lower one [B, m, D] -> [B, T, D]."""

    def __init__(self, config: HourglassConfig, level: int, k: int) -> None:
        super().__init__(config, level, k, config.upsampling == "attention")
        d = config.d_model
        self.matrix = None if config.upsampling == "repeat" else nn.Linear(d, k * d, bias=False)

    def forward(self, x: Tensor, short: Tensor, fine: Stage, coarse: Stage) -> Tensor:
        last, first = short, coarse.start  # with the coarse token in which the new tokens begin
        if fine.state is not None:
            if fine.start:
                last = torch.cat((fine.state.recall((self.key, "last"), short), short), dim=1)
                first = coarse.start - 1
            fine.state.remember((self.key, "last"), last[:, -1:])
        if self.matrix is None:
            long = last.unsqueeze(2).expand(-1, -1, self.k, -1)
        else:
            long = self.matrix(last).unflatten(-1, (self.k, -1))  # [B, m, k, D]
        offset = fine.start - first * self.k
        long = long.flatten(1, 2)[:, offset : offset + fine.length]
        some = None
        if fine.documents is not None and coarse.documents is not None:
            owners = coarse.documents.repeat_interleave(self.k, dim=1)[:, : fine.length]
            some = (owners == fine.documents).unsqueeze(-1)
            long = long * some.to(long.dtype)
        x = x + long
        return x if self.attention is None else self.attend(x, short, fine, coarse, some)


@register("hourglass")
class Hourglass(HierarchicalStack):
    """Pre-norm blocks of one width at all levels, and a final RMSNorm."""

    Config = HourglassConfig
    narrow_init = True

    def __init__(self, config: HourglassConfig) -> None:
        c = config
        super().__init__(c, [PlainBlock(c.shape, i) for i in range(c.n_layers)], RMSNorm(c.d_model, c.norm_eps))
        self.attention_head_dim, self.embedding_std = c.shape.head_dim, c.init_std
        self.document_grid = max(factor for _, factor in c.path)
        self.shorten: Any = nn.ModuleList(Shortening(c, level, k) for level, k in enumerate(c.factors))
        self.upsample: Any = nn.ModuleList(Upsampling(c, level, k) for level, k in enumerate(c.factors))

    def hidden(self, tokens: Tensor, *, documents: Tensor | None = None, state: DecodingState | None = None) -> Hidden:
        if state is not None:
            check_state(state, tokens.shape[1])
        documents = None if documents is None else number_documents(documents)
        start, count = 0 if state is None else state.length, tokens.shape[1]
        x = self.run_stage(0, self.embed(tokens), Stage(start, count, 1, documents, state))
        if state is not None:
            state.length += count
        return Hidden(self.norm(x))

    def run_stage(self, level: int, x: Tensor, stage: Stage) -> Tensor:
        """[B, n, D] -> [B, n, D]: the blocks of this level and all below."""
        before, after = self.blocks_of(level)
        context = self.context_of(x, stage)
        for block in before:
            x = block(x, context)
        if level == len(self.shorten):
            return x
        below = stage.below(self.shorten[level].k)
        short = self.shorten[level](x, stage, below)
        if below.length:
            short = self.run_stage(level + 1, short, below)
        x = self.upsample[level](x, short, stage, below)
        for block in after:
            x = block(x, context)
        return x

    def blocks_of(self, level: int) -> tuple[list[nn.Module], list[nn.Module]]:
        """Those before and after the levels below."""
        counts = [count for count, _ in self.config.path]
        last = len(counts) - 1 - level
        first, second = sum(counts[:level]), sum(counts[:last])
        after = self.layers[second : second + counts[last]] if last > level else []
        return list(self.layers[first : first + counts[level]]), list(after)

    def context_of(self, x: Tensor, stage: Stage) -> Context:
        level: Any = None if stage.state is None else Level(stage.state, stage.start)
        context, weight = Context(stage.documents, level), self.embedding.weight
        seen = visible(self.config.attention_kernel, (0,), self.attention_head_dim, weight, x, context)
        return context._replace(visible=seen._replace(positions=stage.positions(x.device)))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        super().init_weights(generator)
        for module in (*self.shorten, *self.upsample):
            module.reset(generator)

    def blocks(self) -> list[nn.Module]:
        return [*self.layers, *self.shorten, *self.upsample]

    @classmethod
    def check_sizes(cls, config: HourglassConfig, tokens: int | None = None, longest: int | None = None) -> None:
        most = max(factor for _, factor in config.path)
        if longest is not None and most > longest:
            name = "hierarchy" if config.hierarchy else "shorten_factor"
            raise ValueError(f"{name}: a factor of {most} is more than the longest sequence ({longest}); lower it")

    @classmethod
    def config_for_scale(cls, scale: float, vocab_size: int, target_parameters: int, **choices: Any) -> HourglassConfig:
        if choices.get("hierarchy"):
            blocks = sum(count for count, _ in parse_hierarchy(choices["hierarchy"]))
            choices = {"n_layers": blocks, **choices}
        return super().config_for_scale(scale, vocab_size, target_parameters, **choices)

    @classmethod
    def kinds(cls, config: HourglassConfig) -> list[str]:
        return ["block"] * config.n_layers

    @classmethod
    def parts(cls, config: HourglassConfig, kind: str) -> list[nn.Module]:
        return [PlainBlock(config.shape, 0)]

    @classmethod
    def shallowest(cls, config: HourglassConfig) -> HourglassConfig:
        return config if config.hierarchy else replace(config, n_layers=1)
