"""The `model` section of a config: the class that it names, and its values in the types of that class's own Config."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trainer.core.config import DEFAULT_MODEL, RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import coerced

if TYPE_CHECKING:
    from trainer.data.dataset import DatasetInfo

GPT2_STD, GPT2_WIDTH = 0.02, 768  # of its initial matrices


def read_model(config: RunConfig) -> tuple[str, Any, dict[str, Any]]:
    """(name, class, the fields of its Config that the config gives). Raises UserError, which names model.KEY, for a model that
    is not registered, a key that its Config does not have, or a value of another type. With model.lora_rank, the class is that
    of the model with adapters; with model.linear, of the model with such layers."""
    from models.base import get_model, load_models, model_names
    from models.bitnet import PLAIN, with_linear
    from models.lora import FIELDS, with_lora, without_lora

    load_models()
    options = dict(config.model)
    name = options.pop("name", DEFAULT_MODEL)
    if name not in model_names():
        raise UserError(_unknown(str(name), model_names()))
    model_class = get_model(name)
    if "mup" in options and "mup" not in {field.name for field in dataclasses.fields(model_class.Config)}:
        raise UserError(
            f"model.mup: {name} has no maximal update parametrisation: {model_class.mup_refusal}; leave it out"
        )
    both = with_lora(with_linear(model_class))  # type: ignore[arg-type]  # classes can be hashed
    given = coerced(both.Config, options, "model.")
    if given.get("linear", PLAIN) != PLAIN:
        if given.get("lora_rank"):
            raise UserError(
                "model.lora_rank: an update of weights of two or three values is no such weight, so it could not be merged; train "
                f"all weights, or set model.linear to {PLAIN}"
            )
        return name, with_linear(model_class), without_lora(given)  # type: ignore[arg-type]
    given.pop("linear", None)
    if given.get("lora_rank"):
        return name, with_lora(model_class), given  # type: ignore[arg-type]
    useless = [key for key in FIELDS if key in given and key != "lora_rank"]
    if useless:
        raise UserError(f"model.{useless[0]}: has no effect without model.lora_rank; set that too, or leave it out")
    return name, model_class, without_lora(given)


def written_out(config: RunConfig) -> tuple[Any, Any]:
    """(model class, its Config), from a config that gives all that the model needs, as a run's config.yaml does."""
    name, model_class, given = read_model(config)
    missing = [
        field.name
        for field in dataclasses.fields(model_class.Config)
        if field.name not in given and field.default is field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"model.{missing[0]}: the config of the run does not set it; add it to the section model")
    try:
        return model_class, model_class.Config(**given)
    except ValueError as error:
        raise UserError(f"model {name}: {error}") from None


def check_vocabulary(model_class: Any, model_config: Any, tokenizer_size: int) -> None:
    """UserError if the tokenizer has ids for which the model has no row."""
    if model_config.vocab_size < tokenizer_size:
        raise UserError(f"model.vocab_size: {model_config.vocab_size} is smaller than the tokenizer's {tokenizer_size}")
    try:
        model_class.check_sizes(model_config, tokens=tokenizer_size)
    except ValueError as error:
        raise UserError(f"model.{error}") from None


def with_threshold(
    model_class: Any, model_config: Any, given: Mapping[str, Any], dataset: DatasetInfo | None, config: RunConfig
) -> tuple[Any, dict[str, str]]:
    """(model_config with what the data say of its patches, unless it is given; by field, where that comes from). dataset: None if it is
    not prepared yet. UserError if the model needs entropies and the data have none, or only some that see across documents."""
    rule = model_class.entropy_rule(model_config)
    if rule is None:
        return model_config, {}
    patches = None if dataset is None else dataset.patches
    if patches is None:
        raise UserError(
            f"model.patching: {rule} needs the entropies of another model, and {config.data.path or 'the dataset'} has none: prepare the data "
            "with --patches RUN, or set model.patching to space or static"
        )
    if config.data.separate_documents and not patches.separate:
        raise UserError(
            f"data.separate_documents: the entropies of {config.data.path} see across documents; leave it out, or train their model "
            f"({patches.run}) with it and prepare the data again"
        )
    found = {"patch_size": patches.patch_size, "threshold": patches.thresholds[rule]}
    source = f"measured by `prepare --patches {patches.run} --patch_size {patches.patch_size:g}`"
    chosen = {key: value for key, value in found.items() if key not in given}
    return dataclasses.replace(model_config, **chosen), dict.fromkeys(chosen, source)


def with_init_std(model_class: Any, model_config: Any, given: Mapping[str, Any]) -> tuple[Any, dict[str, str]]:
    """(model_config with an init_std that suits its width, unless it is given; by field, where that comes from).

    GPT-2's 0.02 is 0.55 / sqrt(its width of 768), near the sqrt(0.4 / width) of arXiv 1910.05895. In a narrower decoder the branches are then
    so weak at first that a learning rate 2 times the best leaves the model at the loss of pairs of tokens. With model.mup the width
    is that of the base. Only classes with `narrow_init`: others learn less with it.
    """
    from models.mup import base_of

    default = {field.name: field.default for field in dataclasses.fields(model_class.Config)}.get("init_std")
    width, named = getattr(model_config, "d_model", GPT2_WIDTH), "d_model"
    if getattr(model_config, "mup", False):
        width, named = base_of(model_config)[0], "mup's base width"
    of_width = getattr(model_config, "init", "gpt2") in ("mitchell", "width_scaled")
    kept = "init_std" in given or default != GPT2_STD or width >= GPT2_WIDTH or of_width
    if kept or not model_class.narrow_init:
        return model_config, {}
    found = float(f"{GPT2_STD * math.sqrt(GPT2_WIDTH / width):.3g}")
    source = f"{GPT2_STD} sqrt({GPT2_WIDTH} / {named}), for widths below GPT-2's"
    return dataclasses.replace(model_config, init_std=found), {"init_std": source}


def _unknown(name: str, names: list[str]) -> str:
    near = _nearest_name(name, names)
    hint = f"; did you mean {near}?" if near else ""
    return (
        f"model.name: {name!r} is not known (allowed: {', '.join(names)}; --plugin FILE.py for one of your own){hint}"
    )


def _nearest_name(name: str, names: list[str]) -> str:
    """The name with the most similar spelling, without case and punctuation; "" if none is near."""

    def plain(text: str) -> str:
        return "".join(c for c in text.casefold() if c.isalnum() or c == "+")

    by_spelling = {plain(known): known for known in names}
    near = difflib.get_close_matches(plain(name), list(by_spelling), 1, 0.6)
    return by_spelling[near[0]] if near else ""
