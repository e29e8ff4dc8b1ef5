"""`train`: the loop. One optimiser step is `optimiser_step`; everything around it is when to look and what to keep."""

from __future__ import annotations

import contextlib
import dataclasses
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
from trainer.config import CorpusConfig, PrepareConfig, RunConfig
from trainer.data.dataset import DatasetInfo
from trainer.data.stream import Split, TrainStream, find_dataset, is_remote, local_folder
from trainer.engine import build_engine
from trainer.engine.distributed import World, join, read_world
from trainer.errors import UserError
from trainer.evaluate import score, validate
from trainer.generate import complete
from trainer.metrics.report import Measured, Report
from trainer.optim import build_optimizer
from trainer.plan import Plan, render, resolve
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

    def __init__(self, plan: Plan, world: World, dataset: DatasetInfo) -> None:
        config = plan.config
        self.plan, self.config, self.world, self.dataset = plan, config, world, dataset
        self.folder = Path(config.run_dir or "").expanduser()
        self.engine = build_engine(plan, world)
        self.model, self.device = self.engine.model, self.engine.device
        self.optimizer = build_optimizer(plan, self.model, self.device)
        self.names = {parameter: name for name, parameter in self.model.named_parameters()}
        self.stream = TrainStream(Split(config.data, dataset, "train"), config.seed, config.data.threads)
        self.validation = Split(config.data, dataset, "validation")
        law = GradNormLaw.of(plan.parameters)
        self.multiplier = BatchMultiplier(law, plan.parameters, config.seed, config.batch.n_max)
        self.state = State()
        embedding = self.model.token_embedding()
        embedding.scale_grad_by_freq = config.optim.embedding_frequency == "microbatch"
        self.embedding: Any = embedding.weight if config.optim.embedding_frequency == "global" else None

    # -- one optimiser step ------------------------------------------------------------------------------------------

    def optimiser_step(self) -> Measured:
        """Accumulate one global batch, then update. Nothing here waits for the device but the batch law, every fifth step."""
        state, step = self.state, self.state.step
        length = self.plan.sequence_length(step)
        sequences = state.k * (self.config.batch.tokens_per_step // length)
        counted = sequences * length  # targets of this step on all ranks: the loss is their mean
        torch.manual_seed(zlib.crc32(f"{self.config.seed}:{step}:{self.world.rank}".encode()))  # dropout and the like

        loss = torch.zeros((), device=self.device)
        # How often each token stands in the whole step: its embedding row's gradient is divided by that.
        occurrences = None if self.embedding is None else torch.zeros(len(self.embedding), device=self.device)
        for tokens, targets, last in self.microbatches(length, sequences):
            loss += self.engine.backward(tokens, targets, 1 / counted, last)
            if occurrences is not None:
                occurrences.index_add_(0, tokens.flatten(), (targets != IGNORE).flatten().float())
        loss = self.world.sum(loss) / counted

        if occurrences is not None:
            self.embedding.grad.div_(self.world.sum(occurrences).clamp_(min=1)[:, None])
        gradients = [parameter.grad for parameter in self.names if parameter.grad is not None]
        norms = torch._foreach_norm(gradients, 2, torch.float32)  # fp32 also where gradients are bf16
        norm = torch.linalg.vector_norm(torch.stack(norms))
        if self.config.optim.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(list(self.names), self.config.optim.clip_norm, norm)
        finite = (torch.isfinite(loss) & torch.isfinite(norm)).float()
        self.optimizer.step(step, loss, finite)
        self.model.post_step()
        self.optimizer.clear_gradients()

        measured = Measured(
            step=step + 1,
            tokens=state.tokens + counted,
            step_tokens=counted,
            epoch=self.stream.epoch(state.position),
            length=length,
            multiplier=state.k,
            lr=self.optimizer.matrix_lr,
            loss=loss,
            grad_norm=norm,
            finite=finite,
        )
        state.position = self.stream.start(state.position, length) + counted
        state.tokens += counted
        state.step += 1
        if self.config.batch.dynamic:
            self.multiplier.after_step(step, norm.item() if step % self.multiplier.every == 0 else None)
            state.n, state.k = self.multiplier.n, self.multiplier.k
        return measured

    def microbatches(self, length: int, sequences: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
        """This rank's share of a step, as (tokens [B, T], targets [B, T], whether it is the last)."""
        position = self.state.position
        first, count = self.share(sequences)
        following = self.stream.start(position, length) + sequences * length
        fit = max(1, self.config.batch.tokens_per_microbatch // length)
        if count == 0:  # fewer sequences than ranks: take part in the collectives with a row that does not count
            empty = torch.zeros(1, length, dtype=torch.long, device=self.device)
            yield empty, torch.full_like(empty, IGNORE), True
            return
        parts = -(-count // fit)
        rows = -(-count // parts)
        for at in range(0, count, rows):
            windows = self.stream.windows(position, length, first + at, min(rows, count - at))
            last = at + rows >= count
            # The next rows are read while the device works on these. Across a step, guess that nothing grows.
            if last:
                self.stream.read_ahead(following, length, first, min(rows, count))
            else:
                self.stream.read_ahead(position, length, first + at + rows, min(rows, count - at - rows))
            block = torch.from_numpy(windows)
            if self.device.type == "cuda":
                block = block.pin_memory().to(self.device, non_blocking=True)
            yield block[:, :-1], block[:, 1:], last

    def share(self, sequences: int) -> tuple[int, int]:
        """(first, count) of this rank's sequences: contiguous, as even as whole sequences allow."""
        rank, size = self.world.rank, self.world.size
        first, after = sequences * rank // size, sequences * (rank + 1) // size
        return first, after - first

    # -- looking -----------------------------------------------------------------------------------------------------

    def train_accuracy(self) -> float | None:
        """Share of right guesses on a few of the next step's sequences; costs one small forward pass."""
        length = self.plan.sequence_length(self.state.step)
        windows = self.stream.windows(self.state.position, length, 0, max(1, ACCURACY_TOKENS // length))
        block = torch.from_numpy(windows)
        with torch.no_grad():
            _, right, count = score(self.engine, block[:, :-1], block[:, 1:])
        return (right / count).item()

    def validate(self) -> dict[str, Any]:
        """The run's protocols on the validation split; the last time, and where max_tokens is 0, on the whole of it."""
        final = self.state.step == self.config.max_steps
        limit = 0 if final else self.config.evaluation.max_tokens
        return validate(self.engine, self.validation, self.plan, self.world, self.state.step, max_tokens=limit)

    def write_sample(self, tokenizer: Any, tokens: int, header: str) -> str:
        """A text sample (rank 0), appended to samples.txt; returns it."""
        prompt = self.config.log.sample_prompt
        limit = self.model.max_context
        if limit is not None and len(tokenizer.encode(prompt)) + tokens > limit:
            tokens = max(1, limit - len(tokenizer.encode(prompt)))
            prompt = tokenizer.decode(tokenizer.encode(prompt)[: limit - tokens].tolist())
        text = prompt + complete(self.engine, tokenizer, [prompt], tokens, [], seed=self.config.seed)[0]
        with (self.folder / "samples.txt").open("a", encoding="utf-8") as file:
            file.write(f"=== {header}\n{text}\n\n")
        return text

    # -- keeping -----------------------------------------------------------------------------------------------------

    def save(self, seconds: float) -> Path:
        """Write a checkpoint of everything needed to go on."""
        self.state.seconds = seconds
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        optimizer = self.optimizer.tensors(self.names)
        tensors |= {f"optimizer.{name}": tensor for name, tensor in optimizer.items()}
        tensors["weight_decay"] = self.optimizer.decay
        facts = {
            "tokens": self.state.tokens,
            "state": dataclasses.asdict(self.state),
            "fingerprint": self.dataset.fingerprint,
            "world_size": self.world.size,
            "config": dataclasses.asdict(self.config),
            "torch": torch.__version__,
        }
        settings = self.config.checkpoint
        keep = checkpoint.retention(settings.keep, settings.keep_every)
        return checkpoint.save(self.folder / "checkpoints", self.state.step, tensors, facts, self.world, keep)

    def restore(self) -> bool:
        """Go on from the newest good checkpoint; False where there is none."""
        folder = self.folder / "checkpoints"
        chosen = self.world.on_leader(lambda: checkpoint.choose(folder, None, self.world.say))
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
        tensors = checkpoint.load(path, "", self.world, self.device)
        own = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        checkpoint.put_into(self.model, own, path)
        parameters = {name: parameter for parameter, name in self.names.items()}
        states = {name.removeprefix("optimizer."): t for name, t in tensors.items() if name.startswith("optimizer.")}
        self.optimizer.load_tensors(states, parameters)
        self.optimizer.decay = tensors["weight_decay"]
        self.multiplier.n, self.multiplier.k = self.state.n, self.state.k
        self.world.say(f"going on from {path}, step {self.state.step} of {self.config.max_steps}")
        return True


def run(given: dict[str, Any]) -> None:
    """The verb. given: values of the YAML file and the flags, as in RunConfig."""
    world = read_world()
    values, resuming = combined_values(given)
    config = build(RunConfig, values)
    obtain_dataset(config, world)  # before the process group, which would not wait as long as this may take
    join(world, config.device)
    # Rank 0 looks and resolves; the others take what it found, and its error where there is one.
    values, resuming = world.on_leader(lambda: combined_values(given))
    config, plan_text = world.on_leader(lambda: resolve_run(build(RunConfig, values), resuming))
    dataset = find_dataset(config.data)
    assert dataset is not None
    with contextlib.ExitStack() as stack:
        folder = Path(config.run_dir).expanduser()
        world.on_leader(lambda: stack.enter_context(locked(folder)) and None)
        train(resolve(config, dataset), world, dataset, plan_text)
    world.stop()


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


def train(plan: Plan, world: World, dataset: DatasetInfo, plan_text: str | None) -> None:
    """From the plan to the trained model. plan_text: of a new run; None: go on with an old one."""
    from trainer.data.tokenizers import Tokenizer

    config = plan.config
    this = Run(plan, world, dataset)
    if plan_text is None:
        this.restore()
    if this.state.step >= config.max_steps:
        world.say(
            f"{this.folder} is finished ({this.state.step} steps); raise --max_steps to go on, or choose another --run_dir"
        )
        return
    tokenizer = None
    if world.leader:
        write_start(this.folder, config, plan_text, local_folder(config.data))
        world.say(f"{plan_text or ''}\n\noptimiser groups\n{this.optimizer.table()}".lstrip())
        tokenizer = Tokenizer.from_file(this.folder / "tokenizer.json", dataset.tokenizer.name)
    world.say(opening(this))
    report = Report(this.folder, plan, world, this.engine, this.state.step, this.state.seconds)
    try:
        loop(this, report, tokenizer)
        finish(this, report, tokenizer)
    finally:
        this.stream.close()
        report.close()


def opening(this: Run) -> str:
    """What it is that trains, and how the batch begins and ends."""
    lengths, tokens = this.plan.sequence_lengths, this.config.batch.tokens_per_step
    kernels = this.model.describe_kernels()
    return (
        f"\nengine: {this.engine.describe()}" + (f"\nkernels: {kernels}" if kernels else "") + "\n"
        f"{this.plan.parameters:,} parameters; sequences per step {tokens // lengths[0]:,} of {lengths[0]} tokens at first, "
        f"{tokens // lengths[-1]:,} of {lengths[-1]} at last; lr {this.config.optim.lr:.8f}"
    )


def loop(this: Run, report: Report, tokenizer: Any) -> None:
    """Step, and at their intervals evaluate, sample and save."""
    config, state = this.config, this.state

    def due(every: int) -> bool:
        return state.step == config.max_steps or (every > 0 and state.step % every == 0)

    while state.step < config.max_steps:
        report.step_done(this.optimiser_step())
        evaluate, save = due(config.evaluation.every), due(config.checkpoint.every)
        if not (evaluate or save or due(config.log.every)):
            continue
        report.stop_clock()
        accuracy = this.train_accuracy() if this.world.leader else None
        report.flush(this.validate() if evaluate else None, accuracy)
        if evaluate and this.world.leader:
            if config.log.sample_tokens and state.step < config.max_steps:
                this.write_sample(tokenizer, config.log.sample_tokens, f"step {state.step}")
            draw_curves(this)
        if save:
            report.sync()
            this.save(report.clock.seconds)
        report.clock.start()


def draw_curves(this: Run) -> None:
    """curves.png of the run so far."""
    from trainer.metrics import plots

    title = f"{this.config.model['name']}, {this.plan.parameters / 1e6:.1f} M parameters, {this.folder.name}"
    plots.draw(this.folder / "metrics.jsonl", this.folder / "curves.png", title)


def finish(this: Run, report: Report, tokenizer: Any) -> None:
    """The closing demonstration and where everything lies."""
    if not this.world.leader:
        return
    last = report.last
    text = ""
    if this.config.log.demo_tokens:
        sample = this.write_sample(tokenizer, this.config.log.demo_tokens, f"step {this.state.step}, final")
        text = "\n".join(textwrap.fill(line, 80) for line in sample.splitlines()) + "\n\n"
    report.console.say(
        f"\n{text}{this.state.step:,} steps, {this.state.tokens:,} tokens in {report.clock.seconds:.1f} s of training: "
        f"validation loss {last['val_loss']:.4f}, {last['val_bits_per_byte']:.4f} bits/byte\n"
        f"{this.folder}: metrics.jsonl, curves.png, samples.txt, checkpoints; "
        f"`python -m trainer generate {this.folder}` writes more"
    )
