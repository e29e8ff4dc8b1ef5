"""Preference optimisation: of two answers to a prompt, the better one becomes likelier, compared with a frozen reference.

A row is a pair: tokens, targets and loss_mask are [B, 2, T], the better answer first. Only tokens of answers enter, so the prompt,
which both share, and padding change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from models.base import IGNORE, Batch
from models.config import check_ranges, setting
from trainer.data.dataset import LOSS_MASK
from trainer.objectives.base import Loss, Objective, answers_alone, register_objective
from trainer.objectives.frozen import PRECISION, FrozenSpec, Precision


@dataclass(frozen=True)
class PreferenceConfig:
    loss: Literal["sigmoid", "ipo", "simpo"] = setting(
        "sigmoid",
        "sigmoid: DPO (arXiv 2305.18290); ipo (2310.12036); simpo (2405.14734): log-probabilities per token, no reference",
    )
    beta: float = setting(
        0.1, "how closely the model keeps to the reference (the paper of SimPO takes 2 to 2.5)", above=0
    )
    label_smoothing: float = setting(
        0.0, "sigmoid: share of the pairs that are taken to be the wrong way round", low=0, high=0.5
    )
    gamma: float = setting(1.0, "simpo: the margin that is aimed at", low=0)
    reference: str | None = setting(
        None, "RUN[@STEP], folder of a Hugging Face model, or hf://ORG/NAME; auto: the model that init_from names"
    )
    reference_weights: str = setting("evaluation", "which weights of the run that `reference` names")
    reference_precision: Precision = setting("compute", PRECISION)

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing is for the loss sigmoid, not for {self.loss}; leave it out")
        if self.loss == "simpo" and self.reference is not None:
            raise ValueError("simpo has no reference; leave it out")


@register_objective("dpo")
class PreferenceOptimisation(Objective):
    """The mean over pairs. A pair counts if both of its answers have a token within the row.

    The reward of an answer is beta * log(its probability / that of the reference); margin: the better answer's minus the other's;
    accuracy: share of pairs with a positive margin. chosen_reward: if it falls, both answers become less likely.
    """

    Config = PreferenceConfig
    records = ("preference",)

    def frozen_models(self) -> dict[str, FrozenSpec]:
        c = self.config
        if c.loss == "simpo":
            return {}
        return {"reference": FrozenSpec(c.reference, c.reference_weights, c.reference_precision)}

    def targets(self, batch: Batch) -> Tensor:
        return answers_alone(batch)

    def example(self, tokens: Tensor) -> Batch:
        """[B, T] -> pairs of half the length [B, 2, T / 2], which need as much memory."""
        pairs = tokens[:, : tokens.shape[1] // 2 * 2].unflatten(1, (2, -1))
        return {**super().example(pairs), LOSS_MASK: torch.ones_like(pairs, dtype=torch.uint8)}  # type: ignore[misc]

    def forward(self, model: Any, batch: Batch) -> Loss:
        tokens, targets = batch["tokens"].flatten(0, 1), self.targets(batch).flatten(0, 1)  # [2B, T]
        scores = -model.nll(model.hidden(tokens), targets).sum(-1)  # [2B], log-probabilities of the answers
        if self.config.loss == "simpo":
            scores = scores / (targets != IGNORE).sum(-1).clamp(min=1)
        else:
            reference = self.frozen["reference"]
            scores = scores + reference.nll(reference.hidden(tokens), targets).sum(-1)
        rewards = self.config.beta * scores.view(-1, 2)  # [B, 2]
        margin = rewards[:, 0] - rewards[:, 1]  # [B]
        counted = self.counted(batch)
        measured = {"margin": margin, "accuracy": (margin > 0).float(), "chosen_reward": rewards[:, 0]}
        return Loss(
            self.losses(margin).where(counted, 0).sum(),
            self.count(batch),
            measures={name: values.detach().where(counted, 0).sum() for name, values in measured.items()},
        )

    def losses(self, margin: Tensor) -> Tensor:
        """[B] -> [B]"""
        config = self.config
        if config.loss == "ipo":
            return ((margin - 0.5) / config.beta).square()  # (log-ratio - 1 / (2 beta))^2
        if config.loss == "simpo":
            return -F.logsigmoid(margin - config.gamma)
        wrong = config.label_smoothing
        return -(1 - wrong) * F.logsigmoid(margin) - wrong * F.logsigmoid(-margin)

    def counted(self, batch: Batch) -> Tensor:
        """Whether a pair counts: [B]"""
        return (self.targets(batch) != IGNORE).any(-1).all(-1)

    def count(self, batch: Batch) -> Tensor:
        return self.counted(batch).sum(dtype=torch.float64)
