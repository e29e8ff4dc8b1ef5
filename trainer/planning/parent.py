"""init_from: a new run that begins with the weights of a parent, which is another run or a Hugging Face model.

It takes the parent's model, with all fields, and its tokenizer. Everything else is its own: schedule, optimizer state, data, step 0.
The run's config.yaml and every checkpoint's manifest name the parent: a run by absolute path and step, a folder by absolute path, a
model of the hub by its commit. A run that has a checkpoint never reads its parent again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from models.base import get_model
from models.bitnet import PLAIN
from models.config import with_later_fields
from models.hugging_face import family_of
from models.lora import FIELDS, without_lora
from models.materialise import ties
from trainer.checkpoint import format as checkpoint
from trainer.checkpoint import hugging_face
from trainer.checkpoint.weights import MODEL, choose_weights
from trainer.core.config import RunConfig, model_name
from trainer.core.errors import UserError
from trainer.core.files import user_path
from trainer.core.settings import build
from trainer.core.text import printable
from trainer.data.dataset import TOKENIZER, DatasetInfo, TokenizerInfo
from trainer.data.tokenizers import get_tokenizer
from trainer.engine.meta import build_meta, projections_of
from trainer.planning.model import written_out
from trainer.planning.run_config import (
    StoredConfig,
    as_started,
    branch_point,
    changeable,
    drop_inferred,
    read_config,
    with_branch,
)
from trainer.runtime.distributed import World

Say = Callable[[str], None]
SIZES = ("model_scale", "parameters")


@dataclass(frozen=True)
class RunParent:
    """A checkpoint of a run. model: the section of its config, with every field; sizes: its SIZES that are set; data: keys of
    `data` for a dataset with its tokenizer."""

    folder: Path  # absolute
    step: int
    config: RunConfig

    def __str__(self) -> str:
        return f"{self.folder}@{self.step}"

    @property
    def model(self) -> dict[str, Any]:
        return {"name": model_name(self.config.model), **without_lora(self.config.model)}

    @property
    def sizes(self) -> dict[str, Any]:
        return {key: getattr(self.config, key) for key in SIZES if getattr(self.config, key) is not None}

    @property
    def data(self) -> dict[str, Any]:
        end = self.config.data.end_of_text
        return {"tokenizer": str(self.folder / TOKENIZER)} | ({} if end is None else {"end_of_text": end})

    def check_tokenizer(self, tokenizer: TokenizerInfo, path: Any, end_of_text: str | None) -> None:
        """UserError unless `tokenizer`, that of the dataset at `path`, is the model's. end_of_text: as in its config."""
        own = DatasetInfo.load(self.folder).tokenizer
        if tokenizer.sha256 != own.sha256:
            raise UserError(
                f"init_from: {path} was prepared with tokenizer {tokenizer.name}, but {self.folder} uses {own.name}; "
                f"prepare it with --tokenizer {self.folder / TOKENIZER}"
            )

    def weights(self, wanted: str, model_class: Any, model_config: Any, world: World) -> Iterable[tuple[str, Tensor]]:
        """(name, whole tensor in CPU memory) of all weights. wanted: which ones, see trainer/checkpoint/weights.py; model_class,
        model_config: of the new run, without LoRA. All ranks call this; each reads by itself. UserError if there are no such
        weights."""
        found = choose_weights(self.folder / "checkpoints", self.step, wanted, world.say, world)
        shapes = {MODEL + name: shape for name, shape in shapes_of(model_class, model_config).items()}
        checkpoint.check_shapes(found.paths[-1], shapes, {MODEL + name: at for name, at in found.stored().items()})
        return found.each(projections_of(model_class, model_config, found))


