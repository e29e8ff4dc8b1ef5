"""Checkpoints: a directory per step, written aside, complete once its manifest is there, then renamed.

    checkpoints/step-00000100/   __0_0.distcp ...  tensors, sharded (torch.distributed.checkpoint)
                                 .metadata         where each tensor lies
                                 manifest.json     written last: sizes, hashes, step, tokens, state, config, versions
    checkpoints/latest           name of the newest, for people and scripts (the trainer looks at the directories)

Only tensors and JSON are stored, and nothing that is read can run code. A tensor is stored under one name with its
whole shape, however it lay over the ranks that wrote it: what any number of them saved, any number reads.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from trainer.checkpoint.reader import METADATA, Reader, misfit, plain_error
from trainer.core.errors import Damaged, MachineError, UserError
from trainer.core.files import DIGEST, bare_name, read_json, sealed, sync_path, system_error, write_file
from trainer.core.text import printable
from trainer.runtime.distributed import World

MANIFEST = "manifest.json"
LATEST = "latest"
FORMAT = 2  # 1: no digest of the manifest
NAME = re.compile(r"step-[0-9]{8,}")
ALONE = World()
EVALUATION = "evaluation."  # prefix of the weights to evaluate with, where they are not those that are trained

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
        raise type(error)(
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
    """What `work` returns on each rank. Where it fails on any, UserError on all: none waits for another.

    A MachineError goes before the others: while one rank could not read, nothing is known to be damaged.
    """
    result, error = None, None
    try:
        result = work()
    except (Exception, CheckpointException) as problem:
        error = plain_error(problem)
    parts = [(result, error)] * world.size
    if world.size > 1:
        dist.all_gather_object(parts, (result, error), group=group)
    errors = [error for _, error in parts if error is not None]
    if errors:
        raise next((error for error in errors if isinstance(error, MachineError)), errors[0])
    return [result for result, _ in parts]


def _empty(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _hash_own_files(temporary: Path, world: World) -> dict[str, dict[str, Any]]:
    """Size and xxh64 of the files this rank wrote (rank 0 also takes .metadata)."""
    names = sorted(path.name for path in temporary.iterdir())
    mine = [name for name in names if name.startswith(f"__{world.rank}_") or (world.leader and name == METADATA)]
    return {name: {"bytes": (temporary / name).stat().st_size, "xxh64": _hash(temporary / name)} for name in mine}


def _hash(path: Path) -> str:
    digest = xxhash.xxh64()
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


def _publish(temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Manifest, rename, pointer: in that order, each on disk before the next."""
    write_file(temporary / MANIFEST, sealed(manifest))
    sync_path(temporary)
    if final.exists():  # no finished checkpoint: the run would have gone on from it
        _set_aside(final)
    temporary.rename(final)
    sync_path(final.parent)
    write_file(final.parent / LATEST, final.name)


def amend(path: Path, facts: dict[str, Any]) -> None:
    """Change what the manifest of a finished checkpoint says of the run; a fact that is None is taken out."""
    manifest = _read_manifest(path) | facts
    write_file(path / MANIFEST, sealed({key: value for key, value in manifest.items() if value is not None}))


def _set_aside(path: Path) -> Path:
    """Give a checkpoint that is of no use a name under which it is no longer found; nothing of it is removed."""
    aside = path.with_name(path.name + ".damaged")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")
    path.rename(aside)
    sync_path(path.parent)
    return aside


