"""How a run gets its dataset: rank 0 prepares it if it is missing, the others wait with a time limit, and all must see the same."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.core.config import CorpusConfig, DataConfig, PrepareConfig, RunConfig
from trainer.core.errors import MachineError, UserError
from trainer.core.files import system_error, user_path
from trainer.core.settings import build, merge
from trainer.data.dataset import DatasetInfo, partial_folder, present
from trainer.data.remote import Say, is_remote
from trainer.data.stream import find_dataset
from trainer.runtime.launcher import own_host

if TYPE_CHECKING:
    from trainer.runtime.distributed import World

# How long a rank waits that sees no preparation: rank 0 may start later, and a network file system may show files late.
UNSEEN_SECONDS = 90.0
BEAT_SECONDS = 5.0


def absolute_paths(given: dict[str, Any], values: dict[str, Any], before: dict[str, Any], say: Say) -> dict[str, Any]:
    """`given` with absolute data.path and data.cache, so that the run can be continued from any folder.

    values: all values of this command; before: those of the run's folder, empty for a new run. Raises UserError if an existing
    run's path is relative to a folder other than this one.
    """
    data, own = build(DataConfig, _data(values), "data."), build(DataConfig, _data(before), "data.")
    paths: dict[str, Any] = {}
    if data.cache is not None:
        paths["cache"] = str(user_path(data.cache, "data.cache").absolute())
    if data.path is not None and not is_remote(data.path):
        folder = user_path(data.path, "data.path")
        if own.path is not None and not is_remote(own.path) and not present(folder):
            folder = _of_the_run(folder, user_path(own.path, "data.path"), _data(given).get("path") is not None, say)
        paths["path"] = str(folder.absolute())
    for name in _data(given).get("mix") or {}:
        path = data.mix[name].path
        if path is not None and not is_remote(path):
            absolute = str(user_path(path, f"data.mix.{name}.path").absolute())
            paths["mix"] = {**paths.get("mix", {}), name: {"path": absolute}}
    return merge(given, {"data": paths}) if paths else given


def _data(values: dict[str, Any]) -> dict[str, Any]:
    data = values.get("data")
    return data if isinstance(data, dict) else {}


def _of_the_run(folder: Path, own: Path, asked: bool, say: Say) -> Path:
    """The data folder of an existing run if there is nothing at `folder`, the path of this command. own: the path stored in the run;
    asked: whether the command named a path."""
    if not asked and not own.is_absolute():
        raise UserError(
            f"data.path: this run was started with {own}, and there is no such folder in {Path.cwd()}; "
            "continue in the folder where it was started, or give --data.path"
        )
    if folder == own or not present(own):
        return folder
    say(f"data.path: there is nothing at {folder.absolute()}; using {own.absolute()}, which this run has read so far")
    return own


def obtain_dataset(config: RunConfig, world: World) -> None:
    """Make sure that `data.path` exists: if it does not, rank 0 prepares it from `data.source`, and the others wait for it."""
    data = config.data
    if data.path is None:
        raise UserError(
            "data.path: no data to train on; run `python -m trainer prepare --source TEXT --out DIR` and give --data.path DIR, "
            "or start with configs/quickstart.yaml"
        )
    if is_remote(data.path) or not data.source:
        return
    folder = user_path(data.path, "data.path")
    if present(folder):
        return
    if not world.leader:
        wait_for(folder, world, 60 * config.engine.timeout_minutes)
        return
    from trainer.data.prepare import prepare

    corpus = {f.name: getattr(data, f.name) for f in dataclasses.fields(CorpusConfig)}
    with beating(beat_of(folder)) if world.size > 1 else contextlib.nullcontext():
        prepare(PrepareConfig(**corpus, out=str(folder)), world.say)


def wait_for(folder: Path, world: World, limit: float) -> None:
    """Return when the dataset is at `folder`. Raises MachineError after `limit` seconds without a sign that it is being prepared, and
    after UNSEEN_SECONDS if there never was one."""
    sign, since = sign_of_life(folder), time.monotonic()
    while not present(folder):
        time.sleep(0.2)
        now = sign_of_life(folder)
        if now != sign:
            sign, since = now, time.monotonic()
        waited = time.monotonic() - since
        if waited > (min(limit, UNSEEN_SECONDS) if sign is None else limit):
            what = "and no sign that it is being prepared" if sign is None else "and its preparation makes no progress"
            raise MachineError(
                f"data.path: rank {world.rank} on {own_host(os.environ)} has seen nothing at {folder.absolute()} for {waited:.0f} s, "
                f"{what}; data.path must be a folder that all machines of the run share, or be prepared on each of them"
            )


def sign_of_life(folder: Path) -> Any:
    """A value that changes while a dataset is being prepared for `folder`; None if there is no sign of that."""
    found = []
    for path in (beat_of(folder), partial_folder(folder)):
        with contextlib.suppress(OSError):
            found.append(path.stat().st_mtime_ns)
    return found or None


def beat_of(folder: Path) -> Path:
    """The file whose time shows that rank 0 is preparing a dataset for `folder`, even long before any of it is written."""
    return Path(f"{partial_folder(folder)}.beat")


@contextlib.contextmanager
def beating(path: Path) -> Iterator[None]:
    """Within the block, touch the file `path` every BEAT_SECONDS; remove it afterwards."""
    done = threading.Event()

    def beat() -> None:
        while True:
            with contextlib.suppress(OSError):  # prepare reports what is wrong with this disk
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            if done.wait(BEAT_SECONDS):
                return

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with contextlib.suppress(OSError):
            path.unlink()


def agree_on_dataset(config: RunConfig, world: World) -> DatasetInfo:
    """The dataset, which is the same for all ranks. If a rank sees none or another one, all ranks raise the same UserError."""
    found: DatasetInfo | UserError | None
    try:
        found = find_dataset(config.data, world.say_from if world.local_rank == 0 else lambda line: None)
        found = found or UserError(f"data.path: there is no dataset at {config.data.path} any more")
    except UserError as error:
        found = error
    except OSError as error:  # sent to the other ranks too, which would wait for this one
        found = system_error(error, f"data.path: {error.filename or config.data.path}")
    views = world.gather((found if isinstance(found, UserError) else found.fingerprint, own_host(os.environ)))
    for rank, (view, host) in enumerate(views):
        if isinstance(view, UserError):
            raise view if world.size == 1 else type(view)(f"{view} (rank {rank} on {host})")
        if view != views[0][0]:
            raise UserError(
                f"data.path: rank {rank} on {host} sees a different dataset at {config.data.path} than rank 0 on {views[0][1]} "
                f"(fingerprints {view[:12]} and {views[0][0][:12]}); give all machines the same one"
            )
    assert isinstance(found, DatasetInfo)
    if not found.sealed:
        world.say(
            f"data.path: {config.data.path} was prepared before datasets had digests: nothing proves its counts of bytes and words, "
            "from which bits/byte follow; a newly prepared dataset has a digest"
        )
    return found
