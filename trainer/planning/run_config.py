"""The config of an existing run: how it is stored, what may change, and how a command is merged with it.

    # crescendo-lm 0.2.0, config format 2, digest 5f1c...     the release that wrote it, and a digest of all except comments
    model_scale: 1.0                                          every key, nothing left to infer

A config of format 1 has no such line. A key that an older release did not know stands for what that release did.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainer import __version__
from trainer.checkpoint.manifest import BEST, found, ranked
from trainer.core.config import ABSENT_MEANS, LENGTHS, RunConfig, model_name
from trainer.core.errors import Damaged, UserError
from trainer.core.files import parse_json, read_small, user_path, write_file
from trainer.core.settings import build, load_yaml, merge, parse_flags, to_yaml
from trainer.core.text import count_in_words, printable
from trainer.planning.dial import DEFAULT_SCALE

CONFIG = "config.yaml"
ENVIRONMENT = "environment.jsonl"
CONFIG_FORMAT = 2
HEADER = re.compile(r"# crescendo-lm (\S+), config format ([0-9]+), digest ([0-9a-f]{64})")

# Keys that may change when a run goes on, besides the kernels of its model: where it computes and what it reports, not what it
# computes.
CHANGEABLE = (
    "run_dir",
    "max_steps",
    *LENGTHS,
    "device",
    "profile",
    "data.path",
    "data.cache",
    "data.threads",
    "batch.tokens_per_microbatch",
    "batch.device_token_capacity",
    "optim.ema",
    "optim.non_finite",
    "optim.max_skips",
    "engine.",
    "evaluation.",
    "checkpoint.",
    "log.",
)

# Keys of the section `data` that decide what a run computes; the fingerprint of the data covers the others.
OF_THE_DATA = ("data.order", "data.packing", "data.separate_documents")

# Keys that depend on the strategy and the number of processes. If either changes, they are decided anew.
BY_STRATEGY = (
    "strategy",
    "shard_size",
    "offload",
    "reshard_after_forward",
    "deepspeed_config",
    "activation_checkpointing",
    "cuda_graphs",
)


def to_stderr(line: str) -> None:
    print(printable(line), file=sys.stderr)


def default_run_dir(config: RunConfig) -> str:
    """runs/MODEL-SCALE, or runs/MODEL-SIZE if the config gives `parameters`, such as 1.3B"""
    if config.parameters is not None:
        size = count_in_words(config.parameters)
    else:
        size = f"{DEFAULT_SCALE if config.model_scale is None else config.model_scale:g}"
    return str(Path("runs") / f"{model_name(config.model)}-{size}")


def folder_of(config: RunConfig) -> Path:
    """The run folder of a config: its run_dir, or the default."""
    return user_path(default_run_dir(config) if config.run_dir is None else config.run_dir, "run_dir")


# -- the file --------------------------------------------------------------------------------------------------------------


def write_config(folder: Path, config: RunConfig) -> None:
    """Write config.yaml; a folder with it can be resumed."""
    write_file(folder / CONFIG, seal(to_yaml(config), __version__, str(CONFIG_FORMAT)))


def keep_changed_config(folder: Path) -> None:
    """Before config.yaml is written again: if it was changed meanwhile, keep it under another name."""
    try:
        if (folder / CONFIG).exists():
            _read(folder)
    except Damaged:
        (folder / CONFIG).rename(folder / f"{CONFIG}.changed")


def seal(text: str, release: str, version: str) -> str:
    """`text` below a line that gives the release that wrote it, and its digest."""
    return f"# crescendo-lm {release}, config format {version}, digest {_digest(text, release, version)}\n{text}"


def _digest(text: str, release: str, version: str) -> str:
    """sha256 of the release, the format and all lines that are not comments."""
    lines = [release, version, *(line for line in text.splitlines() if not line.startswith("#"))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class StoredConfig:
    """The values of a run's config.yaml, with `ABSENT_MEANS` filled in, and the release that wrote it.

    given: the dotted keys in the file; release: of crescendo-lm, "" if not known; processes: of the last start, None if not
    known.
    """

    folder: Path
    values: dict[str, Any]
    given: set[str]
    release: str
    processes: int | None = None

    def build(self, values: dict[str, Any] | None = None) -> RunConfig:
        """The RunConfig of these values, or of `values`. For an unknown key, UserError names the release that wrote it."""
        try:
            build(RunConfig, self.values)
        except UserError as error:
            if self.release in ("", __version__):
                raise UserError(f"{self.folder / CONFIG}: {error}") from None
            raise UserError(
                f"{self.folder / CONFIG}: was written by crescendo-lm {self.release}, this is {__version__}: {error}; "
                f"go on with crescendo-lm {self.release}"
            ) from None
        return build(RunConfig, self.values if values is None else values)


def is_run(folder: Path) -> bool:
    """Whether `folder` holds a run: a config.yaml with a run's header, or with other files of a run beside it."""
    config = folder / CONFIG
    if not config.is_file():
        return False
    beside = (folder / ENVIRONMENT).is_file() or (folder / "checkpoints").is_dir()
    return beside or read_small(config).startswith(b"# crescendo-lm ")


