"""The recipe `hlb`: learning rates, decay and gradient-norm laws, parameter groups and schedules of hlb-gpt.

The laws are hlb-gpt's (tuned at 46 M and 1.5 B parameters and interpolated between; an "alpha" of its author), with
N = parameters. `tests/recipes/test_scaling.py` holds the whole table from scale 0.5 to 148.

The recipe is that of hlb-gpt 0.4.1, with these differences:

- Decay of the first step: 16 b^-ln(V), from the loss of a model that knows nothing. hlb-gpt decays its matrices by 16, the
  initial value of its optimiser, at 2 % of lr: each loses a thousandth (8e-4 at model_scale 1), once.
- A gradient norm changes the size of the batch one step later (`BatchMultiplier`); hlb-gpt waits for the norm.
- Decay follows the mean loss of the step over all its microbatches and devices; hlb-gpt's follows the last microbatch.
- Embedding gradients are divided by the counts of the whole step; hlb-gpt's by those of each microbatch
  (optim.embedding_frequency microbatch).
- The multiplier of the batch is bounded (batch.n_max), and its draws follow from the seed and the step.
- Weights, moments and sums of gradients are fp32, and distances exact; hlb-gpt uses bf16 throughout (precision pure_bf16,
  model.position_bias_quantised).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.optim import Group, names_by_role
from trainer.recipes.recipe import Default, PlanEntry, Recipe

# One calibrated point: the tokens that fit a 40 GB A100 at scale 1 and length 1024 in hlb-gpt.
CALIBRATED_CAPACITY = 114_688
CALIBRATED_BYTES = 40 * 1024**3
CPU_CAPACITY = 4_096  # of a laptop, where caches and waiting time limit a microbatch, not memory
EVALUATION_TOKENS = 153_600


def device_token_capacity(memory_bytes: int | None) -> tuple[int, str]:
    """G, the tokens that fit a device at scale 1, and the rule it came from. memory_bytes: None on a CPU."""
    if memory_bytes is None:
        return CPU_CAPACITY, "default of a CPU"
    capacity = int(CALIBRATED_CAPACITY * memory_bytes / CALIBRATED_BYTES)
    return capacity, f"114,688 on 40 GiB (hlb on an A100), times {memory_bytes / 1024**3:.1f} GiB of this device"


def tokens_per_microbatch(scale: float, capacity: int = CALIBRATED_CAPACITY) -> int:
    """C = floor(G / (1.52174 + 0.482 s^0.87)): tokens of one forward and backward on one device."""
    return math.floor(capacity / (1.52174 + 0.482 * scale**0.87))


def base_learning_rate(n_parameters: int) -> float:
    """9e7 / (ln N)^8.8"""
    return 9e7 / math.log(n_parameters) ** 8.8


def learning_rate(n_parameters: int) -> float:
    """The run's learning rate: 2.62 times the base."""
    return 2.62 * base_learning_rate(n_parameters)


def rate_at_batch(rate: float, tokens: int, scale: float) -> float:
    """The run's learning rate for steps of `tokens` tokens: the law was fitted with C tokens, and Adam's steps of noisier gradients
    should be shorter, by the root of the ratio (arXiv 2205.10287)."""
    return rate * math.sqrt(min(1.0, tokens / tokens_per_microbatch(scale)))


def weight_decay_base(n_parameters: int) -> float:
    """b = 0.007 (0.01 ln N)^-4"""
    return 0.007 * (0.01 * math.log(n_parameters)) ** -4


def weight_decay(loss: Tensor, base: float) -> Tensor:
    """wd(loss) = 16 b^-(loss + 1e-8): about a reciprocal perplexity (the idea is of arXiv 2204.02311, section 5)."""
    return 16 * torch.exp(-(loss + 1e-8) * math.log(base))


