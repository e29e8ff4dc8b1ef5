"""`train`: the loop. One optimiser step is `optimiser_step`; everything around it is when to look and what to keep."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import textwrap
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.base import IGNORE
from trainer import checkpoint
from trainer.checkpoint_saver import Saver
from trainer.config import CorpusConfig, PrepareConfig, RunConfig
from trainer.data.dataset import DatasetInfo
from trainer.data.stream import Split, TrainStream, find_dataset, is_remote, local_folder
from trainer.engine import build_engine
from trainer.engine.distributed import World, join, read_world
from trainer.engine.signals import STOPPING, StopSignals, exit_code, follow_launcher, stopped_line
from trainer.engine.watchdog import Watchdog
from trainer.engine.wishes import read_wishes
from trainer.errors import UserError
from trainer.evaluate import score, validate
from trainer.generate import complete
from trainer.metrics.report import Measured, Report
from trainer.optim.frequency import FrequencyScaling
from trainer.outcome import tell_outcome
from trainer.plan import Plan, render, resolve
from trainer.preflight import before_training
from trainer.run_folder import check_unchanged, combined_values, locked, write_start
from trainer.scaling import BatchMultiplier, GradNormLaw
from trainer.settings import build

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


class Run:
    """The parts of a run, put together once."""

    def __init__(
        self, plan: Plan, world: World, dataset: DatasetInfo, watchdog: Watchdog, signals: StopSignals
    ) -> None:
        config = plan.config
        self.plan, self.config, self.world, self.dataset = plan, config, world, dataset
        self.watchdog, self.signals = watchdog, signals
        self.folder = Path(config.run_dir or "").expanduser()
        self.engine = build_engine(plan, world)
        self.model, self.device = self.engine.model, self.engine.device
        self.no_flags = torch.zeros(len(STOPPING) + 1, device=self.device)
        self.stream = TrainStream(Split(config.data, dataset, "train"), config.seed, config.data.threads)
        self.validation = Split(config.data, dataset, "validation")
        law = GradNormLaw.of(plan.parameters)
        self.multiplier = BatchMultiplier(law, plan.parameters, config.seed, config.batch.n_max)
        keep = checkpoint.retention(config.checkpoint.keep, config.checkpoint.keep_every)
        self.saver = Saver(self.folder / "checkpoints", world, keep, config.checkpoint.asynchronous)
        self.state = State()
        embedding = self.model.token_embedding()
        embedding.scale_grad_by_freq = config.optim.embedding_frequency == "microbatch"
        self.frequency: Any = FrequencyScaling(embedding) if config.optim.embedding_frequency == "global" else None

    # -- one optimiser step ------------------------------------------------------------------------------------------

    def optimiser_step(self) -> Measured:
        """Accumulate one global batch, then update. Nothing here waits for the device but the batch law, every fifth step."""
        state, step = self.state, self.state.step
        length = self.plan.sequence_length(step)
        sequences = state.k * (self.config.batch.tokens_per_step // length)
        counted = sequences * length  # targets of this step on all ranks: the loss is their mean
        torch.manual_seed(zlib.crc32(f"{self.config.seed}:{step}:{self.world.rank}".encode()))  # dropout and the like

        self.watchdog.at(step + 1, "reading data", in_step=True)
        rows = self.read(length, sequences)  # [rows of this rank, length + 1]
        if self.frequency is not None:
            self.frequency.count(rows[:, :-1], self.world)
        loss = torch.zeros((), device=self.device)
        for number, (tokens, targets, last) in enumerate(self.microbatches(rows, length, sequences), 1):
            self.watchdog.at(step + 1, f"microbatch {number}", in_step=True)
            loss += self.engine.backward(tokens, targets, 1 / counted, last)
        self.watchdog.at(step + 1, "loss and update", in_step=True)
        # What only one rank knows travels with the loss: all learn of it at the same step, at no cost.
        sums = self.world.sum(torch.cat([loss[None] / counted, self.flags()]))  # [4]
        loss, flags = sums[0], sums[1:]
        norm, finite = self.engine.step(step, loss)
        self.model.post_step()

        measured = Measured(
            step=step + 1,
            tokens=state.tokens + counted,
            step_tokens=counted,
            epoch=self.stream.epoch(state.position),
            length=length,
            multiplier=state.k,
            lr=self.engine.optimizer.matrix_lr,
            loss=loss,
            grad_norm=norm,
            finite=finite,
            flags=flags,
        )
        state.position = self.stream.start(state.position, length) + counted
        state.tokens += counted
        state.step += 1
        if self.config.batch.dynamic:
            self.multiplier.after_step(step, norm.item() if step % self.multiplier.every == 0 else None)
            state.n, state.k = self.multiplier.n, self.multiplier.k
        return measured

    def flags(self) -> Tensor:
        """What of this rank all must learn: for each signal of STOPPING whether it came, and whether a save has failed; fp32 [3]."""
        asked = self.signals.asked
        if asked is None and not self.saver.failed:
            return self.no_flags
        return torch.tensor(
            [*(float(asked == number) for number in STOPPING), float(self.saver.failed)], device=self.device
        )

    def read(self, length: int, sequences: int) -> Tensor:
        """This rank's sequences of the step, each with its last target, on the device; begins to read those of the next step."""
        position = self.state.position
        first, count = self.share(sequences)
        rows = torch.from_numpy(self.stream.windows(position, length, first, count))
        following = self.stream.start(position, length) + sequences * length
        self.stream.read_ahead(following, length, first, count)  # guessing that nothing grows
        return rows.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else rows

    def microbatches(self, rows: Tensor, length: int, sequences: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
        """`rows` as (tokens [B, T], targets [B, T], whether it is the last): equally many on every rank."""
        largest = -(-sequences // self.world.size)  # share of any rank
        fit = max(1, self.config.batch.tokens_per_microbatch // length)
        parts = rows.tensor_split(-(-largest // fit))
        for number, part in enumerate(parts, 1):
            tokens, targets = part[:, :-1], part[:, 1:]
            if (
                len(part) == 0
            ):  # fewer sequences than elsewhere: take part in the collectives with a row that does not count
                tokens = torch.zeros(1, length, dtype=torch.long, device=self.device)
                targets = torch.full_like(tokens, IGNORE)
            yield tokens, targets, number == len(parts)

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
        windows = self.stream.windows(self.state.position, length, 0, max(1, ACCURACY_TOKENS // length))
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
        if limit is not None and len(tokenizer.encode(prompt)) + tokens > limit:
            tokens = max(1, limit - len(tokenizer.encode(prompt)))
            prompt = tokenizer.decode(tokenizer.encode(prompt)[: limit - tokens].tolist())
        text = prompt + complete(self.engine, tokenizer, [prompt], tokens, [], seed=self.config.seed)[0]
        if self.world.leader:
            with (self.folder / "samples.txt").open("a", encoding="utf-8") as file:
                file.write(f"=== {header}\n{text}\n\n")
        return text

    # -- keeping -----------------------------------------------------------------------------------------------------

    def save(self, seconds: float) -> None:
        """Write a checkpoint of everything needed to go on."""
        self.watchdog.at(self.state.step, "saving")
        self.state.seconds = seconds
        facts = {
            "tokens": self.state.tokens,
            "state": dataclasses.asdict(self.state),
            "fingerprint": self.dataset.fingerprint,
            "world_size": self.world.size,
            "config": dataclasses.asdict(self.config),
            "torch": torch.__version__,
        }
        self.saver.save(self.state.step, self.engine.tensors(), facts)

    def restore(self) -> bool:
        """Go on from the newest good checkpoint; False where there is none."""
        folder = self.folder / "checkpoints"
        chosen = checkpoint.choose(folder, None, self.world.say, self.world)
        if chosen is None:
            return False
        path, manifest = chosen
        if manifest.get("fingerprint") != self.dataset.fingerprint:
            raise UserError(
                f"data.path: {self.config.data.path} is not the data that {path} was trained on (another fingerprint); "
                "give the run its data back or choose another --run_dir"
            )
        try:
            self.state = State(**manifest["state"])
        except (KeyError, TypeError) as error:
            raise UserError(
                f"checkpoint: the state in {path / checkpoint.MANIFEST} is not this version's: {error}"
            ) from None
        self.engine.load(path)
        self.multiplier.n, self.multiplier.k = self.state.n, self.state.k
        self.world.say(f"going on from {path}, step {self.state.step} of {self.config.max_steps}")
        return True


def run(given: dict[str, Any]) -> None:
    """The verb. given: values of the YAML file and the flags, as in RunConfig."""
    world = read_world()
    values, resuming = combined_values(given)
    config = build(RunConfig, values)
    obtain_dataset(config, world)  # before the process group, which would not wait as long as this may take
    with StopSignals(world) as signals:
        if read_wishes(os.environ).launcher not in ("python", "srun"):
            follow_launcher()
        asked = run_joined(given, config, world, signals)
    if asked is not None:
        raise SystemExit(exit_code(asked))


def run_joined(given: dict[str, Any], config: RunConfig, world: World, signals: StopSignals) -> signal.Signals | None:
    """The run, from the process group's beginning to its end; returns the signal that ended it early."""
    join(world, config.device, 2 * config.engine.timeout_minutes)  # the watchdog, which knows more, speaks first
    # Rank 0 looks and resolves; the others take what it found, and its error where there is one.
    values, resuming = world.on_leader(lambda: combined_values(given))
    config, plan_text = world.on_leader(lambda: resolve_run(build(RunConfig, values), resuming))
    if world.size == 1:
        join(world, config.device, alone=config.engine.strategy != "single")
    dataset = find_dataset(config.data)
    assert dataset is not None
    with contextlib.ExitStack() as stack:
        folder = Path(config.run_dir or "").expanduser()
        limits = 60 * config.engine.timeout_minutes, 60 * config.engine.step_timeout_minutes
        # What is left of a job's try on a machine that was cut off holds the folder until its own watchdog ends it.
        patience = 2 * min(limits) if int(os.environ.get("SLURM_RESTART_COUNT") or 0) else 0
        world.on_leader(lambda: stack.enter_context(locked(folder, patience)) and None)
        watchdog = stack.enter_context(contextlib.closing(Watchdog(world, *limits)))
        plan = resolve(config, dataset)
        before_training(plan, world)
        asked = train(Run(plan, world, dataset, watchdog, signals), plan_text)
    if world.leader:  # before the other ranks leave: launchers end all processes when the first ends badly
        tell_outcome("finished" if asked is None else f"stopped by {asked.name}")
    world.stop()
    return asked


def resolve_run(config: RunConfig, resuming: bool) -> tuple[Any, str | None]:
    """The config with nothing left to infer, and the text of a new run's plan; UserError where a run was started otherwise."""
    plan = resolve(config, find_dataset(config.data))
    if not resuming:
        return plan.config, render(plan)
    check_unchanged(Path(plan.config.run_dir).expanduser(), plan.config)
    return plan.config, None


def obtain_dataset(config: RunConfig, world: World) -> None:
    """See to it that `data.path` exists: rank 0 prepares it from `data.source` where it does not, the others wait for it."""
    data = config.data
    if data.path is None:
        raise UserError(
            "data.path: no data to train on; run `python -m trainer prepare --source TEXT --out DIR` and give --data.path DIR, "
            "or start with configs/quickstart.yaml"
        )
    if is_remote(data.path) or not data.source or Path(data.path).expanduser().exists():
        return
    while not world.leader and find_dataset(data) is None:
        time.sleep(0.5)
    if world.leader:
        from trainer.data.prepare import prepare

        corpus = {f.name: getattr(data, f.name) for f in dataclasses.fields(CorpusConfig)}
        prepare(PrepareConfig(**corpus, out=data.path), world.say)


def train(this: Run, plan_text: str | None) -> signal.Signals | None:
    """From the plan to the trained model; returns the signal that stopped it early. plan_text: of a new run; None: go on with an old one."""
    from trainer.data.tokenizers import Tokenizer

    config, world = this.config, this.world
    if plan_text is None:
        this.restore()
    if this.state.step >= config.max_steps:
        world.say(
            f"{this.folder} is finished ({this.state.step} steps); raise --max_steps to go on, or choose another --run_dir"
        )
        return None
    world.on_leader(lambda: write_start(this.folder, config, plan_text, local_folder(config.data)))
    tokenizer = Tokenizer.from_file(this.folder / "tokenizer.json", this.dataset.tokenizer.name)
    world.say(f"{plan_text or ''}\n\noptimiser groups\n{this.engine.optimizer.table()}".lstrip() + "\n" + opening(this))
    report = Report(this.folder, this.plan, world, this.engine, this.state.step, this.state.seconds)
    try:
        asked = loop(this, report, tokenizer)
        if asked is None:
            finish(this, report, tokenizer)
        else:
            world.say(stopped_line(asked, this.state.step))
    finally:
        this.stream.close()
        report.close()
    this.engine.close()
    return asked


def opening(this: Run) -> str:
    """What it is that trains, and how the batch begins and ends."""
    lengths, tokens = this.plan.sequence_lengths, this.config.batch.tokens_per_step
    kernels = this.model.describe_kernels()
    return (
        f"\nengine: {this.engine.describe()}" + (f"\nkernels: {kernels}" if kernels else "") + "\n"
        f"{this.plan.parameters:,} parameters; sequences per step {tokens // lengths[0]:,} of {lengths[0]} tokens at first, "
        f"{tokens // lengths[-1]:,} of {lengths[-1]} at last; lr {this.config.optim.lr:.8f}"
    )


def loop(this: Run, report: Report, tokenizer: Any) -> signal.Signals | None:
    """Step, and at their intervals evaluate, sample and save; returns the signal that ended it before the last step."""
    config, state = this.config, this.state

    def due(every: int) -> bool:
        return state.step == config.max_steps or (every > 0 and state.step % every == 0)

    asked = None
    while state.step < config.max_steps and asked is None:
        report.step_done(this.optimiser_step())
        if report.save_failed:
            this.watchdog.at(state.step, "saving")
            this.saver.finish()
        asked = report.asked if state.step < config.max_steps else None
        save = asked is not None or due(config.checkpoint.every) or due(config.checkpoint.keep_every)
        evaluate = asked is None and due(config.evaluation.every)
        if not (evaluate or save or due(config.log.every)):
            continue
        report.stop_clock()  # waits for the device, which may wait for other ranks: still part of the step
        this.watchdog.at(state.step, "log row")
        report.flush(this.validate() if evaluate else None, this.train_accuracy() if asked is None else None)
        if evaluate and config.log.sample_tokens and state.step < config.max_steps:
            this.write_sample(tokenizer, config.log.sample_tokens, f"step {state.step}")
        if evaluate:
            this.watchdog.at(state.step, "curves")
            if this.world.leader:
                draw_curves(this)
        if save:
            report.sync()
            this.save(report.clock.seconds)
        report.clock.start()
    this.saver.finish()
    return asked


def draw_curves(this: Run) -> None:
    """curves.png of the run so far."""
    from trainer.metrics import plots

    title = f"{this.config.model['name']}, {this.plan.parameters / 1e6:.1f} M parameters, {this.folder.name}"
    plots.draw(this.folder / "metrics.jsonl", this.folder / "curves.png", title)


def finish(this: Run, report: Report, tokenizer: Any) -> None:
    """The closing demonstration and where everything lies."""
    text = ""
    if this.config.log.demo_tokens:
        sample = this.write_sample(tokenizer, this.config.log.demo_tokens, f"step {this.state.step}, final")
        text = "\n".join(textwrap.fill(line, 80) for line in sample.splitlines()) + "\n\n"
    if not this.world.leader:
        return
    last = report.last
    report.console.say(
        f"\n{text}{this.state.step:,} steps, {this.state.tokens:,} tokens in {report.clock.seconds:.1f} s of training: "
        f"validation loss {last['val_loss']:.4f}, {last['val_bits_per_byte']:.4f} bits/byte\n"
        f"{this.folder}: metrics.jsonl, curves.png, samples.txt, checkpoints; "
        f"`python -m trainer generate {this.folder}` writes more"
    )
