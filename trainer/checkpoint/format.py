"""Checkpoints: one directory per step. It is written under a temporary name, its manifest last, and then renamed.

    checkpoints/step-00000100/   __0_0.distcp ...  tensors, sharded (torch.distributed.checkpoint)
                                 .metadata         where each tensor is stored
                                 manifest.json     written last: sizes, hashes, step, tokens, state, config, versions
    checkpoints/latest           name of the newest, for people and scripts (the trainer lists the directories instead)

A checkpoint holds only tensors and JSON, and reading it can never run code. Each tensor is stored under one name with its
whole shape, whatever its sharding. So any number of ranks can read what any other number of ranks wrote.
"""

from __future__ import annotations

import contextlib
import os
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

from trainer.checkpoint.manifest import (
    BEST,
    FORMAT,
    MANIFEST,
    METADATA,
    VALIDATION,
    found,
    ranked,
    read_manifest,
    step_name,
)
from trainer.checkpoint.reader import Reader, misfit, plain_error
from trainer.core.errors import Damaged, MachineError, UserError
from trainer.core.files import sealed, sync_path, system_error, write_file
from trainer.core.text import printable
from trainer.runtime.distributed import World

LATEST = "latest"
ALONE = World()

# We use one process on purpose. The filter is permanent, because `catch_warnings` would affect other threads.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def save(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    facts: dict[str, Any],
    world: World,
    keep: Callable,
    group: Any = None,
) -> Path:
    """Write one checkpoint. All ranks call this. facts: JSON for the manifest; keep(steps) -> the steps to retain.

    tensors: DTensors (each rank writes its shards), equal tensors on several ranks (one rank writes each), and tensors that
    only one rank holds. group: the process group, with all ranks, for the collectives; None: the default group.
    If any rank cannot write, every rank raises UserError, and the earlier checkpoints are unchanged.
    """
    temporary, final = folder / f"{step_name(step)}.tmp", folder / step_name(step)

    def write() -> dict[str, dict[str, Any]]:
        # 0: the writer must not use the GPU, because a thread does not inherit the current device.
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
            "free disk space or allow writing there, then start the same command again"
        ) from None
    return final


class _Writer(dcp.FileSystemWriter):
    """Raises the OSError (such as no space), which torch hides behind an error of its archive format."""

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().write_data(*args, **kwargs)
        except RuntimeError as problem:
            if isinstance(problem.__context__, OSError):
                raise problem.__context__ from None
            raise


def together(work: Callable[[], Any], world: World, group: Any = None) -> list[Any]:
    """The results of `work` on all ranks. If it fails on any rank, all ranks raise UserError, so that no rank waits for another.

    A MachineError comes before other errors: while one rank could not read, it is not certain that a file is damaged.
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
    """Size and xxh64 of the files that this rank wrote (on rank 0 also of .metadata)."""
    names = sorted(path.name for path in temporary.iterdir())
    mine = [name for name in names if name.startswith(f"__{world.rank}_") or (world.leader and name == METADATA)]
    return {name: file_entry(temporary / name) for name in mine}


def file_entry(path: Path) -> dict[str, Any]:
    """What a manifest says about a file."""
    return {"bytes": path.stat().st_size, "xxh64": _hash(path)}


def _hash(path: Path) -> str:
    digest = xxhash.xxh64()
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


def _publish(temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, rename the directory, write `latest`: in this order, each on disk before the next."""
    write_file(temporary / MANIFEST, sealed(manifest))
    sync_path(temporary)
    if final.exists():  # it cannot be a good checkpoint, because the run would have continued from it
        set_aside(final)
    temporary.rename(final)
    sync_path(final.parent)
    write_file(final.parent / LATEST, final.name)


def set_aside(path: Path, why: str = "damaged") -> Path:
    """Rename a checkpoint that is not to be used, so that it is no longer found. Nothing of it is removed."""
    aside = path.with_name(f"{path.name}.{why}")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.{why}-{number}")
    path.rename(aside)
    sync_path(path.parent)
    return aside


