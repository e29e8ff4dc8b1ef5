"""`wandb-copy`: copies a finished wandb run into another project, as a line to compare with. The source is only read.

The copy's id follows from the source's path, so there is one copy in a project: given again, the command goes on where it was interrupted,
or says that the copy is whole. A row keeps its step.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.commands import Values, Verb
from trainer.core.errors import MachineError, UserError
from trainer.core.settings import setting
from trainer.core.text import printable

SOURCE = re.compile(r"[\w.-]+/[\w.-]+/[\w.-]+")
TARGET = re.compile(r"([\w.-]+/)?[\w.-]+")
ROWS, FROM = "copied_rows", "copied_from"  # keys of the copy: in its summary, once it is whole; in its config
# Files that wandb writes for every run. Those of the source go into a folder, beside the copy's own.
OF_WANDB = ("config.yaml", "output.log", "requirements.txt", "conda-environment.yaml", "diff.patch")
OWN_FOLDER = "source"


@dataclass
class WandbCopyConfig:
    """`wandb-copy`: which run, and where to."""

    source: str | None = setting(None, "ENTITY/PROJECT/RUN_ID of a finished run (the flag itself is optional)")
    to: str | None = setting(None, "PROJECT or ENTITY/PROJECT of the copy")
    name: str | None = setting(None, "name of the copy; auto: that of the source")


def run(config: WandbCopyConfig) -> None:
    """Run the verb."""
    source, target = checked(config)
    try:
        import wandb
    except ImportError:
        raise UserError("wandb-copy: wandb is not installed; `pip install wandb`") from None
    if not wandb.login(prompt=False, verify=False):
        raise UserError("wandb-copy: nobody is logged in to wandb on this machine; `wandb login` first")
    try:
        line = copy_run(wandb, source, target, config.name)
    except UserError:
        raise
    except (
        wandb.errors.Error,
        OSError,
    ) as error:  # of the service or the network; the requests of wandb raise OSErrors
        raise MachineError(
            f"wandb-copy: the service cannot be reached, or refused: {printable(' '.join(f'{error}'.split()), 300)}; the same command "
            "goes on"
        ) from None
    print(line)


def checked(config: WandbCopyConfig) -> tuple[str, str]:
    """(source, target). UserError if one is not of its form."""
    source, target = config.source or "", config.to or ""
    if not SOURCE.fullmatch(source):
        raise UserError(
            f"source: {printable(source) or 'nothing'} is not ENTITY/PROJECT/RUN_ID, as in the address of a run"
        )
    if not TARGET.fullmatch(target):
        raise UserError(f"to: {printable(target) or 'nothing'} is not PROJECT or ENTITY/PROJECT")
    return source, target


def copy_run(wandb: Any, source: str, target: str, name: str | None) -> str:
    """Copy config, history, summary and files. Returns what was done. wandb: the package, or what stands for it."""
    api = wandb.Api()
    original = find(api, source)
    if original is None:
        raise UserError(f"source: there is no run {source}, or this login may not see it")
    if original.state != "finished":
        raise UserError(f"source: {source} is {printable(original.state)}; only a finished run is copied")
    path = f"{project_of(api, target)}/{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    there = find(api, path)
    if there is not None and there.config.get(FROM) != source:
        raise UserError(f"to: {path} is there, and is no copy of {source}; choose another project")
    if there is not None and ROWS in there.summary:
        return f"{path} is a whole copy of {source} already: {there.summary[ROWS]} rows"
    first = 0 if there is None or there.lastHistoryStep is None else there.lastHistoryStep + 1
    copy = begin(wandb, original, source, path, name)
    with tempfile.TemporaryDirectory() as folder:  # until everything is sent
        try:
            rows, left_out = copy_history(original, copy, first)
            copy.summary.update(plain(dict(original.summary)))
            files = copy_files(original, copy, Path(folder))
        finally:
            copy.finish()
    confirm(wandb.Api(), path, rows, files)
    media = f"; {left_out} values that are no numbers or texts are left out" if left_out else ""
    return f"{path}: a copy of {source}, {rows} rows, {len(files)} files{media}"


def project_of(api: Any, target: str) -> str:
    """ENTITY/PROJECT of the copy, with the login's own entity if `target` names none."""
    if "/" in target:
        return target
    if not api.default_entity:
        raise UserError(f"to: this login has no entity of its own; give ENTITY/{target}")
    return f"{api.default_entity}/{target}"


def confirm(api: Any, path: str, rows: int, files: list[str]) -> None:
    """Mark the copy as whole, once the service has all of its files. MachineError if it has not."""
    arrived = api.run(path)
    missing = sorted({*files} - {file.name for file in arrived.files()})
    if missing:
        raise MachineError(f"wandb-copy: {path} lacks {printable(', '.join(missing[:3]))}; the same command goes on")
    arrived.summary.update({ROWS: rows})


def find(api: Any, path: str) -> Any:
    """The run at a path; None if there is none."""
    try:
        return api.run(path)
    except ValueError:  # wandb's RunNotFoundError is one
        return None


def begin(wandb: Any, original: Any, source: str, path: str, name: str | None) -> Any:
    """The new run, or the one that an interrupted copy left. It records nothing of this machine. path: ENTITY/PROJECT/ID."""
    entity, project, copy_id = path.split("/")
    settings = wandb.Settings(
        silent=True, console="off", x_disable_stats=True, x_disable_meta=True, disable_git=True, disable_code=True
    )
    return wandb.init(
        entity=entity,
        project=project,
        id=copy_id,
        name=name or original.name,
        config={**dict(original.config), FROM: source},
        tags=[*dict.fromkeys([*(original.tags or []), "benchmark"])],
        job_type="benchmark",
        resume="allow",
        mode="online",
        dir=tempfile.gettempdir(),
        settings=settings,
    )


def copy_history(original: Any, copy: Any, first: int) -> tuple[int, int]:
    """Log the rows from step `first` on under their own steps. Returns the rows of the whole history, and the values left out."""
    rows = left_out = 0
    for row in original.scan_history(use_cache=False):
        rows += 1
        values = {key: value for key, value in row.items() if value is not None and not key.startswith("_")}
        kept = plain(values)
        left_out += len(values) - len(kept)
        if row["_step"] >= first and kept:
            copy.log(kept, step=row["_step"])
    return rows, left_out


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """The numbers and texts among values; pictures, tables and wandb's own keys are none."""
    return {
        key: value for key, value in values.items() if isinstance(value, (int, float, str)) and not key.startswith("_")
    }


def copy_files(original: Any, copy: Any, folder: Path) -> list[str]:
    """Send the source's files from an empty folder, those that wandb writes for every run under OWN_FOLDER. Returns their names."""
    names = []
    for file in original.files():
        path = Path(file.name)
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"source: the file {printable(file.name)} is not inside its run")
        own = file.name in OF_WANDB or file.name.startswith("wandb-")
        root = folder / OWN_FOLDER if own else folder
        root.mkdir(exist_ok=True)
        file.download(root=str(root), replace=True).close()
        copy.save(str(root / path), base_path=str(folder), policy="now", glob=False)
        names.append(f"{OWN_FOLDER}/{file.name}" if own else file.name)
    return names


def source_run(word: str, flags: Values) -> Values:
    """The word before the flags names the source."""
    return {"source": word}


VERB = Verb(
    name="wandb-copy",
    help="copy a finished wandb run into another project, as a line to compare with",
    config=WandbCopyConfig,
    run=run,
    alone=True,
    positional=source_run,
)