@dataclass(frozen=True)
class ModelParent:
    """A folder of a Hugging Face model, or of one that `export` wrote. name: as config.yaml keeps it; own: whether the weights have our
    names; end_of_text: the token that ends documents, if `export` says so. Otherwise like RunParent."""

    name: str
    folder: Path
    model: dict[str, Any]
    sizes: dict[str, Any]
    own: bool = False
    end_of_text: str | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def data(self) -> dict[str, Any]:
        if not self.has_tokenizer():
            return {}
        return {"tokenizer": str(self.folder)} | ({} if self.end_of_text is None else {"end_of_text": self.end_of_text})

    def has_tokenizer(self) -> bool:
        return any((self.folder / name).is_file() for name in hugging_face.TOKENIZER_FILES)

    def check_tokenizer(self, tokenizer: TokenizerInfo, path: Any, end_of_text: str | None) -> None:
        if not self.has_tokenizer():
            return
        own = get_tokenizer(str(self.folder), end_of_text=end_of_text)
        if tokenizer.sha256 != own.sha256:
            raise UserError(
                f"init_from: {path} was prepared with tokenizer {tokenizer.name}, but {self} has another one; "
                f"prepare it with --tokenizer {self.folder}"
            )

    def weights(self, wanted: str, model_class: Any, model_config: Any, world: World) -> Iterable[tuple[str, Tensor]]:
        if wanted != "evaluation":
            raise UserError(f"init_weights: {self} is not a run, so it has no {wanted}; leave it out")
        if not self.has_tokenizer():
            world.say(f"{self} holds no tokenizer, so nothing proves that the data are prepared with the right one")
        return self.each(build_meta(model_class, model_config))

    def each(self, model: Any) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor) of the weights for `model`, a model of ours without storage. UserError if they do not fit."""
        content, stored = hugging_face.read_config(self.folder), hugging_face.Weights(self.folder)
        try:
            yield from own_weights(model, stored) if self.own else family_of(content)[0].weights(model, stored)
        except KeyError as error:
            raise UserError(f"init_from: {self} lacks the weights {printable(error)}") from None
        except RuntimeError as error:
            raise UserError(f"init_from: {self}: {printable(error)}") from None


Parent = RunParent | ModelParent


def find_parent(text: str, say: Say) -> Parent:
    """The run or the model that init_from names. UserError if there is none, or if it is of a kind that no model here computes."""
    if text.startswith(hugging_face.HUB):
        return model_parent(*hugging_face.fetch(text))
    folder = user_path(text, "init_from")
    if (folder / hugging_face.CONFIG).is_file():
        return model_parent(str(folder.absolute()), folder.absolute())
    folder, step = branch_point(text, "init_from", say)
    return RunParent(folder.absolute(), step, read_config(folder, say).build())


def model_parent(name: str, folder: Path) -> ModelParent:
    content = hugging_face.read_config(folder)
    own = hugging_face.own_model(content, folder / hugging_face.CONFIG)
    end = content.get(hugging_face.END_OF_TEXT)
    if own is not None:
        return own_parent(name, folder, own, end)
    try:
        family, config = family_of(content)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"init_from: {folder / hugging_face.CONFIG}: {printable(error)}") from None
    model = {"name": family.name, **dataclasses.asdict(config)}
    count = get_model(family.name).count_parameters(config)
    return ModelParent(name, folder, model, {"parameters": count}, end_of_text=end)


def own_parent(name: str, folder: Path, own: dict[str, Any], end: str | None) -> ModelParent:
    """own: the section `model` of the run that was exported; end: the token that ends its documents, if it is not the usual one."""
    try:
        model_class, config = written_out(build(RunConfig, {"model": with_later_fields(own)}))
    except UserError as error:
        raise UserError(f"init_from: {folder / hugging_face.CONFIG}: {error}") from None
    model = {"name": own["name"], **dataclasses.asdict(config)}
    return ModelParent(name, folder, model, {"parameters": model_class.count_parameters(config)}, True, end)


def own_weights(model: Any, stored: hugging_face.Weights) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of each weight that a checkpoint of `model` holds, from a folder that `export` wrote. KeyError or RuntimeError
    if names or shapes do not match."""
    start = hugging_face.NETWORK if any(name.startswith(hugging_face.NETWORK) for name in stored) else ""
    tied = ties(model)
    left = {name.removeprefix(start) for name in stored}
    for name, expected in model.state_dict().items():
        source = name if start + name in stored else tied.get(name, name)
        value = stored[start + source]
        if value.shape != expected.shape:
            raise RuntimeError(f"{start}{source} is {tuple(value.shape)}, not {tuple(expected.shape)}")
        yield name, value
    left -= {name for name, _ in model.named_buffers()} | set(model.state_dict())
    if left:
        raise RuntimeError(f"the model has no place for {', '.join(sorted(left)[:5])}")


