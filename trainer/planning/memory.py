"""The memory of a run, estimated before it starts: models without storage, what they keep for backward, what fits a device."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from models.base import Batch
from models.lora import reserve_base
from models.quantization import packed_layers, packed_tensors
from trainer.core.config import OptimConfig
from trainer.engine.deepspeed_config import BUCKET
from trainer.engine.meta import build_meta, stand_ins, told_of_model
from trainer.objectives import DEFAULT_OBJECTIVE
from trainer.optim import names_by_role, state_bytes_per_parameter, trained_parameters
from trainer.planning.frozen import NO_MODELS, Frozen
from trainer.runtime.compat import fake_tensors, private

GIB = 1024**3

# Bytes per parameter, by precision. The optimizer's rule gives those of its state ("moments"). pure_bf16 sums its gradients in
# fp32. What is computed from weights alone, such as autocast's copies in bf16, is measured.
PARTS = {
    "fp32": {"weights": 4, "gradients": 4},
    "bf16": {"weights": 4, "gradients": 4},
    "pure_bf16": {"weights": 2, "gradients": 6},
}
# FSDP gathers its copies a few blocks at a time, and sums pure_bf16's gradients in the unsharded gradients.
FSDP_PARTS = {
    "fp32": {"weights": 4, "gradients": 4},
    "bf16": {"weights": 4, "gradients": 4},
    "pure_bf16": {"weights": 2, "gradients": 2},
}
# DeepSpeed holds fp32 masters besides the moments, and sums its bf16 gradients in fp32.
ZERO_PARTS = {
    "fp32": {"weights": 4, "gradients": 4, "masters": 4},
    "bf16": {"weights": 2, "gradients": 6, "masters": 4},
}
ORDER = ("weights", "gradients", "masters", "moments", "average")
ZERO3_REUSE = 1_000_000_000  # DeepSpeed's stage3_max_reuse_distance: parameters used again within it stay gathered
SHARDED = {
    "zero1": {"masters", "moments", "average"},
    "zero2": {"masters", "moments", "average", "gradients"},
    "zero3": {"masters", "moments", "average", "gradients", "weights"},
    "fsdp": {"moments", "average", "gradients", "weights"},
    "hsdp": {"moments", "average", "gradients", "weights"},
}
GONE_BEFORE_UPDATE = ("head gradient", "copies", "unsharded gradients")
# What engine.offload keeps in CPU memory.
OFFLOADED = {
    **dict.fromkeys(("zero1", "zero2", "zero3"), {"masters", "moments", "average", "gradients"}),
    **dict.fromkeys(("fsdp", "hsdp"), {"moments", "average", "gradients", "weights"}),
}


@dataclass(frozen=True)
class ParallelLayout:
    """How a run is laid out on its devices. processes: of the whole run; shards: processes that share one copy of the model;
    narrow: the moments of fp32 weights are bf16; triton: Triton's kernels run (FlexAttention, the loss); compiled: by
    torch.compile, block by block; deterministic: only kernels that add in a fixed order; cuda_graphs: whose graphs keep their own
    activations, beside those of microbatches that run without a graph, and all gradients; optim: as far as it is decided."""

    strategy: str
    precision: str
    processes: int = 1
    shards: int = 1
    offload: bool = False
    reshard: bool = True
    narrow: bool = False
    on_gpu: bool = True
    triton: bool = False
    compiled: bool = False
    deterministic: bool = False
    cuda_graphs: bool = False
    optim: OptimConfig = field(default_factory=OptimConfig, hash=False)

    @classmethod
    def of(cls, config: Any, processes: int, target: Any, strategy: str = "", shards: int = 0) -> ParallelLayout:
        """The layout of a RunConfig on devices as `target`, a trainer.runtime.device.Target. strategy, shards: if not yet
        decided in the config."""
        from trainer.engine import compilation

        engine = config.engine
        if not strategy:
            strategy, shards = engine.strategy, engine.shard_size if engine.strategy == "hsdp" else processes
        compiled = compilation.choose(strategy, target)[0] if engine.compile is None else engine.compile
        compiled = compiled and not engine.background_compile  # eager steps come first and need more
        narrow = config.optim.narrow_state
        how = processes, shards, engine.offload, engine.reshard_after_forward, narrow
        device = target.memory is not None, target.triton, compiled, config.deterministic, engine.cuda_graphs
        return cls(strategy, config.precision, *how, *device, config.optim)

    @property
    def compute(self) -> str:
        """fp32, autocast (fp32 weights, bf16 products; the residual stream as the model's config says) or bf16 (everything)."""
        if self.precision == "fp32":
            return "fp32"
        return "autocast" if self.precision == "bf16" and self.strategy in ("single", "ddp", "zero0") else "bf16"


class SavedActivations(NamedTuple):
    """Bytes alive after the forward pass of one sequence. blocks: what each block's forward added; logits: whether there is a
    tensor of T x V numbers among them (in models that do not call linear_cross_entropy); unreached: parameters that get no
    gradient, None if the graph does not tell (see engine/gradients.py); copies: the most held of matrices that were computed
    from parameters alone, such as autocast's copies, which are not in the total."""

    total: int
    blocks: list[int]
    logits: bool
    unreached: list[str] | None
    copies: int


def trains_head(model: Any) -> bool:
    """Whether the output projection gets a gradient. model: may have no storage."""
    return bool(names_by_role(model)["embedding" if model.tied_embedding() else "head"])


_measured: dict[
    tuple[Any, ...], SavedActivations
] = {}  # a cache: a process plans the same model several times, and measuring takes seconds


class MemoryEstimate:
    """The memory that a model needs at one sequence length. Models are built without storage; measurements are cached.

    documents: whether the model is given the document number of each token; objective: the section of a resolved config; frozen:
    the models that it needs, as in a Plan.
    """

    def __init__(
        self,
        model_class: Any,
        model_config: Any,
        length: int,
        documents: bool = False,
        objective: Mapping[str, Any] = DEFAULT_OBJECTIVE,
        frozen: Mapping[str, Frozen] = NO_MODELS,
    ) -> None:
        self.model_class, self.model_config, self.objective = model_class, model_config, dict(objective)
        self.frozen = dict(frozen)
        self.length, self.documents = length, documents
        self._model = model = build_meta(model_class, model_config)
        every = model_class.count_parameters(model_config)
        reserve_base(model, "meta")
        self.packed = sum(
            tensor.nbytes for tensor in packed_tensors(model).values()
        )  # of frozen matrices, whole on every device
        blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks()]
        self.parameters = every - sum(layer.weight.numel() for layer in packed_layers(model).values())  # without these
        self.trained = sum(parameter.numel() for parameter in trained_parameters(model).values())
        # Gathered at once: two blocks (one computes while the next is gathered) and what is outside the blocks.
        self.gathered = min(self.parameters, 2 * max(blocks, default=0) + self.parameters - sum(blocks))
        self.caps_logits = model.caps_logits()
        projection = model.token_embedding().weight  # the output projection has its shape
        self.head = projection.numel() if trains_head(model) else 0  # numbers in its gradient

    def state(self, layout: ParallelLayout, accumulates: bool = False) -> dict[str, int]:
        """Bytes on one device, by part, without activations and loss. accumulates: a step may have several microbatches."""
        fsdp, zero = layout.strategy in ("fsdp", "hsdp"), layout.strategy in ("zero1", "zero2", "zero3")
        parts: dict[str, float] = dict((FSDP_PARTS if fsdp else ZERO_PARTS if zero else PARTS)[layout.precision])
        narrow = layout.narrow or layout.precision == "pure_bf16"
        parts["moments"] = state_bytes_per_parameter(self._model, layout.optim, narrow)
        if layout.optim.ema:
            parts["average"] = 4  # fp32 whatever the weights are
        sharded = SHARDED.get(layout.strategy, set())
        away = OFFLOADED[layout.strategy] if layout.offload else set()
        state = {}
        for part in (part for part in ORDER if part in parts):
            count = self.parameters if part == "weights" else self.trained
            held = -(-count // layout.shards) if part in sharded else count
            state[part] = (part not in away) * int(parts[part] * held)
        if self.packed:
            state["weights in nf4"] = self.packed
        if self.frozen:
            shards = layout.shards if fsdp else 1
            state["frozen models"] = sum(model.bytes(layout.precision, shards) for model in self.frozen.values())
        copies = self._measure(layout, "none").copies
        if copies:
            state["copies"] = copies
        # The loss computes the head's gradient while all activations are held: unsharded, in fp32.
        if self.head:
            state["head gradient"] = 4 * self.head
        if fsdp or layout.strategy == "zero3":
            kept = ZERO3_REUSE if layout.strategy == "zero3" else 0 if layout.reshard else self.parameters
            copies = min(self.parameters, max(self.gathered, kept))
            state["gathered"] = copies * (4 if layout.precision == "fp32" else 2)
        if fsdp and accumulates:
            state["unsharded gradients"] = 4 * self.trained  # ranks exchange gradients at the last microbatch only
        if layout.strategy in ("zero2", "zero3"):
            state["buckets"] = (4 if layout.precision == "fp32" else 2) * BUCKET
        return state

    def in_cpu_memory(self, layout: ParallelLayout) -> int:
        """Bytes that engine.offload moves from one device to the memory of its machine."""
        here = self.state(replace(layout, offload=False))
        return sum(here.get(part, 0) for part in OFFLOADED[layout.strategy]) if layout.offload else 0

    @staticmethod
    def in_loss(state: dict[str, int], layout: ParallelLayout, accumulates: bool) -> int:
        """Bytes of `state` that are held in the loss of a step's last microbatch, together with all activations."""
        gradients = state["gradients"]
        if layout.strategy in ("fsdp", "hsdp"):
            absent = gradients  # the backward pass makes their shards later
        elif layout.precision == "pure_bf16":
            absent = gradients // 3 if accumulates else gradients  # the bf16 ones; fp32 sums are held
        else:  # other strategies hold buffers for gradients from the beginning
            absent = gradients if layout.strategy == "single" and not (accumulates or layout.cuda_graphs) else 0
            absent += state["buckets"] if layout.strategy == "zero2" else 0  # the backward pass makes them
        return sum(state.values()) - absent

    @staticmethod
    def in_update(state: dict[str, int]) -> int:
        """Bytes of `state` that are held at the end of the backward pass and in the update, when activations are gone."""
        return sum(state.values()) - sum(state.get(part, 0) for part in GONE_BEFORE_UPDATE)

    def activations(self, layout: ParallelLayout, how: str) -> int:
        """Bytes that one sequence holds at the end of the forward pass and, with checkpointing, in one block's recomputation.

        how: engine.activation_checkpointing. Exact except for buffers of the engine, fragmentation, and some bytes per token
        and head that biases of scores (ALiBi, forget gates, hlb's slopes) hold under FlexAttention.
        """
        kept, plain = self._measure(layout, how), self._measure(layout, "none")
        block = max(before - after for before, after in zip(plain.blocks, kept.blocks, strict=True))
        return self.saved(layout, how) + block

    def saved(self, layout: ParallelLayout, how: str) -> int:
        """Bytes that one sequence holds at the end of the forward pass."""
        return (2 if layout.cuda_graphs else 1) * self._measure(layout, how).total

    def loss(self, layout: ParallelLayout, how: str, tokens: float) -> float:
        """Temporary bytes of the loss of a microbatch of `tokens` tokens, while all activations are held.

        A chunk of logits. If the model already holds all logits: their gradient, in fp32 and in the compute type.
        """
        from models.layers.linear_cross_entropy import working_bytes

        vocab_size, itemsize = self.model_config.vocab_size, 4 if layout.compute == "fp32" else 2
        if self._measure(layout, how).logits:
            return 8 * vocab_size * tokens
        return working_bytes(
            tokens,
            self.head,
            vocab_size,
            itemsize,
            on_gpu=layout.on_gpu,
            fused=layout.triton,
            softcap=self.caps_logits,
            rounded=layout.compute == "bf16",
        )

    def tokens_that_fit(self, memory: int | None, layout: ParallelLayout, how: str, accumulates: bool) -> float:
        """Tokens in whole sequences that a GPU of `memory` bytes holds in one microbatch. No limit on a CPU (None).

        hlb's C comes from a run in pure bf16; fp32 weights, moments and losses need more.
        """
        if memory is None:
            return float("inf")
        one, loss = self.activations(layout, how), self.loss(layout, how, self.length)
        most = self.loss(layout, how, float("inf"))  # the limit for any number of tokens, due to chunks
        state = self.state(layout, accumulates)
        if self.in_update(state) > 0.9 * memory:
            return 0
        room = 0.9 * memory - self.in_loss(state, layout, accumulates)
        return int(max(0, room / (one + loss), (room - most) / one)) * self.length

    def most_held(self, layout: ParallelLayout, how: str, sequences: int, accumulates: bool) -> int:
        """Peak bytes with microbatches of `sequences` sequences."""
        state = self.state(layout, accumulates)
        return max(self.in_microbatch(layout, how, sequences, accumulates), self.in_update(state))

    def in_one_block(self, layout: ParallelLayout, how: str, sequences: int) -> int:
        """Peak bytes of a forward pass that keeps the activations of one block at a time, with weights but without moments."""
        state, loss = self.state(layout), int(self.loss(layout, how, sequences * self.length))
        weights = sum(state.get(part, 0) for part in ("weights", "copies", "head gradient"))
        return weights + loss + 2 * sequences * max(self._measure(layout, "none").blocks, default=0)

    def in_microbatch(self, layout: ParallelLayout, how: str, sequences: int, accumulates: bool) -> int:
        """Peak bytes of a microbatch: in its loss or, with checkpointing, in the recomputation of the first block after it."""
        state, kept = self.state(layout, accumulates), self.saved(layout, how)
        block = self.activations(layout, how) - kept
        loss = int(self.loss(layout, how, sequences * self.length))
        return self.in_loss(state, layout, accumulates) + sequences * kept + max(sequences * block, loss)

    def unreached(self, layout: ParallelLayout, how: str) -> list[str] | None:
        """Names of the parameters that get no gradient, as far as the forward pass tells. Cached if the run was planned."""
        return self._measure(layout, how).unreached

    def _measure(self, layout: ParallelLayout, how: str) -> SavedActivations:
        asked = self.length, layout.compute, how, self.documents, layout.triton, layout.compiled
        under = self.objective, self.frozen
        key = self.model_class, repr(self.model_config), *asked, layout.deterministic, repr(under)
        if key not in _measured:
            with _determinism(layout.deterministic):
                _measured[key] = saved_activations(self.model_class, self.model_config, *asked, *under)
        return _measured[key]


def saved_activations(
    model_class: Any,
    model_config: Any,
    length: int,
    compute: str,
    how: str = "none",
    documents: bool = False,
    flex: bool = False,
    compiled: bool = False,
    objective: Mapping[str, Any] = DEFAULT_OBJECTIVE,
    frozen: Mapping[str, Frozen] = NO_MODELS,
) -> SavedActivations:
    """What is alive after the forward pass of one sequence, its loss included.

    Measured by running the model on tensors without storage. Parameters, their copies and their gradients do not count.
    compute, flex, compiled: see ParallelLayout; how: engine.activation_checkpointing; documents, objective, frozen: see MemoryEstimate.
    A model that cannot be compiled trains uncompiled, so it is measured uncompiled.
    """
    from trainer.engine import compilation

    asked = model_class, model_config, objective, frozen, length, compute, how, documents, flex
    what = (
        f"its forward pass under the objective {objective['name']} does not run on tensors without values, as planning "
        "does (no .item(), .tolist(), numpy)"
    )
    with told_of_model(model_class, what):
        if not compiled:
            return _saved_activations(*asked)
        try:
            return _saved_activations(*asked, compiled=True)
        except Exception as error:
            if not compilation.of_compiler(error):
                raise
            return _saved_activations(*asked)


def _saved_activations(
    model_class: Any,
    model_config: Any,
    objective: Mapping[str, Any],
    frozen: Mapping[str, Frozen],
    length: int,
    compute: str,
    how: str,
    documents: bool,
    flex: bool,
    compiled: bool = False,
) -> SavedActivations:

    from models.layers.flex import planning_for_gpu
    from models.layers.linear_cross_entropy import score_nothing, scored_by
    from trainer.engine import activation_checkpointing, compilation, gradients
    from trainer.objectives import build_objective
    from trainer.objectives.base import ModelAndObjective, example_batch

    model_config = model_class.without_device_kernels(model_config)
    # Not the meta device: fake CPU tensors choose fused kernels and support autocast, as real tensors do.
    with fake_tensors(), contextlib.ExitStack() as stack:
        with _default_dtype(torch.bfloat16 if compute == "bf16" else torch.float32):
            model = model_class(model_config)
        reserve_base(model, "cpu")
        with _default_dtype(torch.float32 if compute == "fp32" else torch.bfloat16):
            others = stand_ins(frozen)
        joined = ModelAndObjective(model, build_objective(objective, others))
        activation_checkpointing.apply(model, how)
        if compiled:
            compilation.hold_as_compiled(model)
        if flex:
            stack.enter_context(planning_for_gpu())
        if compute == "autocast":
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        stack.enter_context(scored_by(score_nothing))
        alive = stack.enter_context(_alive_tensors(model, *others.values()))
        starts, added = [], []
        for block in model.blocks():
            block.register_forward_pre_hook(lambda *_: starts.append(alive.activations.bytes))
            block.register_forward_hook(lambda *_: added.append(alive.activations.bytes - starts[-1]))
        tokens = torch.zeros(1, length, dtype=torch.long)
        batch: Batch = example_batch(joined.objective, model, tokens)
        loss = joined(batch | {"documents": tokens} if documents else batch).sum
        total = alive.activations.bytes
        entries = length * model_config.vocab_size
        logits = any(
            shape[-1:] == (model_config.vocab_size,) and shape.numel() == entries
            for _, shape, _ in alive.activations.storages.values()
        )
        unreached = gradients.unreached(model, loss)
        del loss
    return SavedActivations(total, added, logits, unreached, alive.copies.most)


@contextlib.contextmanager
def _determinism(wanted: bool) -> Any:
    """Determinism as in the run, where torch refuses some kernels."""
    if not wanted or torch.are_deterministic_algorithms_enabled():
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def _default_dtype(dtype: Any) -> Any:
    """Parameters made inside have this `dtype`. (A model of fake tensors cannot be converted.)"""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _Held:
    """Storages that are watched until they go. bytes: what they take; most: what they took at most."""

    def __init__(self) -> None:
        # Bytes, shape of the last tensor, and a reference that subtracts the bytes when the storage goes. So no call has to scan
        # them all.
        self.storages: dict[Any, tuple[int, torch.Size, weakref.ref[Any]]] = {}
        self.bytes = self.most = 0

    def add(self, reference: Any, tensor: torch.Tensor) -> None:
        self.let_go(reference)  # it may have another size by now
        storage = tensor.untyped_storage()
        gone = weakref.ref(storage, lambda _: self.let_go(reference))
        self.storages[reference] = storage.nbytes(), tensor.shape, gone
        self.bytes += storage.nbytes()
        self.most = max(self.most, self.bytes)

    def let_go(self, reference: Any) -> None:
        if reference in self.storages:
            self.bytes -= self.storages.pop(reference)[0]


def _alive_tensors(*models: Any) -> Any:
    """A dispatch mode that watches the memory that operators allocate: `activations`, and `copies` of parameters."""

    weak_reference, tree_leaves = private("StorageWeakRef"), private("tree_leaves")
    conversions = (torch.ops.aten._to_copy.default, torch.ops.prims.convert_element_type.default)
    room = (torch.ops.aten.empty_like.default, torch.ops.aten.zeros_like.default)  # for gradients

    class AliveTensors(private("TorchDispatchMode")):  # type: ignore[misc]
        supports_higher_order_operators = True

        @classmethod
        def ignore_compile_internals(cls) -> bool:
            return True  # else nothing is compiled under this mode; it still sees the operators of compiled code

        def __init__(self) -> None:
            super().__init__()
            tensors = [
                tensor
                for model in models
                for tensor in (*model.parameters(), *model.buffers(), *packed_tensors(model).values())
            ]
            self.own = {weak_reference(tensor.untyped_storage()) for tensor in tensors}
            self.vectors: set[Any] = set()  # made from parameters; each layer holds its own, so they count
            self.activations, self.copies = _Held(), _Held()

        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = operator(*args, **(kwargs or {}))
            # Matrices made only from parameters (copies for autocast, room for gradients) exist once per run, not per sequence.
            given = [self.reference(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            of_parameters = bool(given) and all(map(self.is_of_parameters, given))
            for tensor in tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    reference = self.reference(tensor)
                    if of_parameters and (tensor.ndim > 1 or operator in conversions or operator in room):
                        if tensor.ndim > 1 and operator not in room and not self.is_of_parameters(reference):
                            self.copies.add(reference, tensor)
                        self.own.add(reference)
                    elif of_parameters:
                        self.vectors.add(reference)
                    if reference not in self.own:
                        self.activations.add(reference, tensor)
            return out

        def is_of_parameters(self, reference: Any) -> bool:
            return reference in self.own or reference in self.vectors

        @staticmethod
        def reference(tensor: torch.Tensor) -> Any:
            return weak_reference(tensor.untyped_storage())

    return AliveTensors()


def expected_memory(plan: Any) -> dict[str, int]:
    """Bytes on one device, by part. "total" is the peak, which may be less than the sum of the parts.

    The total excludes "activations without checkpointing" and each process's bytes "in CPU memory"; either may be absent.
    """
    batch, how = plan.config.batch, plan.config.engine.activation_checkpointing
    layout, length = ParallelLayout.of(plan.config, plan.processes, plan.target), batch.sequence_length
    config = plan.config
    estimate = MemoryEstimate(
        plan.model_class, plan.model_config, length, config.data.separate_documents, config.objective, plan.frozen
    )
    step = batch.tokens_per_step // length * (math.ceil(batch.n_max) if batch.dynamic else 1)
    share = -(-step // plan.processes)  # rows of the largest step on one device, cut into even parts
    texts = plan.texts_per_row
    parts = -(-share // max(1, batch.tokens_per_microbatch // (length * texts)))
    first, second = texts * -(-share // parts), texts * ((share + parts - 2) // parts)
    memory = estimate.state(layout, parts > 1)
    most = max(estimate.in_microbatch(layout, how, first, accumulates=False), estimate.in_update(memory))
    if parts > 1:
        most = max(most, estimate.in_microbatch(layout, how, second, accumulates=True))
    passing = estimate.activations(layout, how) * first, int(estimate.loss(layout, how, first * length))
    memory |= {"activations": passing[0], "loss": passing[1], "total": most}
    if how != "none":
        memory["activations without checkpointing"] = estimate.activations(layout, "none") * first
    if layout.offload:
        memory["in CPU memory"] = estimate.in_cpu_memory(layout)
    return memory
