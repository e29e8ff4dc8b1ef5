"""A run is a folder: its resolved config, plan, environment, tokenizer, metrics, curves, samples and checkpoints."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import DataConfig, RunConfig
from trainer.errors import UserError
from trainer.files import DIGEST, digest_of, read_small, system_error, user_path, write_file
from trainer.launcher import find_place
from trainer.memory import KERNEL_FIELDS
from trainer.run_config import CONFIG, ENVIRONMENT, StoredConfig, is_run, keep_changed_config, read_config, write_config
from trainer.text import printable


@contextlib.contextmanager
def locked(folder: Path, patience: float = 0) -> Iterator[None]:
    """Hold the run folder for this process. A kill releases it; a second run in the same folder is refused after `patience` seconds."""
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=patience)
        lock.acquire()
    except Timeout:
        raise UserError(
            f"run_dir: another process is training in {folder}; wait for it or choose another --run_dir"
        ) from None
    except OSError as error:
        raise system_error(error, f"run_dir: cannot write to {folder} (or choose another --run_dir)") from None
    try:
        yield
    finally:
        lock.release()


def write_start(
    folder: Path, config: RunConfig, plan_text: str | None, dataset_folder: Path, say: Callable[[str], None]
) -> None:
    """Everything that says what this run is: config.yaml, plan.txt, dataset.json, tokenizer.json; a line of environment.jsonl."""
    for name in ("dataset.json", "tokenizer.json"):
        _copy(dataset_folder / name, folder / name, plan_text is not None, say)
    if plan_text is not None:
        write_file(folder / "plan.txt", plan_text + "\n")
    _append_line(folder / ENVIRONMENT, environment())
    keep_changed_config(folder)
    write_config(folder, config)  # last: a folder with it can be resumed


def _copy(source: Path, target: Path, new: bool, say: Callable[[str], None]) -> None:
    """Have the content of `source` in `target`. In the folder of a new run, UserError where something else has that name."""
    content = read_small(source)
    held = read_small(target) if target.exists() else b""
    if held == content:
        return
    # What a start that was cut off has left is a beginning of the content, or zeros that stand for what was never written.
    if new and not content.startswith(held.rstrip(b"\0")):
        raise UserError(f"run_dir: {target} is there and belongs to other data; choose another --run_dir")
    if held:
        say(f"{target} is not that of the run's data; it is written again")
    write_file(target, content)


def _append_line(path: Path, content: dict[str, Any]) -> None:
    """Add a sealed JSON object to a file of lines; a last line that a kill has cut off stays a line of its own."""
    before = read_small(path) if path.exists() else b""
    if before and not before.endswith(b"\n"):
        before += b"\n"
    write_file(path, before + json.dumps({**content, DIGEST: digest_of(content)}).encode() + b"\n")


def environment() -> dict[str, Any]:
    """Command, versions, machine, processes and git state of this start."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": package_versions(),
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "processes": find_place(os.environ).size,
        "git": git_state(),
    }


