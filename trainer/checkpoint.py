"""Checkpoints: a directory per step, written aside, complete once its manifest is there, then renamed.

    checkpoints/step-00000100/   __0_0.distcp ...  tensors, sharded (torch.distributed.checkpoint)
                                 .metadata         where each tensor lies
                                 manifest.json     written last: sizes, hashes, step, tokens, state, config, versions
    checkpoints/latest           name of the newest, for people and scripts (the trainer looks at the directories)

Only tensors and JSON are stored, and nothing that is read can run code. A tensor is stored under one name with its
whole shape, however it lay over the ranks that wrote it: what any number of them saved, any number reads.
"""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from trainer.engine.distributed import World
from trainer.errors import UserError
from trainer.files import sync_path, write_file

MANIFEST = "manifest.json"
FORMAT = 1
ALONE = World()

# One process is what was meant. A filter for good, since `catch_warnings` would reach into other threads.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def save(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    facts: dict[str, Any],
    world: World,
    keep: Callable,
    group: Any = None,
) -> Path:
    """Write one checkpoint from all ranks. facts: JSON for the manifest; keep(steps) -> the steps to retain.

    tensors, by rank: DTensors (each rank writes its shards), equal tensors on several ranks (one of them writes each),
    and tensors that one rank alone holds. group: of the collectives, with all ranks; none: the run's own.
    Raises UserError on every rank where any cannot write; the checkpoints before it are then untouched.
    """
    temporary, final = folder / f"{step_name(step)}.tmp", folder / step_name(step)

    def write() -> dict[str, dict[str, Any]]:
        # 0: nothing here touches the GPU, whose current device a thread does not inherit.
        writer = _Writer(temporary, sync_files=True, per_thread_copy_ahead=0)
        dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=world.size == 1)
        return _hash_own_files(temporary, world)

    def publish() -> None:
        files = {name: entry for part in parts for name, entry in part.items()}
        _publish(temporary, final, {"format": FORMAT, "step": step, "files": files, **facts})
        _purge(folder, step, keep)

    try:
        together(lambda: _empty(temporary) if world.leader else None, world, group)
        parts = together(write, world, group)
        together(lambda: publish() if world.leader else None, world, group)
    except UserError as error:
        if world.leader:
            shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"checkpoint: step {step} could not be written to {folder}: {error}; earlier checkpoints are untouched; "
            "make room or permit writing there, then start the same command again"
        ) from None
    return final


class _Writer(dcp.FileSystemWriter):
    """Says what the system said (no space), which the library hides behind an error of its archive format."""

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().write_data(*args, **kwargs)
        except RuntimeError as problem:
            if isinstance(problem.__context__, OSError):
                raise problem.__context__ from None
            raise


def together(work: Callable[[], Any], world: World, group: Any = None) -> list[Any]:
    """What `work` returns on each rank. Where it fails on any, UserError on all: none waits for another."""
    result, error = None, None
    try:
        result = work()
    except (Exception, CheckpointException) as problem:
        error = _cause(problem)
    parts = [(result, error)] * world.size
    if world.size > 1:
        dist.all_gather_object(parts, (result, error), group=group)
    for _, text in parts:
        if text is not None:
            raise UserError(text)
    return [result for result, _ in parts]


