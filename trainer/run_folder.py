"""A run is a folder: its resolved config, plan, environment, tokenizer, metrics, curves, samples and checkpoints."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import ABSENT_MEANS, DataConfig, RunConfig
from trainer.errors import UserError
from trainer.files import write_file
from trainer.launcher import find_place
from trainer.memory import KERNEL_FIELDS
from trainer.settings import build, load_yaml, merge, parse_flags, to_yaml

CONFIG = "config.yaml"
ENVIRONMENT = "environment.jsonl"

# What may change between the parts of one run: where it computes and what it reports, not what it computes.
CHANGEABLE = (
    "run_dir",
    "max_steps",
    "device",
    "profile",
    "data.path",
    "data.cache",
    "data.threads",
    "batch.tokens_per_microbatch",
    "batch.device_token_capacity",
    "optim.non_finite",
    "optim.max_skips",
    "engine.",
    "evaluation.",
    "checkpoint.",
    "log.",
    *(f"model.{name}" for name in KERNEL_FIELDS),
)

# What goes with a strategy and a number of processes: with others it is decided anew.
BY_STRATEGY = (
    "strategy",
    "shard_size",
    "offload",
    "reshard_after_forward",
    "deepspeed_config",
    "activation_checkpointing",
    "cuda_graphs",
)


def default_run_dir(config: RunConfig) -> str:
    """runs/MODEL-SCALE"""
    return str(Path("runs") / f"{config.model.get('name', 'hlb')}-{config.model_scale:g}")


def folder_of(config: RunConfig) -> Path:
    """Where the run of a config lives, whether it says so or not."""
    return Path(config.run_dir or default_run_dir(config)).expanduser()


def combined_values(given: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """What a `train` command asks for, on top of what its run folder holds already: (values, whether it is a resumption)."""
    from trainer.checkpoint import found

    folder = folder_of(build(RunConfig, given))
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run_dir: {folder} is a file, not a folder; choose another --run_dir")
    if not (folder / CONFIG).exists():
        if found(folder / "checkpoints"):
            raise UserError(
                f"run_dir: {folder} has checkpoints but no {CONFIG}; put it back or choose another --run_dir"
            )
        return given, False
    saved = load_config(folder)
    engine, strategy = saved.get("engine", {}), given.get("engine", {}).get("strategy")
    processes = _last_start(folder).get("processes")
    if processes != find_place(os.environ).size or strategy not in (None, engine.get("strategy")):
        saved["engine"] = {key: value for key, value in engine.items() if key not in BY_STRATEGY}
    return merge(saved, drop_inferred(given)), True


def load_config(folder: Path) -> dict[str, Any]:
    """A run's config.yaml, with what the keys mean that were not there yet when it was started."""
    values = load_yaml(folder / CONFIG)
    for key, meaning in ABSENT_MEANS.items():
        section, _, leaf = key.rpartition(".")
        values = merge({section: {leaf: meaning}} if section else {leaf: meaning}, values)
    return values


def _last_start(folder: Path) -> dict[str, Any]:
    """What `environment` said of the last start in this folder; empty where that is not known."""
    try:
        lines = (folder / ENVIRONMENT).read_text(encoding="utf-8").splitlines()
        return json.loads(lines[-1])
    except (OSError, ValueError, IndexError):
        return {}


def plugins_of(folder: Path) -> list[str]:
    """The modules that the last start in this folder named by --plugin; none of them is imported."""
    plugins = parse_flags(_last_start(folder).get("command", []))[1].get("plugin", [])
    return plugins if isinstance(plugins, list) else [plugins]


