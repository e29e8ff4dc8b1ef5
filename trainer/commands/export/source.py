"""What is exported: the weights of a run's checkpoint, and everything that must be known about them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.checkpoint.hugging_face import END_OF_TEXT
from trainer.core.config import DEFAULT_MODEL, RunConfig, model_name
from trainer.core.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trainer.checkpoint.weights import Weights
    from trainer.data.dataset import DatasetInfo
    from trainer.data.tokenizers import Tokenizer

Shapes = dict[str, tuple[Any, Any]]  # name -> (torch.Size, torch.dtype)

# For the comparison, if the run's data are not there. Letters of several alphabets, numbers, spaces, and a character of four bytes.
TEXT = (
    "In 1856, Abraham Lincoln said:  «It's 3.5 km», and «да, 日本 🙂».\n\n\tThe cat sat on the mat; the dog didn't.\n"
)


@dataclass(frozen=True)
class Source:
    """A run's checkpoint. config: without LoRA, whose updates `each` merges; wanted: the value of --weights; dtype: of the
    floating-point weights in the files (None: as stored)."""

    folder: Path
    config: RunConfig
    weights: Weights
    wanted: str
    model_class: Any
    model_config: Any
    dtype: torch.dtype | None

    @property
    def name(self) -> str:
        """Of the architecture."""
        return model_name(self.config.model)

    @cached_property
    def fields(self) -> dict[str, Any]:
        """The fields of the model's Config. Another machine chooses its own kernels."""
        from models.config import kernel_fields_of

        fields = dataclasses.asdict(self.model_config)
        return fields | dict.fromkeys(fields.keys() & kernel_fields_of(self.name), "auto")

    @cached_property
    def info(self) -> DatasetInfo:
        """Of the data that the run was trained on."""
        from trainer.data.dataset import DatasetInfo

        return DatasetInfo.load(self.folder)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        from trainer.data.tokenizers import Tokenizer

        stored = self.info.tokenizer
        return Tokenizer.from_file(self.folder / "tokenizer.json", stored.name, stored.eot_id)

    @property
    def end_of_text(self) -> str:
        """The token that ends a document, as text."""
        return self.tokenizer.decode([self.tokenizer.eot_id])

    @property
    def chosen_end(self) -> dict[str, str]:
        """The entry of config.json for a token that ends documents because someone chose it."""
        chosen = self.info.arguments.get("end_of_text")
        return {} if chosen is None else {END_OF_TEXT: chosen}

    @cached_property
    def projections(self) -> Any:
        from trainer.engine.meta import projections_of

        return projections_of(self.model_class, self.model_config, self.weights)

    def stored(self) -> Shapes:
        """Name -> (whole shape, dtype in the file) of what `each` yields."""
        return {name: (shape, self._written(dtype)) for name, (shape, dtype) in self.weights.stored().items()}

    def each(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor), one at a time in the order of `stored`."""
        for name, tensor in self.weights.each(self.projections):
            yield name, tensor.to(self._written(tensor.dtype))

    def _written(self, dtype: torch.dtype) -> torch.dtype:
        return self.dtype if self.dtype is not None and dtype.is_floating_point else dtype

    def model(self) -> Any:
        """The model with the weights as they are written, computing in fp32. UserError if some have no value."""
        import torch

        from models.materialise import Unset
        from trainer.runs.opening import load_model
        from trainer.runtime.distributed import World

        config = self.model_class.without_device_kernels(self.model_config)
        try:
            model = load_model(self.model_class, config, self.weights, torch.device("cpu"), World())
        except Unset as error:
            raise UserError(f"model {self.name}: {error}") from None
        stored = self.weights.stored()
        for name, tensor in model.state_dict().items():
            if name in stored:
                tensor.copy_(tensor.to(self._written(stored[name][1])))
        return model.float().eval()

    def tokens(self, rows: int = 2, length: int = 64) -> Tensor:
        """[rows, length] ids to compare models with: the beginning of the validation split, if the run's data are there, otherwise of
        a fixed text."""
        import torch

        from trainer.inference.decoding import encode_prompt

        limit = getattr(self.model_class, "max_context", None) or self.fields.get("max_context") or length
        length = min(length, limit)
        ids = self._validation_ids(rows * length)
        if ids is None:
            ids = encode_prompt(self.tokenizer, TEXT)
        repeated = (ids * (rows * length // len(ids) + 1))[: rows * length]
        return torch.tensor(repeated).view(rows, length)

    def _validation_ids(self, count: int) -> list[int] | None:
        from trainer.data.remote import is_remote
        from trainer.data.stream import Split, find_dataset

        data = self.config.data
        if data.path is None or is_remote(data.path):
            return None
        try:
            found = find_dataset(data)
            if found is None or found.tokenizer.sha256 != self.info.tokenizer.sha256:
                return None
            return Split(data, found, "validation").sample(0)["tokens"].tolist()[:count]
        except UserError:
            return None  # moved, or damaged: the fixed text serves as well


def find_source(
    run_dir: str | None, step: int | str | None, wanted: str, dtype: str, say: Callable[[str], None]
) -> Source:
    """The checkpoint that the user names. UserError if there is none."""
    import torch

    from models.lora import without_lora
    from trainer.checkpoint.weights import choose_weights
    from trainer.planning.model import written_out
    from trainer.runs.opening import stored_run
    from trainer.runtime.distributed import World

    if run_dir is None:
        raise UserError("run_dir: name the run's folder, as in `python -m trainer export runs/NAME`")
    folder, stored = stored_run(run_dir, say)
    trained = stored.build()  # the stored config holds every inferred value
    config = dataclasses.replace(trained, model=without_lora({"name": DEFAULT_MODEL, **trained.model}))
    weights = choose_weights(folder / "checkpoints", step, wanted, say, World())
    dtypes = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}
    return Source(folder, config, weights, wanted, *written_out(config), dtypes[dtype])
