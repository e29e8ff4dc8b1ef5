"""The next token, and hidden states that point where a teacher's do (the cosine loss of DistilBERT, arXiv 1910.01108). Where the
widths differ, a learned matrix takes the student's states to the teacher's width, as in TinyBERT (arXiv 1909.10351)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.base import Batch, Hidden
from models.config import check_ranges, setting
from trainer.core.errors import UserError
from trainer.objectives.base import Loss, register_objective
from trainer.objectives.frozen import PRECISION, Precision
from trainer.objectives.taught import TEACHER, Taught


@dataclass(frozen=True)
class CosineConfig:
    teacher: str | None = setting(None, f"{TEACHER}; none: the model that init_from names")
    teacher_weights: str = setting("evaluation", "which weights of the run that `teacher` names")
    teacher_precision: Precision = setting("compute", PRECISION)
    weight: float = setting(1.0, "factor of the cosine loss, which is added to the cross-entropy", low=0)
    layers: str = setting(
        "even",
        "STUDENT:TEACHER,...: blocks that are compared, counted from 0; even: each of the student's, evenly spaced",
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.layers != "even":
            parsed(self.layers)


@register_objective("cosine_embedding")
class CosineEmbedding(Taught):
    """cross-entropy + weight (1 - cos(student's state, teacher's state)), a mean over pairs of blocks, summed over the targets that
    count. A state is the output of a block where the target is predicted; all pairs of the same two widths share one projection."""

    Config = CosineConfig

    def linear_layers(self, model: Any, batch: Batch) -> dict[str, tuple[int, int]]:
        _, pairs = self.states(model, batch)
        widths = [(mine.shape[-1], other.shape[-1]) for mine, other in pairs]
        return {layer_name(*both): both for both in widths if both[0] != both[1]}

    def forward(self, model: Any, batch: Batch) -> Loss:
        hidden, pairs = self.states(model, batch)
        loss, parts = model.loss(hidden, self.targets(batch), "sum", batch.get("weights"))
        apart = torch.stack([apart_of(projected(model, mine, other.shape[-1]), other) for mine, other in pairs])
        cosine = self.config.weight * (apart.mean(0) * self.weights(batch)).sum()
        return Loss(loss + cosine, self.count(batch), {**parts, "cosine": cosine})

    def states(self, model: Any, batch: Batch) -> tuple[Hidden, list[tuple[Tensor, Tensor]]]:
        """(the student's last states, the states [B, T, D] and [B, T, D'] of each pair of blocks)"""
        tokens, documents = batch["tokens"], batch.get("documents")
        teacher = self.frozen["teacher"]
        pairs = block_pairs(self.config.layers, len(model.blocks()), len(teacher.blocks()))
        with outputs_of([teacher.blocks()[there] for _, there in pairs]) as theirs:
            teacher.hidden(tokens, documents=documents)
        with outputs_of([model.blocks()[here] for here, _ in pairs]) as ours:
            hidden = model.hidden(tokens, documents=documents)
        return hidden, list(zip(ours, theirs, strict=True))


def parsed(layers: str) -> list[tuple[int, int]]:
    """The pairs of "STUDENT:TEACHER,...". ValueError if it is anything else."""
    pairs = [pair.split(":") for pair in layers.split(",")]
    if not all(len(pair) == 2 and all(number.strip().isdecimal() for number in pair) for pair in pairs):
        raise ValueError(f"layers {layers!r} is neither even nor a list such as 0:1,1:3")
    return [(int(here), int(there)) for here, there in pairs]


def block_pairs(layers: str, ours: int, theirs: int) -> list[tuple[int, int]]:
    """(block of the student, block of the teacher) of each pair. ours, theirs: how many blocks they have. UserError for a block that
    does not exist."""
    if layers == "even":
        return [(block, -(-(block + 1) * theirs // ours) - 1) for block in range(ours)]
    pairs = parsed(layers)
    for here, there in pairs:
        if here >= ours or there >= theirs:
            raise UserError(
                f"objective.layers: {here}:{there} is not a pair of the student's {ours} and the teacher's {theirs} blocks"
            )
    return pairs


@contextlib.contextmanager
def outputs_of(blocks: list[Any]) -> Iterator[list[Tensor]]:
    """The output [B, T, D] of each block in the forward pass within the context. Hooks on the blocks themselves see it under every
    engine, compiled or not, and are outside of what activation checkpointing computes again."""
    found: dict[int, Tensor] = {}
    states: list[Tensor] = []

    def keep(block: Any, _: Any, output: Any) -> None:
        found[id(block)] = output if isinstance(output, Tensor) else output[0]

    handles = [block.register_forward_hook(keep) for block in dict.fromkeys(blocks)]
    try:
        yield states
        states += [found[id(block)] for block in blocks]
    finally:
        for handle in handles:
            handle.remove()


def layer_name(width: int, wanted: int) -> str:
    return f"{width}_{wanted}"


def projected(model: Any, states: Tensor, width: int) -> Tensor:
    """The student's states [B, T, D] at the teacher's width: [B, T, width]."""
    if states.shape[-1] == width:
        return states
    layer = model.objective_layers[layer_name(states.shape[-1], width)]
    return layer(states.to(layer.weight.dtype))  # a residual stream may be wider than the weights


def apart_of(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cos of the states of each token: two [B, T, D] -> [B, T], fp32 or more; 0 to 2."""
    wide = torch.promote_types(student.dtype, torch.float32)
    return 1 - F.cosine_similarity(student.to(wide), teacher.to(wide), dim=-1)
