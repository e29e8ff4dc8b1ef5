"""`export`: writes a checkpoint's weights to one folder, for programs that know nothing about runs.

    model.safetensors   under the model's own parameter names; above SHARD_BYTES model-00001-of-0000N.safetensors and so on,
                        with model.safetensors.index.json (which file holds which name), as on the Hugging Face hub
    config.json         model, config (the fields of its Config), step, weights, tokens, precision, crescendo (the version)
    tokenizer.json

The files do not depend on how the weights were trained (devices, processes, strategy). To load them again:

    about = json.loads(Path("export/config.json").read_text())
    models.base.load_models()  # or import the module that registers the model
    model_class = models.base.get_model(about["model"])
    model = model_class(model_class.Config(**about["config"]))
    model.init_weights()  # sets what no file holds: buffers that follow from the config
    model.load_state_dict(safetensors.torch.load_file("export/model.safetensors"))  # several files: their union
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer import __version__
from trainer.commands import Verb, run_folder
from trainer.core.config import DEFAULT_MODEL, WEIGHTS, model_name
from trainer.core.errors import UserError
from trainer.core.files import sync_path, user_path, write_file
from trainer.core.settings import setting

SHARD_BYTES = 2 << 30  # about the most held in memory at once; a larger tensor gets a file of its own


@dataclass
class ExportConfig:
    """`export`: which checkpoint to write, and where."""

    run_dir: str | None = setting(None, "folder of the run (the flag itself is optional)")
    step: int | None = setting(None, "checkpoint to use; auto: the newest good one", low=0)
    weights: str = setting("evaluation", WEIGHTS)
    to: Literal["safetensors"] = setting("safetensors", "format of the weights")
    out: str | None = setting(None, "folder to write; must not exist; auto: RUN/export-STEP")


def run(config: ExportConfig) -> None:
    """Run the verb in one process, on the CPU. It overwrites nothing, and removes a partial export if it fails."""
    from models.config import kernel_fields_of
    from models.lora import without_lora
    from trainer.checkpoint.weights import choose_weights
    from trainer.engine.meta import projections_of
    from trainer.planning.model import written_out
    from trainer.runs.opening import stored_run
    from trainer.runtime.distributed import World

    if config.run_dir is None:
        raise UserError("run_dir: name the run's folder, as in `python -m trainer export runs/NAME`")
    say = World().say
    folder, stored = stored_run(config.run_dir, say)
    trained = stored.build()  # the stored config holds every inferred value
    trained.model = without_lora(trained.model)
    fields = dict(trained.model)
    kernels = kernel_fields_of(model_name(fields))
    fields |= dict.fromkeys(fields.keys() & kernels, "auto")  # another machine chooses its own kernels
    weights = choose_weights(folder / "checkpoints", config.step, config.weights, say, World())
    manifest = weights.manifest
    out = user_path(config.out, "out") if config.out is not None else folder / f"export-{manifest['step']}"
    about = {
        "model": fields.pop("name", DEFAULT_MODEL),
        "config": fields,
        "step": manifest["step"],
        "weights": config.weights,
        "tokens": manifest["tokens"],
        "precision": trained.precision,
        "crescendo": __version__,
    }
    projections = projections_of(*written_out(trained), weights)
    with fresh_folder(out) as partial:
        write_weights(weights, projections, partial, SHARD_BYTES)
        write_file(partial / "config.json", json.dumps(about, indent=1) + "\n")
        shutil.copy(folder / "tokenizer.json", partial / "tokenizer.json")
    which = "" if config.weights == "evaluation" else f" ({config.weights})"
    merged = "" if weights.lora_scale is None else "; the updates of LoRA are merged into them"
    say(f"{out}: the weights of {weights.paths[-1]}{which}{merged}")


@contextlib.contextmanager
def fresh_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out`. It is renamed to `out` if the block succeeds, and removed if not."""
    if os.path.lexists(out):
        raise UserError(f"out: {out} exists already; choose another folder or remove it first")
    partial = out.with_name(out.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed export
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (*partial.iterdir(), partial):
            sync_path(path)
        partial.rename(out)
        sync_path(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_weights(weights: Any, projections: Any, out: Path, limit: int) -> None:
    """Write `weights`, projected (see trainer/checkpoint/weights.py), as safetensors files of up to `limit` bytes each."""
    import safetensors
    from safetensors.torch import save_file

    sizes = {name: shape.numel() * dtype.itemsize for name, (shape, dtype) in weights.stored().items()}
    files = list(divide(sizes, limit))
    tensors = weights.each(projections)  # in the order of `stored`
    places: dict[str, str] = {}
    for number, names in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
        try:
            save_file(dict(itertools.islice(tensors, len(names))), out / file, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:
            raise UserError(f"out: {out / file} could not be written: {error}") from None
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


VERB = Verb(
    name="export",
    help="a run's weights as safetensors, for other programs",
    config=ExportConfig,
    run=run,
    alone=True,
    positional=run_folder,
)
