"""One optimiser step: read, forward and backward of each microbatch, one sum over the ranks, the update."""

from __future__ import annotations

import signal
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.base import IGNORE, Batch
from trainer.runtime.device import HostCopy
from trainer.runtime.signals import STOPPING, first_of

if TYPE_CHECKING:
    from trainer.training.run import Run


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step did. The fields are known at once. The properties come from the device: reading one waits
    until the device has finished this step, so read them once the next step has been launched."""

    step: int  # optimiser steps done, this one included
    tokens: int  # trained on so far
    step_tokens: int
    epoch: float
    epochs: dict[str, float]  # of each further dataset of data.mix
    sequence_length: int
    batch_multiplier: int
    lr: float
    part_names: tuple[str, ...]  # names of the further losses, in the order of `parts`
    measured: HostCopy

    def wait(self) -> None:
        """Wait until the device has finished the step."""
        self.measured.read()

    @property
    def loss(self) -> float:
        """Mean over the step's targets on all ranks."""
        return self.measured.read()["loss"][0]

    @property
    def grad_norm(self) -> float:
        """Euclidean norm of the global gradient, before clipping."""
        return self.measured.read()["grad_norm"][0]

    @property
    def noise_scale(self) -> float | None:
        """Gradient noise scale in tokens, from averages over the last steps. None: not estimated, or lost in the noise, where the
        estimate of |G|^2 is not positive."""
        square, trace = self.measured.read()["noise"]
        return trace / square if square > 0 else None

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are finite. If not, the step changed nothing."""
        return self.measured.read()["finite"][0] > 0

    @property
    def parts(self) -> dict[str, float]:
        """The further losses by name, as means like `loss`."""
        return dict(zip(self.part_names, self.measured.read()["parts"], strict=True))

    @property
    def stop_signal(self) -> signal.Signals | None:
        """The signal that asks the run to stop, if any rank has received one: the first of STOPPING."""
        return first_of(self.measured.read()["stop_signals"])

    @property
    def save_failed(self) -> bool:
        """Whether an asynchronous save has failed on any rank."""
        return self.measured.read()["save_failed"][0] > 0


def optimiser_step(run: Run) -> StepResult:
    """Accumulate the gradient of one global batch, then update the weights. Nothing here waits for the device."""
    state, step, watchdog = run.state, run.state.step, run.watchdog
    length = run.plan.sequence_length(step)
    sequences = state.k * run.plan.sequences(step)
    torch.manual_seed(zlib.crc32(f"{run.config.seed}:{step}:{run.world.rank}".encode()))  # for dropout

    watchdog.at(step + 1, "reading data", in_step=True)
    position = run.position()
    tokens = run.stream.tokens(position, length, sequences)  # of this step on all ranks
    batch = run.read(length, sequences)  # [rows of this rank, length, ...]
    if run.frequency is not None:
        run.frequency.count(batch["tokens"], run.world)
    count = run.engine.count(
        batch, tokens if run.stream.every_token else None
    )  # the loss is the sum over the step, divided by this
    losses: Any = 0  # [1 + parts]
    parts = microbatches(run, batch, length, sequences)
    half = len(parts) // 2 if run.config.log.noise_scale else 0
    for number, part in enumerate(parts, 1):
        watchdog.at(step + 1, f"microbatch {number}", in_step=True)
        losses = losses + run.engine.backward(part, 1 / count, number in (half, len(parts)))
        if number == half:
            half_norm, half_count = run.engine.norm_so_far(), count_of(run, parts[:half])

    watchdog.at(step + 1, "loss and update", in_step=True)
    # The flags are summed with the loss: all ranks see them at the same step, without another all-reduce.
    flags = own_flags(run)
    losses, flags = run.world.sum(torch.cat([losses / count, flags])).split([len(losses), len(flags)])
    norm, finite = run.engine.step(step, losses[0])
    if half:
        run.noise.add(half_norm, half_count, norm, count, finite)
    result = StepResult(
        step=step + 1,
        tokens=state.tokens + tokens,
        step_tokens=tokens,
        epoch=run.stream.epoch(state.position),
        epochs=run.stream.epochs(state.position),
        sequence_length=length,
        batch_multiplier=state.k,
        lr=run.engine.optimizer.matrix_lr,
        part_names=run.engine.part_names,
        measured=HostCopy(
            loss=losses[:1],
            parts=losses[1:],
            grad_norm=norm[None],
            noise=run.noise.averages,
            finite=finite[None],
            stop_signals=flags[:-1],
            save_failed=flags[-1:],
        ),
    )
    state.position, state.tokens, state.step = position + sequences * length, result.tokens, result.step
    if run.config.batch.dynamic:
        run.multiplier.after_step(step, run.last_norm())
        state.n, state.k = run.multiplier.n, run.multiplier.k
    run.last = result
    return result


def own_flags(run: Run) -> Tensor:
    """Flags of this rank for all ranks: one per signal of STOPPING, then one for a failed save; fp32 [len(STOPPING) + 1]."""
    asked, failed = run.signals.asked, run.saver.failed
    if asked is None and not failed:
        return run.no_flags  # nothing is copied to the device in an ordinary step
    return torch.tensor([*(float(asked == number) for number in STOPPING), float(failed)], device=run.device)


def count_of(run: Run, parts: list[Batch]) -> Tensor:
    """What counts in microbatches of all ranks, as in `Engine.count`: fp32 scalar on the device."""
    return run.world.sum(torch.stack([run.engine.objective.count(part) for part in parts]).sum()).float()


def microbatches(run: Run, batch: Batch, length: int, sequences: int) -> list[Batch]:
    """Cut `batch` along dimension 0, each part as wide as its own rows. Every rank makes equally many parts; for log.noise_scale two
    at least."""
    largest = -(-sequences // run.world.size)  # share of a rank
    fit = max(1, run.config.batch.tokens_per_microbatch // (length * run.plan.texts_per_row))
    count = max(-(-largest // fit), 2 if run.config.log.noise_scale else 1)
    parts: list[Any] = [{} for _ in range(count)]
    for key, value in batch.items():
        for part, values in zip(parts, value.tensor_split(count), strict=True):  # type: ignore[attr-defined]
            part[key] = values
    first, _ = run.share(sequences)
    for part in parts:
        rows, axis = len(part["tokens"]), part["tokens"].dim() - 1
        width = run.stream.width(run.position(), length, first, rows)
        part |= {key: values.narrow(axis, 0, min(width, values.shape[axis])) for key, values in part.items()}
        first += rows
        if rows == 0:  # fewer sequences than on other ranks: a row without targets joins the collectives
            part |= {key: value.new_zeros(1, *value.shape[1:]) for key, value in part.items()}
            part["targets"] = torch.full_like(part["targets"], IGNORE)
    return parts
