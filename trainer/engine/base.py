"""Base class of all engines: a model distributed over devices, with one global gradient and one weight update per step."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from models.base import Batch
from models.layers.float8 import convert_to_float8
from models.layers.quantized import fill_packed
from models.lora import reserve_base
from models.materialise import Unset, materialise, ties, with_storage
from models.quantization import move_packed, packed_layers, packed_tensors, quantize_matrices
from trainer.checkpoint.weights import EMA, EMA_UPDATES, EVALUATION, MODEL, holds
from trainer.core.errors import UserError
from trainer.data.documents import document_numbers
from trainer.engine.activation_checkpointing import apply as checkpoint_activations
from trainer.engine.background_compile import BackgroundCompiler, start_background
from trainer.engine.compilation import Compiled
from trainer.engine.matrices import Update, deal, update_copies, update_cost
from trainer.engine.meta import build_meta
from trainer.objectives import FrozenModel, Loss, build_objective
from trainer.objectives.base import ModelAndObjective
from trainer.optim import Optimizer
from trainer.optim.ema import WeightAverage
from trainer.recipes import build_optimizer
from trainer.runtime.device import choose_device, device_name, free_bytes, keep_freed_memory
from trainer.runtime.distributed import World

T = TypeVar("T")

ROOM_SHARE = 0.8  # share of free memory that gathered weights may take; activations need the rest


class Engine:
    """Holds the model and its optimiser. Subclasses distribute them. The training loop calls the same methods on all engines:

    backward(batch, scale, sync) per microbatch, then step(step, loss); tensors() and load() for checkpoints.

    model: the trained model; its forward passes go through `joined`, the module of model and objective. shapes: whole shape of
    every parameter. local: name -> the part of the trained parameter that this rank updates; the optimiser sees only these parts.
    whole_tensors: whether these parts are whole parameters. lockstep: whether a forward pass contains collectives, so that
    all ranks must take part in each. part_names: names of the partial losses, known after the first `backward`. average: the
    moving average of the weights, with optim.ema.
    """

    lockstep = False
    whole_tensors = True
    part_names: tuple[str, ...] = ()
    average: WeightAverage | None = None
    _told_of_room = False  # whether the line that whole weights do not fit was printed
    _compiled: Compiled | None = None
    _background: BackgroundCompiler | None = None  # while a second process compiles and the blocks run eagerly
    local: dict[str, nn.Parameter]
    joined: Any

    def __init__(self, plan: Any, world: World) -> None:
        self.plan, self.config, self.world = plan, plan.config, world
        self.strategy, self.precision = plan.config.engine.strategy, plan.config.precision
        self.device = choose_device(plan.config.device, world.local_rank)
        prepare_device(self.device, plan.config.deterministic)
        self.objective = build_objective(self.config.objective)
        meta = build_meta(plan.model_class, plan.model_config)
        meta = meta.to(torch.bfloat16) if self.precision == "pure_bf16" else meta
        reserve_base(meta, self.device)
        self.shapes = {name: parameter.shape for name, parameter in meta.named_parameters()}
        self.model: Any = self.parallelize(meta)
        self.optimizer: Optimizer = build_optimizer(
            plan,
            self.model,
            {name: self.shapes[name] for name in self.local},
            self.local,
            self.device,
            self.whole_tensors,
        )
        self.take_matrices()
        self.begin_average()

    def parallelize(self, meta: Any) -> Any:
        """The model on its devices with initial weights, made from `meta`, which has no storage. Sets `local` and `joined`."""
        raise NotImplementedError

    def join(self, model: Any) -> ModelAndObjective:
        return ModelAndObjective(model, self.objective)

    def hold_frozen(self, name: str, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Give the objective a model of the plan's `frozen`. weights: (name, whole tensor) of all, which every rank reads by itself;
        the model holds them on the device in the number type that the run computes in. No collectives."""
        frozen = self.plan.frozen[name]
        meta = build_meta(*frozen.classes())
        meta = meta if self.precision == "fp32" else meta.to(torch.bfloat16)
        if frozen.spec.precision == "nf4":
            # In CPU memory first: the device need not hold it whole.
            model = with_weights(meta, weights, torch.device("cpu"))
            quantize_matrices(model, "nf4")
            model = model.to(self.device)
            move_packed(model, self.device)
        else:
            self.shard_frozen(meta)
            model = with_weights(meta, weights, self.device)
        self.objective.frozen[name] = FrozenModel(model)

    def shard_frozen(self, meta: Any) -> None:
        """Spread the weights of a frozen model over the ranks, in place. Here every rank holds all of them."""

    def prepare_blocks(self, model: Any) -> None:
        """See the function below. With engine.background_compile, a second process begins to compile here."""
        # Any rank prints: compilation may fail on one machine only.
        self._compiled = prepare_blocks(model, self.config, self.world.say_from)
        if self._compiled is not None and self.config.engine.background_compile:
            self._background = start_background(self.plan, self.objective, self.device)
            self._compiled.active = self._background is None

    def initialise(self, model: Any, device: torch.device) -> Any:
        """Give `model` storage on `device` and initial weights.

        A seed gives the same weights on every device, strategy and number of ranks. All ranks call this. If one rank finds
        values that were not set, all ranks raise UserError.
        """
        problem = ""
        try:
            model = materialise(model, device, torch.Generator().manual_seed(self.config.seed))
        except Unset as error:
            problem = str(error)
        for found in self.world.gather(problem):
            if found:
                raise UserError(f"model {self.config.model['name']}: {found}")
        return model

    def describe(self) -> str:
        """One line about what this engine really made: strategy, devices, precision, options, and rank 0's parameters."""
        where = device_name(self.device)
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        tf32 = " (products in TF32)" if self.device.type == "cuda" and self.precision == "fp32" else ""
        held, total = self.held(), sum(self.shapes[name].numel() for name in self.local)
        share = f"; rank 0 updates {held:,} of {total:,} parameters" if held != total else ""
        engine = self.config.engine
        how = "" if engine.activation_checkpointing == "none" else f", recomputing {engine.activation_checkpointing}"
        how += ", offloaded" * engine.offload + ", products in fp8" * self.config.float8 + ", compiled" * engine.compile
        how += " in the background" * (self._background is not None)
        how += ", microbatches replayed" * engine.cuda_graphs
        return f"{self.strategy} on {self.world.size} x {where}{threads}, {self.precision}{tf32}{how}{share}"

    def held(self) -> int:
        """Number of parameters that this rank's optimiser updates."""
        return sum(parameter.numel() for parameter in self.local.values())

    def autocast(self) -> Any:
        """The context for every forward pass."""
        return autocast(self.device, self.precision)

    def gathered(self) -> Any:
        """The context for several forward passes without training between them, such as generating text."""
        return contextlib.nullcontext()

    def whole_weights_fit(self) -> bool:
        """Whether every rank has memory for all weights in compute precision. If not, a line says so once. All ranks call this."""
        whole = (4 if self.precision == "fp32" else 2) * sum(shape.numel() for shape in self.shapes.values())
        fits = whole < ROOM_SHARE * min(self.world.gather(free_bytes(self.device, self.world.local_size)))
        if not (fits or self._told_of_room):
            self._told_of_room = True
            self.world.say(
                f"text: weights are gathered again for every token, because all weights need {whole / 1024**3:.2f} GiB, more than "
                "is free"
            )
        return fits

    def masters(self) -> dict[str, Tensor]:
        """Name -> what the optimiser updates on this rank, without gradients: `local`, or other tensors that hold it."""
        return {name: parameter.detach() for name, parameter in self.local.items()}

    def begin_average(self) -> None:
        """Begin the moving average, if the run has one, at the present weights."""
        if self.config.optim.ema:
            self.average = WeightAverage(self.masters(), self.config.optim.ema, self.device)

    @property
    def evaluated(self) -> tuple[str, ...]:
        """The weights that an evaluation measures; see `evaluating`."""
        return ("evaluation",) if self.average is None else ("evaluation", "ema")

    @contextlib.contextmanager
    def evaluating(self, weights: str = "evaluation") -> Iterator[None]:
        """A context in which the model holds other weights: those that the optimizer's rule evaluates with, or the moving average
        ("ema"). They are projected, because an average of projected weights is not. All ranks enter together."""
        others = self.optimizer.evaluation_weights()
        if weights == "ema":
            assert self.average is not None
            others = self.average.averages
        if not others:
            yield
            return
        trained = {name: values.clone() for name, values in self.masters().items()}
        try:
            self.set_weights(others)
            self.project()
            yield
        finally:
            self.set_weights(trained)

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy values into some of `masters`, and from there to all that is computed with."""
        masters = self.masters()
        for name, values in weights.items():
            masters[name].copy_(values)

    def agree(self, value: T) -> T:
        """With `lockstep`, where all ranks generate text together: rank 0's `value`. Else this rank's own."""
        return self.world.on_leader(lambda: value) if self.lockstep else value

    def predict(
        self, tokens: Tensor, documents: Tensor | None = None, cache: Any = None, positions: Tensor | None = None
    ) -> Tensor:
        """Logits [B, T, V] of tokens [B, T], or [1, M, V] of those at `positions` [2, M], their rows and columns. documents: [B, T], see
        Batch; cache: a result of the model's `new_state`."""
        return self.joined(tokens_alone(tokens, documents, positions), cache=cache).logits

    def count(self, batch: Batch, tokens: int | None) -> int | Tensor:
        """The number by which the loss of a step is divided, summed over ranks. batch: of this rank; tokens: targets of all ranks,
        None if not all of them count.

        An int if every token counts. Else a scalar on the device, for which the host does not wait.
        """
        if tokens is not None and self.objective.counts_every_token and "weights" not in batch:
            return tokens
        return self.world.sum(self.objective.count(batch)).float()

    def backward(self, batch: Batch, scale: float | Tensor, sync: bool) -> Tensor:
        """Add the gradient of scale * (sum of the objective's losses).

        batch: on the device; scale: 1 / `count` of the step; sync: whether to sum the gradient so far over the ranks, as a step's
        last microbatch must. Returns `losses` of this rank.
        All ranks call this the same number of times in a step.
        """
        raise NotImplementedError

    def documents(self, tokens: Tensor) -> Tensor | None:
        """[B, T]: the document of each token, if tokens attend only within their document; else None."""
        return document_numbers(tokens, self.plan.end_of_text)

    def with_documents(self, batch: Batch) -> Batch:
        """The batch, with the document of each token added if tokens attend only within their document."""
        if "documents" in batch or self.plan.end_of_text is None:
            return batch
        return {**batch, "documents": self.documents(batch["tokens"])}  # type: ignore[typeddict-item]

    def losses(self, output: Loss) -> Tensor:
        """Losses [1 + parts + measures] of a forward pass, detached, in fp32.

        The first is the sum minus its parts (for next_token the cross-entropy, as validation measures it). The parts and the
        measures follow in the order of `part_names`. The first is not finite if any of the parts is not.
        """
        parts, measures = output.parts or {}, output.measures or {}
        loss, self.part_names = output.sum.detach(), (*parts, *measures)
        further = [value.detach().float() for value in (*parts.values(), *measures.values())]
        return torch.stack([loss - sum(further[: len(parts)]), *further])

    def step(self, step: int, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Clip, update, project, average, clear the gradients.

        step: 0-based; loss: the step's global mean, fp32 scalar on the device. Returns (global gradient norm before clipping,
        1.0 if loss and norm are finite else 0.0). A step that is not finite changes nothing.
        """
        self.collect_gradients()
        norm = self.gradient_norm()
        if self.config.optim.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(list(self.local.values()), self.config.optim.clip_norm, norm)
        finite = (torch.isfinite(loss) & torch.isfinite(norm)).float()
        self.optimizer.prepare(step, finite)
        self.update()
        self.project()
        self.update_average(finite)
        self.optimizer.follow(loss, finite)
        self.clear_gradients()
        if self._background is not None and self._background.finished():
            self._use_compiled_code(self._background, step + 2)
        return norm, finite

    def _use_compiled_code(self, background: BackgroundCompiler, step: int) -> None:
        """step: 1-based, the first one that runs compiled code."""
        assert self._compiled is not None
        self._background = None
        self._compiled.active, phrase = background.result()
        code = "compiled" if self._compiled.active else "eager"
        self.world.say_from(f"engine.compile: {phrase}: {code} code from step {step:,} on")

    def update(self) -> None:
        """One step of the optimiser, after its `prepare`."""
        self.optimizer.step()

    def project(self) -> None:
        """Apply the model's projection after an update."""
        self.model.post_step()

    def update_average(self, finite: Tensor) -> None:
        """Bring the moving average up to date, after the projection. finite: as in `Optimizer.prepare`."""
        if self.average is not None:
            self.average.update(self.masters(), finite)

    def collect_gradients(self) -> None:
        """Set `.grad` of every tensor in `local` to its part of the global gradient."""

    def norm_so_far(self) -> Tensor:
        """Norm of the global gradient of the step's microbatches so far, of which the last one was called with `sync`; as in
        `gradient_norm`."""
        self.collect_gradients()
        return self.gradient_norm()

    def gradient_norm(self) -> Tensor:
        """Euclidean norm of the global gradient, fp32 scalar on the device."""
        return torch.linalg.vector_norm(self.local_norms())

    def local_norms(self) -> Tensor:
        """Norm of each gradient of this rank, in fp32 even if gradients are bf16."""
        gradients = [parameter.grad for parameter in self.local.values() if parameter.grad is not None]
        return torch.stack(torch._foreach_norm(gradients, 2, torch.float32)).to(self.device)

    def clear_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def take_matrices(self) -> None:
        """Allocate the state of the parameters that this rank updates whole, if the optimizer's rule needs them whole."""
        self.optimizer.exchange = self.update_matrices
        owners = self.owners(list(self.optimizer.whole))
        self.optimizer.allocate_whole(name for name, rank in owners.items() if rank == self.world.rank)

    def update_matrices(self, names: list[str], update: Update) -> dict[str, Tensor]:
        """For rules that need whole tensors. Returns this rank's part of each result of `update`.

        `update` runs once on each rank, with the whole (gradient, weight) of every parameter that this rank owns. All ranks call
        this, after `collect_gradients`.
        """
        tensors = {name: (self.local[name].grad, self.local[name].detach()) for name in names}
        return update_copies(tensors, update, self.owners(names))  # type: ignore[arg-type]

    def owners(self, names: list[str]) -> dict[str, int]:
        """Name -> rank that owns the parameter, if each parameter is updated whole by one rank."""
        return deal({name: update_cost(self.optimizer.parts(name).values()) for name in names}, self.world.size)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """All tensors to save, by name: model.NAME, optimizer.NAME.KEY, weight_decay; evaluation.NAME if those weights differ;
        ema.NAME and ema_updates with a moving average."""
        # A parameter that has had no gradient yet has no state; its state would begin with zeros.
        state, whole = self.optimizer.state, set(self.optimizer.whole)
        self.optimizer.allocate(p for name, p in self.local.items() if p not in state and name not in whole)
        tensors = {MODEL + name: tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {MODEL + name: tensor for name, tensor in packed_tensors(self.model).items()}
        for name, parameter in self.local.items():
            for key, value in state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = value if name in whole else self.as_stored(name, value)
        found = {EVALUATION: self.optimizer.evaluation_weights()}
        if self.average is not None:
            found[EMA] = self.average.averages
            tensors[EMA_UPDATES] = self.average.updates
        for prefix, weights in found.items():
            tensors |= {prefix + name: self.as_stored(name, values) for name, values in weights.items()}
            tied = {name: first for name, first in ties(self.model).items() if first in weights}
            tensors |= {prefix + name: tensors[prefix + first] for name, first in tied.items()}
        return tensors | {"weight_decay": self.optimizer.decay}

    def as_stored(self, name: str, value: Tensor) -> Tensor:
        """An optimiser tensor of parameter `name` as a checkpoint needs it, so that it knows the whole shape."""
        return value

    def load(self, path: Any) -> None:
        """Load the tensors that `tensors` gave, from a checkpoint of any engine. UserError if `path` is of another model."""
        from trainer.checkpoint.format import read_into

        tensors, goes_on = self.tensors(), self.average_goes_on(path)
        if not goes_on:
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith((EMA, EMA_UPDATES))}
        read_into(path, tensors, self.world)
        if not goes_on:
            self.begin_average()

    @torch.no_grad()
    def begin_with(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Before step 0: set parameters and buffers to other values than the initial ones; a moving average begins there.

        weights: (name, whole tensor in CPU memory) of all, which every rank reads by itself. No collectives.
        """
        held, packed = self.model.state_dict(), packed_layers(self.model)
        for name, whole in weights:
            if name in packed:
                fill_packed(packed[name], whole)
            else:
                put_whole(held[name], whole)
        self.begin_average()

    def average_goes_on(self, path: Any) -> bool:
        """Whether the moving average is to be read from a checkpoint. A line says where only one of both has one."""
        held = self.world.on_leader(lambda: holds(path, EMA))
        if self.average is not None and not held:
            self.world.say(f"optim.ema: {path} holds no moving average; it begins at the weights of that checkpoint")
        if self.average is None and held:
            self.world.say(f"optim.ema: is 0; the moving average that {path} holds is left out")
        return held and self.average is not None

    def close(self) -> None:
        """Free resources that would outlive the process group."""
        if self._background is not None:
            self._background.close()


def prepare_blocks(model: Any, config: Any, say: Callable[[str], None]) -> Compiled | None:
    """Apply fp8, activation checkpointing, then compilation to each block. Call it before the blocks are sharded.

    config: RunConfig. Returns None if nothing is compiled.
    """
    if config.float8:
        for block in model.blocks():
            convert_to_float8(block)
    checkpoint_activations(model, config.engine.activation_checkpointing)
    return Compiled(model, say) if config.engine.compile else None


def with_weights(meta: Any, weights: Iterable[tuple[str, Tensor]], device: torch.device) -> Any:
    """The model `meta`, which has no storage and may be sharded, on `device` with these weights, whole and of any number type."""
    model = with_storage(meta, device)
    model.init_weights(torch.Generator())  # for buffers that no file holds
    held = model.state_dict()
    for name, whole in weights:
        put_whole(held[name], whole)
    return model


def put_whole(tensor: Tensor, whole: Tensor) -> None:
    """Set a tensor, or this rank's shard of a DTensor, from the whole value, which every rank has."""
    if isinstance(tensor, DTensor):
        # src_data_rank None: each rank cuts its own part out of its own value.
        whole = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
        tensor = tensor.to_local()
    tensor.copy_(whole)


def tokens_alone(tokens: Tensor, documents: Tensor | None = None, positions: Tensor | None = None) -> Batch:
    """A batch without targets. positions: of the tokens whose logits are wanted, if not those of all are."""
    batch: Any = {"tokens": tokens, "documents": documents, "positions": positions}
    return {name: values for name, values in batch.items() if values is not None}  # type: ignore[return-value]


def prepare_device(device: torch.device, deterministic: bool) -> None:
    """Global settings of torch for a run on `device`."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it to be deterministic
        torch.use_deterministic_algorithms(True)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    else:
        keep_freed_memory()


def autocast(device: torch.device, precision: str) -> Any:
    """bf16 compute for precision bf16, whose weights are fp32; no effect for other precisions."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
