"""AU-Net (arXiv 2506.14761): an autoregressive U-Net over bytes, words, and groups of words.

Blocks of the first stage read bytes. The next stage has the bytes that end a word alone (the first byte after it that is no letter or
digit), of which each has read its word already: it takes their vectors through one matrix. Each further stage has every
`group_words`-th vector of the one before. After the last one, each stage gets back what the next one says, adds it to what it had
before (a skip connection of the U), and goes on with further blocks. A vector informs its position and those up to the next one, each
through a matrix of its own for its place ("multi-linear upsampling"); so deeper stages help to predict further ahead.

Where the paper's splitting rule is a regular expression of the whole text, this cuts at spaces as SpaceByte does, of whose rule every
byte knows at once what it says (layers/patching.py), and places from `upsample_places` on share a matrix. layers/stages.py says what
room there is, and how single steps of decoding go on. (BlaGPT's version takes the places of the first row for all rows of a batch.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models import counting
from models.base import Hidden, Split, register
from models.config import setting
from models.layers.byte_config import ByteConfig
from models.layers.causal import Context
from models.layers.norms import RMSNorm
from models.layers.patching import RULES, PatchState, Rule, refuse_fixed_shapes
from models.layers.plain_block import PlainBlock, Shape, fused_matrices_in, reset_parts
from models.layers.positions import positions_in_documents
from models.layers.stack import HybridStack
from models.layers.stages import Choice, Stage, choose, first_stage


@dataclass(frozen=True)
class AUNetConfig(ByteConfig):
    stages: int = setting(3, "2: bytes and words; 3: also groups of words; 4: also groups of these", low=2, high=4)
    byte_width: int = setting(0, "width of the stage of bytes; 0: half of d_model", low=0, high=10**6)
    byte_layers: int = setting(0, "its blocks, on each side; 0: a sixth of n_layers", low=0, high=1000)
    byte_window: int = setting(512, "bytes that its attention sees", low=1, high=10**9)
    word_width: int = setting(0, "width of the stages between the first and the last; 0: d_model", low=0, high=10**6)
    word_layers: int = setting(0, "blocks of each of them, on each side; 0: a sixth of n_layers", low=0, high=1000)
    word_size: float = setting(
        6.0, "bytes of a word, with what follows it; there is room for 1.25 times as many words", low=1, high=10**4
    )
    group_words: int = setting(2, "words of a group, and groups of a larger one", low=2, high=1000)
    upsample_places: int = setting(8, "bytes after the end of a word that have a matrix each", low=1, high=1000)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, width in (("byte_width", self.widths[0]), ("word_width", self.word_width or self.d_model)):
            if width % self.head_dim:
                raise ValueError(f"{name} must be whole heads of {self.head_dim} channels, but {width} is not")

    @property
    def widths(self) -> list[int]:
        """Of each stage."""
        between = [self.word_width or self.d_model] * (self.stages - 2)
        return [self.byte_width or self.d_model // 2, *between, self.d_model]

    @property
    def depths(self) -> list[int]:
        """Blocks on each side of all stages but the last."""
        usual = max(1, round(self.n_layers / 6))
        return [self.byte_layers or usual, *[self.word_layers or usual] * (self.stages - 2)]

    @property
    def shapes(self) -> list[Shape]:
        """Of the blocks of each stage."""
        depth = self.n_layers + 2 * sum(self.depths)
        return [self.shape_of(w, depth, 0 if i else self.byte_window) for i, w in enumerate(self.widths)]

    @property
    def rules(self) -> list[Rule]:
        """How each stage but the last is cut."""
        return [Rule("space", self.word_size), *[Rule("static", self.group_words)] * (self.stages - 2)]

    @property
    def places(self) -> list[int]:
        """Matrices of each upsampling."""
        return [self.upsample_places, *[self.group_words] * (self.stages - 2)]


class Projection(nn.Module):
    """Between the stages: a matrix of RMS(x), [B, M, d_in] -> [B, M, d_out]."""

    def __init__(self, shape: Shape, d_in: int, d_out: int) -> None:
        super().__init__()
        self.shape = shape
        self.norm = RMSNorm(d_in, shape.norm_eps)
        self.matrix = nn.Linear(d_in, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.matrix(self.norm(x))

    def reset(self, generator: torch.Generator | None) -> None:
        reset_parts(self, self.shape, generator)


@register("aunet")
class AUNet(HybridStack):
    """`layers` are those of the last stage; `early` and `late` those of each other stage before and after the deeper ones."""

    Config = AUNetConfig
    embedding: nn.Embedding
    # The matrices of the outer stages, which may have learning rates of their own.
    further_roles: ClassVar[dict[str, str]] = {"bytes": "matrix", "words": "matrix"}

    def __init__(self, config: AUNetConfig) -> None:
        c, widths, shapes = config, config.widths, config.shapes
        layers = [PlainBlock(c.shapes[-1], (c.stages - 1, i)) for i in range(c.n_layers)]
        super().__init__(c, layers, RMSNorm(widths[0], c.norm_eps), width=widths[0])
        self.early, self.late = (self._outer_blocks(side) for side in ("early", "late"))
        pairs = list(zip(shapes, shapes[1:], c.places, strict=False))
        self.down: Any = nn.ModuleList(Projection(a, a.width, b.width) for a, b, _ in pairs)
        self.up: Any = nn.ModuleList(Projection(b, b.width, places * a.width) for a, b, places in pairs)
        self.windows, self.attention_head_dim = (c.byte_window,), c.head_dim

    def _outer_blocks(self, side: str) -> Any:
        c = self.config
        stages = zip(c.shapes, c.depths, strict=False)
        return nn.ModuleList(
            nn.ModuleList(PlainBlock(shape, (side, stage, i)) for i in range(depth))
            for stage, (shape, depth) in enumerate(stages)
        )

    def hidden(
        self,
        tokens: Tensor,
        *,
        documents: Tensor | None = None,
        state: Any = None,  # a PatchState
    ) -> Hidden:
        refuse_fixed_shapes(state)
        context = self.context(tokens, documents, state)
        words = self.ends_of_words(tokens, context.documents, state)
        x = self.run_stage(0, self.embedding(tokens), first_stage(tokens, context.documents, state), context, words)
        if state is not None:
            state.length += tokens.shape[1]
        return Hidden(self.norm(x))

    def ends_of_words(self, tokens: Tensor, documents: Tensor | None, state: PatchState | None) -> Tensor:
        """[B, T] bool"""
        count, start = tokens.shape[1], 0
        if state is not None:
            start = state.length
            tokens = state.append("tokens", tokens, dim=1, window=2)  # after the one before
        places = torch.arange(tokens.shape[1], device=tokens.device) + (start + count - tokens.shape[1])
        places = places.expand_as(tokens) if documents is None else positions_in_documents(documents)
        rule = self.config.rules[0]
        return ((places == 0) | RULES[rule.kind](tokens, rule, places, None))[:, -count:]

    def run_stage(self, level: int, x: Tensor, stage: Stage, context: Context, wanted: Tensor) -> Tensor:
        """x [B, n, width]; wanted: [B, n] bool, which positions the next stage should have."""
        for layer in self.early[level]:
            x = layer(x, context)
        choice, below = choose(stage, wanted, self.config.rules[level], level)
        x = x + self.from_below(level, x, choice, below)
        for layer in self.late[level]:
            x = layer(x, context)
        return x

    def from_below(self, level: int, x: Tensor, choice: Choice, below: Stage) -> Tensor:
        """What the deeper stages say at each position of x [B, n, width], the same."""
        c, short = self.config, self.down[level](choice.taken(x))  # [B, M, width below]
        if short.shape[1]:
            context = below.context(short, c.attention_kernel, c.head_dim, self.embedding.weight)
            if level + 2 < c.stages:
                short = self.run_stage(level + 1, short, below, context, self.begin_groups(short, below))
            else:
                short = self.run_layers(short, context)
        places = c.places[level]
        long = self.up[level](short).unflatten(-1, (places, -1))  # [B, M, places, width]
        long = choice.with_last(long, below.state, (level, "up"))
        own = choice._replace(last=choice.last * places + choice.since.clamp(max=places - 1))
        return own.spread(long.flatten(1, 2))

    def begin_groups(self, x: Tensor, stage: Stage) -> Tensor:
        """[B, n] bool: the first of each `group_words` positions of a document."""
        if stage.documents is None:
            places = stage.places(x.shape[1], x.device).expand(len(x), -1)
        else:
            places = positions_in_documents(stage.documents)
        return places % self.config.group_words == 0

    def new_state(self, batch: int, max_length: int | None, device: torch.device, dtype: torch.dtype) -> PatchState:
        return PatchState(max_length)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        super().init_weights(generator)
        for module in self.blocks():
            if module not in self.layers:
                module.reset(generator)  # type: ignore[operator]

    def blocks(self) -> list[nn.Module]:
        early, late = ([layer for stage in side for layer in stage] for side in (self.early, self.late))
        return [*early, *self.down, *self.layers, *self.up, *late]

    def parameter_groups(self) -> dict[str, list[str]]:
        groups = super().parameter_groups()
        for name in groups.pop("matrix"):
            part, _, rest = name.partition(".")
            stage = int(rest.partition(".")[0]) if part != "layers" else len(self.early)
            groups.setdefault(("bytes", "words")[stage > 0] if stage < len(self.early) else "matrix", []).append(name)
        return groups

    def fused_matrices(self) -> dict[str, Split]:
        c, found = self.config, fused_matrices_in(self)
        for level, (places, width) in enumerate(zip(c.places, c.widths, strict=False)):
            found[f"up.{level}.matrix.weight"] = Split(0, {f"place {i}": width for i in range(places)})
        return found

    @classmethod
    def inferred(cls, config: AUNetConfig) -> dict[str, int]:
        between = {"word_width": config.widths[1], "word_layers": config.depths[1]} if config.stages > 2 else {}
        return {"byte_width": config.widths[0], "byte_layers": config.depths[0]} | between

    @classmethod
    def config_for_scale(cls, scale: float, vocab_size: int, target_parameters: int, **choices: Any) -> AUNetConfig:
        return counting.find_shape(cls, vocab_size, target_parameters, choices, cls.count_parameters)

    @classmethod
    def count_parameters(cls, config: AUNetConfig) -> int:
        c, widths, shapes = config, config.widths, config.shapes
        total = (1 if c.tied else 2) * c.vocab_size * widths[0] + widths[0] + c.n_layers * shapes[-1].parameters
        for shape, depth, places, below in zip(shapes, c.depths, c.places, widths[1:], strict=False):
            total += 2 * depth * shape.parameters + (1 + places) * shape.width * below + shape.width + below
        return total
