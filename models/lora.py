"""LoRA (arXiv 2106.09685): trained weights W stay as they are, and W + (alpha / rank) B A computes, where A and B are small and trained.

`with_lora` gives any model's class this, also a stranger's, without a change of its file: the linear layers in its blocks get
adapters, and all other parameters are frozen. B starts at zero, so the model starts as the one without adapters.

A layer that fuses several matrices (queries, keys and values) has one pair A, B for each of them. So a rank means the same
whether an architecture fuses its matrices or not, and they need not share the few directions of one A.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from models import counting
from models.base import LanguageModel, Split
from models.config import setting, with_fields
from models.layers.lora import Adapter, Pair, add_update
from models.quantization import packed_layers, reserve_packed


@dataclass(frozen=True)
class LoraConfig:
    """The fields that a Config with adapters has besides its own."""

    lora_rank: int = setting(8, "LoRA: rows of A and columns of B for each matrix; 0: no LoRA", low=0, high=10**6)
    lora_alpha: float = setting(
        32.0,
        "LoRA: an update is (lora_alpha / lora_rank) B A; if it stays the same for every rank, the best learning rate hardly changes",
        above=0,
        high=10**6,
    )
    lora_targets: str = setting("matrix", "LoRA: ROLE,ROLE: roles of the linear layers in the blocks that get adapters")
    lora_base: str = setting(
        "compute", "LoRA: frozen matrices: compute, as the run computes, or nf4, in 4 bits (QLoRA, arXiv 2305.14314)"
    )

    def __post_init__(self) -> None:
        if self.lora_base not in BASES:
            raise ValueError(f"lora_base must be {' or '.join(BASES)}, not {self.lora_base!r}")


BASES = ("compute", "nf4")


FIELDS = tuple(field.name for field in dataclasses.fields(LoraConfig))


class LoraModel(LanguageModel):
    """What `with_lora` puts before a model's class: `adapts`."""

    adapts: ClassVar[type[LanguageModel]]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if super().projections() or type(self).post_step is not LanguageModel.post_step:
            raise ValueError(
                "lora_rank: this model projects its weights after each step, but W + B A is not projected; train all weights"
            )
        self.requires_grad_(False)
        # Asked for before there are adapters, of which the model knows nothing.
        self._lora_roles, fused = super().parameter_groups(), super().fused_matrices()
        for path, layer, role in self._targets():
            split = fused.get(f"{path}.weight")
            rows = split.sizes.values() if split is not None and split.dim in (0, -2) else [layer.out_features]
            scale = config.lora_alpha / config.lora_rank
            layer.lora = Adapter(Pair(layer.in_features, count, config.lora_rank, scale) for count in rows)
            layer.register_forward_hook(add_update)
            factors = [f"{path}.lora.{name}" for name, _ in layer.lora.named_parameters()]
            self._lora_roles[role] = [*self._lora_roles[role], *factors]

    def _targets(self) -> list[tuple[str, Any, str]]:
        """(path, layer, role of its weight) of each layer that gets an adapter. ValueError if there is none for a role."""
        role_of = {name: role for role, names in self._lora_roles.items() for name in names}
        inside = {module for block in self.blocks() for module in block.modules()}
        # A weight that two layers share would no longer be shared if one of them got an adapter.
        holders: Counter[Any] = Counter(
            parameter for module in self.modules() for parameter in module.parameters(recurse=False)
        )
        linear = [
            (path, module, role_of[f"{path}.weight"])
            for path, module in self.named_modules()
            if module in inside and isinstance(module, nn.Linear) and holders[module.weight] == 1
        ]
        found: dict[str, tuple[str, Any, str]] = {}
        for wanted in map(str.strip, self.config.lora_targets.split(",")):
            of_role = {at[0]: at for at in linear if wanted in (at[2], self.further_roles.get(at[2]))}
            if not of_role:
                there = ", ".join(sorted({role for _, _, role in linear})) or "none"
                raise ValueError(
                    f"lora_targets: no linear layer in the blocks has the role {wanted!r} (roles there: {there})"
                )
            found |= of_role
        taken = [path for path, layer, _ in found.values() if hasattr(layer, "lora")]
        if taken:
            raise ValueError(f"lora_targets: {taken[0]} has an attribute `lora` of its own; rename it")
        return list(found.values())

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        super().init_weights(generator)
        for module in self.modules():
            if isinstance(module, Pair):
                module.draw(generator)

    def parameter_groups(self) -> dict[str, list[str]]:
        """The factors of a matrix have its role, so that an optimiser of matrices updates them."""
        packed = packed_layers(self).keys()  # no parameters any more
        return {role: [name for name in names if name not in packed] for role, names in self._lora_roles.items()}

    def fused_matrices(self) -> dict[str, Split]:
        """None: what is trained fuses no matrices."""
        return {}

    def multipliers(self) -> None:
        """None for the optimizer: the rank of an adapter does not grow with the width, so mup's rules are not for it."""

    def transfers(self) -> dict[str, Any]:
        return {}

    @classmethod
    def count_parameters(cls, config: Any) -> int:
        return counting.parameters_of(cls, config)  # type: ignore[arg-type]  # classes can be hashed

    @classmethod
    def config_for_scale(cls, scale: float, vocab_size: int, target_parameters: int, **choices: Any) -> Any:
        """The Config of the model without adapters, with the fields of LoRA. ValueError if the model cannot have the adapters."""
        own = {key: choices.pop(key) for key in FIELDS if key in choices}
        plain = cls.adapts.config_for_scale(scale, vocab_size, target_parameters, **choices)
        config = cls.Config(**{field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}, **own)
        cls.count_parameters(config)
        return config

    def flops_per_token(self, sequence_length: int) -> int:
        """Without the gradients of frozen matrices: 2 FLOPs for each of their entries."""
        roles = self.names_by_role()
        matrices: list[Any] = [self.get_parameter(name) for name in (*roles.get("matrix", []), *roles.get("head", []))]
        matrices += [self.token_embedding().weight] if self.tied_embedding() else []
        frozen = sum(matrix.numel() for matrix in matrices if not matrix.requires_grad)
        return super().flops_per_token(sequence_length) - 2 * frozen


