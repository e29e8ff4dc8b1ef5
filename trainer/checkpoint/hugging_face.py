"""A folder of a Hugging Face model, or of one that `export` wrote: config.json, and its weights as safetensors, in one file or in
several with an index."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.core.errors import MachineError, UserError
from trainer.core.files import bare_name, parse_json, read_small
from trainer.core.text import printable

HUB = "hf://"  # begins the name of a model on the hub
CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")
END_OF_TEXT = (
    "crescendo_end_of_text"  # in a config.json of `export`: the token that ends documents, if it is not the usual one
)
# What `export` writes for a model that transformers has no class for: fields of config.json, and the prefix of every weight's name.
MODEL_NAME, MODEL_CONFIG, NETWORK = "crescendo_model", "crescendo_config", "network."


class Weights(Mapping[str, Tensor]):
    """Name -> tensor of the safetensors files in a folder, read when it is asked for. UserError if a file is missing or damaged."""

    def __init__(self, folder: Path) -> None:
        self._open: dict[Path, Any] = {}
        if (folder / INDEX).is_file():
            places = parse_json(read_small(folder / INDEX), folder / INDEX).get("weight_map")
            if not isinstance(places, dict):
                raise UserError(f"init_from: {folder / INDEX} has no weight_map")
            self._places = {name: folder / bare_name(file, str(folder / INDEX)) for name, file in places.items()}
        elif (folder / SINGLE).is_file():
            self._places = dict.fromkeys(self._file(folder / SINGLE).keys(), folder / SINGLE)
        else:
            raise UserError(f"init_from: {folder} holds neither {SINGLE} nor {INDEX}; save the model as safetensors")

    def __getitem__(self, name: str) -> Tensor:
        path = self._places[name]
        with _one_line(path):
            return self._file(path).get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def _file(self, path: Path) -> Any:
        """The open file; only what is asked for is read from it."""
        from safetensors import safe_open

        if path not in self._open:
            with _one_line(path):
                self._open[path] = safe_open(path, framework="pt")
        return self._open[path]


@contextlib.contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Turns the errors of safetensors into a UserError."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError) as error:
        raise UserError(f"init_from: {path} cannot be read: {printable(error, 300)}") from None


def read_config(folder: Path) -> dict[str, Any]:
    """The content of config.json."""
    return parse_json(read_small(folder / CONFIG), folder / CONFIG)


def own_model(content: dict[str, Any], where: Path) -> dict[str, Any] | None:
    """The section `model` of the run that `export` wrote with our own names; None if `content`, a config.json, is another model's.

    where: the file, for the error. UserError if it names one of ours but is not whole.
    """
    plain = "crescendo" in content and "model" in content  # --format safetensors
    names = ("model", "config") if plain else (MODEL_NAME, MODEL_CONFIG)
    if names[0] not in content:
        return None
    name, fields = (content.get(key) for key in names)
    if not isinstance(name, str) or not isinstance(fields, dict):
        raise UserError(
            f"init_from: {where} has no text in {names[0]!r}, or no object in {names[1]!r}; export it again"
        )
    return {**fields, "name": name}


def fetch(name: str) -> tuple[str, Path]:
    """(hf://ORG/NAME@COMMIT, folder) of hf://ORG/NAME[@REVISION], downloaded if this machine does not have it yet.

    UserError if the hub has no such model, MachineError if it cannot be reached.
    """
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()  # its lines about retries would hide the one below
    repository, _, revision = name.removeprefix(HUB).partition("@")
    wanted = [CONFIG, "model*.safetensors", INDEX, *TOKENIZER_FILES]
    try:
        folder = huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=wanted)
    except Exception as error:  # network, hub and cache errors have no common base
        passes = any(word in type(error).__name__ for word in ("Connect", "Timeout", "LocalEntry"))
        raise (MachineError if passes else UserError)(
            f"init_from: {printable(name)} cannot be fetched from the Hugging Face hub ({type(error).__name__}); download it "
            "elsewhere and give its folder"
        ) from None
    return f"{HUB}{repository}@{Path(folder).name}", Path(folder)  # the cache names a snapshot's folder by its commit