def drop_inferred(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Without the keys that say `auto`: on resumption what was inferred then holds, but for what may change."""
    kept: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            kept[key] = drop_inferred(value, f"{prefix}{key}.")
        elif (value is not None and str(value).lower() != "auto") or f"{prefix}{key}".startswith(CHANGEABLE):
            kept[key] = value
    return kept


def check_unchanged(folder: Path, config: RunConfig) -> None:
    """UserError where the config asks of an existing run something other than it was started with."""
    before, after = flat(build(RunConfig, load_config(folder))), flat(config)
    # `auto` in a resolved config is a key that was not there yet: what was inferred instead is what always held.
    differing = [key for key in after if before.get(key) not in (after[key], "auto") and not key.startswith(CHANGEABLE)]
    if differing:
        key = differing[0]
        more = f" (and {', '.join(differing[1:])})" if len(differing) > 1 else ""
        raise UserError(
            f"{key}: {folder} was started with {before.get(key)!r}, now it is {after[key]!r}{more}; "
            "choose another --run_dir, or leave that key as it was"
        )


def flat(config: Any) -> dict[str, Any]:
    """Dotted key -> value."""
    import dataclasses

    def walk(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(walk(dataclasses.asdict(config), ""))


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
        raise UserError(
            f"run_dir: cannot write to {folder}: {error.strerror or error}; choose another --run_dir"
        ) from None
    try:
        yield
    finally:
        lock.release()


def write_start(folder: Path, config: RunConfig, plan_text: str | None, dataset_folder: Path) -> None:
    """Everything that says what this run is: config.yaml, plan.txt, dataset.json, tokenizer.json; a line of environment.jsonl."""
    for name in ("dataset.json", "tokenizer.json"):
        if not (folder / name).exists():
            shutil.copy(dataset_folder / name, folder / name)
    if plan_text is not None:
        write_file(folder / "plan.txt", plan_text + "\n")
    with (folder / ENVIRONMENT).open("a", encoding="utf-8") as file:
        file.write(json.dumps(environment()) + "\n")
    write_file(folder / CONFIG, to_yaml(config))  # last: a folder with it can be resumed


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
    lockstep = False  # see engine.base.Engine

    def agree(self, value: Any) -> Any:
        return value

    def autocast(self) -> Any:
        from trainer.engine.base import autocast

        return autocast(self.device, self.plan.config.precision)

    def split(self, data: DataConfig, name: str) -> Any:
        """A split of `data` (the run's own dataset where no path is given); its tokenizer must be the run's."""
        from trainer.data.stream import Split, find_dataset

        data = data if data.path is not None else self.plan.config.data
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


def open_run(run_dir: str | None, step: int | None, device: str, precision: str, world: Any = None) -> OpenRun:
    """Load a run folder; UserError where it is none, has no checkpoint, or only damaged ones."""
    import torch

    from trainer import checkpoint
    from trainer.data.dataset import DatasetInfo
    from trainer.data.tokenizers import Tokenizer
    from trainer.device import choose_device, keep_freed_memory
    from trainer.engine.distributed import World
    from trainer.memory import build_meta
    from trainer.plan import resolve

    if run_dir is None:
        raise UserError("run_dir: name the run's folder, as in `python -m trainer generate runs/NAME`")
    folder, world = Path(run_dir).expanduser(), world or World()
    if not (folder / CONFIG).exists():
        raise UserError(f"run_dir: {folder} is not a run folder (it has no {CONFIG})")
    values = load_config(folder)
    if precision != "auto":
        values["precision"] = precision
    values |= {"device": device, "run_dir": str(folder)}  # the folder may have been moved
    values.pop("engine", None)  # how the run was spread does not bind one process that reads it
    config = build(RunConfig, values)
    config.model |= dict.fromkeys(config.model.keys() & KERNEL_FIELDS, "auto")  # nor do the kernels of its machine
    dataset = DatasetInfo.load(folder)
    plan = resolve(config, dataset)
    place = choose_device(device, world.local_rank)
    if place.type == "cpu":
        keep_freed_memory()
    chosen = world.on_leader(lambda: checkpoint.choose(folder / "checkpoints", step, world.say))
    if chosen is None:
        raise UserError(f"run_dir: {folder} has no checkpoint yet")
    path, manifest = chosen
    tensors = checkpoint.load(path, "model.", world, place)
    model = build_meta(plan.model_class, plan.model_config).to_empty(device=place)
    model.init_weights(torch.Generator())  # for what no checkpoint holds: buffers that follow from the config
    checkpoint.put_into(model, tensors, path, assign=True)
    model = model.to(torch.bfloat16) if plan.config.precision == "pure_bf16" else model.float()
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json", dataset.tokenizer.name)
    return OpenRun(folder, plan, model.eval(), tokenizer, place, manifest["step"])
