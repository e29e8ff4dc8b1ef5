"""Validation loss by two protocols, during training and for `evaluate`.

full: the split in order, in windows that do not overlap. Every token is a target once. The figure is the same on any number
      of devices.
hlb:  150 random windows as in hlb-gpt, from a seed; for comparison with hlb-gpt's 3.80.

Of chat and preference data there is `full` alone: each document is a row, and the objective says which of its targets are measured
(sft: the answers). Of preference data the better answers are measured; while a run trains on them, also its objective on the pairs.
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
from trainer.data.dataset import LOSS_MASK
from trainer.data.raw_text import RawText
from trainer.data.stream import Split, ordered_windows
from trainer.objectives import Objective, build_objective
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
    return figures(split, world.sum(totals), len(windows))


@torch.no_grad()
def by_document(
    runner: Any,
    split: Split,
    objective: Objective,
    length: int,
    world: World,
    max_tokens: int = 0,
    at: Callable[[str], None] = lambda where: None,
) -> dict[str, Any]:
    """As `full`, of chat or preference data: the targets of `objective` in each document, of pairs in the better one. `windows` are
    documents. What a document has beyond `length` tokens is left out, as in training."""
    rows = Documents(split, length, max_tokens)
    chosen = rows.numbers[:: rows.texts]
    at_once = rows_at_once(runner.model.config.vocab_size, length, runner.device.type)
    totals = torch.zeros(3, dtype=torch.float64, device=runner.device)
    for first in turns(world, len(chosen), at_once):
        at(f"validation document {first} of {len(chosen)}")
        batch = rows.batch(chosen[first : first + at_once])
        totals += torch.stack(score(runner, batch["tokens"], objective.targets(batch), joined=False))
    return figures(split, world.sum(totals), len(chosen))


@torch.no_grad()
def of_pairs(
    engine: Any, split: Split, length: int, world: World, max_tokens: int, at: Callable[[str], None]
) -> dict[str, float]:
    """The engine's objective on the pairs of a split: objective_loss, and objective_NAME of each measure, as means over pairs."""
    rows = Documents(split, length, max_tokens)
    count = len(rows.numbers) // 2
    at_once = max(1, rows_at_once(engine.model.config.vocab_size, length, engine.device.type) // 2)
    totals: dict[str, Any] = {}
    training = engine.model.training
    engine.model.eval()
    for first in turns(world, count, at_once):
        at(f"validation pair {first} of {count}")
        flat = rows.batch(rows.numbers[2 * first : 2 * (first + at_once)])
        batch = {name: values.unflatten(0, (-1, 2)).to(engine.device) for name, values in flat.items()}  # [B, 2, T]
        with engine.autocast():
            loss = engine.joined(batch)
        for name, value in {"count": loss.count, "loss": loss.sum, **(loss.measures or {})}.items():
            totals[name] = totals.get(name, 0) + value.double()
    engine.model.train(training)
    summed = world.sum(torch.stack(list(totals.values()))).tolist()
    found = dict(zip(totals, summed, strict=True))
    pairs = found.pop("count")
    return {f"objective_{name}": value / max(pairs, 1) for name, value in found.items()}


class Documents:
    """The documents of a split as padded rows. numbers: those that are measured, of similar length side by side; pairs stay together.
    texts: documents of a row of training."""

    def __init__(self, split: Split, length: int, max_tokens: int) -> None:
        """max_tokens: stop after about so many; 0: all."""
        self.split, self.texts = split, 2 if split.records == "preference" else 1
        whole = split.lengths()
        self._starts, self._lengths = np.cumsum(whole) - whole, np.minimum(whole, length + 1)
        longest = self._lengths.reshape(-1, self.texts).max(1)
        if max_tokens:
            longest = longest[: 1 + int(np.searchsorted(np.cumsum(self.texts * longest), max_tokens))]
        order = np.argsort(longest, kind="stable")
        self.numbers = (order[:, None] * self.texts + np.arange(self.texts)).ravel()

    def batch(self, numbers: np.ndarray) -> Any:
        """Documents as tensors [B, T] as wide as the longest, at least two rows without targets: every rank has a batch."""
        width = int(self._lengths[numbers].max(initial=2)) - 1
        shape = max(2, len(numbers)), width
        batch: dict[str, np.ndarray] = {
            "tokens": np.zeros(shape, np.int64),
            "targets": np.full(shape, IGNORE, np.int64),
            LOSS_MASK: np.zeros(shape, np.uint8),
        }
        for row, number in enumerate(numbers):
            start, count = int(self._starts[number]), int(self._lengths[number])
            if count < 2:
                continue  # an end-of-text id alone has no target
            tokens = self.split.read(start, count)
            batch["tokens"][row, : count - 1], batch["targets"][row, : count - 1] = tokens[:-1], tokens[1:]
            batch[LOSS_MASK][row, : count - 1] = self.split.read(start, count, LOSS_MASK)[1:]
        return {name: torch.from_numpy(values) for name, values in batch.items()}


def figures(split: Split | RawText, totals: Tensor, windows: int) -> dict[str, Any]:
    """What `full` returns. totals: [3], sums of what `score` returns."""
    nats, correct, count = totals.tolist()
    if not count:
        raise UserError(
            f"data: no document of the {split.name} split of {printable(split.folder)} has a target within the length of "
            "evaluation.sequence_length; raise it, or prepare other data"
        )
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
        "windows": windows,
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
    """UserError if the split is too short for `protocol`, the value of `key`, or of data that it does not measure."""
    if split.records != "text" and protocol == "hlb":
        raise UserError(f"{key}: the windows of hlb are of text, and the data are {split.records}; set it to full")
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


def score(runner: Any, tokens: Tensor, targets: Tensor, joined: bool = True) -> list[Tensor]:
    """(sum of losses, correct predictions, targets) of a batch [B, T], as fp64 scalars on the device. joined: whether a row may hold
    several documents."""
    tokens, targets = tokens.to(runner.device), targets.to(runner.device)
    training = runner.model.training
    runner.model.eval()
    with runner.autocast():
        logits = runner.predict(tokens, runner.documents(tokens) if joined else None).float()  # [B, T, V]
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
    if isinstance(split, Split) and split.records != "text":
        length = config.evaluation.sequence_length
        assert length is not None  # resolved
        trained = getattr(runner, "objective", None)  # an engine's, with its frozen models
        objective = trained or build_objective(config.objective)
        results["full"] = by_document(runner, split, objective, length, world, max_tokens, at)
        if trained is not None and split.records == "preference":
            results["full"] |= of_pairs(runner, split, length, world, max_tokens, at)
        return results
    if config.evaluation.protocol in ("full", "both"):
        length = config.evaluation.sequence_length
        assert length is not None  # resolved
        results["full"] = full(runner, split, length, world, max_tokens, at)
    if config.evaluation.protocol in ("hlb", "both"):
        draw_seed = config.seed if seed is None else seed
        assert config.model_scale is not None  # resolved
        results["hlb"] = hlb(runner, split, config.model_scale, world, draw_seed, step, at)
    return results
