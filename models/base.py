"""The contract every model meets, and the registry that finds models by name.

A model is a config dataclass plus an `nn.Module`, joined by one decorator:

    @register("mine")
    class Mine(LanguageModel):
        Config = MineConfig

`python -m trainer check FILE` then checks the promises below. Models import nothing from `trainer`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import inspect
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import counting
from models.mup import Multipliers, Transfer
from models.state import DecodingState, State

IGNORE = -1  # a target that does not count
Cache = DecodingState  # the name that models for crescendo-lm 0.2.0 and earlier use


class Batch(TypedDict, total=False):
    """The input of one forward and backward pass: tensors [B, T, ...]. An objective may need further keys.

    tokens: int64. targets: int64, IGNORE if a target does not count. weights: weight of each target (absent: 1).
    documents: the document number of each token. It changes at each new document; no token attends to another document.
    """

    tokens: Tensor
    targets: Tensor
    weights: Tensor
    documents: Tensor


class Hidden(NamedTuple):
    """The output of the blocks. states: [B, T, D], input of the output projection; heads: additional input of further heads."""

    states: Tensor
    heads: Any = None


class Output(NamedTuple):
    """The result of a forward pass. It is a tuple, because FSDP and DeepSpeed look for tensors in tuples.

    loss: cross-entropy in nats, mean or sum over the targets that count, fp32 scalar (None without targets)
    logits: [B, T, V] (None with targets, so that the loss can be fused with the head)
    parts: further losses by name, already included in `loss` (None: there are none)
    measures: see LanguageModel.measures (None: there are none)
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    parts: dict[str, Tensor] | None = None
    measures: dict[str, Tensor] | None = None


class Split(NamedTuple):
    """How a parameter that fuses several matrices splits: into consecutive parts along `dim`, given as name -> size."""

    dim: int
    sizes: dict[str, int]

    def parts(self, tensor: Tensor) -> dict[str, Tensor]:
        """Name -> view of that part of the whole parameter, or of a tensor of its shape."""
        return dict(zip(self.sizes, tensor.split(list(self.sizes.values()), self.dim), strict=True))


