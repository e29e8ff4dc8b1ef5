"""How long a run trains: its steps, and the tokens in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from trainer.core.config import LENGTHS
from trainer.core.errors import UserError
from trainer.optim import schedules
from trainer.planning.resolver import Draft, ModelFacts


class Epoch(NamedTuple):
    """An epoch of the training split. tokens: without padding; filled: their share of rows x length; padding: share of it in the
    tensors that the model is given."""

    tokens: int
    filled: float
    padding: float


DEFAULT_STEPS = 1000


def choose_length(draft: Draft, model: ModelFacts, epoch: Epoch | None) -> Draft:
    """max_steps, from a key of LENGTHS if the config gives one. epoch: of the training split; None: not known yet.

    UserError for two different lengths, or for epochs of data that do not exist yet.
    """
    config = draft.config
    stated = [key for key in LENGTHS if getattr(config, key) is not None]
    if not stated or (stated == ["epochs"] and epoch is None and config.max_steps is not None):
        return draft.fill("", "max_steps", DEFAULT_STEPS, "the default")
    if len(stated) > 1:
        raise UserError(f"{stated[1]}: {stated[0]} already gives the length of the run; leave one of them out")
    if stated == ["max_seconds"]:
        if config.max_steps is None:
            raise UserError("max_seconds: only `train` measures the speed; give max_steps, tokens or epochs here")
        rule = f"for max_seconds {config.max_seconds:g}"  # measured by `train`, or given beside it
        return draft.note("max_steps", config.max_steps, rule)
    wanted, rule = tokens_wanted(stated[0], getattr(config, stated[0]), model.parameters, epoch)
    if epoch is not None and epoch.filled < 1:
        wanted, rule = wanted / epoch.filled, f"{rule} in rows that are {epoch.filled:.1%} full"
    batch = config.batch
    steps = nearest_steps(lambda count: sum(tokens_at_lengths(batch, count).values()), wanted)
    if config.max_steps not in (None, steps):
        raise UserError(f"max_steps: {config.max_steps:,}, but {rule} take {steps:,} steps; leave one of them out")
    rule += ", if batch.dynamic never makes the batch larger" if batch.dynamic else ""
    return draft.set("", "max_steps", steps).note("max_steps", steps, rule)


def tokens_wanted(key: str, value: float, parameters: int, epoch: Epoch | None) -> tuple[float, str]:
    """The tokens of a run whose length is given by this key of LENGTHS, and the rule. UserError for unknown data."""
    if key == "tokens":
        return value, f"{value:,} tokens"
    if key == "tokens_per_parameter":
        return value * parameters, f"{value:g} tokens for each of {parameters:,} parameters"
    if epoch is None:
        raise UserError(
            "epochs: the data are not there yet, so their size is not known; run `prepare`, or give `tokens`"
        )
    return value * epoch.tokens, f"{value:g} epochs of {epoch.tokens:,} tokens"


def whole_sequences(batch: Any, step: int, length: int) -> int:
    """Sequences of `length` tokens in 0-based `step`, before hlb's multiplier: at least one. batch: resolved."""
    return max(1, schedules.ramped(step, batch.ramp_start, batch.tokens_per_step, batch.ramp_steps) // length)


def sequence_lengths(batch: Any) -> list[int]:
    """The sequence lengths of a run, in order. batch: resolved."""
    return schedules.sequence_lengths(batch.sequence_start, batch.sequence_length, batch.sequence_double_every)


def tokens_at_lengths(batch: Any, steps: int) -> dict[int, int]:
    """Sequence length -> tokens of the first `steps` steps at that length, if hlb's multiplier stays at one. batch: resolved."""
    done, tokens, lengths = 0, {}, sequence_lengths(batch)
    for i, length in enumerate(lengths):
        last = length == lengths[-1]
        until = steps if last else min(steps, (i + 1) * batch.sequence_double_every + 1)
        growing = range(done, max(done, min(until, batch.ramp_steps)))
        sequences = sum(whole_sequences(batch, step, length) for step in growing)
        sequences += (until - done - len(growing)) * whole_sequences(batch, batch.ramp_steps, length)
        tokens[length], done = sequences * length, until
    return tokens


def nearest_steps(spent: Callable[[int], int], wanted: float) -> int:
    """The number of steps, at least one, whose spent(steps) is nearest to `wanted`. spent grows with the steps."""
    high = 1
    while spent(high) < wanted:
        high *= 2
    low = high // 2  # spent(low) < wanted <= spent(high), or low is 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if spent(middle) < wanted else (low, middle)
    return low if low and wanted - spent(low) < spent(high) - wanted else high
