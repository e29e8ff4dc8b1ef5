"""Which weights of any model are packed into few bits, or trained so: those of the linear layers with the role `matrix`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.layers.quantized import FORMATS, QuantizedLinear, packed_bytes, quantize_linear, refusal


def matrix_layers(model: Any) -> tuple[dict[str, tuple[Any, list[int]]], dict[str, str]]:
    """(name of a weight -> (its layer, the rows of each matrix that it fuses), name of another parameter of this role -> why its
    layer is none).

    Embedding and head have other roles: an error there reaches every logit. model: may have no storage.
    """
    # Tied modules are one layer with several names; a weight that two layers share would no longer be shared.
    holders: Counter[Any] = Counter(
        parameter for module in model.modules() for parameter in module.parameters(recurse=False)
    )
    fused = model.fused_matrices()
    found: dict[str, tuple[Any, list[int]]] = {}
    left: dict[str, str] = {}
    for name in model.names_by_role().get("matrix", []):
        owner, _, kind = name.rpartition(".")
        layer = model.get_submodule(owner)
        if not isinstance(layer, nn.Linear) or kind != "weight":
            left[name] = f"is no weight of a linear layer, but of {type(layer).__name__}"
        elif holders[layer.weight] > 1:
            left[name] = "is shared by several layers"
        else:
            split = fused.get(name)
            whole = split is None or split.dim not in (0, -2)
            found[name] = (layer, [layer.out_features] if whole else list(split.sizes.values()))
    return found, left


def packable(model: Any, format: str) -> tuple[dict[str, tuple[Any, list[int]]], dict[str, str]]:
    """As `matrix_layers`; layers that cannot have the format are among those that stay as they are."""
    layers, left = matrix_layers(model)
    refused = {name: why for name, (layer, _) in layers.items() if (why := refusal(format, layer)) is not None}
    return {name: found for name, found in layers.items() if name not in refused}, left | refused


def quantize_matrices(model: Any, format: str, packed: Mapping[str, Tensor] | None = None) -> dict[str, str]:
    """Pack these weights, in place, each on its device. packed: as in `packed_tensors`, instead of the weights that the model has.
    Returns the matrices that stay as they are, with the reason."""
    layers, left = packable(model, format)
    for name, (layer, rows) in layers.items():
        own = None if packed is None else packed_of(name, packed)
        quantize_linear(layer, format, rows, own)
    return left


def reserve_packed(model: Any, format: str, device: torch.device | str) -> None:
    """As `quantize_matrices`, for a model without storage or values: the packed tensors are zeros on `device`."""
    for layer, rows in packable(model, format)[0].values():
        room = FORMATS[format].room(layer.out_features, layer.in_features, rows)
        packed = {part: torch.zeros(shape, dtype=dtype, device=device) for part, (shape, dtype) in room.items()}
        quantize_linear(layer, format, rows, packed)


def move_packed(model: Any, device: torch.device | str, dtype: torch.dtype | None = None) -> None:
    """Move the packed tensors, which `to` does not move. dtype: of the unpacked weights from now on, if it changes."""
    for layer in packed_layers(model).values():
        layer.packed = {part: tensor.to(device) for part, tensor in layer.packed.items()}
        layer.dtype = dtype or layer.dtype


def packed_of(name: str, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one weight in `packed`, by their short names."""
    return {key.rpartition(".")[2]: tensor for key, tensor in packed.items() if key.rpartition(".")[0] == name}


def packed_layers(model: Any) -> dict[str, QuantizedLinear]:
    """Name of each packed weight, as it was in `named_parameters` -> its layer."""
    return {f"{path}.weight": module for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def packed_tensors(model: Any) -> dict[str, Tensor]:
    """NAME.weight.PART -> tensor: what `state_dict` lacks."""
    return {
        f"{name}.{part}": tensor
        for name, layer in packed_layers(model).items()
        for part, tensor in layer.packed.items()
    }


def matrix_bytes(model: Any, format: str) -> tuple[int, int]:
    """(weights, bytes) of the matrices that `quantize_matrices` would pack. model: may have no storage."""
    layers = [(layer.out_features, layer.in_features, rows) for layer, rows in packable(model, format)[0].values()]
    return sum(out * width for out, width, _ in layers), sum(packed_bytes(format, *shape) for shape in layers)
