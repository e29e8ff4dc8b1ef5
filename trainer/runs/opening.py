"""Opening the folder of a run: its model with the weights of one checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.core.config import DataConfig, RunConfig, model_name
from trainer.core.errors import UserError
from trainer.core.files import user_path
from trainer.core.text import printable
from trainer.engine.meta import build_meta, projections_of, told_of_model
from trainer.planning.run_config import (
    CONFIG,
    StoredConfig,
    is_run,
    read_config,
)


@dataclass
class OpenRun:
    """A run's model with the weights of one checkpoint, ready to evaluate or to write text.

    config: the run's own, except for the device, the precision and what only training needs
    end_of_text: id of the token that ends a document, if documents do not attend to each other; else None
    """

    folder: Path
    config: RunConfig
    model: Any
    tokenizer: Any
    device: Any
    step: int
    end_of_text: int | None

    def agree(self, value: Any) -> Any:
        return value

    @property
    def precision(self) -> str:
        return self.config.precision

    def predict(self, tokens: Any, documents: Any = None, cache: Any = None, positions: Any = None) -> Any:
        """As an engine's."""
        if positions is not None:
            from models.base import logits_at

            return logits_at(self.model, tokens, documents, positions)
        return self.model(tokens, documents=documents, cache=cache).logits

    def autocast(self) -> Any:
        from trainer.engine.base import autocast

        return autocast(self.device, self.precision)

    def documents(self, tokens: Any) -> Any:
        """[B, T]: the document number of each token, if documents do not attend to each other; else None."""
        from trainer.data.documents import document_numbers

        return document_numbers(tokens, self.end_of_text)

    def split(self, data: DataConfig, name: str) -> Any:
        """A split of `data`, or of the run's own dataset if no path is given. Its tokenizer must be the run's."""
        from trainer.data.stream import Split, find_dataset

        data = data if data.path is not None else self.config.data
        file = Path(data.path or "").expanduser()
        if file.is_file():
            raise UserError(
                f"data.path: {printable(file)} is a file, but a dataset is a folder: run `python -m trainer prepare "
                f"--source {file} --validation_source {file} --tokenizer {self.folder / 'tokenizer.json'} --out DIR` and give DIR"
            )
        info = find_dataset(data)
        if info is None:
            raise UserError(f"data.path: there is no dataset at {data.path}; run `python -m trainer prepare` first")
        if info.tokenizer.sha256 != self.tokenizer.sha256:
            raise UserError(
                f"data.path: {data.path} was prepared with tokenizer {info.tokenizer.name}, "
                f"but the run uses {self.tokenizer.name}; prepare it with --tokenizer {self.folder / 'tokenizer.json'}"
            )
        return Split(data, info, name)

    def check_length(self, length: int) -> None:
        limit = self.model.max_context
        if length < 1 or (limit is not None and length > limit):
            raise UserError(
                f"sequence_length: {length} is not between 1 and the model's context of {limit or 'any length'}"
            )


def stored_run(run_dir: str, say: Callable[[str], None]) -> tuple[Path, StoredConfig]:
    """The folder that the user names, and the config of the run in it. UserError if it holds no run."""
    folder = user_path(run_dir, "run_dir")
    if not is_run(folder):
        raise UserError(
            f"run_dir: {folder} is not a run folder (it has no {CONFIG}, or none of the other files of a run)"
        )
    return folder, read_config(folder, say)


def without_training(values: dict[str, Any]) -> dict[str, Any]:
    """A run's values without those that only training needs: a single process that reads the run may not support them."""
    kept = {key: value for key, value in values.items() if key not in ("engine", "float8", "profile")}
    for section, names in {
        "batch": ("device_token_capacity", "tokens_per_microbatch"),
        "optim": ("state_precision", "name", "settings", "roles"),
    }.items():
        kept[section] = {key: value for key, value in (kept.get(section) or {}).items() if key not in names}
    return kept