def _purge(folder: Path, step: int, keep: Callable) -> None:
    """After a save at `step`, remove checkpoints up to `step` that need not be kept, and leftovers of killed saves.

    A checkpoint is first renamed to an unfinished one, so that a half-removed checkpoint is never found. Errors are ignored,
    because the new checkpoint is already complete; the next save tries again.
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


def retention(newest: int, every: int, best: Callable[[list[int]], list[int]] = lambda steps: []) -> Callable:
    """A function that selects the steps to keep: all multiples of `every` (0: none), the last `newest` of the others, and those that
    `best` selects.

    The multiples do not count among the newest, the best ones do. The last step of all is always kept.
    """

    def keep(steps: list[int]) -> list[int]:
        lasting = [step for step in steps if every and step % every == 0]
        return lasting + sorted(set(steps) - set(lasting))[-max(1, newest) :] + best(steps)

    return keep


def choose(
    folder: Path, step: int | str | None, say: Callable[[str], None], world: World = ALONE
) -> tuple[Path, dict[str, Any]] | None:
    """The newest undamaged checkpoint and its manifest; None if there are no checkpoints. step: that of this step instead, or with
    "best" the undamaged one with the lowest validation loss.

    A damaged checkpoint is reported through `say`, and the one before it is tried; UserError if all are damaged. A read error
    is not damage: it is raised, as MachineError if it may pass.
    world: if it is given, all ranks call this, share the reading and get the same result.
    """
    there = world.on_leader(lambda: found(folder))
    if step == BEST:
        candidates = [(at, path) for _, at, path in reversed(world.on_leader(lambda: ranked(folder, say)))]
    else:
        candidates = [(at, path) for at, path in there if step in (None, at)]
    if not candidates:
        if step is not None:
            have = ", ".join(str(at) for at, _ in there) or "none"
            of = "with a validation loss" if step == BEST else f"of step {step}"
            raise UserError(f"step: there is no checkpoint {of} in {folder} (available: {have})")
        return None
    for _, path in reversed(candidates):
        try:
            manifest = check(path, world)
        except Damaged as error:
            say(f"{error}; trying the {'next best' if step == BEST else 'one before it'}")
        else:
            if step == BEST:
                say(f"step best: {path}, {_of_validation(manifest)}")
            return path, manifest
    raise UserError(f"checkpoint: every checkpoint in {folder} is damaged; remove the folder to start again")


def _of_validation(manifest: dict[str, Any]) -> str:
    """What its validation says of a checkpoint."""
    return f"{manifest[VALIDATION]['metric']} {manifest[VALIDATION]['value']:.4f}"


def go_on_from(folder: Path, world: World) -> tuple[Path, dict[str, Any]] | None:
    """`choose` for a run that continues; all ranks call it.

    Newer checkpoints, which are damaged, are renamed and kept. `latest` is corrected to the name of the chosen checkpoint.
    """
    chosen = choose(folder, None, world.say, world)
    if chosen is not None:
        path, manifest = chosen
        world.on_leader(lambda: _leave_behind(folder, manifest["step"], path.name, world.say))
        if manifest["format"] == 1:
            world.say(
                f"checkpoint: {path} was written by a release whose manifests have no digest; it is used without this check"
            )
    return chosen


def _leave_behind(folder: Path, step: int, name: str, say: Callable[[str], None]) -> None:
    for at, path in found(folder):
        if at > step:
            say(f"checkpoint: {path} is damaged; it is kept as {set_aside(path).name}")
        elif at < step:
            try:
                read_manifest(path)
            except Damaged as error:
                say(f"{error}; the run does not need it now, but cannot go back to it")
    latest = folder / LATEST
    if not latest.is_file() or latest.read_bytes() != name.encode():
        say(f"checkpoint: {latest} did not name the newest good checkpoint; now it names {name}")
        write_file(latest, name)


def check(path: Path, world: World = ALONE) -> dict[str, Any]:
    """The manifest of a checkpoint, after a check that the checkpoint is not damaged. Damaged names what is wrong.

    The check: the manifest's digest is right; the manifest lists exactly the tensor files that exist, with the right sizes and
    hashes; and these files hold all tensors. world: if it is given, all ranks call this and each hashes a share of the files.
    """
    manifest = world.on_leader(lambda: read_manifest(path))
    shares = sorted(manifest["files"].items(), key=lambda item: item[1]["bytes"])[world.rank :: world.size]

    def check_share() -> None:
        for name, entry in shares:
            check_file(path / name, entry["bytes"], entry["xxh64"])

    together(check_share, world)
    world.on_leader(lambda: _check_names(path, set(manifest["files"])))
    return manifest


def _check_names(path: Path, listed: set[str]) -> None:
    """Damaged unless `listed` names exactly the tensor files that exist, and all files that `.metadata` refers to."""
    there = {name for name in os.listdir(path) if name == METADATA or name.endswith(".distcp")}
    for name in sorted(there ^ listed) + sorted(Reader(path).files - listed):
        place = "is not listed in its manifest" if name in there else "is listed in its manifest but missing"
        raise Damaged(f"checkpoint: {path}: {printable(name)} {place}")


def check_file(file: Path, size: int, digest: str) -> None:
    """Damaged, MachineError or UserError unless the file is there with this size and hash."""
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
    """Name -> (whole shape, dtype) of every tensor of a checkpoint, in alphabetical order."""
    return Reader(path).stored()


def check_shapes(
    path: Path, shapes: dict[str, torch.Size], there: dict[str, tuple[torch.Size, torch.dtype]] | None = None
) -> None:
    """UserError names the first of `shapes` (by full name) that differs in the checkpoint or is missing. Reads no tensors. there: as
    for Reader."""
    Reader(path).check_shapes(shapes, there)


def read_into(path: Path, tensors: dict[str, Tensor], world: World) -> None:
    """Fill `tensors` in place, on any device. For a DTensor each rank reads only what its shard needs.

    All ranks call this. Stored values of another dtype are converted. On an error all ranks raise UserError, which names the
    first tensor that is missing or has another shape, or what cannot be read. Some tensors may then still have old values.
    """

    def fill() -> None:
        reader = Reader(path)
        reader.check_shapes({name: tensor.shape for name, tensor in tensors.items()})
        reader.fill(tensors)

    together(fill, world)


def load(path: Path, prefix: str, world: World, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """All tensors whose name begins with `prefix`, whole, by name without the prefix, on `device`. All ranks call this."""
    tensors: dict[str, Tensor] = {}

    def fill() -> None:
        reader = Reader(path)
        for name, (shape, dtype) in reader.stored().items():
            if name.startswith(prefix):
                tensors[name] = torch.empty(shape, dtype=dtype, device=device)
        reader.fill(tensors)

    together(fill, world)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def each(path: Path, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Like `load`, but on the CPU, one tensor at a time in alphabetical order, and only in this process."""
    reader = Reader(path)
    for name, (shape, dtype) in reader.stored().items():
        if name.startswith(prefix):
            tensor = torch.empty(shape, dtype=dtype)
            reader.fill({name: tensor})
            yield name.removeprefix(prefix), tensor


def put_into(model: Any, tensors: dict[str, Tensor], path: Path, assign: bool = False) -> None:
    """Load `tensors` as the state of `model`; UserError names the first tensor that does not fit."""
    own = model.state_dict()
    for name in sorted(own.keys() | tensors.keys()):
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape:
            raise UserError(
                misfit(
                    path, name, *(list(state[name].shape) if name in state else "missing" for state in (tensors, own))
                )
            )
    model.load_state_dict(tensors, assign=assign)
