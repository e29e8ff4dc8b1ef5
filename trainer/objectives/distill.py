"""Knowledge distillation (arXiv 1503.02531): the student learns the distribution that a teacher predicts, besides the next token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.base import Batch, Hidden
from models.config import check_ranges, setting
from trainer.data.dataset import TEACHER_IDS, TEACHER_LOG_PROBS, ColumnInfo
from trainer.objectives.base import Loss, register_objective
from trainer.objectives.frozen import PRECISION, FrozenSpec, Precision
from trainer.objectives.taught import TEACHER, Taught

CHUNK_BYTES = (
    64 << 20
)  # of fp32 logits of one model at a time; their softmax, the teacher's and the gradients are held besides
PLANNED_TOP_K = 32  # stored logits of a token, if neither the config nor a dataset says how many
IMPOSSIBLE = -1e4  # a finite logit whose probability is 0


@dataclass(frozen=True)
class DistillConfig:
    teacher: str | None = setting(None, f"{TEACHER}; none: the columns that `prepare --teacher` stored")
    teacher_weights: str = setting("evaluation", "which weights of the run that `teacher` names")
    teacher_precision: Precision = setting("compute", PRECISION)
    alpha: float = setting(0.5, "share of the teacher; the rest is that of the next token", low=0, high=1)
    temperature: float = setting(1.0, "both distributions are softened: softmax(logits / temperature)", above=0)
    divergence: Literal["forward", "reverse", "js"] = setting(
        "forward", "KL(teacher || student), KL(student || teacher), or the Jensen-Shannon divergence"
    )
    top_k: int = setting(
        0, "only the k ids that the teacher finds most likely, renormalised; 0: all that there are", low=0
    )

    def __post_init__(self) -> None:
        check_ranges(self)


@register_objective("distill")
class Distill(Taught):
    """(1 - alpha) cross-entropy + alpha temperature^2 divergence, summed over the targets that count.

    The square keeps the size of the gradient, which shrinks with the square of the temperature.
    """

    Config = DistillConfig

    def frozen_models(self) -> dict[str, FrozenSpec]:
        return {} if self.config.teacher is None else super().frozen_models()

    def check_columns(self, columns: Mapping[str, ColumnInfo]) -> None:
        if self.config.teacher is not None:
            return
        if TEACHER_IDS not in columns:
            raise ValueError(
                "teacher: name a model, or prepare the data with --teacher, which stores what a model predicts"
            )
        [stored] = columns[TEACHER_IDS].shape
        if self.config.top_k > stored:
            raise ValueError(f"top_k: is {self.config.top_k}, but the dataset stores {stored} ids of the teacher's")

    def example(self, tokens: Tensor) -> Batch:
        batch: Any = super().example(tokens)
        if self.config.teacher is None:
            shape = (*tokens.shape, self.config.top_k or PLANNED_TOP_K)
            batch |= {TEACHER_IDS: tokens.new_zeros(shape), TEACHER_LOG_PROBS: torch.zeros(shape, device=tokens.device)}
        return batch

    def forward(self, model: Any, batch: Batch) -> Loss:
        tokens, targets, documents = batch["tokens"], self.targets(batch), batch.get("documents")
        predicted = self.predicted(batch)  # first: the student holds no activations yet
        hidden = model.hidden(tokens, documents=documents)
        own, parts = model.loss(hidden, targets, "sum", batch.get("weights"))
        apart = self.apart(model, hidden, predicted, self.weights(batch))
        measures = {"cross_entropy": own - sum(parts.values()), "divergence": apart}
        share = self.config.alpha
        parts = {name: (1 - share) * part for name, part in parts.items()}
        total = (1 - share) * own + share * self.config.temperature**2 * apart
        return Loss(total, self.count(batch), parts, measures)

    def predicted(self, batch: Batch) -> tuple[Tensor, ...]:
        """What `teacher_logits` needs of each target, [B, T, ...] each: the teacher's hidden states, or its stored (ids,
        log-probabilities)."""
        if self.config.teacher is not None:
            return (self.frozen["teacher"].hidden(batch["tokens"], documents=batch.get("documents")).states,)
        stored: Any = batch
        k = self.config.top_k or None
        return stored[TEACHER_IDS][..., :k], stored[TEACHER_LOG_PROBS][..., :k]

    def apart(self, model: Any, hidden: Hidden, predicted: tuple[Tensor, ...], weights: Tensor) -> Tensor:
        """The divergence times the weight [B, T] of each target, summed: scalar.

        In chunks of tokens, whose logits are computed again in the backward pass, so that those of a batch are never whole.
        """
        rows = (hidden.states, *predicted, weights)
        size = max(1, CHUNK_BYTES // (4 * model.config.vocab_size))
        chunks = zip(*(values.flatten(0, 1).split(size) for values in rows), strict=True)  # [n, ...]
        sums = [
            checkpoint(self.chunk_apart, model, *chunk, use_reentrant=False, preserve_rng_state=False)
            for chunk in chunks
        ]
        return torch.stack(sums).sum()

    def chunk_apart(self, model: Any, states: Tensor, *rest: Tensor) -> Tensor:
        """The part of `apart` of some tokens: hidden states [n, D], what was predicted, weights [n]."""
        *predicted, weights = rest
        student, teacher = self.aligned(model.logits(Hidden(states[None]))[0], *predicted)
        return (divergence(self.config.divergence, student, teacher, self.config.temperature) * weights).sum()

    def aligned(self, student: Tensor, *predicted: Tensor) -> tuple[Tensor, Tensor]:
        """(student's, teacher's) logits [n, k] of the same ids. student: its logits of all ids [n, V]; predicted: as in `predicted`.

        Ids that only one of both has, because its vocabulary is padded, are left out.
        """
        if self.config.teacher is None:
            ids, log_probs = predicted
            return student.gather(-1, ids.long()), log_probs
        teacher = self.frozen["teacher"].logits(Hidden(predicted[0][None]))[0]
        both = min(student.shape[-1], teacher.shape[-1])
        student, teacher, k = student[:, :both], teacher[:, :both], self.config.top_k
        if not 0 < k < both:
            return student, teacher
        top = teacher.topk(k)
        return student.gather(-1, top.indices), top.values


def divergence(kind: str, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The divergence of each token's softmax(teacher / temperature) and softmax(student / temperature), in nats.

    student, teacher: logits [..., V] -> [...], in fp32 or more. An id with a logit of -inf in either has probability 0 in both.
    """
    absent = student.isneginf() | teacher.isneginf()
    q, p = (
        (wide(logits) / temperature).masked_fill(absent, IMPOSSIBLE).log_softmax(-1) for logits in (student, teacher)
    )
    if kind == "forward":
        return kl(p, q)
    if kind == "reverse":
        return kl(q, p)
    middle = torch.logaddexp(p, q) - math.log(2)
    return (kl(p, middle) + kl(q, middle)) / 2


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities [..., V] -> [...]"""
    return (p.exp() * (p - q)).sum(-1)


def wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