def open_run(
    run_dir: str | None,
    step: int | str | None,
    device: str,
    precision: str,
    world: Any = None,
    weights: str = "evaluation",
) -> OpenRun:
    """Load a run folder. weights: which ones, see trainer/checkpoint/weights.py. UserError if it is not a run, has no checkpoint, only
    damaged ones, or not these weights."""
    import torch

    from models.config import kernel_fields_of
    from models.lora import without_lora
    from models.materialise import Unset
    from trainer.checkpoint.quantized import is_quantized
    from trainer.checkpoint.weights import choose_weights
    from trainer.data.dataset import DatasetInfo
    from trainer.data.tokenizers import Tokenizer
    from trainer.inference.patches import give_patcher
    from trainer.planning.model import check_vocabulary, written_out
    from trainer.runtime.device import choose_device, choose_precision, keep_freed_memory
    from trainer.runtime.distributed import World

    if run_dir is None:
        raise UserError("run_dir: name the run's folder, as in `python -m trainer generate runs/NAME`")
    world = world or World()
    folder, stored = stored_run(run_dir, world.say)
    changes = {"device": device, "run_dir": str(folder)}  # the folder may have been moved
    if precision != "auto":
        changes["precision"] = precision
    config = stored.build(without_training(stored.values | changes))
    config.model = without_lora(config.model)  # whose updates are merged into the weights
    kernels = kernel_fields_of(model_name(config.model))
    # The kernels of the training machine may not exist here.
    config.model |= dict.fromkeys(config.model.keys() & kernels, "auto")
    place = choose_device(device, world.local_rank)
    config.precision, _ = choose_precision(config.precision, place)  # type: ignore[assignment]
    dataset = DatasetInfo.load(folder)
    model_class, model_config = written_out(config)
    check_vocabulary(model_class, model_config, dataset.tokenizer.vocab_size)
    if place.type == "cpu":
        keep_freed_memory()
    dtype = torch.bfloat16 if config.precision == "pure_bf16" else torch.float32
    try:
        if is_quantized(folder):
            model, at = load_quantized(model_class, model_config, folder, step, weights, dtype, place)
        else:
            chosen = choose_weights(folder / "checkpoints", step, weights, world.say, world)
            model, at = load_model(model_class, model_config, chosen, place, world).to(dtype), chosen.manifest["step"]
    except Unset as error:
        raise UserError(f"model {config.model['name']}: {error}") from None
    give_patcher(model, dataset.patches, dataset.tokenizer, place, world)
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json", dataset.tokenizer.name, dataset.tokenizer.eot_id)
    end_of_text = dataset.tokenizer.eot_id if config.data.separate_documents else None
    return OpenRun(folder, config, model.eval(), tokenizer, place, at, end_of_text)


def load_model(model_class: Any, model_config: Any, weights: Any, device: Any, world: Any) -> Any:
    """The model on `device` with `weights`, a trainer.checkpoint.weights.Weights. Unset if neither they nor init_weights set a value."""
    import torch

    from models.materialise import refuse_unset, with_storage
    from trainer.checkpoint import format as checkpoint

    tensors = weights.load(projections_of(model_class, model_config, weights), world, device)
    with told_of_model(model_class, "it cannot be built on the meta device"):
        model = with_storage(build_meta(model_class, model_config), device)
    model.init_weights(torch.Generator())  # sets what a checkpoint does not hold: buffers that follow from the config
    checkpoint.put_into(model, tensors, weights.paths[-1], assign=True)
    refuse_unset(model, given=tensors)
    return model


def load_quantized(
    model_class: Any,
    model_config: Any,
    folder: Path,
    step: int | str | None,
    weights: str,
    dtype: Any,
    device: Any,
) -> tuple[Any, int]:
    """(the model on `device` with the packed weights of a folder that `quantize` wrote, the step that they are of). The rest has
    `dtype`. UserError if the folder holds other weights than those asked for; Unset as in `load_model`.

    In between, all weights of the model are in CPU memory: `init_weights`, which sets what follows from the config, may use them.
    """
    import torch

    from models.materialise import refuse_unset, with_storage
    from models.quantization import move_packed
    from trainer.checkpoint.quantized import put_quantized, read_manifest

    found = read_manifest(folder)
    if step not in (None, found.step) or weights != "evaluation":
        asked = f"weights: {weights}" if weights != "evaluation" else f"step: {step}"
        raise UserError(f"{asked} is not in {folder}, which holds those of {found.source} alone; leave it out")
    with told_of_model(model_class, "it cannot be built on the meta device"):
        model = with_storage(build_meta(model_class, model_config), torch.device("cpu"))
    model.init_weights(torch.Generator())
    given = put_quantized(model, found)
    refuse_unset(model, given=given)
    model = model.to(device, dtype)
    move_packed(model, device, dtype)
    return model, found.step
