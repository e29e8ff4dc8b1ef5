"""Storage and initial weights for a model that was built on the meta device; what stays without a value is refused by name."""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Unset(ValueError):
    """`init_weights` did not set some parameters or buffers; one line names them."""


def materialise(model: Any, device: torch.device, generator: torch.Generator) -> Any:
    """Move a model from the meta device to `device` and set its initial weights; Unset if `init_weights` leaves any out.

    For a sharded model, each rank fills and checks its own shards, without communication.
    """
    model = with_storage(model, device)
    model.init_weights(generator)
    refuse_unset(model)
    return model


def with_storage(model: Any, device: torch.device) -> Any:
    """Allocate a model without storage on `device`, filled with values that mean "not set"; tied parameters stay tied."""
    tied = ties(model)
    model = model.to_empty(device=device)
    for name, first in tied.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, model.get_parameter(first))
    for _, values in _held(model):
        if _has_nan(values):
            values.fill_(math.nan)
        else:
            values.view(_INTEGERS[values.itemsize]).fill_(_unset_integer(values))
    return model


def refuse_unset(model: Any, given: Container[str] = ()) -> None:
    """Raise Unset, with names, if a tensor of the model or a part of it still holds the values of `with_storage`.

    given: names that other code has set; they are not checked. A float that is NaN counts as not set. This reads the weights
    once and waits for the device once.
    """
    names, flags = [], []
    for name, values in _held(model):
        if name not in given:
            names.append(name)
            flags.append(_any_unset(values))
    unset = [name for name, flag in zip(names, torch.stack(flags).tolist(), strict=True) if flag] if flags else []
    if unset:
        raise Unset(
            f"init_weights does not set {_listed(unset)}: a model is built without storage, so the values that __init__ gives "
            "to parameters and buffers are lost; set them in init_weights (in a part of the transformer: in its reset)"
        )
    lost = [
        f"{name}.{attribute}".lstrip(".")
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if isinstance(value, Tensor) and value.is_meta
    ]
    if lost:
        raise Unset(
            f"{_listed(lost)} is neither parameter nor buffer: a model is built without storage, so its values are lost; "
            "make it a buffer (register_buffer) and set it in init_weights"
        )


_INTEGERS = {
    1: torch.int8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
}  # by size in bytes; bools are also viewed as these


def _held(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The local tensor of each parameter and buffer."""
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        yield name, (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _has_nan(values: Tensor) -> bool:
    return values.is_floating_point() or values.is_complex()


def _unset_integer(values: Tensor) -> int:
    """All bytes 0xA5: no model uses this value as an integer of four or eight bytes, and it is not a valid bool."""
    return int.from_bytes(b"\xa5" * values.itemsize, "little", signed=True)


def _any_unset(values: Tensor) -> Tensor:
    """Whether any of `values` is not set, as a bool on their device."""
    if _has_nan(values):
        return (values.float() if values.itemsize == 1 else values).isnan().any()
    same = values.view(_INTEGERS[values.itemsize]) == _unset_integer(values)
    if values.dtype == torch.bool or values.itemsize >= 4 or values.numel() == 0:
        return same.any()
    return same.all()  # a small integer may have this value, but hardly in the whole tensor


def _listed(names: list[str]) -> str:
    """The first four names, and how many more there are."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def ties(model: Any) -> dict[str, str]:
    """Further name -> first name, for each parameter with several names."""
    first: dict[Any, str] = {}
    return {
        name: first[parameter]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if first.setdefault(parameter, name) != name
    }


# -- losses and sizes ----------------------------------------------------------------------------------------------------
