"""What the manifest of a checkpoint says, which checkpoints a folder holds, and which of them had the lowest validation loss."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.core.errors import Damaged, UserError
from trainer.core.files import DIGEST, bare_name, read_json, sealed, write_file
from trainer.core.text import printable

MANIFEST = "manifest.json"
FORMAT = 2  # 1: no digest of the manifest
NAME = re.compile(r"step-[0-9]{8,}")
METADATA = ".metadata"  # where each tensor is stored, as torch.distributed.checkpoint writes it
VALIDATION = "validation"  # key: {metric, value} of the validation at this step; missing if there was none
BEST = "best"  # in place of a step: that with the lowest validation loss


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def found(folder: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every finished checkpoint, oldest first. Checkpoints without a manifest are unfinished."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    complete = [(int(name[5:]), folder / name) for name in names if NAME.fullmatch(name)]
    return sorted((step, path) for step, path in complete if (path / MANIFEST).is_file())


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, after a check of its digest and of what it must hold. Damaged names what is wrong."""
    file = path / MANIFEST
    manifest = read_json(file)
    version, files = manifest.get("format"), manifest.get("files")
    if type(version) is int and version > FORMAT:
        release = printable(manifest.get("crescendo", "a later release"))
        raise UserError(
            f"checkpoint: {path} has format {version}, of crescendo-lm {release}; this version reads formats up to {FORMAT}"
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
            raise Damaged(f"{where}: it does not give the size and hash of {printable(name)}")
    return manifest


def amend(path: Path, facts: dict[str, Any]) -> None:
    """Change facts in the manifest of a finished checkpoint. A fact that is None is removed."""
    manifest = read_manifest(path) | facts
    write_file(path / MANIFEST, sealed({key: value for key, value in manifest.items() if value is not None}))


def validation_of(manifest: dict[str, Any], path: Path) -> tuple[str, float] | None:
    """(metric, value) of the validation at the step of a checkpoint; None if there was none. Damaged if it is no such pair."""
    found = manifest.get(VALIDATION)
    if found is None:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("metric"), str):
        raise Damaged(f"checkpoint: {VALIDATION} in {path / MANIFEST} does not name a metric")
    value: Any = found.get("value")
    if type(value) not in (int, float) or not math.isfinite(value):
        raise Damaged(f"checkpoint: {VALIDATION} in {path / MANIFEST} has no finite value")
    return found["metric"], float(value)


def ranked(folder: Path, say: Callable[[str], None], metric: str | None = None) -> list[tuple[float, int, Path]]:
    """(value, step, directory) of every checkpoint with a validation, the lowest value first, of equal ones the earlier step.

    metric: what is compared; None: what the newest of them has. A checkpoint whose manifest is damaged is reported and left out.
    """
    seen: list[tuple[str, float, int, Path]] = []
    for step, path in found(folder):
        try:
            validation = validation_of(read_manifest(path), path)
        except Damaged as error:
            say(f"{error}; it is left out")
            continue
        if validation is not None:
            seen.append((*validation, step, path))
    wanted = metric or (seen[-1][0] if seen else "")
    return sorted((value, step, path) for name, value, step, path in seen if name == wanted)


def best_steps(folder: Path, count: int, metric: str, steps: list[int]) -> list[int]:
    """Those of `steps` whose checkpoints must be kept: the `count` best by `metric`, and those whose manifest cannot be read."""
    if not count:
        return []
    unreadable = []
    values = []
    for step in steps:
        path = folder / step_name(step)
        try:
            validation = validation_of(read_manifest(path), path)
        except UserError:
            unreadable.append(step)
            continue
        if validation is not None and validation[0] == metric:
            values.append((validation[1], step))
    return unreadable + [step for _, step in sorted(values)[:count]]
