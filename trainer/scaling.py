"""The dial: `model_scale` -> dimensions, batch, learning rates, decay and gradient-norm laws. Pure functions, no torch.

The laws are hlb-gpt's (tuned at 46 M and 1.5 B parameters and interpolated between; an "alpha" of its author), with
N = parameters. `tests/test_scaling.py` holds the whole table from scale 0.5 to 148.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

# One calibrated point: the tokens that fit a 40 GB A100 at scale 1 and length 1024 in hlb-gpt.
CALIBRATED_CAPACITY = 114_688
CALIBRATED_BYTES = 40 * 1024**3
CPU_CAPACITY = 4_096  # a laptop: not its memory but its patience and caches limit a microbatch
EVALUATION_TOKENS = 153_600


def dimensions(scale: float) -> tuple[int, int]:
    """(d_model, n_layers) of hlb at this scale: d = 64 rint(6 log2(1+s)), L = rint(8 log2(1+s)); at least (64, 1)."""
    growth = math.log2(1 + scale)
    return max(64, 64 * round(6 * growth)), max(1, round(8 * growth))


def hlb_parameters(d_model: int, n_layers: int, vocab_size: int) -> int:
    """N = 2 V d + L (6.25 d^2 + d + 1) + d, exact where 8 divides d."""
    return 2 * vocab_size * d_model + n_layers * (25 * d_model**2 // 4 + d_model + 1) + d_model


def target_parameters(scale: float, vocab_size: int) -> int:
    """What every architecture aims at (within 3 %) at this scale: hlb's own count with this vocabulary."""
    return hlb_parameters(*dimensions(scale), vocab_size)


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


def weight_decay_base(n_parameters: int) -> float:
    """b = 0.007 (0.01 ln N)^-4"""
    return 0.007 * (0.01 * math.log(n_parameters)) ** -4


def weight_decay(loss: float, base: float) -> float:
    """wd(loss) = 16 b^-(loss + 1e-8): about a reciprocal perplexity (the idea is of arXiv 2204.02311, section 5)."""
    return 16 * base ** -(loss + 1e-8)


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
    """(sequences per batch, batches) of hlb's validation: 150 windows of 1024 tokens, floors and all."""
    batch = max(1, microbatch_tokens // length // 16)
    return batch, EVALUATION_TOKENS // length // batch


def sequence_length(step: int, start: int, longest: int, double_every: int) -> int:
    """Length trained on at 0-based `step`: doubles after each `double_every` finished steps, so step 0..80 stay at the start."""
    if double_every == 0:
        return longest
    doublings = max(0, (step - 1) // double_every)
    return min(longest, start * 2 ** min(doublings, 32))


def sequence_lengths(start: int, longest: int, double_every: int) -> list[int]:
    """The lengths a run passes through, in order."""
    if double_every == 0:
        return [longest]
    lengths = [start]
    while lengths[-1] < longest:
        lengths.append(min(longest, lengths[-1] * 2))
    return lengths


@dataclass
class BatchMultiplier:
    """hlb's dithered batch: n follows the gradient norm's law, the integer k of the next step is n rounded at random.

    `k` multiplies `tokens_per_step`. The draw depends on (seed, step) only, so all ranks and a resumed run agree.
    The original has no bound on n; here n <= n_max, since a gradient norm held up by weight decay would grow it for ever. And
    here a norm counts one step later, when it has long left the device: the original waits for it.
    """

    law: GradNormLaw
    n_parameters: int
    seed: int
    n_max: float
    n: float = 0.0
    k: int = 1

    every = 5  # steps between updates of n

    def after_step(self, step: int, norm_before: float | None) -> None:
        """Update after 0-based `step`; norm_before: global norm of the whole gradient of the step before it, where known."""
        seen = step - 1
        if seen % self.every == 0 and norm_before is not None and math.isfinite(norm_before):
            ratio = norm_before / math.sqrt(self.n_parameters) / self.law.target(seen)
            self.n = min(self.n_max, max(0.1, self.n * (1 + ratio) / 2))
        whole = math.floor(self.n)
        # A string seed: Python hashes it with SHA-512, the same in every process and version.
        self.k = max(1, whole + (random.Random(f"{self.seed}:{step}:microbatches").random() < self.n - whole))


def plain_learning_rate(non_embedding: int) -> float:
    """0.003239 - 0.0001395 ln N, N without embeddings (arXiv 2001.08361, appendix D.6)."""
    return 0.003239 - 0.0001395 * math.log(non_embedding)


def plain_tokens_per_step(non_embedding: int) -> int:
    """2048 * 160 (N / 108 M)^(2/3) tokens, N without embeddings (the rule of OLMo-core's model ladder)."""
    return round(2048 * 160 * (non_embedding / 108e6) ** (2 / 3))
