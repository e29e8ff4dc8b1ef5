"""Fields of a model's Config: a default, a help text, the range of a number. Also completes a saved Config with newer fields."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, get_type_hints

from models.base import get_model, load_models, model_names

MOST = 2**31 - 1  # largest absolute value of an integer field without a range


def setting(default: Any, help: str, low: float | None = None, above: float | None = None, high: float | None = None):
    """A dataclass field with help text and, for numbers, the range low <= x <= high, or x > above."""
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "above": above, "high": high})


def check_ranges(config: Any) -> None:
    """ValueError, with the name of the field, unless each number of a Config is finite and in the range of its field."""
    for field in dataclasses.fields(config):
        check_range(field, getattr(config, field.name))


def check_range(field: dataclasses.Field, value: Any) -> None:
    """ValueError if `value` is a number that is not finite or not in the range of the field."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{field.name} must be finite, not {value}")
    low, above, high = (field.metadata.get(limit) for limit in ("low", "above", "high"))
    if isinstance(value, int):
        low, high = -MOST if low is None else low, MOST if high is None else high
    if low is not None and value < low:
        raise ValueError(f"{field.name} must be at least {low:,}, not {value}")
    if above is not None and value <= above:
        raise ValueError(f"{field.name} must be above {above:,}, not {value}")
    if high is not None and value > high:
        raise ValueError(f"{field.name} must be at most {high:,}, not {value}")


def check_choice(config: Any, field: str, choices: Iterable[str]) -> None:
    """ValueError unless the field is one of `choices`."""
    known, value = list(choices), getattr(config, field)
    if value not in known:
        raise ValueError(f"{field} must be one of {', '.join(known)}, not {value!r}")


def with_fields(config_class: Any, further: Any) -> Any:
    """A Config class of the same name with the fields of the dataclass `further` after its own, whose values are checked like these."""
    hints = get_type_hints(further)

    def check(self: Any) -> None:
        for cls in (config_class, further):
            if hasattr(cls, "__post_init__"):
                cls.__post_init__(self)
        for field in dataclasses.fields(further):
            check_range(field, getattr(self, field.name))

    return dataclasses.make_dataclass(
        config_class.__name__,
        [
            (field.name, hints[field.name], dataclasses.field(default=field.default, metadata=field.metadata))
            for field in dataclasses.fields(further)
        ],
        bases=(config_class,),
        namespace={"__post_init__": check, "__module__": config_class.__module__},
        frozen=config_class.__dataclass_params__.frozen,
    )


def kernel_fields_of(name: Any) -> tuple[str, ...]:
    """The `kernel_fields` of the model that is registered under `name`; () if there is no such model."""
    load_models()
    return get_model(name).kernel_fields if name in model_names() else ()


def with_later_fields(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The model section of a stored config, completed with fields that its model got later, at values that change nothing.

    A new field has a default that leaves older models unchanged, in the class that introduces it. A preset, whose Config
    derives from that class, may have another default, which is not used here. A model that is not registered stays unchanged.
    """
    load_models()
    if saved.get("name") not in model_names():
        return dict(saved)
    completed = dict(saved)
    if "lora_rank" in completed:
        completed.setdefault("lora_base", "compute")
    for cls in reversed(get_model(saved["name"]).Config.__mro__):
        for field in dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ():
            if field.default is not dataclasses.MISSING:
                completed.setdefault(field.name, field.default)
    return completed