def _empty(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _cause(problem: BaseException) -> str:
    """One line. The library wraps what happened in what is no `Exception`, with a traceback as its text."""
    if isinstance(problem, CheckpointException) and problem.failures:
        problem = next(iter(problem.failures.values()))[0]
    if isinstance(problem, UserError):
        return str(problem)
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
    """After a save at `step`, remove what need not be kept: older checkpoints, later ones (the run has passed them over
    as damaged), and what killed saves left. The manifest goes first, so that none is half there."""
    steps = [at for at, _ in found(folder)]
    for at in sorted(set(steps) - set(keep([at for at in steps if at <= step]))):
        (folder / step_name(at) / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder / step_name(at), ignore_errors=True)
    for leftover in folder.glob("step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def retention(newest: int, every: int) -> Callable[[list[int]], list[int]]:
    """Keep the multiples of `every` (0: there are none) for good, and of the others the `newest` last ones.

    The multiples do not count among the newest: they push nothing out. The last of all is always among what is kept.
    """

    def keep(steps: list[int]) -> list[int]:
        lasting = [step for step in steps if every and step % every == 0]
        return lasting + sorted(set(steps) - set(lasting))[-max(1, newest) :]

    return keep


def found(folder: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every finished checkpoint, oldest first. Unfinished ones have no manifest and do not count."""
    complete = [path for path in folder.glob("step-*") if (path / MANIFEST).is_file() and path.name[5:].isdigit()]
    return sorted((int(path.name[5:]), path) for path in complete)


def choose(
    folder: Path, step: int | None, say: Callable[[str], None], world: World = ALONE
) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole (or the one of `step`), with its manifest; None where there is none at all.

    A damaged one is reported through `say` and the one before it is used; UserError where all are damaged.
    world: where it is given, all ranks call this, share the reading and get the same answer.
    """
    there = world.on_leader(lambda: found(folder))
    candidates = [(at, path) for at, path in there if step in (None, at)]
    if not candidates:
        if step is not None:
            have = ", ".join(str(at) for at, _ in there) or "none"
            raise UserError(f"step: there is no checkpoint of step {step} in {folder} (there: {have})")
        return None
    for _, path in reversed(candidates):
        try:
            return path, check(path, world)
        except UserError as error:
            say(f"{error}; trying the one before it")
    raise UserError(f"checkpoint: every checkpoint in {folder} is damaged; remove the folder to start anew")


def check(path: Path, world: World = ALONE) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all there with the right size and hash; else UserError names one.

    world: where it is given, all ranks call this and each hashes a share of the files.
    """
    manifest = world.on_leader(lambda: _read_manifest(path))
    shares = sorted(manifest["files"].items(), key=lambda item: item[1]["bytes"])[world.rank :: world.size]

    def check_share() -> None:
        for name, entry in shares:
            _check_file(path / name, entry["bytes"], entry["xxh64"])

    together(check_share, world)
    return manifest


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["format"]
        if version != FORMAT:
            raise UserError(f"checkpoint: {path} has format {version}, this version reads {FORMAT}")
        for entry in manifest["files"].values():
            entry["bytes"], entry["xxh64"] = int(entry["bytes"]), str(entry["xxh64"])
        int(manifest["step"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"checkpoint: {path / MANIFEST} cannot be read ({type(error).__name__}: {error})") from None
    return manifest


def _check_file(file: Path, size: int, digest: str) -> None:
    if not file.is_file():
        raise UserError(f"checkpoint: {file} is missing")
    if file.stat().st_size != size:
        raise UserError(f"checkpoint: {file} has {file.stat().st_size:,} bytes, {size:,} expected")
    if _hash(file) != digest:
        raise UserError(f"checkpoint: {file} is damaged: its hash is not the manifest's")


def stored(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Name -> (whole shape, type) of every tensor of a checkpoint, in alphabetical order."""
    return _Reader(path).stored()


def check_shapes(path: Path, shapes: dict[str, torch.Size]) -> None:
    """UserError names the first of `shapes` (by full name) that the checkpoint does not hold so. Reads no tensors."""
    _Reader(path).check_shapes(shapes)


def read_into(path: Path, tensors: dict[str, Tensor], world: World) -> None:
    """Fill `tensors` in place, on whatever device they are; of a DTensor each rank reads what its shard needs.

    All ranks call this. Other types are converted. UserError on all of them names the first that is missing or has
    another shape, or says what cannot be read; the tensors are then in part those of before.
    """

    def fill() -> None:
        reader = _Reader(path)
        reader.check_shapes({name: tensor.shape for name, tensor in tensors.items()})
        reader.fill(tensors)

    together(fill, world)


def load(path: Path, prefix: str, world: World, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Every tensor whose name begins with `prefix`, whole, without the prefix, on `device`. All ranks call this."""
    tensors: dict[str, Tensor] = {}

    def fill() -> None:
        reader = _Reader(path)
        for name, (shape, dtype) in reader.stored().items():
            if name.startswith(prefix):
                tensors[name] = torch.empty(shape, dtype=dtype, device=device)
        reader.fill(tensors)

    together(fill, world)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def each(path: Path, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """As `load`, on the CPU, but one tensor after the other in alphabetical order, and without the other ranks."""
    reader = _Reader(path)
    for name, (shape, dtype) in reader.stored().items():
        if name.startswith(prefix):
            tensor = torch.empty(shape, dtype=dtype)
            reader.fill({name: tensor})
            yield name.removeprefix(prefix), tensor


def put_into(model: Any, tensors: dict[str, Tensor], path: Path, assign: bool = False) -> None:
    """Load `tensors` as the state of `model`; UserError names the first that does not fit."""
    own = model.state_dict()
    for name in sorted(own.keys() | tensors.keys()):
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape:
            raise UserError(
                _misfit(
                    path, name, *(list(state[name].shape) if name in state else "missing" for state in (tensors, own))
                )
            )
    model.load_state_dict(tensors, assign=assign)


def _misfit(path: Path, name: str, there: Any, here: Any) -> str:
    return f"checkpoint: {path} is of another model: {name} is {there} there and {here} by the run's config.yaml"


class _Reader(dcp.FileSystemReader):
    """Reads `.metadata`, which the library pickles, once, and by an unpickler that knows the few classes it needs."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            with (path / ".metadata").open("rb") as file:
                self._metadata = _MetadataUnpickler(file).load()
            self._entries = sorted(self._metadata.state_dict_metadata.items())
        except UserError:
            raise
        except Exception as problem:  # a damaged pickle can raise anything
            cause = f"cannot be read by torch {torch.__version__}: {_cause(problem)}"
            raise UserError(f"checkpoint: {path / '.metadata'} {cause}") from None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    def stored(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        return {
            name: (entry.size, entry.properties.dtype)
            for name, entry in self._entries
            if isinstance(entry, TensorStorageMetadata)
        }

    def check_shapes(self, shapes: dict[str, torch.Size]) -> None:
        there = self.stored()
        for name, shape in sorted(shapes.items()):
            if name not in there or there[name][0] != shape:
                held = list(there[name][0]) if name in there else "missing"
                raise UserError(_misfit(Path(self.path), name, held, list(shape)))

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Read into `tensors`, in place and by this process alone; UserError where that fails."""
        planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            dcp.load(dict(tensors), storage_reader=self, planner=planner, no_dist=True)
        except CheckpointException as problem:
            raise UserError(f"checkpoint: {self.path} cannot be read: {_cause(problem)}") from None


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
