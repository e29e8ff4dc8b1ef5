"""A run put together: its optimiser step, what it looks at in between, what it keeps. When to do which is train.py's."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.base import IGNORE, Batch
from trainer import __version__
from trainer.checkpoint import format as checkpoint
from trainer.checkpoint.saver import Saver
from trainer.core.errors import Damaged, UserError
from trainer.data.dataset import DatasetInfo
from trainer.data.stream import Split, TrainStream
from trainer.engine import build_engine
from trainer.inference.decoding import complete
from trainer.inference.evaluation import check_enough, score, validate
from trainer.optim.frequency import FrequencyScaling
from trainer.planning.plan import Plan
from trainer.planning.run_config import check_trained_with, folder_of
from trainer.recipes.hlb import BatchMultiplier, GradNormLaw
from trainer.runs.report import Measured
from trainer.runtime.device import HostCopy
from trainer.runtime.distributed import World
from trainer.runtime.signals import STOPPING, StopSignals
from trainer.runtime.watchdog import Watchdog

ACCURACY_TOKENS = 2048  # training accuracy is an estimate from about this many tokens


@dataclass
class State:
    """All that the loop itself must remember; the rest follows from the step."""

    step: int = 0  # optimiser steps done
    position: int = 0  # tokens of the data stream passed
    tokens: int = 0  # tokens trained on
    seconds: float = 0.0
    n: float = 0.0  # hlb's batch multiplier, and its dithered value for the next step
    k: int = 1
    norm: float | None = None  # gradient norm of the last step, as its checkpoint has it

    @classmethod
    def stored(cls, values: Any, where: Path) -> State:
        """The state in a manifest. Damaged where a value is none that a run can have."""
        fields = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or values.keys() != fields:
            raise Damaged(
                f"checkpoint: the state in {where} is not this version's: it must hold {', '.join(sorted(fields))}"
            )
        whole = all(
            type(values[name]) is int and 0 <= values[name] < 1 << 63 for name in ("step", "position", "tokens", "k")
        )
        real = all(type(values[name]) in (int, float) and values[name] >= 0 for name in ("seconds", "n"))
        if not (whole and real and values["k"] >= 1 and type(values["norm"]) in (int, float, type(None))):
            raise Damaged(f"checkpoint: the state in {where} holds a value that no run can have")
        return cls(**values)


class Run:
    """The parts of a run, put together once."""

    def __init__(
        self, plan: Plan, world: World, dataset: DatasetInfo, watchdog: Watchdog, signals: StopSignals
    ) -> None:
        config = plan.config
        self.plan, self.config, self.world, self.dataset = plan, config, world, dataset
        self.watchdog, self.signals = watchdog, signals
        self.folder = folder_of(config)
        self.engine = build_engine(plan, world)
        self.model, self.device = self.engine.model, self.engine.device
        self.no_flags = torch.zeros(len(STOPPING) + 1, device=self.device)
        self.stream = TrainStream(
            Split(config.data, dataset, "train"), config.seed, config.data.threads, config.data.order
        )
        self.validation = Split(config.data, dataset, "validation")
        check_enough(self.validation, config.evaluation.protocol, "evaluation.protocol")
        law = GradNormLaw.of(plan.parameters)
        self.multiplier = BatchMultiplier(law, plan.parameters, config.seed, config.batch.n_max)
        keep = checkpoint.retention(config.checkpoint.keep, config.checkpoint.keep_every)
        self.saver = Saver(self.folder / "checkpoints", world, keep, config.checkpoint.asynchronous)
        self.state = State()
        self.rows = ""  # digest of metrics.jsonl in the checkpoint that the run goes on from
        self.last: Measured | None = None  # step of this process
        embedding = self.model.token_embedding()
        embedding.scale_grad_by_freq = config.optim.embedding_frequency == "microbatch"
        self.frequency: Any = FrequencyScaling(embedding) if config.optim.embedding_frequency == "global" else None

    # -- one optimiser step ------------------------------------------------------------------------------------------

    def optimiser_step(self) -> Measured:
        """Accumulate one global batch, then update. Nothing here waits for the device to do what it is told here."""
        state, step = self.state, self.state.step
        length = self.plan.sequence_length(step)
        sequences = state.k * (self.config.batch.tokens_per_step // length)
        counted = sequences * length  # tokens of this step on all ranks
        torch.manual_seed(zlib.crc32(f"{self.config.seed}:{step}:{self.world.rank}".encode()))  # dropout and the like

        self.watchdog.at(step + 1, "reading data", in_step=True)
        position = self.position()
        rows = self.read(length, sequences)  # [rows of this rank, length + 1]
        if self.frequency is not None:
            self.frequency.count(rows[:, :-1], self.world)
        batch: Batch = {"tokens": rows[:, :-1], "targets": rows[:, 1:]}
        count = self.engine.count(batch, counted)
        losses: Any = 0  # [1 + parts]
        for number, (part, last) in enumerate(self.microbatches(batch, length, sequences), 1):
            self.watchdog.at(step + 1, f"microbatch {number}", in_step=True)
            losses = losses + self.engine.backward(part, 1 / count, last)
        self.watchdog.at(step + 1, "loss and update", in_step=True)
        # What only one rank knows travels with the loss: all learn of it at the same step, at no cost.
        sums = self.world.sum(torch.cat([losses / count, self.flags()]))
        losses, flags = sums.split([len(losses), len(self.no_flags)])
        norm, finite = self.engine.step(step, losses[0])

        measured = Measured(
            step=step + 1,
            tokens=state.tokens + counted,
            step_tokens=counted,
            epoch=self.stream.epoch(state.position),
            length=length,
            multiplier=state.k,
            lr=self.engine.optimizer.matrix_lr,
            numbers=HostCopy(torch.cat([torch.stack([losses[0], norm, finite]), flags, losses[1:]])),
            parts=self.engine.part_names,
        )
        state.position = position + counted
        state.tokens += counted
        state.step += 1
        if self.config.batch.dynamic:
            self.multiplier.after_step(step, self.last_norm())
            state.n, state.k = self.multiplier.n, self.multiplier.k
        self.last = measured
        return measured

    def last_norm(self) -> float | None:
        """Gradient norm of the last step, which may have been one before a restart."""
        return self.state.norm if self.last is None else self.last.grad_norm

    def flags(self) -> Tensor:
        """What of this rank all must learn: for each signal of STOPPING whether it came, and whether a save has failed; fp32 [len(STOPPING) + 1]."""
        asked = self.signals.asked
        if asked is None and not self.saver.failed:
            return self.no_flags
        return torch.tensor(
            [*(float(asked == number) for number in STOPPING), float(self.saver.failed)], device=self.device
        )

    def position(self) -> int:
        """Where in the data the next step begins."""
        step = self.state.step
        length, before = self.plan.sequence_length(step), self.plan.sequence_length(max(0, step - 1))
        return self.stream.start(self.state.position, length, before)

    def read(self, length: int, sequences: int) -> Tensor:
        """This rank's sequences of the step, each with its last target, on the device; begins to read those of the next step."""
        position = self.position()
        first, count = self.share(sequences)
        rows = torch.from_numpy(self.stream.windows(position, length, first, count))
        self.stream.read_ahead(position + sequences * length, length, first, count)  # guessing that nothing grows
        return rows.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else rows

    def microbatches(self, batch: Batch, length: int, sequences: int) -> Iterator[tuple[Batch, bool]]:
        """`batch` cut along dimension 0, and whether a part is the last: equally many parts on every rank."""
        largest = -(-sequences // self.world.size)  # share of any rank
        fit = max(1, self.config.batch.tokens_per_microbatch // length)
        count = -(-largest // fit)
        parts: list[Any] = [{} for _ in range(count)]
        for key, value in batch.items():
            for part, values in zip(parts, value.tensor_split(count), strict=True):  # type: ignore[attr-defined]
                part[key] = values
        for number, part in enumerate(parts, 1):
            if (
                len(part["tokens"]) == 0
            ):  # fewer sequences than on other ranks: a row that does not count joins the collectives
                part = {key: value.new_zeros(1, *value.shape[1:]) for key, value in part.items()}
                part["targets"] = torch.full_like(part["targets"], IGNORE)
            yield part, number == count

    def share(self, sequences: int) -> tuple[int, int]:
        """(first, count) of this rank's sequences: contiguous, as even as whole sequences allow."""
        rank, size = self.world.rank, self.world.size
        first, after = sequences * rank // size, sequences * (rank + 1) // size
        return first, after - first

    # -- looking -----------------------------------------------------------------------------------------------------

    def train_accuracy(self) -> float | None:
        """Share of right guesses on a few of the next step's sequences; costs one small forward pass."""
        if not (self.world.leader or self.engine.lockstep):
            return None
        length = self.plan.sequence_length(self.state.step)
        windows = self.stream.windows(self.position(), length, 0, max(1, ACCURACY_TOKENS // length))
        block = torch.from_numpy(windows)
        with torch.no_grad():
            _, right, count = score(self.engine, block[:, :-1], block[:, 1:])
        return (right / count).item()

    def validate(self) -> dict[str, Any]:
        """The run's protocols on the validation split; the last time, and where max_tokens is 0, on the whole of it."""
        step = self.state.step
        self.watchdog.at(step, "validation")
        final = step == self.config.max_steps
        limit = 0 if final else self.config.evaluation.max_tokens
        return validate(
            self.engine,
            self.validation,
            self.plan,
            self.world,
            step,
            max_tokens=limit,
            at=lambda place: self.watchdog.at(step, place),
        )

    def write_sample(self, tokenizer: Any, tokens: int, header: str) -> str:
        """A text sample, appended to samples.txt; returns it ("" on ranks that take no part)."""
        self.watchdog.at(self.state.step, "text sample")  # also who takes no part: it counts places
        if not (self.world.leader or self.engine.lockstep):
            return ""
        prompt = self.config.log.sample_prompt
        limit = self.model.max_context
        if limit is not None:  # beyond it every token would cost a whole context
            tokens = max(1, min(tokens, limit - len(tokenizer.encode(prompt))))
        with self.engine.gathered():
            new = complete(self.engine, tokenizer, [prompt], tokens, [], self.world.say, seed=self.config.seed)
        text = prompt + new[0]
        if self.world.leader:
            with (
                self.world.decoration("samples.txt"),
                (self.folder / "samples.txt").open("a", encoding="utf-8") as file,
            ):
                file.write(f"=== {header}\n{text}\n\n")
        return text

    # -- keeping -----------------------------------------------------------------------------------------------------

    def save(self, seconds: float, rows: str = "") -> None:
        """Write a checkpoint of everything needed to go on. rows: the digest of metrics.jsonl."""
        self.watchdog.at(self.state.step, "saving")
        self.saver.save(self.state.step, self.engine.tensors(), self.facts(seconds, rows))

    def facts(self, seconds: float, rows: str = "") -> dict[str, Any]:
        """What a checkpoint's manifest says of the run."""
        self.state.seconds, self.state.norm = seconds, self.last_norm()
        return {
            "tokens": self.state.tokens,
            "state": dataclasses.asdict(self.state),
            "fingerprint": self.dataset.fingerprint,
            "metrics": rows,
            "world_size": self.world.size,
            "config": dataclasses.asdict(self.config),
            "torch": torch.__version__,
            "crescendo": __version__,
        }

    def restore(self) -> bool:
        """Go on from the newest good checkpoint; False where there is none."""
        chosen = checkpoint.go_on_from(self.folder / "checkpoints", self.world)
        if chosen is None:
            return False
        path, manifest = chosen
        if manifest.get("fingerprint") != self.dataset.fingerprint:
            raise UserError(
                f"data.path: {self.config.data.path} is not the data that {path} was trained on (another fingerprint); "
                "give the run its data back or choose another --run_dir"
            )
        check_trained_with(manifest.get("config"), self.config, path / checkpoint.MANIFEST)
        self.go_on(path, manifest)
        self.world.say(f"going on from {path}, step {self.state.step} of {self.config.max_steps}")
        return True

    def go_on(self, path: Path, manifest: dict[str, Any]) -> None:
        """Take up the state and the tensors of a checkpoint, whatever config it was made with."""
        self.state = State.stored(manifest.get("state"), path / checkpoint.MANIFEST)
        self.rows = str(manifest.get("metrics", ""))
        self.engine.load(path)
        self.multiplier.n, self.multiplier.k = self.state.n, self.state.k
