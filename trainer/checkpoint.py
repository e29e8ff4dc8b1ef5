"""Checkpoints: a directory per step, written aside, complete once its manifest is there, then renamed.

    checkpoints/step-00000100/   __0_0.distcp ...  tensors, sharded (torch.distributed.checkpoint)
                                 .metadata         where each tensor lies
                                 manifest.json     written last: sizes, hashes, step, tokens, state, config, versions
    checkpoints/latest           name of the newest, for people and scripts (the trainer looks at the directories themselves)

Only tensors and JSON are stored, and nothing that is read can run code.
"""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from trainer.engine.distributed import World
from trainer.errors import UserError
from trainer.files import sync_path, write_file

MANIFEST = "manifest.json"
FORMAT = 1


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def save(
    folder: Path, step: int, tensors: dict[str, Tensor], facts: dict[str, Any], world: World, keep: Callable
) -> Path:
    """Write one checkpoint from all ranks. facts: JSON for the manifest; keep(steps) -> the steps to retain.

    Raises UserError where it cannot be written; the checkpoints before it are then untouched.
    """
    temporary, final = folder / f"{step_name(step)}.tmp", folder / step_name(step)
    own, error = {}, None
    try:
        world.on_leader(lambda: _empty(temporary))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "assuming a single process": it is one
            writer = dcp.FileSystemWriter(temporary, sync_files=True)
            dcp.save(tensors, storage_writer=writer, no_dist=world.size == 1)
        own = _hash_own_files(temporary, world)
    except (Exception, CheckpointException) as problem:  # disk full, permissions; any rank's failure must reach all
        error = _cause(problem)
    parts = world.gather((own, error))
    error = next((text for _, text in parts if text), None)
    if error is None:
        files = {name: entry for part, _ in parts for name, entry in part.items()}
        manifest = {"format": FORMAT, "step": step, "files": files, **facts}
        try:
            world.on_leader(lambda: _publish(temporary, final, manifest))
            world.on_leader(lambda: _purge(folder, step, keep))
        except (UserError, OSError) as problem:
            error = str(problem)
    if error is not None:
        if world.leader:
            shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"checkpoint: step {step} could not be written to {folder}: {error}; earlier checkpoints are untouched; "
            "make room or permit writing there, then start the same command again"
        )
    return final


def _empty(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _cause(problem: BaseException) -> str:
    """One line. The library wraps what happened in an exception that is no `Exception`, with a traceback as its text."""
    if isinstance(problem, CheckpointException) and problem.failures:
        problem = next(iter(problem.failures.values()))[0]
    return " ".join(f"{type(problem).__name__}: {problem}".split())[:300]


def _hash_own_files(temporary: Path, world: World) -> dict[str, dict[str, Any]]:
    """Size and xxh64 of the files this rank wrote (rank 0 also takes .metadata)."""
    names = sorted(path.name for path in temporary.iterdir())
    mine = [name for name in names if name.startswith(f"__{world.rank}_") or (world.leader and name == ".metadata")]
    return {name: {"bytes": (temporary / name).stat().st_size, "xxh64": _hash(temporary / name)} for name in mine}


def _hash(path: Path) -> str:
    digest = xxhash.xxh64()
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


def _publish(temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Manifest, rename, pointer: in that order, each on disk before the next."""
    write_file(temporary / MANIFEST, json.dumps(manifest, indent=1))
    sync_path(temporary)
    if final.exists():  # a damaged one of the same step, passed over when this run started
        shutil.rmtree(final)
    temporary.rename(final)
    sync_path(final.parent)
    write_file(final.parent / "latest", final.name)


def _purge(folder: Path, step: int, keep: Callable) -> None:
    """After a save at `step`, remove what need not be kept: older checkpoints, later ones (the run has passed them over as
    damaged), and what killed saves left. The manifest goes first, so that none is half there."""
    steps = [at for at, _ in found(folder)]
    for at in sorted(set(steps) - set(keep([at for at in steps if at <= step]))):
        (folder / step_name(at) / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder / step_name(at), ignore_errors=True)
    for leftover in folder.glob("step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def retention(newest: int, every: int) -> Callable[[list[int]], list[int]]:
    """Keep the `newest` last ones and, where `every` is not 0, all multiples of it."""

    def keep(steps: list[int]) -> list[int]:
        return sorted(steps)[-max(1, newest) :] + [step for step in steps if every and step % every == 0]

    return keep


def found(folder: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every finished checkpoint, oldest first. Unfinished ones have no manifest and do not count."""
    complete = [path for path in folder.glob("step-*") if (path / MANIFEST).is_file() and path.name[5:].isdigit()]
    return sorted((int(path.name[5:]), path) for path in complete)


def choose(folder: Path, step: int | None, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole (or the one of `step`), with its manifest; None where there is none at all.

    A damaged one is reported through `say` and the one before it is used; UserError where all are damaged.
    """
    candidates = [(at, path) for at, path in found(folder) if step in (None, at)]
    if not candidates:
        if step is not None:
            have = ", ".join(str(at) for at, _ in found(folder)) or "none"
            raise UserError(f"step: there is no checkpoint of step {step} in {folder} (there: {have})")
        return None
    for _, path in reversed(candidates):
        try:
            return path, check(path)
        except UserError as error:
            say(f"{error}; trying the one before it")
    raise UserError(f"checkpoint: every checkpoint in {folder} is damaged; remove the folder to start anew")


def check(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all there with the right size and hash; else UserError names the file."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["format"]
        if version != FORMAT:
            raise UserError(f"checkpoint: {path} has format {version}, this version reads {FORMAT}")
        expected = [(path / name, int(entry["bytes"]), entry["xxh64"]) for name, entry in manifest["files"].items()]
        int(manifest["step"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"checkpoint: {path / MANIFEST} cannot be read ({type(error).__name__}: {error})") from None
    for file, size, digest in expected:
        if not file.is_file():
            raise UserError(f"checkpoint: {file} is missing")
        if file.stat().st_size != size:
            raise UserError(f"checkpoint: {file} has {file.stat().st_size:,} bytes, {size:,} expected")
        if _hash(file) != digest:
            raise UserError(f"checkpoint: {file} is damaged: its hash is not the manifest's")
    return manifest


def load(path: Path, prefix: str, world: World, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Every tensor whose name begins with `prefix`, without the prefix, on `device`."""
    reader = _SafeReader(path)
    stored = reader.read_metadata().state_dict_metadata
    wanted = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device=device)
        for name, entry in stored.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dcp.load(wanted, storage_reader=reader, no_dist=world.size == 1)
        except CheckpointException as problem:
            raise UserError(f"checkpoint: {path} cannot be read: {_cause(problem)}") from None
    return {name.removeprefix(prefix): tensor for name, tensor in wanted.items()}


def put_into(model: Any, tensors: dict[str, Tensor], path: Path, assign: bool = False) -> None:
    """Load `tensors` as the state of `model`; UserError names the first that does not fit."""
    own = model.state_dict()
    for name in sorted(own.keys() | tensors.keys()):
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape:
            here = [list(state[name].shape) if name in state else "missing" for state in (tensors, own)]
            raise UserError(
                f"checkpoint: {path} is of another model: {name} is {here[0]} there and {here[1]} by the run's config.yaml"
            )
    model.load_state_dict(tensors, assign=assign)


class _SafeReader(dcp.FileSystemReader):
    """Reads `.metadata`, which the library pickles, with an unpickler that knows the few classes it needs and no others."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


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
        raise UserError(f"checkpoint: .metadata asks for {module}.{name}, which no checkpoint needs; it is not loaded")
