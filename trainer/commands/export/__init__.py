"""`export`: writes a checkpoint's weights to one folder, for programs that know nothing about runs.

--format safetensors, under the model's own names:

    model.safetensors   under the model's own parameter names; above SHARD_BYTES model-00001-of-0000N.safetensors and so on,
                        with model.safetensors.index.json (which file holds which name), as on the Hugging Face hub
    config.json         model, config (the fields of its Config), step, weights, tokens, precision, crescendo (the version)
    tokenizer.json

The files do not depend on how the weights were trained (devices, processes, strategy). To load them again:

    about = json.loads(Path("export/config.json").read_text())
    models.base.load_models()  # or import the module that registers the model
    model_class = models.base.get_model(about["model"])  # with model.linear: models.bitnet.with_linear of that
    model = model_class(model_class.Config(**about["config"]))
    model.init_weights()  # sets what no file holds: buffers that follow from the config
    model.load_state_dict(safetensors.torch.load_file("export/model.safetensors"))  # several files: their union

--format hf is a folder for transformers: see `hugging_face.py`; --format gguf a file for llama.cpp: see `gguf_file.py`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.commands import Verb, run_folder
from trainer.core.config import STEP, WEIGHTS, Step
from trainer.core.errors import UserError
from trainer.core.files import sync_path, user_path
from trainer.core.settings import setting


@dataclass
class ExportConfig:
    """`export`: which checkpoint to write, and where."""

    run_dir: str | None = setting(None, "folder of the run (the flag itself is optional)")
    step: Step = setting(None, STEP, low=0)
    weights: str = setting("evaluation", WEIGHTS)
    format: Literal["safetensors", "hf", "gguf"] = setting(
        "safetensors",
        "safetensors: under the model's own names; hf: a folder that transformers loads, with tokenizer and model card; "
        "gguf: one file for llama.cpp, of a GPT-2, Llama or Qwen3",
    )
    dtype: Literal["auto", "fp32", "bf16"] = setting(
        "auto", "of the written weights; auto: as the checkpoint holds them, which is fp32 unless the run was pure_bf16"
    )
    license: str | None = setting(None, "hf: licence of the weights for the model card, such as apache-2.0")
    out: str | None = setting(None, "folder to write; must not exist; auto: RUN/export-STEP")


def run(config: ExportConfig) -> None:
    """Run the verb in one process, on the CPU. It overwrites nothing, and removes a partial export if it fails."""
    from trainer.commands.export.source import find_source
    from trainer.runtime.distributed import World

    write = writer(config)
    say = World().say
    source = find_source(config.run_dir, config.step, config.weights, config.dtype, say)
    step = source.weights.manifest["step"]
    out = user_path(config.out, "out") if config.out is not None else source.folder / f"export-{step}"
    with fresh_folder(out) as partial:
        added = write(source, partial)
    which = "" if config.weights == "evaluation" else f" ({config.weights})"
    merged = "" if source.weights.lora_scale is None else "; the updates of LoRA are merged into them"
    say(f"{out}: the weights of {source.weights.paths[-1]}{which}{merged}{added}")


def writer(config: ExportConfig) -> Callable[[Any, Path], str]:
    """What writes the format: (source, empty folder) -> what the last line of the command adds. UserError if it needs a package that
    is not installed, or a key has no meaning for it."""
    if config.license is not None and config.format != "hf":
        raise UserError("license: is for the model card of --format hf; leave it out")
    from trainer.commands.export.plain import write_plain

    if config.format == "safetensors":
        return write_plain
    if config.format == "gguf":
        require("gguf", config.format)
        from trainer.commands.export.gguf_file import write_gguf

        return write_gguf
    require("transformers", config.format)
    from trainer.commands.export.hugging_face import write_hugging_face
    from trainer.commands.export.model_card import check_license

    check_license(config.license)
    return lambda source, out: write_hugging_face(source, out, config.license)


def require(package: str, format: str) -> None:
    """UserError if a package that the format needs is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"format: {format} needs the package {package}; run `pip install 'crescendo-lm[{package}]'`")


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


VERB = Verb(
    name="export",
    help="a run's weights for other programs: safetensors, transformers, llama.cpp",
    config=ExportConfig,
    run=run,
    alone=True,
    positional=run_folder,
)
