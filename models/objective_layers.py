"""Linear layers that an objective trains together with a model, such as a projection onto a teacher's width.

`with_layers` gives any model's class these layers, also a stranger's, without a change of its file. So they have a role, and
every engine shards, updates and stores them as it does the model's own parameters. They are no part of the published model:
whoever reads the weights of a run leaves them out (`is_objective_layer`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models import counting
from models.base import LanguageModel, Split
from models.layers import fill_

ATTRIBUTE = "objective_layers"  # of the model: a ModuleDict

Layers = Mapping[str, tuple[int, int]]  # name -> (inputs, outputs)


class ModelWithLayers(LanguageModel):
    """What `with_layers` puts before a model's class, `beside`. The model's own methods see a model without them."""

    beside: ClassVar[type[LanguageModel]]
    layers_of_objective: ClassVar[tuple[tuple[str, tuple[int, int]], ...]]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        layers = {name: nn.Linear(*sizes, bias=False) for name, sizes in self.layers_of_objective}
        self.add_module(ATTRIBUTE, nn.ModuleDict(layers))

    @contextlib.contextmanager
    def _without_layers(self) -> Iterator[None]:
        """A context for a method of the model, which may call others that enter it again."""
        layers = self._modules.pop(ATTRIBUTE, None)
        try:
            yield
        finally:
            if layers is not None:
                self._modules[ATTRIBUTE] = layers

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """The layers are orthonormal (rows, or columns if there are more rows), so they nearly keep the angles between their
        inputs. They are drawn last: the model's own weights are those that it has without them."""
        with self._without_layers():
            super().init_weights(generator)
        for name, (inputs, outputs) in self.layers_of_objective:
            whole = torch.empty(outputs, inputs, device="cpu", dtype=torch.float64)
            weight = self.get_parameter(f"{ATTRIBUTE}.{name}.weight")
            fill_(weight, nn.init.orthogonal_(whole, generator=generator).float())

    def parameter_groups(self) -> dict[str, list[str]]:
        with self._without_layers():
            groups = {role: list(names) for role, names in super().parameter_groups().items()}
        own = [name for name, _ in self.named_parameters() if is_objective_layer(name)]
        return {**groups, "matrix": [*groups.get("matrix", []), *own]}

    def fused_matrices(self) -> dict[str, Split]:
        with self._without_layers():
            return super().fused_matrices()

    def projections(self) -> dict[str, Callable[[Tensor], None]]:
        with self._without_layers():
            return super().projections()

    @classmethod
    def count_parameters(cls, config: Any) -> int:
        """Those of the layers included."""
        return counting.parameters_of(cls, config)  # type: ignore[arg-type]  # classes can be hashed

    @classmethod
    def config_for_scale(cls, scale: float, vocab_size: int, target_parameters: int, **choices: Any) -> Any:
        """That of the model without the layers: they do not count towards its size."""
        return cls.beside.config_for_scale(scale, vocab_size, target_parameters, **choices)


def with_layers(model_class: Any, layers: Layers) -> Any:
    """A class of the same model with these layers in `objective_layers`; without any, the class itself. Equal arguments give the
    same class."""
    return _made(model_class, tuple(layers.items())) if layers else model_class


@functools.cache
def _made(model_class: Any, layers: tuple[tuple[str, tuple[int, int]], ...]) -> type[ModelWithLayers]:
    about = {"__module__": model_class.__module__, "__doc__": model_class.__doc__}
    members = {**about, "beside": model_class, "layers_of_objective": layers}
    return type(model_class.__name__, (ModelWithLayers, model_class), members)


def is_objective_layer(name: str) -> bool:
    """Whether a parameter of a run's model belongs to its objective and not to the published model."""
    return name.startswith(f"{ATTRIBUTE}.")
