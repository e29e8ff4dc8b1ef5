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
from trainer.data.dataset import LOSS_MASK
from trainer.objectives.base import Loss, Objective, answers_alone, register_objective
from trainer.objectives.frozen import FrozenSpec


@dataclass(frozen=True)
class PreferenceConfig:
    """loss: sigmoid, DPO (arXiv 2305.18290); ipo (2310.12036); simpo (2405.14734): log-probabilities per token, without a reference.

    beta: how far the model may move from the reference (the paper of SimPO takes 2 to 2.5). label_smoothing: sigmoid, the share of
    pairs that are taken to be the wrong way round. gamma: simpo, the margin that is aimed at. reference: RUN[@STEP], a folder of a
    Hugging Face model, or hf://ORG/NAME; None: the model that init_from names. reference_weights: as init_weights.
    """

    loss: Literal["sigmoid", "ipo", "simpo"] = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    gamma: float = 1.0
    reference: str | None = None
    reference_weights: str = "evaluation"

    def __post_init__(self) -> None:
        if not 0 < self.beta < float("inf"):
            raise ValueError(f"beta {self.beta} is not above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing {self.label_smoothing} is not from 0 to below 0.5")
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing is for the loss sigmoid, not for {self.loss}; leave it out")
        if not 0 <= self.gamma < float("inf"):
            raise ValueError(f"gamma {self.gamma} is below 0")
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
        if self.config.loss == "simpo":
            return {}
        return {"reference": FrozenSpec(self.config.reference, self.config.reference_weights)}

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
