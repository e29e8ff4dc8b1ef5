"""Reads the tensors of one checkpoint directory. The content of a checkpoint can neither run code nor name files elsewhere."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from trainer.checkpoint.manifest import METADATA
from trainer.core.errors import UserError
from trainer.core.files import bare_name, system_error


def plain_error(problem: BaseException) -> UserError:
    """The error as a UserError of one line, or as a MachineError if it may pass.

    torch wraps the error in CheckpointException, which is not a subclass of `Exception` and whose text is a traceback.
    """
    if isinstance(problem, CheckpointException) and problem.failures:
        problem = next(iter(problem.failures.values()))[0]
    if isinstance(problem, UserError):
        return problem
    if isinstance(problem, OSError):
        return system_error(problem, str(problem.filename or type(problem).__name__))
    return UserError(" ".join(f"{type(problem).__name__}: {problem}".split())[:300])


def misfit(path: Path, name: str, there: Any, here: Any) -> str:
    return f"checkpoint: {path} is of another model: {name} is {there} there, but {here} by the run's config.yaml"


class Reader(dcp.FileSystemReader):
    """Reads `.metadata` once. torch pickles this file; the unpickler here allows only the few classes that it needs."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            with (path / METADATA).open("rb") as file:
                self._metadata = _MetadataUnpickler(file).load()
            self._entries = sorted(self._metadata.state_dict_metadata.items())
            self.files = {
                bare_name(place.relative_path, f"checkpoint: {path / METADATA}")
                for place in self._metadata.storage_data.values()
            }
        except UserError:
            raise
        except OSError as error:
            raise system_error(error, f"checkpoint: {path / METADATA} cannot be read") from None
        except Exception as problem:  # a damaged pickle can raise anything
            cause = f"cannot be read by torch {torch.__version__}: {plain_error(problem)}"
            raise UserError(f"checkpoint: {path / METADATA} {cause}") from None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    def stored(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        return {
            name: (entry.size, entry.properties.dtype)
            for name, entry in self._entries
            if isinstance(entry, TensorStorageMetadata)
        }

    def check_shapes(
        self, shapes: dict[str, torch.Size], there: dict[str, tuple[torch.Size, torch.dtype]] | None = None
    ) -> None:
        """there: what the checkpoint stands for, if not `stored`."""
        there = self.stored() if there is None else there
        for name, shape in sorted(shapes.items()):
            if name not in there or there[name][0] != shape:
                held = list(there[name][0]) if name in there else "missing"
                raise UserError(misfit(Path(self.path), name, held, list(shape)))

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Read into `tensors`, in place and in this process only. UserError if it fails."""
        planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            dcp.load(dict(tensors), storage_reader=self, planner=planner, no_dist=True)
        except CheckpointException as problem:
            error = plain_error(problem)
            raise type(error)(f"checkpoint: {self.path} cannot be read: {error}") from None


class _MetadataUnpickler(pickle.Unpickler):
    _allowed = {
        "torch.distributed.checkpoint.metadata": {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
        "pathlib._local": {"PosixPath", "WindowsPath"},
        "collections": {"OrderedDict"},
    }

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) == ("torch", "Size") or name in self._allowed.get(module, ()):
            return super().find_class(module, name)
        raise UserError(f"checkpoint: .metadata asks for {module}.{name}, which no checkpoint needs; it was not loaded")