def with_origin(given: dict[str, Any], stored: StoredConfig | None, processes: int, say: Say) -> dict[str, Any]:
    """The values of a `train` command, over those of the run that it begins from: see `with_branch` and `with_parent`."""
    if stored is not None:
        return as_started(given, stored)
    config = build(RunConfig, given)
    if config.init_from is not None and config.branch_from is not None:
        raise UserError("init_from: branch_from already says how the run begins; leave one of them out")
    return with_parent(with_branch(given, None, processes, say), config, say)


def with_parent(given: dict[str, Any], config: RunConfig, say: Say) -> dict[str, Any]:
    """The values of a new run, over those that it takes from its parent, which is named as an absolute path with its step.

    config: built of `given`. UserError if `given` contradicts the parent: another size, another model, or a field of the model
    that changes the shape of its weights. A line says which other fields differ.
    """
    if config.init_from is None:
        if config.init_weights != "evaluation":
            raise UserError("init_weights: says which weights of init_from a run begins with; give --init_from too")
        return given
    parent = find_parent(config.init_from, say)
    for key in SIZES:
        wanted = getattr(config, key)
        if wanted not in (None, parent.sizes.get(key)):
            raise UserError(
                f"init_from: {key} is {wanted:g}, but the size of the model is that of {parent}; leave it out"
            )
    return {
        **given,
        **parent.sizes,
        "init_from": str(parent),
        "model": changed_model(given.get("model") or {}, parent, say),
        "data": {**parent.data, **drop_inferred(given.get("data") or {}, ())},
    }


def changed_model(given: dict[str, Any], parent: Parent, say: Say) -> dict[str, Any]:
    """The parent's section `model` with the fields of `given`; kernels are chosen for this machine."""
    name = parent.model["name"]
    kernels = {key.removeprefix("model.") for key in changeable(name) if key.startswith("model.")}
    given = drop_inferred(given, ())
    adapters = {key: value for key, value in given.items() if key in FIELDS}
    given = without_lora(given)
    if given.get("name", name) != name:
        raise UserError(f"init_from: model.name is {given['name']!r}, but {parent} is of {name}; leave it out")
    before = written_out(build(RunConfig, {"model": parent.model}))
    model = {**parent.model, **dict.fromkeys(parent.model.keys() & kernels, "auto"), **given}
    after = written_out(build(RunConfig, {"model": model}))
    # A Config has the field `linear` only where it is not the default.
    values = {
        key: (getattr(after[1], key, PLAIN), getattr(before[1], key, PLAIN))
        for key in given.keys() - kernels - {"name"}
    }
    differing = {key: (now, then) for key, (now, then) in values.items() if now != then}
    shown = ", ".join(f"model.{key} is {now!r} (was {then!r})" for key, (now, then) in sorted(differing.items()))
    if differing and shapes_of(*after) != shapes_of(*before):
        raise UserError(f"init_from: {printable(shown)}, which the weights of {parent} do not fit; leave it as it was")
    if len({getattr(config, "multipliers", None) for _, config in (before, after)}) > 1:
        raise UserError(
            f"init_from: {printable(shown)}, with which the weights of {parent} compute something else; leave model.mup as it was"
        )
    if differing:
        say(f"init_from: {printable(shown)}: the weights of {parent} were trained with the old value")
    return model | adapters


def shapes_of(model_class: Any, model_config: Any) -> dict[str, Any]:
    """Name -> shape of every weight and buffer that a checkpoint of the model holds."""
    return {name: tensor.shape for name, tensor in build_meta(model_class, model_config).state_dict().items()}
