"""The format `safetensors`: the weights under the model's own names, for programs that have this package."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from trainer import __version__
from trainer.commands.export import tensors
from trainer.commands.export.source import Source
from trainer.core.files import write_file


def write_plain(source: Source, out: Path) -> str:
    """Write the folder that the head of trainer/commands/export/__init__.py describes. Returns nothing to add to the last line."""
    manifest = source.weights.manifest
    about = {
        "model": source.name,
        "config": source.fields,
        "step": manifest["step"],
        "weights": source.wanted,
        "tokens": manifest["tokens"],
        "precision": source.config.precision,
        "crescendo": __version__,
        **source.chosen_end,
    }
    write_weights(source, out)
    write_file(out / "config.json", json.dumps(about, indent=1) + "\n")
    shutil.copy(source.folder / "tokenizer.json", out / "tokenizer.json")
    return ""


def write_weights(source: Source, out: Path) -> None:
    """The weights under the model's own names."""
    sizes = {name: shape.numel() * dtype.itemsize for name, (shape, dtype) in source.stored().items()}
    tensors.write_tensors(sizes, source.each(), out, tensors.SHARD_BYTES)
