"""A run is a folder: its resolved config, plan, environment, tokenizer, metrics, curves, samples and checkpoints."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.core.files import DIGEST, digest_of, read_small, system_error, write_file
from trainer.planning.laws import LAWS
from trainer.planning.run_config import (
    ENVIRONMENT,
    keep_changed_config,
    write_config,
)
from trainer.runtime.environment import environment

LOCK_SECONDS = 1.0  # `is_locked` of another process may hold the lock for a moment


@contextlib.contextmanager
def locked(
    folder: Path, patience: float = LOCK_SECONDS, key: str = "run_dir", doing: str = "training in"
) -> Iterator[None]:
    """Lock a folder for this process. A kill releases the lock. UserError if another process still holds it after `patience`
    seconds. key: the setting that names the folder; doing: what the other process does with it."""
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=patience)
        lock.acquire()
    except Timeout:
        raise UserError(f"{key}: another process is {doing} {folder}; wait for it or choose another --{key}") from None
    except OSError as error:
        raise system_error(error, f"{key}: cannot write to {folder} (or choose another --{key})") from None
    try:
        yield
    finally:
        lock.release()


def is_locked(folder: Path) -> bool:
    """Whether a process is training in the run folder. For a moment this takes the lock itself: see LOCK_SECONDS."""
    from filelock import FileLock, Timeout

    if not (folder / ".lock").exists():
        return False
    try:
        with FileLock(folder / ".lock", timeout=0):
            return False
    except Timeout:
        return True
    except OSError as error:
        raise system_error(error, f"{folder / '.lock'}: cannot be opened") from None


def write_start(
    folder: Path,
    config: RunConfig,
    plan_text: str | None,
    dataset_folder: Path,
    say: Callable[[str], None],
    laws: str = "",
    *,
    device: str,
) -> None:
    """Write the files that describe the run: config.yaml, plan.txt, dataset.json, tokenizer.json, a line of environment.jsonl, and a copy
    of the laws that `dial` names. device: the name of what the processes compute on."""
    for name in ("dataset.json", "tokenizer.json"):
        _copy(dataset_folder / name, folder / name, plan_text is not None, say)
    if plan_text is not None:
        write_file(folder / "plan.txt", plan_text + "\n")
    if laws:
        write_file(folder / LAWS, laws)
    _append_line(folder / ENVIRONMENT, environment() | {"device": device})
    keep_changed_config(folder)
    write_config(folder, config)  # last, since a folder with config.yaml can be resumed


def unused_name(path: Path) -> Path:
    """A name beside `path` that no file has, for what it held until now: metrics.before-1.jsonl."""
    number = 1
    while (kept := path.with_name(f"{path.stem}.before-{number}{path.suffix}")).exists():
        number += 1
    return kept


def _copy(source: Path, target: Path, new: bool, say: Callable[[str], None]) -> None:
    """Make `target` a copy of `source`. In the folder of a new run, UserError if `target` already holds something else."""
    content = read_small(source)
    held = read_small(target) if target.exists() else b""
    if held == content:
        return
    # A start that was killed may leave the beginning of the content, or zeros where data never reached the disk.
    if new and not content.startswith(held.rstrip(b"\0")):
        raise UserError(f"run_dir: {target} exists and belongs to other data; choose another --run_dir")
    if held:
        say(f"{target} does not match the run's data; it is replaced")
    write_file(target, content)


def _append_line(path: Path, content: dict[str, Any]) -> None:
    """Append a JSON object with its digest to a file of lines. A last line that a kill cut off stays a separate line."""
    before = read_small(path) if path.exists() else b""
    if before and not before.endswith(b"\n"):
        before += b"\n"
    write_file(path, before + json.dumps({**content, DIGEST: digest_of(content)}).encode() + b"\n")
