"""The weights of a folder that `quantize` wrote: a run that evaluates and writes text, and cannot be trained.

config.yaml, dataset.json, tokenizer.json   as in the run that it was made from
model.safetensors    tensors: NAME of what stays as it is, NAME.PART of a packed weight (see models/layers/quantized.py)
quantized.json       written last: format, step, source, sizes and hashes of the files, its own digest
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from models.layers.quantized import FORMATS, is_installed
from models.materialise import ties
from models.quantization import packable, packed_of, packed_tensors, quantize_matrices
from trainer.checkpoint.format import check_file, file_entry, put_into
from trainer.core.errors import Damaged, UserError
from trainer.core.files import DIGEST, read_json, sealed, write_file
from trainer.core.text import printable

MANIFEST, WEIGHTS = "quantized.json", "model.safetensors"
FORMAT = 1


@dataclass(frozen=True)
class Quantized:
    """What quantized.json says. to: a key of FORMATS; source: the run and the step that the weights are from."""

    folder: Path
    to: str
    step: int
    source: str


def is_quantized(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def refuse_quantized(folder: Path, key: str) -> None:
    """UserError, which names `key`, if the folder holds quantised weights: what needs the weights in full cannot use it."""
    if is_quantized(folder):
        found = read_manifest(folder)
        raise UserError(
            f"{key}: {printable(folder)} holds weights in {found.to}, made from {printable(found.source)}; name that run instead"
        )


def check_installed(to: str, key: str) -> None:
    """UserError, which names `key`, if a package for this format is missing."""
    if to == "nf4" and not is_installed():
        raise UserError(f"{key}: nf4 needs bitsandbytes; run pip install 'crescendo-lm[quantize]'")


def write_quantized(folder: Path, model: Any, to: str, step: int, source: str, facts: dict[str, Any]) -> None:
    """Write the weights of a model whose matrices are packed. facts: JSON for the manifest."""
    import safetensors
    from safetensors.torch import save_file

    tied = ties(model)
    kept = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    tensors = {name: tensor.contiguous() for name, tensor in (kept | packed_tensors(model)).items()}
    try:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise UserError(f"out: {folder / WEIGHTS} could not be written: {error}") from None
    files = {WEIGHTS: file_entry(folder / WEIGHTS)}
    manifest = {"format": FORMAT, "to": to, "step": step, "source": source, "files": files, **facts}
    write_file(folder / MANIFEST, sealed(manifest))


def read_manifest(folder: Path) -> Quantized:
    """Raises Damaged if it is not what was written, UserError if a later release wrote it."""
    file = folder / MANIFEST
    found = read_json(file)
    version = found.get("format")
    if type(version) is int and version > FORMAT:
        raise UserError(f"{file}: has format {version}; this version reads formats up to {FORMAT}")
    known = {"to": str, "step": int, "source": str, "files": dict}
    if version != FORMAT or DIGEST not in found or any(type(found.get(key)) is not kind for key, kind in known.items()):
        raise Damaged(f"{file}: is not as `quantize` writes it; make the folder again")
    entry = found["files"].get(WEIGHTS)
    if found["to"] not in FORMATS or not isinstance(entry, dict) or {"bytes", "xxh64"} - entry.keys():
        raise Damaged(f"{file}: does not name a known format and the file of its weights; make the folder again")
    return Quantized(folder, found["to"], found["step"], found["source"])


def put_quantized(model: Any, found: Quantized) -> list[str]:
    """Give a model in CPU memory the weights of the folder, its matrices packed. Returns the names of what stays as it is.

    Raises UserError if a package is missing or the weights are of another model, Damaged if the file is not what was written.
    """
    import safetensors
    from safetensors.torch import load_file

    check_installed(found.to, "run_dir")
    file = found.folder / WEIGHTS
    entry = read_json(found.folder / MANIFEST)["files"][WEIGHTS]
    check_file(file, entry["bytes"], entry["xxh64"])
    try:
        tensors = load_file(file)
    except safetensors.SafetensorError as error:
        raise Damaged(f"{file}: is not as it was written: {printable(error)}") from None
    packed = take_packed(model, found.to, tensors, file)
    try:
        quantize_matrices(model, found.to, packed)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None
    tensors |= {name: tensors[first] for name, first in ties(model).items() if first in tensors}
    put_into(model, tensors, file)
    return list(tensors)


def take_packed(model: Any, to: str, tensors: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The packed tensors of the model's matrices, taken out of `tensors`. UserError unless their shapes and types are those of the
    model."""
    packed: dict[str, Tensor] = {}
    for name, (layer, rows) in packable(model, to)[0].items():
        there = {part: (tuple(tensor.shape), tensor.dtype) for part, tensor in packed_of(name, tensors).items()}
        if there != FORMATS[to].room(layer.out_features, layer.in_features, rows):
            raise UserError(f"{file}: {name} is not packed as {to} for the model of config.yaml")
        packed |= {f"{name}.{part}": tensors.pop(f"{name}.{part}") for part in there}
    return packed
