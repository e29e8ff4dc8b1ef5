"""The recipe `plain`: warm-up and cosine, a fixed batch."""

from __future__ import annotations

import math
from typing import Any

import torch

from trainer.optim import Group
from trainer.optim.schedules import warmup_cosine


def plain_groups(shapes: dict[str, torch.Size], optim: Any, total: int) -> list[Group]:
    """Warm-up and cosine; only parameters of two or more dimensions decay."""

    def schedule(step: int) -> float:
        return warmup_cosine(step, optim.warmup_steps, total, optim.final_lr_fraction)

    decayed = [name for name, shape in shapes.items() if len(shape) >= 2]
    rest = [name for name, shape in shapes.items() if len(shape) < 2]
    adamw = {"adamw": {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}}
    groups = [
        Group("decayed", decayed, optim.lr, schedule, optim.weight_decay, optim.loss_driven_decay, adamw),
        Group("not decayed", rest, optim.lr, schedule, settings=adamw),
    ]
    return [group for group in groups if group.parameters]


def plain_learning_rate(non_embedding: int) -> float:
    """0.003239 - 0.0001395 ln N, N without embeddings (arXiv 2001.08361, appendix D.6)."""
    return 0.003239 - 0.0001395 * math.log(non_embedding)


def plain_tokens_per_step(non_embedding: int) -> int:
    """2048 * 160 (N / 108 M)^(2/3) tokens, N without embeddings (the rule of OLMo-core's model ladder)."""
    return round(2048 * 160 * (non_embedding / 108e6) ** (2 / 3))
