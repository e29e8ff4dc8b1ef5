"""`train --from_step N`: a run goes on from an older checkpoint of its own. What came after it is set aside under other names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trainer.checkpoint.format import LATEST, check, set_aside
from trainer.checkpoint.manifest import found
from trainer.core.errors import UserError
from trainer.core.files import write_file
from trainer.runs.folder import unused_name
from trainer.runtime.distributed import World

KEPT = ("metrics.jsonl", "samples.txt")  # the run cuts their newer part off when it goes on


def go_back(folder: Path, step: int, world: World) -> None:
    """Make the checkpoint of `step` the newest one of the run in `folder`, which this process has locked. All ranks call this.

    UserError if it is missing or damaged; then nothing has changed. Nothing is deleted. A kill leaves the run as it was, or gone back:
    the newest checkpoint is the last to be renamed, and until then a start without from_step goes on from it.
    """
    place = folder / "checkpoints"
    there = world.on_leader(lambda: found(place))
    path = dict(there).get(step)
    if path is None:
        have = ", ".join(str(at) for at, _ in there) or "none"
        raise UserError(
            f"from_step: there is no checkpoint of step {step} in {place} (available: {have}); checkpoint.keep and "
            "checkpoint.keep_every decide which are kept"
        )
    check(path, world)
    newer = [path for at, path in there if at > step]
    if newer:
        world.on_leader(lambda: _set_aside(folder, newer, path.name, world.say))
    else:
        world.say(f"from_step: {path} is the newest checkpoint, nothing comes after it")


def _set_aside(folder: Path, newer: list[Path], name: str, say: Callable[[str], None]) -> None:
    kept = []
    for file in (folder / name for name in KEPT):
        if file.is_file() and file.stat().st_size:
            copy = unused_name(file)
            write_file(copy, file.read_bytes())
            kept.append(copy.name)
    record = folder / "wandb-id"
    if record.is_file():  # wandb takes no step twice: the run that goes on from here is another one there
        record.rename(unused_name(record))
    aside = [set_aside(path, "replaced").name for path in newer]  # oldest first
    write_file(folder / "checkpoints" / LATEST, name)
    say(
        f"from_step: {folder} goes back to {name}; newer checkpoints are kept as {', '.join(aside)}, all rows and samples until now as "
        f"{' and '.join(kept) or 'nothing'}"
    )