def package_versions() -> dict[str, str]:
    """Of the packages that matter, those that are installed."""
    import importlib.metadata

    versions = {}
    for package in ("torch", "numpy", "mosaicml-streaming", "deepspeed", "accelerate", "crescendo-lm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


@functools.cache
def git_state() -> dict[str, Any] | None:
    """The commit of this checkout, and whether files differ from it; None where git does not tell."""
    here = Path(__file__).parent
    try:
        sha = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return {"sha": sha.stdout.strip(), "dirty": bool(dirty.stdout.strip())} if sha.returncode == 0 else None


@dataclass
class OpenRun:
    """A run's model with the weights of one checkpoint, ready to evaluate or to write text."""

    folder: Path
    plan: Any
    model: Any
    tokenizer: Any
    device: Any
    step: int

    def agree(self, value: Any) -> Any:
        return value

    @property
    def precision(self) -> str:
        return self.plan.config.precision

    def autocast(self) -> Any:
        from trainer.engine.base import autocast

        return autocast(self.device, self.plan.config.precision)

    def split(self, data: DataConfig, name: str) -> Any:
        """A split of `data` (the run's own dataset where no path is given); its tokenizer must be the run's."""
        from trainer.data.stream import Split, find_dataset

        data = data if data.path is not None else self.plan.config.data
        file = Path(data.path or "").expanduser()
        if file.is_file():
            raise UserError(
                f"data.path: {printable(file)} is a file, and a dataset is a folder: run `python -m trainer prepare "
                f"--source {file} --validation_source {file} --tokenizer {self.folder / 'tokenizer.json'} --out DIR` and give DIR"
            )
        info = find_dataset(data)
        if info is None:
            raise UserError(f"data.path: there is no dataset at {data.path}; run `python -m trainer prepare` first")
        if info.tokenizer.sha256 != self.tokenizer.sha256:
            raise UserError(
                f"data.path: {data.path} was prepared with tokenizer {info.tokenizer.name}, "
                f"the run with {self.tokenizer.name}; prepare it with --tokenizer {self.folder / 'tokenizer.json'}"
            )
        return Split(data, info, name)

    def check_length(self, length: int) -> None:
        limit = self.model.max_context
        if length < 1 or (limit is not None and length > limit):
            raise UserError(
                f"sequence_length: {length} is not within 1 and the model's context of {limit or 'any length'}"
            )


def stored_run(run_dir: str, say: Callable[[str], None]) -> tuple[Path, StoredConfig]:
    """The folder that the user names, and the config of the run in it; UserError where there is none."""
    folder = user_path(run_dir, "run_dir")
    if not is_run(folder):
        raise UserError(f"run_dir: {folder} is not a run folder (it has no {CONFIG}, or nothing else of a run)")
    return folder, read_config(folder, say)


def without_training(values: dict[str, Any]) -> dict[str, Any]:
    """A run's values without those that only training on its device needs: they do not bind one process that reads the run."""
    kept = {key: value for key, value in values.items() if key not in ("engine", "float8", "profile")}
    for section, names in {
        "batch": ("device_token_capacity", "tokens_per_microbatch"),
        "optim": ("state_precision",),
    }.items():
        kept[section] = {key: value for key, value in (kept.get(section) or {}).items() if key not in names}
    return kept


def open_run(run_dir: str | None, step: int | None, device: str, precision: str, world: Any = None) -> OpenRun:
    """Load a run folder; UserError where it is none, has no checkpoint, or only damaged ones."""
    import torch

    from models.base import Unset, refuse_unset, with_storage
    from trainer import checkpoint
    from trainer.data.dataset import DatasetInfo
    from trainer.data.tokenizers import Tokenizer
    from trainer.device import choose_device, keep_freed_memory
    from trainer.engine.distributed import World
    from trainer.memory import build_meta
    from trainer.plan import resolve

    if run_dir is None:
        raise UserError("run_dir: name the run's folder, as in `python -m trainer generate runs/NAME`")
    world = world or World()
    folder, stored = stored_run(run_dir, world.say)
    changes = {"device": device, "run_dir": str(folder)}  # the folder may have been moved
    if precision != "auto":
        changes["precision"] = precision
    config = stored.build(without_training(stored.values | changes))
    config.model |= dict.fromkeys(config.model.keys() & KERNEL_FIELDS, "auto")  # nor do the kernels of its machine
    dataset = DatasetInfo.load(folder)
    plan = resolve(config, dataset, training=False)
    place = choose_device(device, world.local_rank)
    if place.type == "cpu":
        keep_freed_memory()
    chosen = world.on_leader(lambda: checkpoint.choose(folder / "checkpoints", step, world.say))
    if chosen is None:
        raise UserError(f"run_dir: {folder} has no checkpoint yet")
    path, manifest = chosen
    tensors = checkpoint.load(path, "model.", world, place)
    model = with_storage(build_meta(plan.model_class, plan.model_config), place)
    model.init_weights(torch.Generator())  # for what no checkpoint holds: buffers that follow from the config
    checkpoint.put_into(model, tensors, path, assign=True)
    try:
        refuse_unset(model, given=tensors)
    except Unset as error:
        raise UserError(f"model {plan.config.model['name']}: {error}") from None
    model = model.to(torch.bfloat16) if plan.config.precision == "pure_bf16" else model.float()
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json", dataset.tokenizer.name, dataset.tokenizer.eot_id)
    return OpenRun(folder, plan, model.eval(), tokenizer, place, manifest["step"])