def _purge(folder: Path, step: int, keep: Callable) -> None:
    """After a save at `step`, remove what need not be kept of the checkpoints up to it, and what killed saves left.

    Each takes the name of an unfinished one first, so that none is half there. A folder that cannot be cleaned now is
    cleaned after the next save: the checkpoint is written and counts.
    """
    with contextlib.suppress(OSError):
        steps = [at for at, _ in found(folder) if at <= step]
        for at in sorted(set(steps) - set(keep(steps))):
            doomed = folder / f"{step_name(at)}.tmp"
            shutil.rmtree(doomed, ignore_errors=True)
            (folder / step_name(at)).rename(doomed)
        for leftover in folder.glob("step-*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        (folder / f"{LATEST}.tmp").unlink(missing_ok=True)


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
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    complete = [(int(name[5:]), folder / name) for name in names if NAME.fullmatch(name)]
    return sorted((step, path) for step, path in complete if (path / MANIFEST).is_file())


def choose(
    folder: Path, step: int | None, say: Callable[[str], None], world: World = ALONE
) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole (or the one of `step`), with its manifest; None where there is none at all.

    A damaged one is reported through `say` and the one before it is used; UserError where all are damaged. An error of
    reading is no damage: it is raised, as MachineError where it may pass.
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
        except Damaged as error:
            say(f"{error}; trying the one before it")
    raise UserError(f"checkpoint: every checkpoint in {folder} is damaged; remove the folder to start anew")


def go_on_from(folder: Path, world: World) -> tuple[Path, dict[str, Any]] | None:
    """As `choose`, for the run itself, by all ranks: what is damaged is kept under another name, and the `latest` that people
    read names what was chosen."""
    chosen = choose(folder, None, world.say, world)
    if chosen is not None:
        path, manifest = chosen
        world.on_leader(lambda: _leave_behind(folder, manifest["step"], path.name, world.say))
        if manifest["format"] == 1:
            world.say(
                f"checkpoint: {path} was written by a release whose manifests have no digest; it is taken as it is"
            )
    return chosen


def _leave_behind(folder: Path, step: int, name: str, say: Callable[[str], None]) -> None:
    for at, path in found(folder):
        if at > step:
            say(f"checkpoint: {path} is damaged and kept as {_set_aside(path).name}")
        elif at < step:
            try:
                _read_manifest(path)
            except Damaged as error:
                say(f"{error}; the run does not need it now, but could not go back to it")
    latest = folder / LATEST
    if not latest.is_file() or latest.read_bytes() != name.encode():
        say(f"checkpoint: {latest} did not name the newest good checkpoint; now it names {name}")
        write_file(latest, name)


def check(path: Path, world: World = ALONE) -> dict[str, Any]:
    """The manifest of a checkpoint that is whole: its digest is right, and it lists the files that are there, each of the size
    and hash it says, those of all tensors among them. Damaged names what is not.

    world: where it is given, all ranks call this and each hashes a share of the files.
    """
    manifest = world.on_leader(lambda: _read_manifest(path))
    shares = sorted(manifest["files"].items(), key=lambda item: item[1]["bytes"])[world.rank :: world.size]

    def check_share() -> None:
        for name, entry in shares:
            _check_file(path / name, entry["bytes"], entry["xxh64"])

    together(check_share, world)
    world.on_leader(lambda: _check_names(path, set(manifest["files"])))
    return manifest


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    manifest = read_json(file)
    version, files = manifest.get("format"), manifest.get("files")
    if type(version) is int and version > FORMAT:
        release = printable(manifest.get("crescendo", "a later release"))
        raise UserError(
            f"checkpoint: {path} has format {version}, of crescendo-lm {release}; this version reads {FORMAT}"
        )
    where = f"checkpoint: {file} cannot be used"
    if type(version) is not int or version < 1 or (version > 1 and DIGEST not in manifest):
        raise Damaged(f"{where}: it has no valid format or no digest")
    if manifest.get("step") != int(path.name[5:]):
        raise Damaged(f"{where}: it is of step {printable(manifest.get('step'))}")
    if not isinstance(files, dict) or METADATA not in files:
        raise Damaged(f"{where}: it does not list {METADATA}")
    for name, entry in files.items():
        bare_name(name, where)
        if (
            not isinstance(entry, dict)
            or type(entry.get("bytes")) is not int
            or not isinstance(entry.get("xxh64"), str)
        ):
            raise Damaged(f"{where}: it does not say the size and hash of {printable(name)}")
    return manifest


def _check_names(path: Path, listed: set[str]) -> None:
    """Damaged unless `listed` are the tensor files that are there, and those that hold the tensors are among them."""
    there = {name for name in os.listdir(path) if name == METADATA or name.endswith(".distcp")}
    for name in sorted(there ^ listed) + sorted(Reader(path).files - listed):
        place = "is not listed in its manifest" if name in there else "is listed and not there"
        raise Damaged(f"checkpoint: {path}: {printable(name)} {place}")


def _check_file(file: Path, size: int, digest: str) -> None:
    try:
        there = file.stat().st_size
        if there != size:
            raise Damaged(f"checkpoint: {file} has {there:,} bytes, {size:,} expected")
        if _hash(file) != digest:
            raise Damaged(f"checkpoint: {file} is damaged: its hash is not the manifest's")
    except FileNotFoundError:
        raise Damaged(f"checkpoint: {file} is missing") from None
    except OSError as error:
        raise system_error(error, f"checkpoint: {file} cannot be read") from None


def stored(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Name -> (whole shape, type) of every tensor of a checkpoint, in alphabetical order."""
    return Reader(path).stored()


def check_shapes(path: Path, shapes: dict[str, torch.Size]) -> None:
    """UserError names the first of `shapes` (by full name) that the checkpoint does not hold so. Reads no tensors."""
    Reader(path).check_shapes(shapes)


def read_into(path: Path, tensors: dict[str, Tensor], world: World) -> None:
    """Fill `tensors` in place, on whatever device they are; of a DTensor each rank reads what its shard needs.

    All ranks call this. Other types are converted. UserError on all of them names the first that is missing or has
    another shape, or says what cannot be read; the tensors are then in part those of before.
    """

    def fill() -> None:
        reader = Reader(path)
        reader.check_shapes({name: tensor.shape for name, tensor in tensors.items()})
        reader.fill(tensors)

    together(fill, world)


def load(
    path: Path, prefix: str, world: World, device: torch.device | str = "cpu", instead: str = ""
) -> dict[str, Tensor]:
    """Every tensor whose name begins with `prefix`, whole, without the prefix, on `device`. All ranks call this.

    instead: a prefix: what also stands under it is taken from there.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}

    def fill() -> None:
        reader = Reader(path)
        stored = reader.stored()
        names.update(_sources(stored, prefix, instead))
        for source in names.values():
            shape, dtype = stored[source]
            tensors[source] = torch.empty(shape, dtype=dtype, device=device)
        reader.fill(tensors)

    together(fill, world)
    return {name: tensors[source] for name, source in names.items()}


def each(path: Path, prefix: str, instead: str = "") -> Iterator[tuple[str, Tensor]]:
    """As `load`, on the CPU, but one tensor after the other in alphabetical order, and without the other ranks."""
    reader = Reader(path)
    stored = reader.stored()
    for name, source in _sources(stored, prefix, instead).items():
        shape, dtype = stored[source]
        tensor = torch.empty(shape, dtype=dtype)
        reader.fill({source: tensor})
        yield name, tensor


def _sources(stored: Iterable[str], prefix: str, instead: str) -> dict[str, str]:
    """Name without prefix -> the name under which its tensor is stored."""
    known = set(stored)
    bare = [name.removeprefix(prefix) for name in stored if name.startswith(prefix)]
    return {name: instead + name if instead and instead + name in known else prefix + name for name in bare}


def put_into(model: Any, tensors: dict[str, Tensor], path: Path, assign: bool = False) -> None:
    """Load `tensors` as the state of `model`; UserError names the first that does not fit."""
    own = model.state_dict()
    for name in sorted(own.keys() | tensors.keys()):
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape:
            raise UserError(
                misfit(
                    path, name, *(list(state[name].shape) if name in state else "missing" for state in (tensors, own))
                )
            )
    model.load_state_dict(tensors, assign=assign)
