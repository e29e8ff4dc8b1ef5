"""Models without storage, and the error if a model cannot be built."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.core.errors import UserError
from trainer.core.text import printable


def build_meta(model_class: Any, model_config: Any) -> Any:
    """The model on the meta device: shapes without memory. (torch is imported here, because `--help` does not need it.)"""
    from models.counting import build_on_meta

    return build_on_meta(model_class, model_config)


def stand_ins(frozen: Mapping[str, Any]) -> dict[str, Any]:
    """The frozen models of a plan without weights, for a forward pass under `fake_tensors`."""
    classes = {name: found.classes() for name, found in frozen.items()}
    return {name: cls(cls.without_device_kernels(config)) for name, (cls, config) in classes.items()}


def flops_per_token(model_class: Any, model_config: Any, length: int) -> int:
    """Training FLOPs of one token, from the model's own method. UserError if they cannot be counted."""
    with told_of_model(
        model_class, "flops_per_token must be defined, because the forward pass does not run on the meta device"
    ):
        return build_meta(model_class, model_config).flops_per_token(length)


@contextlib.contextmanager
def told_of_model(model_class: Any, what: str) -> Iterator[None]:
    """Turn any exception of a model into a UserError of one line: the model's name, `what`, the cause, and the line in its file.

    what: a sentence that says what failed.
    """
    from models.base import OtherTokens, get_model, model_names

    try:
        yield
    except UserError:
        raise
    except OtherTokens as error:
        raise UserError(f"objective.name: {error}") from None
    except Exception as error:
        name = next((name for name in model_names() if get_model(name) is model_class), model_class.__name__)
        file = str(getattr(sys.modules.get(model_class.__module__), "__file__", ""))
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        place = f" ({Path(file).name}, line {lines[-1]})" if lines else ""
        cause = printable(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}", 300)
        raise UserError(f"model {name}: {what}: {cause}{place}") from error


def projections_of(model_class: Any, model_config: Any, weights: Any) -> dict[str, Callable[[Any], None]]:
    """`all_projections`, if `weights` need them."""
    return all_projections(model_class, model_config) if weights.averaged else {}


def all_projections(model_class: Any, model_config: Any) -> dict[str, Callable[[Any], None]]:
    """The model's projection of each name of a parameter. UserError for a model whose projection is more."""
    from models.base import LanguageModel
    from models.materialise import ties

    if model_class.post_step is not LanguageModel.post_step:
        raise UserError(
            f"weights: averages of this model need its post_step, which is for all weights at once; define projections in "
            f"{model_class.__name__} instead"
        )
    with told_of_model(model_class, "it cannot be built on the meta device"):
        model = build_meta(model_class, model_config)
    found = model.projections()
    return {**found, **{name: found[first] for name, first in ties(model).items() if first in found}}
