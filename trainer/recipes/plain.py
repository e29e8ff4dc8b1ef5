"""The recipe `plain`: warm-up and cosine, a fixed batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from trainer.optim import Group, names_by_role
from trainer.optim.schedules import SCHEDULES, Decay, multiplier
from trainer.recipes.recipe import Default, Recipe

BETA2 = 0.95  # of AdamW
HIGHEST_RATE = 0.01  # the law comes from runs of 1e17 FLOPs and more; it grows without bound below


RATE_RULE = (  # the same text for every run: a law of the loss remembers by which rule its runs had their rates
    f"0.3118 C^-0.125, C = 6 N D, N without embeddings, D tokens (arXiv 2401.02954), at most {HIGHEST_RATE:g}; x sqrt(B / 0.292 C^0.3271) "
    "for steps of fewer tokens B (arXiv 2205.10287)"
)


def learning_rate(non_embedding: int, tokens_per_step: int, tokens: int) -> float:
    """0.3118 C^-0.125, C = 6 N D FLOPs (arXiv 2401.02954), N without embeddings; at most HIGHEST_RATE. tokens: D.

    That is for their batch of 0.2920 C^0.3271 tokens; a smaller one has a lower rate, by the root of the ratio (arXiv 2205.10287).
    `ladder --check lr` measures whether it is right; trainer/commands/ladder/README.md has what came out.
    """
    flops = 6 * max(1, non_embedding) * max(1, tokens)
    rate, batch = min(HIGHEST_RATE, 0.3118 * flops**-0.125), 0.2920 * flops**0.3271
    return rate * math.sqrt(min(1.0, tokens_per_step / batch))


def recommended_batch(non_embedding: int) -> int:
    """2048 * 160 (N / 108 M)^(2/3) tokens, N without embeddings (the rule of OLMo-core's model ladder)."""
    return round(2048 * 160 * (non_embedding / 108e6) ** (2 / 3))


def warmup_steps(max_steps: int) -> Default:
    """3 % of the run, but not before AdamW's second moment knows the gradients.

    2 / (1 - beta2) = 40 steps (arXiv 1910.04209), or a quarter of a run too short for them. After 10 steps of warm-up, a Llama of 1.3 M
    parameters stayed at the loss of pairs of tokens: 5.18 instead of 4.43.
    """
    share, least = round(0.03 * max_steps), round(2 / (1 - BETA2))
    if share >= least:
        return Default(share, "3 % of max_steps")
    if 4 * least <= max_steps:
        return Default(least, "2 / (1 - beta2), at least (arXiv 1910.04209); 3 % of max_steps are fewer")
    return Default(max(1, max_steps // 4), "a quarter of max_steps: 2 / (1 - beta2) (arXiv 1910.04209) are more")


class Plain(Recipe):
    """AdamW's usual settings for any model."""

    why = "warm-up and cosine"
    schedules = frozenset(SCHEDULES)

    def batch_defaults(self, config: Any, facts: Any) -> Mapping[str, Default]:
        longest = config.batch.sequence_length
        sequences = max(1, round(recommended_batch(facts.non_embedding) / longest))
        rule = "2048*160 (N/108M)^(2/3), N without embeddings, in whole sequences"
        return {
            "sequence_start": Default(longest, "no growth"),
            "sequence_double_every": Default(0, "no growth"),
            "tokens_per_step": Default(sequences * longest, rule),
            "dynamic": Default(False, "fixed batch"),
        }

    def optim_defaults(self, config: Any, facts: Any) -> Mapping[str, Default]:
        return {
            "lr": self.learning_rate(config, facts),
            "warmup_steps": warmup_steps(config.max_steps),
            "schedule": Default("cosine", "plain recipe"),
            "decay_steps": Default(round(0.2 * config.max_steps), "a fifth of max_steps, for the schedule wsd"),
            "weight_decay": Default(0.1, "plain recipe"),
            "loss_driven_decay": Default(False, "plain recipe"),
            "clip_norm": Default(1.0, "plain recipe"),
        }

    def learning_rate(self, config: Any, facts: Any) -> Default:
        size, batch = facts.base_non_embedding, config.batch.tokens_per_step
        tokens, why = batch * config.max_steps, "; of the base of model.mup, trained as long" if facts.has_base else ""
        if config.init_from or config.branch_from:  # the high rate of a short run would undo what was learned
            tokens, why = max(tokens, 20 * size), why + "; D at least 20 N, since the weights are trained"
        return Default(learning_rate(size, batch, tokens), RATE_RULE + why)

    def embedding_frequency(self, tied: bool) -> Default:
        return Default("none", "plain recipe")

    def groups(self, model: Any, shapes: Mapping[str, torch.Size], config: Any) -> list[Group]:
        """Parameters of two or more dimensions decay, but none whose role counts as norm or bias: short convolutions, token shifts."""
        optim, schedule = config.optim, self.schedule(config.optim.schedule, config)
        by_role = names_by_role(model)
        never = {*by_role["norm"], *by_role["bias"]}
        decayed = [name for name, shape in shapes.items() if len(shape) >= 2 and name not in never]
        rest = [name for name in shapes if name not in set(decayed)]
        adamw = {"adamw": {"beta1": 0.9, "beta2": BETA2, "eps": 1e-8}}
        groups = [
            Group("decayed", decayed, optim.lr, schedule, optim.weight_decay, optim.loss_driven_decay, adamw),
            Group("not decayed", rest, optim.lr, schedule, settings=adamw),
        ]
        return [group for group in groups if group.parameters]

    def schedule(self, name: str, config: Any) -> Callable[[int], float]:
        decay = decay_of(config, config.max_steps)
        return lambda step: multiplier(name, step, decay)

    def schedule_change(self, config: Any, before: int, step: int) -> str:
        optim, now = config.optim, config.max_steps
        old, new, end = (
            optim.lr * multiplier(optim.schedule, at, decay_of(config, total))
            for at, total in ((step, before), (step, now), (now, now))
        )
        return (
            f"max_steps: {now:,} instead of {before:,}: the schedule {optim.schedule} ends there, so the learning rate of step "
            f"{step + 1:,} is {new:.3g}, not {old:.3g}, and {end:.3g} at step {now:,}"
        )


def decay_of(config: Any, total: int) -> Decay:
    """The learning rate's decay in a run of `total` steps. config: resolved."""
    optim = config.optim
    return Decay(optim.warmup_steps, total, optim.final_lr_fraction, optim.decay_steps, optim.decay_power)