class LanguageModel(nn.Module):
    """Base of every model. Subclasses define `Config` and every method that raises here; the rest has a sensible default."""

    Config: ClassVar[type]
    roles: ClassVar[tuple[str, ...]] = ("matrix", "embedding", "head", "norm", "bias", "position")
    # The model's own roles, such as "decay vector" or "hash table" -> the entry of `roles` that an optimiser treats them as.
    further_roles: ClassVar[Mapping[str, str]] = {}
    # Whether an inferred init_std grows as widths fall below GPT-2's: where that was measured to help.
    narrow_init: ClassVar[bool] = False

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    # -- to define: hidden and logits, or forward alone --------------------------------------------------------------

    def hidden(
        self,
        tokens: Tensor,  # [B, T] int64
        *,
        documents: Tensor | None = None,  # [B, T], see Batch; None with a state
        state: Any = None,  # the State from `new_state`: `tokens` continue the tokens that it has read
    ) -> Hidden:
        raise NotImplementedError

    def logits(self, hidden: Hidden) -> Tensor:
        """[B, T, V]"""
        raise NotImplementedError

    def forward(
        self,
        tokens: Tensor,  # [B, T] int64
        targets: Tensor | None = None,  # [B, T], IGNORE if it does not count
        documents: Tensor
        | None = None,  # [B, T] document number of each token, changes at each new document; see Batch
        cache: Any = None,  # the State from `new_state`: `tokens` continue the tokens that it has read
        reduction: str = "mean",  # "mean" or "sum" over the counted targets
        **further: Tensor,  # of `further_keys`
    ) -> Output:
        if documents is not None and cache is not None:
            raise ValueError("documents must be None with a cache: one document is decoded per row")
        hidden = self.hidden(tokens, documents=documents, state=cache, **further)
        if targets is None:
            return Output(logits=self.logits(hidden))
        loss, parts = self.loss(hidden, targets, reduction)
        return Output(loss=loss, parts=parts or None, measures=self.measures(hidden, targets) or None)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Set every parameter and buffer. The model was built on the meta device (see `materialise`), so values from
        `__init__` are lost.

        generator: a CPU generator; the same seed gives the same weights on every device and under every sharding.
        """
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        """The repeated modules: units of sharding, activation checkpointing and compilation."""
        raise NotImplementedError

    def parameter_groups(self) -> dict[str, list[str]]:
        """Role -> names (as in `named_parameters`). Every parameter has exactly one role, of `roles` or `further_roles`."""
        raise NotImplementedError

    # -- defaults ----------------------------------------------------------------------------------------------------

    def nll(self, hidden: Hidden, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Cross-entropy of each next token in nats times its weight, fp32 [B, T]; 0 at IGNORE.

        A model with an output projection overrides this with `linear_nll`, which never holds all logits.
        """
        return token_losses(self.logits(hidden), targets, weights)

    def further_keys(self) -> tuple[str, ...]:
        """Keys of a batch, columns of a dataset, that `hidden` and `forward` also take, by name: fp32 tensors [B, T] that say something about
        each target."""
        return ()

    def loss(
        self, hidden: Hidden, targets: Tensor, reduction: str = "mean", weights: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, parts): the training loss for next tokens as targets, see Output; by default the sum or mean of `nll`.

        weights: weight of each target; only with reduction "sum".
        """
        total = self.nll(hidden, targets, weights).sum()
        return total if reduction == "sum" else total / (targets != IGNORE).sum(), {}

    def measures(self, hidden: Hidden, targets: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
        """What a run prints by name beside its losses, as means over the targets that count: the sums, scalars without gradient.
        weights: as for `loss`."""
        return {}

    kernel_fields: ClassVar[tuple[str, ...]] = ()  # fields of Config that name a kernel; all know "auto" and "torch"
    device_kernels: ClassVar[tuple[str, ...]] = ()  # values of `kernel_fields` that only some devices can run
    masks_documents: ClassVar[bool] = False  # True: the model keeps `documents` apart
    # Where a document starts in its row changes what is computed for it only modulo this number (tokens of a fixed patch).
    document_grid: int = 1
    decodes_incrementally: ClassVar[bool] = True  # False: `new_state` returns None
    optim_defaults: ClassVar[dict[str, float]] = {}  # the model's own defaults for the `optim` section; lr: AdamW's
    optim_source: ClassVar[str] = ""  # where they come from
    max_context: int | None = None  # longest sequence that the model accepts; None: any
    # Why the model has no field `mup`, if it has none.
    mup_refusal: ClassVar[str] = "only the decoders of models/transformer.py have its rules"

    def new_state(self, batch: int, max_length: int | None, device: torch.device, dtype: torch.dtype) -> State | None:
        """The memory of incremental decoding of `batch` texts; None: the whole context is computed for each token.

        max_length: maximum number of tokens of a text (None: not known). device, dtype: of the activations, for tensors that
        are allocated here. The default allocates nothing yet: it takes batch, device and dtype from the first tokens.
        """
        return DecodingState(max_length) if self.decodes_incrementally else None

    # Multi-token prediction, which decoding can use for drafts. Head 1 predicts the next token, head i the i-th.

    def states_of_heads(self, hidden: Hidden, state: Any = None) -> list[Tensor]:
        """The input of each head's output projection, [B, T, D] each, head 1's first. state: that of the call of `hidden`."""
        return [hidden.states]

    def logits_of_head(self, index: int, states: Tensor) -> Tensor:
        """Logits [..., V] of the head of `index` (0 is head 1) from its states [..., D]."""
        return self.logits(Hidden(states))

    # Sizes. The defaults count on the meta device. An override must return the same numbers; `check` tests this.

    @classmethod
    def config_for_scale(cls, scale: float, vocab_size: int, target_parameters: int, **choices: Any) -> Any:
        """The Config at this `model_scale`. It keeps the fields in `choices`; ValueError if no Config can have them.

        Without choices its parameter count is within 3 % of `target_parameters`. The default searches over d_model, n_layers
        and, if the Config has it, n_heads; all other fields keep their defaults.
        """
        return counting.find_shape(cls, vocab_size, target_parameters, choices)

    @classmethod
    def count_parameters(cls, config: Any) -> int:
        """The number of parameters; a parameter with several names counts once."""
        return counting.parameters_of(cls, config)  # type: ignore[arg-type]

    def flops_per_token(self, sequence_length: int) -> int:
        """Training FLOPs of one token in a sequence of this length.

        The convention: 2 FLOPs per multiply-add; the backward pass counts twice the forward pass; attention counts the whole
        [T, T] square, also its masked part; operations that are not matrix products, such as embedding lookups, count 0.
        The default counts a forward pass on the meta device.
        """
        config = type(self).with_kernels(self.config, "torch")  # fused kernels pad their inputs
        return counting.training_flops_of(type(self), config, sequence_length) // sequence_length  # type: ignore[arg-type]

    @classmethod
    def entropy_rule(cls, config: Any) -> str | None:
        """The rule by which this Config cuts texts where another model is uncertain, one of ENTROPY_RULES in layers/patching.py; then the
        Config has a `threshold`, and the model an attribute `patcher`. None: it needs no other model."""
        return None

    # Kernels. The trainer asks these questions about a Config, so that it need not know its fields.

    @classmethod
    def with_kernels(cls, config: Any, kernel: str) -> Any:
        """`config` with `kernel` ("auto" or "torch") in all of its `kernel_fields`."""
        return replace(config, **dict.fromkeys(cls.kernel_fields, kernel))

    @classmethod
    def without_device_kernels(cls, config: Any) -> Any:
        """`config` with "auto" instead of kernels that only some devices can run."""
        named = [name for name in cls.kernel_fields if getattr(config, name) in cls.device_kernels]
        return replace(config, **dict.fromkeys(named, "auto"))

    @classmethod
    def recording_refusal(cls, config: Any) -> str | None:
        """Why a CUDA graph cannot record the forward pass; None if it can."""
        return "dropout's random numbers were never tried in a recording" if getattr(config, "dropout", 0) else None

    @classmethod
    def check_sizes(cls, config: Any, tokens: int | None = None, longest: int | None = None) -> None:
        """Raise ValueError, which begins with the name of a field, if the config does not suit the run.

        tokens: vocabulary size of the tokenizer; longest: tokens of the longest training sequence. None: not known yet.
        """

    @classmethod
    def inferred(cls, config: Any) -> dict[str, int]:
        """Field -> the number that a 0 in it stands for."""
        return {}

    def caps_logits(self) -> bool:
        """Whether the loss soft-caps the logits, for which it needs a copy of them."""
        return False

    def multipliers(self) -> Multipliers | None:
        """Of the maximal update parametrisation, if it is on: see mup.py."""
        return None

    def transfers(self) -> dict[str, Transfer]:
        """Name of a parameter -> how the optimizer treats it under the maximal update parametrisation; one that is not named is treated
        as without."""
        return {}

    def names_by_role(self) -> dict[str, list[str]]:
        """`parameter_groups`, with each further role replaced by the role that it is treated as; an unknown role stays unchanged."""
        by_role: dict[str, list[str]] = {}
        for role, names in self.parameter_groups().items():
            by_role.setdefault(self.further_roles.get(role, role), []).extend(names)
        return by_role

    def fused_matrices(self) -> dict[str, Split]:
        """Name of a parameter that holds several matrices, such as queries, keys and values -> how it splits into them.

        For optimisers that treat each matrix as a whole. A parameter that is not listed is one matrix.
        """
        return {}

    def projections(self) -> dict[str, Callable[[Tensor], None]]:
        """Name of a parameter -> function that projects it in place after each optimiser step (none by default).

        The function gets the whole parameter, as a plain tensor or as a sharded DTensor.
        """
        return {}

    def post_step(self) -> None:
        """Apply `projections`. An override may do more, but ZeRO stages 1 to 3 refuse it, because they apply only `projections`."""
        for name, project in self.projections().items():
            project(self.get_parameter(name))

    def token_embedding(self) -> nn.Embedding:
        """The [V, d] embedding table of the tokens."""
        return self.embedding  # type: ignore[return-value]

    def tied_embedding(self) -> bool:
        """Whether the output head shares the token embedding's matrix."""
        return False

    def describe_kernels(self, device: torch.device | None = None, documents: bool = False) -> str:
        """One line that names the kernels for training on `device` (None: the device of the weights), in the dtype of autocast or
        of the weights, and why ("" if there was no choice). documents: whether documents must be kept apart. ValueError if a
        kernel that the config names cannot do this.
        """
        return ""


