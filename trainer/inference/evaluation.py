"""Validation loss by two protocols, during training and for `evaluate`.

full: the split in order, in windows that do not overlap. Every token is a target once. The figure is the same on any number
      of devices.
hlb:  150 random windows as in hlb-gpt, from a seed; for comparison with hlb-gpt's 3.80.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.base import IGNORE, cross_entropy
from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.core.text import printable
from trainer.data.raw_text import RawText
from trainer.data.stream import Split, ordered_windows
from trainer.recipes.hlb import evaluation_shape, tokens_per_microbatch
from trainer.runtime.distributed import World

# fp32 logits held at once, by type of device. Evaluation should not need more memory than training; a CPU is faster with less.
LOGIT_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
KNOWN_SHARE = 0.999  # of a split's tokens: if fewer count, their bytes are an estimate
LEAST_TOKENS = {"full": 2, "hlb": 3, "both": 3}  # of a split
ESTIMATED = {
    "full": "the split's bytes, in proportion to the tokens that counted",
    "hlb": "the bytes of the split's average token",
}


@torch.no_grad()
def full(
    runner: Any,
    split: Split | RawText,
    length: int,
    world: World,
    max_tokens: int = 0,
    at: Callable[[str], None] = lambda where: None,
) -> dict[str, Any]:
    """Loss over the split in order. runner: has model, predict(), device, autocast() and documents(), as an engine does; at:
    called with the progress, equally often on all ranks; it may raise to stop the evaluation.

    Returns loss (nats per token), perplexity, bits_per_byte, bits_per_byte_is_estimate (then word_perplexity is one too: bytes
    and words of a part of the split are not known exactly), word_perplexity, accuracy, tokens, windows.
    """
    windows = list(ordered_windows(split, length, max_tokens))
    rows = rows_at_once(runner.model.config.vocab_size, length, runner.device.type)
    totals = torch.zeros(3, dtype=torch.float64, device=runner.device)
    for first in turns(world, len(windows), rows):
        at(f"validation window {first} of {len(windows)}")
        chunk = windows[first : first + rows] or [(0, 0)]
        tokens = np.zeros((len(chunk), length), dtype=np.int64)
        targets = np.full((len(chunk), length), IGNORE, dtype=np.int64)
        for i, (start, count) in enumerate(chunk):
            window = split.read(start, count + 1)
            tokens[i, :count], targets[i, :count] = window[:-1], window[1:]
        totals += torch.stack(score(runner, torch.from_numpy(tokens), torch.from_numpy(targets)))
    nats, correct, count = world.sum(totals).tolist()
    # Bytes and words are known only for the whole split; the first token of a dataset's is not a target.
    share = count / split.text_tokens
    loss = nats / count
    return {
        "loss": loss,
        "perplexity": safe_exp(loss),
        "bits_per_byte": nats / math.log(2) / (split.counts.bytes * share),
        "bits_per_byte_is_estimate": share < KNOWN_SHARE,
        "word_perplexity": safe_exp(nats / (split.counts.words * share)) if split.counts.words else None,
        "accuracy": correct / count,
        "tokens": int(count),
        "windows": len(windows),
    }


@torch.no_grad()
def hlb(
    runner: Any,
    split: Split | RawText,
    scale: float,
    world: World,
    seed: int,
    step: int,
    at: Callable[[str], None] = lambda where: None,
) -> dict[str, Any]:
    """hlb-gpt's protocol at `scale`: random windows of 1024 tokens with replacement, drawn from (seed, step)."""
    length = min(1024, runner.model.max_context or 1024, split.counts.tokens - 2)
    batch, steps = evaluation_shape(tokens_per_microbatch(scale))  # as on hlb-gpt's own A100, on any device
    draw = random.Random(f"{seed}:{step}:hlb evaluation")
    starts = [draw.randrange(split.counts.tokens - length - 1) for _ in range(batch * steps)]
    totals = torch.zeros(3, dtype=torch.float64, device=runner.device)
    for first in turns(world, len(starts), batch):
        at(f"validation window {first} of {len(starts)}")
        chosen = starts[first : first + batch]
        block = torch.from_numpy(np.stack([split.read(start, length + 1) for start in chosen or [0]]))
        targets = block[:, 1:] if chosen else torch.full_like(block[:, 1:], IGNORE)
        totals += torch.stack(score(runner, block[:, :-1], targets))
    nats, correct, count = world.sum(totals).tolist()
    loss = nats / count
    return {
        "loss": loss,
        "perplexity": safe_exp(loss),
        "bits_per_byte": loss / math.log(2) * split.counts.tokens / split.counts.bytes,  # bytes of an average token
        "bits_per_byte_is_estimate": True,
        "accuracy": correct / count,
        "tokens": int(count),
        "windows": len(starts),
    }


def check_enough(split: Split | RawText, protocol: str, key: str) -> None:
    """UserError if the split is too short for `protocol`, the value of `key`."""
    if split.counts.tokens < LEAST_TOKENS[protocol]:
        raise UserError(
            f"{key}: {protocol} needs at least {LEAST_TOKENS[protocol]} tokens, but the {split.name} split of "
            f"{printable(split.folder)} has {split.counts.tokens}; prepare more text for it"
        )


def turns(world: World, windows: int, rows: int) -> range:
    """The first window of each of this rank's chunks of `rows`. Ranks take chunks in turn. All have equally many; the last
    chunk of some ranks is empty. So each chunk can use collectives, in the forward pass and in `at`."""
    stride = world.size * rows
    return range(world.rank * rows, -(-windows // stride) * stride, stride)


def score(runner: Any, tokens: Tensor, targets: Tensor) -> list[Tensor]:
    """(sum of losses, correct predictions, targets) of a batch [B, T], as fp64 scalars on the device."""
    tokens, targets = tokens.to(runner.device), targets.to(runner.device)
    training = runner.model.training
    runner.model.eval()
    with runner.autocast():
        logits = runner.predict(tokens, runner.documents(tokens)).float()  # [B, T, V]
    runner.model.train(training)
    right = (logits.max(-1).indices == targets).sum()  # on a CPU max is twice as fast as argmax
    loss = cross_entropy(logits, targets, reduction="sum")
    return [loss.double(), right.double(), (targets != IGNORE).sum().double()]


def rows_at_once(vocab_size: int, length: int, device_type: str) -> int:
    """Windows per forward pass so that fp32 logits stay within LOGIT_BYTES."""
    return max(1, LOGIT_BYTES[device_type] // (4 * vocab_size * length))


def safe_exp(x: float) -> float:
    """e^x, with x capped at 700 so that it does not overflow."""
    return math.exp(min(x, 700.0))


def validate(
    runner: Any,
    split: Split | RawText,
    config: RunConfig,
    world: World,
    step: int,
    seed: int | None = None,
    max_tokens: int = 0,
    at: Callable[[str], None] = lambda where: None,
) -> dict[str, Any]:
    """The protocols of `evaluation.protocol`: {"full": {...}, "hlb": {...}}; the first one there gives the run's val_loss."""
    results: dict[str, Any] = {}
    if config.evaluation.protocol in ("full", "both"):
        length = config.evaluation.sequence_length
        assert length is not None  # resolved
        results["full"] = full(runner, split, length, world, max_tokens, at)
    if config.evaluation.protocol in ("hlb", "both"):
        draw_seed = config.seed if seed is None else seed
        assert config.model_scale is not None  # resolved
        results["hlb"] = hlb(runner, split, config.model_scale, world, draw_seed, step, at)
    return results