@dataclass(frozen=True)
class GradNormLaw:
    """Expected per-parameter gradient norm after `step` steps: g*(step) = (K (step + 0.01))^p."""

    exponent: float  # p = -0.677 (ln N)^-0.2
    step_scale: float  # K = N ln N

    @classmethod
    def of(cls, n_parameters: int) -> GradNormLaw:
        log_n = math.log(n_parameters)
        return cls(exponent=-0.677 * log_n**-0.2, step_scale=n_parameters * log_n)

    def target(self, step: int) -> float:
        return (self.step_scale * (step + 0.01)) ** self.exponent


def evaluation_shape(microbatch_tokens: int, length: int = 1024) -> tuple[int, int]:
    """(sequences per batch, batches) of hlb's validation: 150 windows of 1024 tokens, rounded down as in hlb-gpt."""
    batch = max(1, microbatch_tokens // length // 16)
    return batch, EVALUATION_TOKENS // length // batch


@dataclass
class BatchMultiplier:
    """hlb's dithered batch: n follows the gradient norm's law; the integer k of the next step is n, rounded at random.

    `k` multiplies `tokens_per_step`. The draw depends on (seed, step) only, so all ranks and a resumed run agree.
    hlb-gpt does not bound n. Here n <= n_max, since a gradient norm that weight decay keeps high would grow n without end. Here
    a norm counts one step later, when it has already left the device; hlb-gpt waits for it.
    """

    law: GradNormLaw
    n_parameters: int
    seed: int
    n_max: float
    n: float = 0.0
    k: int = 1

    every = 5  # steps between updates of n

    def after_step(self, step: int, norm_before: float | None) -> None:
        """Update after 0-based `step`; norm_before: global norm of the whole gradient of the step before it, if known."""
        seen = step - 1
        if seen % self.every == 0 and norm_before is not None and math.isfinite(norm_before):
            ratio = norm_before / math.sqrt(self.n_parameters) / self.law.target(seen)
            self.n = min(self.n_max, max(0.1, self.n * (1 + ratio) / 2))
        whole = math.floor(self.n)
        # A string seed: Python hashes it with SHA-512, the same in every process and version.
        self.k = max(1, whole + (random.Random(f"{self.seed}:{step}:microbatches").random() < self.n - whole))


def power_decay(step: int, warmup: int = 100) -> float:
    """hlb's P: linear from 0.02 to 1 over `warmup` steps, then (steps since)^-0.08."""
    return 0.02 + 0.98 * step / warmup if step < warmup else (step - warmup + 1) ** -0.08


def output_decay(step: int) -> float:
    """hlb's Q, for the output head: (step + 1)^-0.2, no warm-up."""
    return (step + 1) ** -0.2


def exponential_decay(step: int) -> float:
    """hlb's schedule of the position bias: 0.995^step."""
    return 0.995**step


class Hlb(Recipe):
    """hlb-gpt's: sequences that grow, a batch that follows the gradient norm, four groups, decay by the loss."""

    made_for = frozenset({"hlb"})
    why = "the recipe made for hlb"
    schedules = frozenset({"hlb"})

    def batch_defaults(self, config: Any, facts: Any) -> Mapping[str, Default]:
        tokens = tokens_per_microbatch(config.model_scale)
        rule = "C of the law at model_scale on hlb's own 40 GiB A100 (the batch never depends on the device)"
        return {
            "sequence_start": Default(min(32, config.batch.sequence_length), "hlb"),
            "sequence_double_every": Default(80, "hlb"),
            "tokens_per_step": Default(tokens, rule),
            "dynamic": Default(True, "hlb's gradient-norm law"),
        }

    def optim_defaults(self, config: Any, facts: Any) -> Mapping[str, Default]:
        return {
            "lr": Default(
                rate_at_batch(learning_rate(facts.parameters), config.batch.tokens_per_step, config.model_scale),
                "2.62 * 9e7 / (ln N)^8.8; x sqrt(tokens_per_step / C) below C, the batch of the law (arXiv 2205.10287)",
            ),
            "warmup_steps": Default(100, "hlb"),
            "schedule": Default("hlb", "its own of each group"),
            "decay_steps": Default(0, "not used by hlb's schedules"),
            "weight_decay": Default(0.0, "hlb decays by the loss"),
            "loss_driven_decay": Default(True, "16 b^-loss, b = 0.007 (0.01 ln N)^-4"),
            "clip_norm": Default(0.0, "hlb does not clip"),
        }

    def embedding_frequency(self, tied: bool) -> Default:
        """The gradient of a head is no sum over occurrences: where both share a matrix, nothing can be divided by counts."""
        return Default("none", "head is tied") if tied else Default("global", "hlb, counted over the whole step")

    def groups(self, model: Any, shapes: Mapping[str, torch.Size], config: Any) -> list[Group]:
        """The four groups of hlb-gpt, by role.

        A matrix that is both embedding and head is in the head's group: 32 lr is for rows that are only looked up; a head
        diverges.
        """
        optim, by_role = config.optim, names_by_role(model)
        if model.tied_embedding():
            shared = model.token_embedding().weight
            tied = [name for name in by_role["embedding"] if model.get_parameter(name) is shared]
            by_role["embedding"] = [name for name in by_role["embedding"] if name not in tied]
            by_role["head"] += tied

        def power(step: int) -> float:
            return power_decay(step, optim.warmup_steps)

        def adamw(beta1: float) -> dict[str, dict[str, float]]:
            return {"adamw": {"beta1": beta1, "beta2": 0.95, "eps": 1e-9}}

        slow = by_role["norm"] + by_role["bias"] + by_role["embedding"]
        groups = [
            Group(
                "matrix",
                by_role["matrix"],
                optim.lr,
                power,
                weight_decay=optim.weight_decay,
                loss_driven_decay=optim.loss_driven_decay,
                settings=adamw(0.9),
            ),
            Group("position", by_role["position"], 100 * optim.lr, exponential_decay, settings=adamw(0.9)),
            Group("norm, bias, embedding", slow, 32 * optim.lr, power, settings=adamw(0.9)),
            Group("head", by_role["head"], 2 * optim.lr, output_decay, settings=adamw(0.6)),
        ]
        return [group for group in groups if group.parameters]

    def rows(self, config: Any, tied: bool) -> list[PlanEntry]:
        key = "lr" if config.optim.rest_lr is None else "rest_lr"
        lr, tables = getattr(config.optim, key), "positions" if tied else "embedding"
        titles = {"norm": "norms", "bias": "biases", "embedding": tables}
        slow = ", ".join(title for role, title in titles.items() if role not in config.optim.roles)
        rows = {
            "position": PlanEntry("lr of the position bias", 100 * lr, f"100 {key}, times 0.995^step"),
            "slow": PlanEntry(f"lr of {slow}", 32 * lr, f"32 {key}, warm-up, then (steps since)^-0.08"),
            "embedding" if tied else "head": PlanEntry("lr of the head", 2 * lr, f"2 {key}, times (step + 1)^-0.2"),
        }
        return [row for role, row in rows.items() if role not in config.optim.roles and (slow or role != "slow")]


def law_rows(config: Any, parameters: int) -> list[PlanEntry]:
    """The constants of those laws that a run follows, with hlb's groups or others. config: resolved."""
    law, rows = GradNormLaw.of(parameters), []
    if config.optim.loss_driven_decay:
        rows.append(PlanEntry("decay base b", weight_decay_base(parameters), "0.007 (0.01 ln N)^-4"))
    if config.batch.dynamic:
        rows.append(PlanEntry("grad-norm exponent p", law.exponent, "-0.677 (ln N)^-0.2"))
        rows.append(PlanEntry("grad-norm scale K", law.step_scale, "N ln N; target sqrt(N) (K (step + 0.01))^p"))
    return rows


def evaluation_rows(config: Any) -> list[PlanEntry]:
    """The shape of hlb's validation, where the run makes it. config: resolved."""
    if config.evaluation.protocol == "full":
        return []
    batch, steps = evaluation_shape(tokens_per_microbatch(config.model_scale))
    return [PlanEntry("hlb validation", f"{batch} x {steps}", "windows of 1,024 a batch x batches, from C")]