@functools.cache
def with_lora(model_class: Any) -> type[LoraModel]:
    """A class of the same model with adapters, frozen except for these. Its Config has the fields of `model_class.Config` and FIELDS."""
    about = {"__module__": model_class.__module__, "__doc__": model_class.__doc__, "adapts": model_class}
    members = {**about, "Config": with_fields(model_class.Config, LoraConfig)}
    return type(model_class.__name__, (LoraModel, model_class), members)


def reserve_base(model: Any, device: torch.device | str) -> None:
    """Give a model with lora_base nf4, without storage, packed tensors on `device` instead of its frozen matrices. Of another model
    nothing changes."""
    if getattr(model.config, "lora_base", None) == "nf4":
        reserve_packed(model, "nf4", device)


def factors_of(weight: str, number: int) -> tuple[str, str]:
    """The names of A and B of the `number`-th matrix that a weight fuses. weight: its name, as in `named_parameters`."""
    pair = f"{weight.removesuffix('.weight')}.lora.{number}"
    return f"{pair}.a", f"{pair}.b"


def is_factor(name: str) -> bool:
    """Whether a parameter of a model with adapters belongs to them."""
    return re.search(r"\.lora\.[0-9]+\.[ab]$", name) is not None


def has_lora(model: Mapping[str, Any]) -> bool:
    """Whether a section `model` of a config is of a model with adapters."""
    return "lora_rank" in model


def has_packed_base(model: Mapping[str, Any]) -> bool:
    """Whether a section `model` of a config is of a model with adapters whose frozen matrices have 4 bits."""
    return model.get("lora_base") == "nf4"


def without_lora(model: Mapping[str, Any]) -> dict[str, Any]:
    """A section `model` for the same model without adapters, into whose weights they are merged."""
    return {key: value for key, value in model.items() if key not in FIELDS}