# -- from the meta device to weights --------------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats, fp32 scalar; logits [B, T, V] of any dtype (the log-sum-exp is fp32), targets [B, T].

    If all targets are IGNORE, the sum is 0 with zero gradients, and the mean is NaN.
    """
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction=reduction)


def token_losses(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Cross-entropy of each token in nats times its weight, fp32 [B, T], 0 at IGNORE; logits [B, T, V], targets [B, T]."""
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none"
    ).view(targets.shape)
    return losses if weights is None else losses * weights


class LogitsAsHidden:
    """Wraps a model that defines only `forward`, so that an objective can use it: its hidden states are the logits."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Output:
        return self.model(*args, **kwargs)

    def hidden(self, tokens: Tensor, *, documents: Tensor | None = None) -> Hidden:
        return Hidden(self.model(tokens, documents=documents).logits)

    def logits(self, hidden: Hidden) -> Tensor:
        return hidden.states

    def nll(self, hidden: Hidden, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        return token_losses(hidden.states, targets, weights)

    def loss(
        self, hidden: Hidden, targets: Tensor, reduction: str = "mean", weights: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        total = self.nll(hidden, targets, weights).sum()
        return total if reduction == "sum" else total / (targets != IGNORE).sum(), {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


class OtherTokens(ValueError):
    """An objective passes other tokens to a model than those that the columns of the batch are of."""


class WithColumns:
    """A model with the columns of one batch that it takes by name: an objective need not know of them."""

    def __init__(self, model: Any, batch: Any) -> None:
        self.model, self.tokens = model, batch["tokens"]
        self.columns = {key: batch[key] for key in model.further_keys() if key in batch}

    def of(self, tokens: Tensor) -> dict[str, Tensor]:
        if self.columns and tokens is not self.tokens:
            raise OtherTokens(
                f"the objective changes the tokens, and {', '.join(self.columns)} are of those that the batch holds; train with another "
                "objective, or another patching"
            )
        return self.columns

    def __call__(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Output:
        return self.model(tokens, *args, **kwargs, **self.of(tokens))

    def hidden(self, tokens: Tensor, **kwargs: Any) -> Hidden:
        return self.model.hidden(tokens, **kwargs, **self.of(tokens))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def with_hidden(model: Any) -> Any:
    """The model itself, if its `hidden` and `logits` define what it computes; otherwise a LogitsAsHidden.

    If a class defines `forward` and inherits `hidden` from a parent, its `forward` may compute something else.
    """
    for cls in type(model).__mro__:
        if "hidden" in vars(cls):
            return model if cls is not LanguageModel else LogitsAsHidden(model)
        if "forward" in vars(cls) and cls is not LanguageModel:
            return LogitsAsHidden(model)
    return LogitsAsHidden(model)


def logits_at(model: Any, tokens: Tensor, documents: Tensor | None, positions: Tensor) -> Tensor:
    """The logits [1, M, V] of some tokens of a batch, without computing those of the others. positions: [2, M], their rows and columns
    in `tokens` [B, T]."""
    model = with_hidden(model)
    rows, columns = positions
    return model.logits(Hidden(model.hidden(tokens, documents=documents).states[rows, columns][None]))


def pad_vocab(size: int, multiple: int = 64) -> int:
    """Vocabulary rounded up for fast matrix products: GPT-2's 50257 -> 50304."""
    return -(-size // multiple) * multiple


_REGISTRY: dict[str, type[LanguageModel]] = {}


_TO_DEFINE = ("Config", "init_weights", "blocks", "parameter_groups")


def register(name: str):
    """Class decorator: register a model under `name`, which must be unique. TypeError if the model lacks a required member."""

    def add(cls: type[LanguageModel]) -> type[LanguageModel]:
        missing = [member for member in _TO_DEFINE if not _defines(cls, member)]
        if not _defines(cls, "forward") and not (_defines(cls, "hidden") and _defines(cls, "logits")):
            missing.insert(0, "hidden and logits (or forward)")
        if missing:
            raise TypeError(f"{cls.__name__} must define {', '.join(missing)}: see LanguageModel in models/base.py")
        from models.lora import FIELDS  # it imports this module

        taken = [field for field in (*FIELDS, "linear") if hasattr(cls.Config, field)]
        if taken:
            file = "lora" if taken[0] in FIELDS else "bitnet"
            raise TypeError(f"{cls.__name__}.Config has a field {taken[0]}, as every model has: see models/{file}.py")
        if name in _REGISTRY and _REGISTRY[name].__qualname__ != cls.__qualname__:
            raise ValueError(f"model name {name!r} is taken by {_REGISTRY[name].__module__}")
        _REGISTRY[name] = cls
        return cls

    return add


def _defines(cls: type[LanguageModel], member: str) -> bool:
    undefined = object()
    return inspect.getattr_static(cls, member, undefined) not in (undefined, vars(LanguageModel).get(member))


class BrokenModel(ImportError):
    """A module that should register models cannot be imported; one line says which module, why, and at which line."""


def load_models() -> None:
    """Import the models of this package, and those of installed packages in the entry point group `crescendo.models`.

    BrokenModel if an import fails.
    """
    for module in _zoo_modules(importlib.import_module("models")):
        with told_in_one_line(module):
            importlib.import_module(module)
    load_entry_points("crescendo.models")


def load_entry_points(group: str) -> None:
    """Import what installed packages name in an entry point group. BrokenModel if an import fails."""
    for entry in _entry_points(group, tuple(sys.path)):
        with told_in_one_line(entry.value):
            entry.load()


@functools.cache
def _entry_points(group: str, path: tuple[str, ...]) -> tuple[Any, ...]:
    """Looking through all installed packages takes a tenth of a second, so it is done once. path: where they are looked for."""
    return tuple(importlib.metadata.entry_points(group=group))


@contextlib.contextmanager
def told_in_one_line(module: str) -> Iterator[None]:
    """Turn any error while importing `module` into a BrokenModel."""
    try:
        yield
    except (Exception, SystemExit) as error:  # a script may call sys.exit when it is imported
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise BrokenModel(f"cannot import {module}: {cause}{_place(error)}") from error


def _place(error: BaseException) -> str:
    """The last line that ran in the module that was being imported last, as " (FILE, line N)"; "" if none was found."""
    frames = traceback.extract_tb(error.__traceback__)
    files = [frame.filename for frame in frames if frame.name == "<module>"]
    lines = [frame.lineno for frame in frames if frame.filename in files[-1:]]
    return f" ({files[-1]}, line {lines[-1]})" if files else ""


def _zoo_modules(package: Any) -> Iterator[str]:
    for found in pkgutil.iter_modules(package.__path__):
        if not found.ispkg and found.name != "base":
            yield f"models.{found.name}"


def model_names() -> list[str]:
    """Names of the registered models (call `load_models` first)."""
    return sorted(_REGISTRY)


def get_model(name: str) -> type[LanguageModel]:
    """The class registered under `name`; `KeyError` if there is none."""
    return _REGISTRY[name]
