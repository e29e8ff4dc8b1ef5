"""The models that an objective needs and does not train: found and checked when a run is planned, opened when it starts."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from models.config import kernel_fields_of
from models.quantization import matrix_bytes
from trainer.checkpoint.quantized import check_installed
from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import build
from trainer.data.dataset import DatasetInfo
from trainer.engine.meta import build_meta
from trainer.objectives import FrozenSpec, build_objective
from trainer.planning.model import written_out
from trainer.planning.parent import find_parent
from trainer.runtime.distributed import World

if TYPE_CHECKING:
    from trainer.planning.resolver import Draft


@dataclass(frozen=True)
class Frozen:
    """A frozen model of a plan. spec: with a source that is found from anywhere; model: the section `model` of its config, with
    every field."""

    spec: FrozenSpec
    model: dict[str, Any]

    def classes(self) -> tuple[Any, Any]:
        """(model class, its Config)"""
        return written_out(build(RunConfig, {"model": self.model}))

    @property
    def parameters(self) -> int:
        model_class, config = self.classes()
        return model_class.count_parameters(config)

    def bytes(self, precision: str, shards: int) -> int:
        """Of its weights on one device. precision: of the run; shards: ranks that share the weights of its blocks."""
        meta, each = build_meta(*self.classes()), 4 if precision == "fp32" else 2
        if self.spec.precision == "nf4":
            count, packed = matrix_bytes(meta, "nf4")  # whole on every rank
            return packed + each * (self.parameters - count)
        blocks = sum(p.numel() for block in meta.blocks() for p in block.parameters())
        return each * (self.parameters - blocks + -(-blocks // shards))


NO_MODELS: Mapping[str, Frozen] = MappingProxyType({})


def choose_frozen(draft: Draft, vocab_size: int, dataset: DatasetInfo | None) -> tuple[Draft, dict[str, Frozen]]:
    """The models that the objective needs, with their sources in the draft. vocab_size: ids that the tokenizer of the data uses.

    UserError if one is not found, has another tokenizer than `dataset`, or cannot read what the run trains on.
    """
    config, found = draft.config, {}
    for field, spec in build_objective(config.objective).frozen_models().items():
        key = f"objective.{field}"
        source = config.init_from if spec.source is None else spec.source
        if source is None:
            raise UserError(f"{key}: name a model: RUN[@STEP], the folder of a Hugging Face model, or hf://ORG/NAME")
        if spec.source is None and spec.weights != config.init_weights:
            raise UserError(
                f"{key}: the run begins with the {config.init_weights} weights of init_from, so set {key}_weights to that too"
            )
        if spec.precision == "nf4":
            check_installed("nf4", f"{key}_precision")
        with told_as(key):
            parent = find_parent(source, lambda line: None)  # `open_weights` says the lines
            if dataset is not None:
                parent.check_tokenizer(dataset.tokenizer, config.data.path, dataset.arguments.get("end_of_text"))
            frozen = Frozen(dataclasses.replace(spec, source=str(parent)), portable(parent.model))
            check_reads(frozen, str(parent), config, vocab_size)
        found[field] = frozen
        draft = draft.set("", "objective", {**draft.config.objective, field: str(parent)})
        name, size = frozen.model["name"], frozen.parameters
        draft = draft.note(
            f"frozen {field}", size, f"parameters of {name} in {parent}; not trained, not in checkpoints"
        )
    return draft, found


def portable(model: dict[str, Any]) -> dict[str, Any]:
    """A section `model` whose kernels are chosen for this machine."""
    return model | dict.fromkeys(model.keys() & set(kernel_fields_of(model["name"])), "auto")


def check_reads(frozen: Frozen, source: str, config: Any, vocab_size: int) -> None:
    """UserError unless the model can compute on the run's sequences. config: resolved as far as its batch."""
    model_class, model_config = frozen.classes()
    if model_config.vocab_size < vocab_size:
        raise UserError(
            f"{source} has {model_config.vocab_size:,} ids, the tokenizer of the data {vocab_size:,}; "
            "name a model of the same tokenizer"
        )
    limit, length = build_meta(model_class, model_config).max_context, config.batch.sequence_length
    if limit is not None and limit < length:
        raise UserError(f"{source} reads {limit} tokens at most; set batch.sequence_length ({length}) to that or less")
    if config.data.separate_documents and not model_class.masks_documents:
        raise UserError(f"{source} does not mask documents; leave data.separate_documents out")


def open_weights(frozen: Frozen, field: str, world: World) -> Iterable[tuple[str, Tensor]]:
    """(name, whole tensor) of all its weights. field: of the objective. All ranks call this. UserError if there are no such weights."""
    with told_as(f"objective.{field}"):
        assert frozen.spec.source is not None  # the plan has found it
        parent = find_parent(frozen.spec.source, world.say)
        return parent.weights(frozen.spec.weights, *frozen.classes(), world)


@contextlib.contextmanager
def told_as(key: str) -> Iterator[None]:
    """What init_from says of a parent is said of `key`."""
    try:
        yield
    except UserError as error:
        told = str(error).removeprefix("init_from: ").removeprefix("init_weights: ")
        raise type(error)(f"{key}: {told}") from None
