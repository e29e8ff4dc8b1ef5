"""`model.linear bitnet` or `sign`: any model with linear layers that compute with three or two values (models/layers/bit_linear.py).

`with_linear` gives any model's class this, also a stranger's, without a change of its file: the linear layers whose weights have the
role `matrix` round their weights and inputs. Embedding, head, norms and biases stay as they are.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from models import counting
from models.base import LanguageModel
from models.config import setting, with_fields
from models.layers.bit_linear import ROUNDINGS, to_bit_linear
from models.quantization import matrix_layers

PLAIN = "torch"


@dataclass(frozen=True)
class LinearConfig:
    """The field that a Config has besides its own."""

    linear: str = setting(
        PLAIN,
        "linear layers: torch, bitnet (-1, 0, 1 and inputs of 8 bits, arXiv 2402.17764) or sign (-1, 1, 2310.11453)",
    )

    def __post_init__(self) -> None:
        if self.linear not in (PLAIN, *ROUNDINGS):
            raise ValueError(f"linear must be {PLAIN}, {' or '.join(ROUNDINGS)}, not {self.linear!r}")


class BitModel(LanguageModel):
    """What `with_linear` puts before a model's class: `adapts`."""

    adapts: ClassVar[type[LanguageModel]]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if config.linear == PLAIN:
            return
        layers, _ = matrix_layers(self)
        if not layers:
            raise ValueError(
                f"linear: no linear layer of this model has the role `matrix`, so {config.linear} changes nothing"
            )
        for layer, rows in layers.values():
            to_bit_linear(layer, config.linear, rows)

    @classmethod
    def count_parameters(cls, config: Any) -> int:
        return counting.parameters_of(cls, config)  # type: ignore[arg-type]  # classes can be hashed

    @classmethod
    def config_for_scale(cls, scale: float, vocab_size: int, target_parameters: int, **choices: Any) -> Any:
        """The Config of the plain model, which has the same parameters, with this field. ValueError if it cannot have it."""
        linear = choices.pop("linear", PLAIN)
        plain = cls.adapts.config_for_scale(scale, vocab_size, target_parameters, **choices)
        fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
        config = cls.Config(**fields, linear=linear)
        cls.count_parameters(config)
        return config


@functools.cache
def with_linear(model_class: Any) -> type[BitModel]:
    """A class of the same model whose Config has the field `linear`."""
    about = {"__module__": model_class.__module__, "__doc__": model_class.__doc__, "adapts": model_class}
    members = {**about, "Config": with_fields(model_class.Config, LinearConfig)}
    return type(model_class.__name__, (BitModel, model_class), members)


def linear_of(model: Mapping[str, Any]) -> str:
    """The kind of linear layers of a section `model` of a config."""
    return model.get("linear") or PLAIN
