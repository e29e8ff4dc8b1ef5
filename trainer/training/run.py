"""The parts of a run put together: its place in the data, its evaluation, its checkpoints. loop.py decides when to use them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from models.base import Batch
from models.lora import without_lora
from models.objective_layers import is_objective_layer
from trainer import __version__
from trainer.checkpoint import format as checkpoint
from trainer.checkpoint.manifest import VALIDATION, amend, best_steps
from trainer.checkpoint.merging import MERGED
from trainer.checkpoint.reader import Reader
from trainer.checkpoint.saver import Saver
from trainer.checkpoint.weights import MODEL
from trainer.core.errors import Damaged, Stopped, UserError
from trainer.data.dataset import DatasetInfo
from trainer.data.mixture import fingerprint
from trainer.data.stream import Split, open_stream
from trainer.engine import build_engine
from trainer.inference.decoding import complete
from trainer.inference.evaluation import check_enough, validate
from trainer.inference.patches import give_patcher
from trainer.optim.frequency import FrequencyScaling
from trainer.planning.frozen import open_weights
from trainer.planning.model import written_out
from trainer.planning.parent import find_parent
from trainer.planning.plan import Plan
from trainer.planning.run_config import branch_point, check_branch, check_trained_with, folder_of
from trainer.recipes.hlb import BatchMultiplier, GradNormLaw
from trainer.runs.metrics import checked_row
from trainer.runtime.distributed import World
from trainer.runtime.signals import STOPPING, StopCheck, StopSignals
from trainer.runtime.watchdog import Watchdog
from trainer.training.early_stopping import read_best
from trainer.training.measuring import Evaluated, Measuring
from trainer.training.noise_scale import NoiseScale
from trainer.training.step import StepResult, own_flags

OWED = "row"  # key of a manifest: the metrics.jsonl row of its step, if the evaluation in that row is still to be made


@dataclass
class State:
    """All that the loop itself must remember; the rest follows from the step."""

    step: int = 0  # optimiser steps done
    position: int = 0  # row lengths of the data stream passed, see trainer/data/stream.py
    tokens: int = 0  # tokens trained on
    seconds: float = 0.0
    n: float = 0.0  # hlb's batch multiplier, and its dithered value for the next step
    k: int = 1
    norm: float | None = None  # gradient norm of the last step, set when a checkpoint is saved
    noise: list[float] = field(default_factory=lambda: [0.0, 0.0])  # averages of the noise scale, set like `norm`
    mark: list[int] = field(default_factory=list)  # of the data stream, see Stream.mark; set like `norm`
    metric: str = ""  # of the evaluations that patience has counted
    reference: list[float] = field(
        default_factory=list
    )  # step and value of its last improvement, see early_stopping.py
    stale: int = 0  # evaluations since then

    @classmethod
    def stored(cls, values: Any, where: Path) -> State:
        """The state in a manifest. Damaged if it has a value that no run can have."""
        names = {field.name for field in dataclasses.fields(cls)}
        later = {"noise": [0.0, 0.0], "mark": [], "metric": "", "reference": [], "stale": 0}  # which 0.3.0 did not have
        if not isinstance(values, dict) or values.keys() | later.keys() != names:
            raise Damaged(
                f"checkpoint: the state in {where} is not this version's: it must hold {', '.join(sorted(names))}"
            )
        values = {**later, **values}
        whole = all(
            type(values[name]) is int and 0 <= values[name] < 1 << 63
            for name in ("step", "position", "tokens", "k", "stale")
        )
        real = all(type(values[name]) in (int, float) and values[name] >= 0 for name in ("seconds", "n"))
        noise, mark, reference = values["noise"], values["mark"], values["reference"]
        real = real and isinstance(noise, list) and len(noise) == 2 and all(type(mean) is float for mean in noise)
        real = real and isinstance(reference, list) and len(reference) in (0, 2) and isinstance(values["metric"], str)
        real = real and all(type(number) in (int, float) and math.isfinite(number) for number in reference)
        whole = whole and isinstance(mark, list) and all(type(number) is int and number >= 0 for number in mark)
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
        self.measuring = Measuring(config, dataset, world)
        self.engine = build_engine(plan, world)
        self.hold_frozen()
        self.model, self.device = self.engine.model, self.engine.device
        self.hold_patcher()
        self.no_flags = torch.zeros(len(STOPPING) + 1, device=self.device)  # see step.own_flags
        self.fingerprint = fingerprint(config.data, dataset)
        self.stream = open_stream(config.data, dataset, config.seed, config.batch.sequence_length)
        self.validation = Split(config.data, dataset, "validation")
        check_enough(self.validation, config.evaluation.protocol, "evaluation.protocol")
        law = GradNormLaw.of(plan.parameters)
        self.multiplier = BatchMultiplier(law, plan.parameters, config.seed, config.batch.n_max)
        place, kept = self.folder / "checkpoints", config.checkpoint
        best = functools.partial(best_steps, place, kept.keep_best, config.evaluation.metric)
        self.saver = Saver(place, world, checkpoint.retention(kept.keep, kept.keep_every, best), kept.asynchronous)
        self.best: list[tuple[float, int]] = []  # (value, step) of the best evaluations whose checkpoints are kept
        self.judged: tuple[int, dict[str, Any]] | None = (
            None  # the last finite evaluation: its step, what a manifest says of it
        )
        self.state = State()
        self.noise = NoiseScale(self.device)
        self.rows = ""  # digest of metrics.jsonl in the checkpoint that the run goes on from
        self.owed: dict[str, Any] | None = None  # row of the checkpoint's step, if its evaluation is still to be made
        self.last: StepResult | None = None  # of the last step of this process
        embedding = self.model.token_embedding()
        embedding.scale_grad_by_freq = config.optim.embedding_frequency == "microbatch"
        self.frequency: Any = FrequencyScaling(embedding) if config.optim.embedding_frequency == "global" else None

    # -- one optimiser step (step.py) --------------------------------------------------------------------------------

    def last_norm(self) -> float | None:
        """Gradient norm of the last step, possibly one before a restart."""
        return self.state.norm if self.last is None else self.last.grad_norm

    def position(self) -> int:
        """Where in the data the next step begins."""
        step = self.state.step
        length, before = self.plan.sequence_length(step), self.plan.sequence_length(max(0, step - 1))
        return self.stream.start(self.state.position, length, before)

    def read(self, length: int, sequences: int) -> Batch:
        """This rank's sequences of the step, on the device. Starts to read the next step's."""
        position = self.position()
        first, count = self.share(sequences)
        batch: Any = {
            name: torch.from_numpy(values) for name, values in self.stream.batch(position, length, first, count).items()
        }
        self.stream.read_ahead(position + sequences * length, length, first, count)  # a guess: nothing grows
        if self.device.type == "cuda":
            batch = {name: rows.pin_memory().to(self.device, non_blocking=True) for name, rows in batch.items()}
        return batch

    def share(self, sequences: int) -> tuple[int, int]:
        """(first, count) of this rank's sequences: contiguous, as even as whole sequences allow."""
        rank, size = self.world.rank, self.world.size
        first, after = sequences * rank // size, sequences * (rank + 1) // size
        return first, after - first

    # -- looking -----------------------------------------------------------------------------------------------------

    def evaluate(self, tokenizer: Any, say: Callable[[str], None]) -> Evaluated:
        """All that the evaluation of this step measures. Raises Stopped on all ranks if one is asked to stop."""
        step = self.state.step
        validation, tasks, metrics = self.validate(), None, {}
        if self.measuring.metrics:
            self.watchdog.at(step, "metrics")
            with self.engine.evaluating():
                metrics = self.measuring.measure(self.engine, tokenizer, step, say)
        if self.measuring.due(step, self.config.max_steps):
            self.watchdog.at(step, "tasks")
            with self.engine.evaluating(), self.engine.gathered():
                tasks = self.measuring.answer(self.engine, tokenizer, self.stoppable())
        return Evaluated(validation, tasks, metrics)

    def stoppable(self) -> Callable[[str], None]:
        """A function that tells the watchdog of the progress of a long evaluation, and raises Stopped on all ranks if one is asked to
        stop: the evaluation may take longer than a cluster waits. All ranks call it equally often."""
        check = StopCheck(lambda: own_flags(self), self.world)

        def at(place: str) -> None:
            self.watchdog.at(self.state.step, place)
            asked = check.heard()
            if asked is not None:
                raise Stopped(asked)

        return at

    def validate(self) -> dict[str, dict[str, Any]]:
        """The run's protocols on the validation split: on all of it after the last step, or if max_tokens is 0. Those of each of
        `Engine.evaluated`. Raises Stopped as `stoppable` says."""
        step, at = self.state.step, self.stoppable()
        self.watchdog.at(step, "validation")
        final = step == self.config.max_steps
        limit = 0 if final else self.config.evaluation.max_tokens
        found = {}
        for weights in self.engine.evaluated:
            with self.engine.evaluating(weights):
                found[weights] = validate(
                    self.engine,
                    self.validation,
                    self.config,
                    self.world,
                    step,
                    max_tokens=limit,
                    at=at,
                )
        return found

    def write_sample(self, tokenizer: Any, tokens: int, header: str) -> str:
        """Append a text sample to samples.txt. Returns it ("" on ranks that take no part)."""
        self.watchdog.at(self.state.step, "text sample")  # on all ranks, since the watchdog counts places
        if not (self.world.leader or self.engine.lockstep):
            return ""
        prompt = self.config.log.sample_prompt
        limit = self.model.max_context
        if limit is not None:  # beyond the context, each token costs a forward pass over all of it
            tokens = max(1, min(tokens, limit - len(tokenizer.encode(prompt))))
        with self.engine.evaluating(), self.engine.gathered():
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

    def save(self, seconds: float, rows: str = "", owed: dict[str, Any] | None = None) -> None:
        """Write a checkpoint of everything needed to go on. rows: the digest of metrics.jsonl; owed: the step's row, if it
        is not in there yet because its evaluation is still to be made."""
        self.watchdog.at(self.state.step, "saving")
        facts = self.facts(seconds, rows) | ({} if owed is None else {OWED: owed})
        self.saver.save(self.state.step, self.engine.tensors(), facts)

    def settle(self, rows: str) -> None:
        """Note in the run's checkpoint that its missing evaluation is made. rows: the digest of metrics.jsonl with that row."""
        path = self.saver.folder / checkpoint.step_name(self.state.step)
        facts = {"metrics": rows, OWED: None, "state": dataclasses.asdict(self.state), **self.validation_fact()}
        self.world.on_leader(lambda: amend(path, facts))
        self.owed = None

    def facts(self, seconds: float, rows: str = "") -> dict[str, Any]:
        """What a checkpoint's manifest says about the run."""
        self.state.seconds, self.state.norm = seconds, self.last_norm()
        self.state.noise, self.state.mark = self.noise.averages.tolist(), self.stream.mark(self.state.position)
        return {
            "tokens": self.state.tokens,
            "state": dataclasses.asdict(self.state),
            "fingerprint": self.fingerprint,
            "metrics": rows,
            "world_size": self.world.size,
            "config": dataclasses.asdict(self.config),
            "torch": torch.__version__,
            "crescendo": __version__,
            **self.validation_fact(),
        }

    def validation_fact(self) -> dict[str, Any]:
        """What a manifest says of the evaluation at its step; empty if there was none."""
        step, validation = self.judged or (None, {})
        return {VALIDATION: validation} if step == self.state.step else {}

    def restore(self) -> bool:
        """Go on from the newest good checkpoint. False if there is none."""
        chosen = checkpoint.go_on_from(self.folder / "checkpoints", self.world)
        if chosen is None:
            return False
        path, manifest = chosen
        refuse_merged(path, manifest)
        if manifest.get("fingerprint") != self.fingerprint:
            raise UserError(
                f"data.path: {self.config.data.path} is not the data that {path} was trained on (another fingerprint); "
                "set --data.path to that data or choose another --run_dir"
            )
        check_trained_with(manifest.get("config"), self.config, path / checkpoint.MANIFEST)
        self.go_on(path, manifest)
        self.best = read_best(self)
        self.world.say(f"going on from {path}, step {self.state.step} of {self.config.max_steps}")
        return True

    def begin(self) -> None:
        """Begin as branch_from or init_from says; without them, at step 0 with the initial weights."""
        if self.config.branch_from is not None:
            self.branch(self.config.branch_from)
        elif self.config.init_from is not None:
            self.begin_with(self.config.init_from)

    def branch(self, point: str) -> None:
        """Begin with another run's weights, optimizer state, step and data position. point: RUN@STEP.

        UserError if that run trained another model or on other data, or with another optimizer.
        """
        source, step = branch_point(point, "branch_from", self.world.say)
        chosen = checkpoint.choose(source / "checkpoints", step, self.world.say, self.world)
        assert chosen is not None  # branch_point found it
        path, manifest = chosen
        refuse_merged(path, manifest)
        check_branch(manifest.get("config"), self.config, path)
        self.world.on_leader(lambda: refuse_other_layers(path, self.engine.shapes))
        if manifest.get("fingerprint") != self.fingerprint:
            raise UserError(
                f"branch_from: {path} was trained on other data than {self.config.data.path}; a branch goes on in it"
            )
        if step >= self.config.max_steps:
            raise UserError(f"max_steps: {self.config.max_steps} is not beyond step {step} of branch_from; raise it")
        self.go_on(path, manifest)
        self.rows, self.owed = "", None  # both belong to the other run's metrics.jsonl
        self.state.metric, self.state.reference, self.state.stale = "", [], 0  # patience begins anew
        self.world.say(f"branching from {path}: step {self.state.step} of {self.config.max_steps}")

    def begin_with(self, init_from: str) -> None:
        """Begin at step 0 with the weights of a parent. init_from: as in config.yaml. UserError if its tokenizer is not that of the
        data."""
        config, world = self.config, self.world
        parent = checkpoint.together(lambda: find_parent(init_from, world.say), world)[world.rank]
        given = self.dataset.tokenizer, config.data.path, self.dataset.arguments.get("end_of_text")
        checkpoint.together(lambda: parent.check_tokenizer(*given), world)
        plain = written_out(dataclasses.replace(config, model=without_lora(config.model)))
        weights = parent.weights(config.init_weights, *plain, world)
        checkpoint.together(lambda: self.engine.begin_with(weights), world)
        world.say(f"beginning with the weights of {parent} ({config.init_weights})")

    def hold_frozen(self) -> None:
        """Open the models that the objective needs and does not train, and pass them down."""
        for name, frozen in self.plan.frozen.items():
            weights = open_weights(frozen, name, self.world)
            checkpoint.together(functools.partial(self.engine.hold_frozen, name, weights), self.world)
            self.world.say(f"objective.{name}: {frozen.spec.source}, {frozen.parameters:,} parameters, frozen")

    def hold_patcher(self) -> None:
        """Pass the model that decides where patches end down to a model that needs one: for validation and for text."""
        info, tokenizer = self.dataset.patches, self.dataset.tokenizer
        give = functools.partial(give_patcher, self.model, info, tokenizer, self.device, self.world)
        checkpoint.together(give, self.world)

    def go_on(self, path: Path, manifest: dict[str, Any]) -> None:
        """Load the state and the tensors of a checkpoint, whatever config it was made with."""
        self.state = State.stored(manifest.get("state"), path / checkpoint.MANIFEST)
        self.rows = str(manifest.get("metrics", ""))
        self.owed = manifest.get(OWED)
        if self.owed is not None and (checked_row(self.owed) is None or self.owed["step"] != self.state.step):
            raise Damaged(f"checkpoint: {OWED} in {path / checkpoint.MANIFEST} is not a row of step {self.state.step}")
        try:
            self.stream.go_on(self.state.mark)
        except ValueError as error:
            raise Damaged(
                f"checkpoint: the state in {path / checkpoint.MANIFEST} is not of these data: {error}"
            ) from None
        self.engine.load(path)
        self.multiplier.n, self.multiplier.k = self.state.n, self.state.k
        self.noise.averages = torch.tensor(self.state.noise, device=self.device)


def refuse_merged(path: Path, manifest: dict[str, Any]) -> None:
    """UserError if a checkpoint holds weights that `merge` made: training cannot go on from them, only begin with them."""
    if MERGED in manifest:
        raise UserError(
            f"run_dir: {path} holds merged weights, without an optimizer's state; train from them with "
            f"--init_from {path.parents[1]} and another --run_dir"
        )


def refuse_other_layers(path: Path, names: Iterable[str]) -> None:
    """UserError if a checkpoint holds other layers of an objective than a run with parameters of these names trains."""
    held = {name.removeprefix(MODEL) for name in Reader(path).stored() if name.startswith(MODEL)}
    differing = sorted(name for name in held ^ set(names) if is_objective_layer(name))
    if differing:
        raise UserError(
            f"branch_from: {differing[0]}, a layer of an objective, is in one of {path} and this run; a branch goes on with the "
            "same objective; to begin with the weights alone, give --init_from instead"
        )
