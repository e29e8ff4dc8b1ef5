"""Writes named tensors as safetensors files of a limited size."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.core.errors import UserError
from trainer.core.files import write_file

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 2 << 30  # about the most held in memory at once; a larger tensor gets a file of its own


def write_tensors(sizes: dict[str, int], tensors: Iterable[tuple[str, Tensor]], out: Path, limit: int) -> None:
    """Write `tensors` into safetensors files of up to `limit` bytes each. sizes: name -> bytes of all, in the same order."""
    import safetensors
    from safetensors.torch import save_file

    files = list(divide(sizes, limit))
    left = iter(tensors)
    places: dict[str, str] = {}
    for number, names in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
        held = {name: tensor.contiguous() for name, tensor in itertools.islice(left, len(names))}
        try:
            save_file(held, out / file, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:
            raise UserError(f"out: {out / file} could not be written: {error}") from None
        del held  # before the next file's tensors are read: a file's are held, not two files'
        places |= dict.fromkeys(names, file)
    if len(files) > 1:
        index: dict[str, Any] = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        write_file(out / "model.safetensors.index.json", json.dumps(index, indent=1) + "\n")


def divide(sizes: dict[str, int], limit: int) -> Iterator[list[str]]:
    """Yield the names in order, in lists whose tensors have at most `limit` bytes together; a larger tensor stands alone."""
    names: list[str] = []
    held = 0
    for name, size in sizes.items():
        if names and held + size > limit:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    if names:
        yield names