def read_config(folder: Path, say: Callable[[str], None]) -> StoredConfig:
    """The config of the run in `folder`.

    If config.yaml was changed after it was written, this takes the config of the newest good checkpoint and says so. UserError
    if there is none.
    """
    try:
        values, release = _read(folder)
    except Damaged as error:
        found = _from_checkpoint(folder, say)
        if found is None:
            raise UserError(
                f"{error}; put it back as it was, or remove its first line to keep the change, and give changes as flags"
            ) from None
        values, release = found
        say(f"{error}; the config of the newest good checkpoint is used instead (give changes as flags)")
    from models.config import with_later_fields  # imports torch, which the name of a run's folder does not need

    given = set(flat(values))
    for key, value in ABSENT_MEANS.items():
        if key not in given:
            _set(values, key.split("."), value)
    values["model"] = with_later_fields(values.get("model") or {})
    return StoredConfig(folder, values, given, release)


def _set(values: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        values = values.setdefault(part, {})
    values[path[-1]] = value


def _read(folder: Path) -> tuple[dict[str, Any], str]:
    """Values and release of config.yaml. Damaged if it was changed after it was written."""
    path = folder / CONFIG
    try:
        text = read_small(path).decode("utf-8")
    except UnicodeDecodeError:
        raise Damaged(f"{path}: is not UTF-8 text; it was changed after it was written") from None
    header = next(filter(None, map(HEADER.fullmatch, text.splitlines()[:1])), None)
    if header is not None and int(header[2]) > CONFIG_FORMAT:
        raise UserError(
            f"{path}: has format {int(header[2])} of crescendo-lm {header[1]}; this is {__version__}, which reads {CONFIG_FORMAT}"
        )
    if header is not None and header[3] != _digest(text, header[1], header[2]):
        raise Damaged(f"{path}: its digest is not that of its content; it was changed after it was written")
    if header is None and text.startswith("# crescendo-lm "):
        raise Damaged(f"{path}: its first line was changed after it was written")
    release = header[1] if header else _last_start(folder).get("versions", {}).get("crescendo-lm", "")
    return load_yaml(path), release


def _from_checkpoint(folder: Path, say: Callable[[str], None]) -> tuple[dict[str, Any], str] | None:
    """Values and release of the config in the newest good checkpoint; None if no digest covers one."""
    from trainer.checkpoint import format as checkpoint

    chosen = checkpoint.choose(folder / "checkpoints", None, say)
    if chosen is None:
        return None
    _, manifest = chosen
    if manifest["format"] == 1 or not isinstance(manifest.get("config"), dict):
        return None
    return manifest["config"], str(manifest.get("crescendo", ""))


# -- what a command makes of it --------------------------------------------------------------------------------------------


def read_run(given: dict[str, Any], say: Callable[[str], None]) -> StoredConfig | None:
    """The config of the run that a `train` command goes on with; None if it starts a new run. A start reads it once.

    UserError if the folder holds something else.
    """
    from trainer.checkpoint.quantized import refuse_quantized

    folder = folder_of(build(RunConfig, given))
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run_dir: {folder} is a file, not a folder; choose another --run_dir")
    if is_run(folder):
        refuse_quantized(folder, "run_dir")
        return dataclasses.replace(read_config(folder, say), processes=_last_start(folder, say).get("processes"))
    if found(folder / "checkpoints"):
        raise UserError(f"run_dir: {folder} has checkpoints but no {CONFIG}; put it back or choose another --run_dir")
    if (folder / CONFIG).exists():
        raise UserError(f"run_dir: {folder} holds a {CONFIG} that no run has written; choose another --run_dir")
    return None


def merge_run(given: dict[str, Any], stored: StoredConfig | None, processes: int) -> dict[str, Any]:
    """The values of a `train` command, merged over those of its run. processes: of this start.

    With another number of processes or another strategy, the keys of BY_STRATEGY are decided anew.
    """
    if stored is None:
        return given
    values = stored.values
    engine, strategy = values.get("engine") or {}, (given.get("engine") or {}).get("strategy")
    if stored.processes != processes or strategy not in (None, engine.get("strategy")):
        values = {**values, "engine": {key: value for key, value in engine.items() if key not in BY_STRATEGY}}
    # The folder says where the run is: it may have been moved or copied.
    name = model_name((given.get("model") or {}) | (values.get("model") or {}))
    return merge(values, drop_inferred(given, changeable(name))) | {"run_dir": str(stored.folder)}


def with_branch(
    given: dict[str, Any], stored: StoredConfig | None, processes: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """The values of a `train` command. If it starts a new run with branch_from: over those of the run that it branches from,
    with that run's folder as an absolute path and with its step.

    UserError if there is no such run or step, or no run_dir.
    """
    config = build(RunConfig, given)
    if stored is not None or config.branch_from is None:
        return given
    if config.dial is not None:
        raise UserError("dial: a branch goes on with the learning rate and the batch of its run; leave it out")
    if config.run_dir is None:
        raise UserError("branch_from: a branch is a run of its own; name its folder with --run_dir")
    source, step = branch_point(config.branch_from, "branch_from", say)
    before = dataclasses.replace(read_config(source, say), processes=_last_start(source, say).get("processes"))
    own: dict[str, Any] = {"run_dir": config.run_dir, "branch_from": f"{source.absolute()}@{step}"}
    own |= {"init_from": None, "init_weights": "evaluation", "dial": None}  # of that run's beginning
    return {**merge_run(given, before, processes), **own}


def as_started(given: dict[str, Any], stored: StoredConfig) -> dict[str, Any]:
    """`given` with branch_from, init_from and the models of the objective as the run has them, where they mean the same: the command
    that started a run, with a relative path or without a step, may be given again."""
    config, values = build(RunConfig, given), stored.values
    named = {key: (getattr(config, key), values.get(key)) for key in ("branch_from", "init_from")}
    kept = {key: before for key, (text, before) in named.items() if names_same(text, before, key)}
    dial, before = config.dial, values.get("dial")
    # A file that is gone is not needed: the run has a copy. One that was changed is refused.
    if dial is not None and names_same(dial, before, "dial") and not user_path(dial, "dial").exists():
        kept["dial"] = before
    objective, before = given.get("objective") or {}, values.get("objective") or {}
    same = {key: before[key] for key in objective.keys() & before if names_same(objective[key], before[key], key)}
    return given | kept | ({"objective": objective | same} if same else {})


def names_same(text: Any, before: Any, key: str) -> bool:
    """Whether a source of weights, given as `text`, is the one that a run has stored as `before`, with an absolute path and a step."""
    from trainer.checkpoint.hugging_face import HUB

    if not (isinstance(text, str) and isinstance(before, str)):
        return False
    text = text.removesuffix(f"@{BEST}")  # which stood for a step when the run began
    whole = text if text.startswith(HUB) else str(user_path(text, key).absolute())
    return whole in (before, before.rpartition("@")[0])


def branch_point(text: str, key: str = "branch_from", say: Callable[[str], None] = to_stderr) -> tuple[Path, int]:
    """The run's folder and the step that RUN[@STEP] means; without a step, the newest one, and @best is that with the lowest validation
    loss. UserError, which names `key`, if there is none."""
    from trainer.checkpoint.quantized import refuse_quantized

    name, wanted = split_step(text)
    folder = user_path(name, key)
    if not is_run(folder):
        also = ", nor that of a Hugging Face model (it has no config.json)" if key == "init_from" else ""
        raise UserError(f"{key}: {printable(folder)} is not a run's folder{also}; write RUN@STEP")
    refuse_quantized(folder, key)
    steps = [step for step, _ in found(folder / "checkpoints")]
    if wanted == BEST:
        best = ranked(folder / "checkpoints", say)
        if not best:
            have = ", ".join(map(str, steps)) or "none"
            raise UserError(f"{key}: no checkpoint of {printable(folder)} has a validation loss (available: {have})")
        return folder, best[0][1]
    if wanted and not (wanted.isascii() and wanted.isdigit() and int(wanted) in steps) or not steps:
        have = ", ".join(map(str, steps)) or "none"
        raise UserError(
            f"{key}: {printable(folder)} has no checkpoint of step {printable(wanted or 'any')} (available: {have}); "
            "checkpoint.keep and checkpoint.keep_every decide which are kept"
        )
    return folder, int(wanted) if wanted else steps[-1]


def split_step(text: str) -> tuple[str, str]:
    """The parts of NAME@STEP; the step is "" if there is none."""
    name, at, step = text.rpartition("@")
    return (name, step) if at else (step, "")


def merged_config(given: dict[str, Any], stored: StoredConfig | None, processes: int) -> RunConfig:
    """The RunConfig of `merge_run`'s values. Raises UserError for a bad key or value."""
    values = merge_run(given, stored, processes)
    return build(RunConfig, values) if stored is None else stored.build(values)


def starts_of(folder: Path, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """The lines that `environment` wrote, one for each start in this folder. A damaged line is reported and left out."""
    try:
        lines = read_small(folder / ENVIRONMENT).splitlines()
    except UserError:
        return []
    kinds, starts = {"command": list, "versions": dict, "processes": int}, []
    for number, line in enumerate(lines, 1):
        try:
            start = parse_json(line, f"{folder / ENVIRONMENT}, line {number}")
        except Damaged as error:
            say(f"{error}; that start is left out")
        else:
            starts.append({key: value for key, value in start.items() if isinstance(value, kinds.get(key, object))})
    return starts


def _last_start(folder: Path, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """What `environment` wrote of the last start in this folder; empty if not known."""
    return next(reversed([{}, *starts_of(folder, say)]))


def plugins_of(folder: Path) -> list[str]:
    """The modules that the last start in this folder named with --plugin. This does not import them."""
    try:
        return plugins_in([str(word) for word in _last_start(folder).get("command", [])])
    except UserError:
        return []


def plugins_in(command: list[str]) -> list[str]:
    """The modules that the words of a command name with --plugin."""
    plugins = parse_flags(command)[1].get("plugin", [])
    return plugins if isinstance(plugins, list) else [plugins]


def changeable(model_name: Any) -> tuple[str, ...]:
    """Prefixes of the dotted keys whose values may change when a run of this model goes on."""
    from models.config import kernel_fields_of

    return (*CHANGEABLE, *(f"model.{field}" for field in kernel_fields_of(model_name)))


def drop_inferred(values: dict[str, Any], may_change: tuple[str, ...], prefix: str = "") -> dict[str, Any]:
    """`values` without the keys that say `auto`: a resumed run keeps what was inferred, except for keys that may change."""
    kept: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            kept[key] = drop_inferred(value, may_change, f"{prefix}{key}.")
        elif (value is not None and str(value).lower() != "auto") or f"{prefix}{key}".startswith(may_change):
            kept[key] = value
    return kept


def check_unchanged(
    stored: StoredConfig, config: RunConfig, given: dict[str, Any], resolve: Callable[[RunConfig], RunConfig]
) -> None:
    """UserError if a command sets a key of an existing run to another value than at its start, and the key may not change.

    config: resolved; given: values of the command; resolve(config) -> the config with nothing left to infer, called only if the
    command names a key that the run's release did not know.
    """
    before, after = flat(stored.build()), flat(config)
    new = {
        key
        for key in after
        if key not in stored.given and key not in ABSENT_MEANS and before.get(key) in (None, "auto")
    }
    if new & set(flat(drop_inferred(given, changeable(config.model["name"])))):
        before |= {key: value for key, value in flat(resolve(stored.build())).items() if key in new}
    else:  # what is inferred today is what the older release did
        before |= {key: after[key] for key in new}
    _refuse_change(
        before,
        after,
        lambda key, more: (
            f"{key}: {stored.folder} was started with {before.get(key)!r}, now it is {after[key]!r}{more}; "
            "choose another --run_dir, or leave that key as it was"
        ),
    )


def check_trained_with(before: Any, config: RunConfig, manifest: Path) -> None:
    """UserError if the run's config is not the one that a checkpoint was made with. before: the config in its manifest."""
    if not isinstance(before, dict):
        raise Damaged(f"checkpoint: {manifest} does not say with which config it was made")
    then, now = flat(before), flat(config)
    _refuse_change(
        {**now, **then},  # a key that the release of the checkpoint did not know
        now,
        lambda key, more: (
            f"{key}: the run's {CONFIG} says {now[key]!r}, {manifest} was made with {then[key]!r}{more}; "
            f"put {CONFIG} back as it was"
        ),
    )


def check_branch(before: Any, config: RunConfig, path: Path) -> None:
    """UserError if a branch changes the model or the optimizer, whose weights and state it begins with. before: the config in the
    checkpoint's manifest; path: of the checkpoint."""
    if not isinstance(before, dict):
        raise Damaged(f"checkpoint: {path} does not say with which config it was made")
    then, now = flat(before), flat(config)
    free = changeable(config.model["name"])
    for key in now:
        of_role = key.startswith("optim.roles.") and key.endswith(".name")  # an entry may be new
        if (
            (of_role or key.startswith(("model.", "optim.name")))
            and not key.startswith(free)
            and then.get(key, None if of_role else now[key]) != now[key]
        ):
            raise UserError(
                f"branch_from: {key} is {now[key]!r}, {path} was made with {then.get(key)!r}; leave it as it was"
            )


def _refuse_change(before: dict[str, Any], after: dict[str, Any], line: Callable[[str, str], str]) -> None:
    may_change = changeable(after.get("model.name"))
    differing = [key for key in after if before.get(key) != after[key] and not key.startswith(may_change)]
    if differing:
        raise UserError(printable(line(differing[0], f" (and {', '.join(differing[1:])})" if differing[1:] else "")))


def flat(config: Any) -> dict[str, Any]:
    """Dotted key -> value, of a dataclass or of nested values."""

    def walk(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + str(key), value

    return dict(walk(config if isinstance(config, dict) else dataclasses.asdict(config), ""))
