"""`merge`: makes one run of several, by arithmetic with their weights. The result generates, evaluates and exports like any run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trainer.commands import Verb
from trainer.core.config import WEIGHTS
from trainer.core.errors import UserError
from trainer.core.files import write_file
from trainer.core.settings import setting

if TYPE_CHECKING:
    from trainer.checkpoint.merging import Merge
    from trainer.checkpoint.weights import Weights
    from trainer.planning.parent import RunParent

OF_BASE = ("task", "ties")  # methods that add changes to a base


@dataclass
class MergeConfig:
    """`merge`: the runs, and how their weights become one."""

    runs: list[str] = setting((), "RUN[@STEP] of each model; the words before the flags")
    out: str | None = setting(None, "folder of the merged run; it must not exist")
    method: Literal["linear", "slerp", "task", "ties"] = setting(
        "linear",
        "linear: weighted mean (arXiv 2203.05482); slerp: two runs, along the arc between them; task: base + what each changed (arXiv "
        "2212.04089); ties: the same, but small changes and those of the minority's sign are left out (arXiv 2306.01708)",
    )
    proportions: list[float] = setting((), "linear, task, ties: weight of each run, in order; auto: 1 each")
    slerp_t: float = setting(0.5, "slerp: 0 is the first run, 1 the second", low=0, high=1)
    base: str | None = setting(None, "task, ties: RUN[@STEP] that the runs began with")
    scale: float = setting(1.0, "task, ties: factor of the changes that are added to the base")
    density: float = setting(0.2, "ties: share of each tensor's changes that is kept", above=0, high=1)
    weights: str = setting("evaluation", WEIGHTS)


def run(config: MergeConfig) -> None:
    """Run the verb in one process, on the CPU. It overwrites nothing, and removes a partial result if it fails."""
    from trainer.checkpoint.merging import merged
    from trainer.commands.export import fresh_folder
    from trainer.core.files import user_path
    from trainer.engine.meta import all_projections, projections_of
    from trainer.planning.model import written_out
    from trainer.runtime.distributed import World

    out = user_path(checked(config), "out")
    say = World().say
    keys = [(name, "runs") for name in config.runs] + ([] if config.base is None else [(config.base, "base")])
    opened = [open_weights(name, key, config.weights, say) for name, key in keys]
    first, weights = opened[0]
    for other, found in opened[1:]:
        check_alike(first, other, weights, found)
    model = written_out(dataclasses.replace(first.config, model=first.model))
    models = [found.each(projections_of(*model, found)) for _, found in opened]
    tensors = merged(method_of(config), models, all_projections(*model))
    with fresh_folder(out) as partial:
        write_run(partial, out, config, [parent for parent, _ in opened], weights.manifest, tensors)
    say(
        f"{out}: {len(config.runs)} runs, merged ({config.method}); `python -m trainer evaluate {out}` measures the result"
    )


def open_weights(text: str, key: str, wanted: str, say: Callable[[str], None]) -> tuple[RunParent, Weights]:
    """The run that RUN[@STEP] names, and its weights. UserError, which names `key`, if there is none."""
    from trainer.checkpoint.weights import choose_weights
    from trainer.planning.parent import RunParent
    from trainer.planning.run_config import branch_point, read_config
    from trainer.runtime.distributed import World

    folder, step = branch_point(text, key, World().say)
    parent = RunParent(folder.absolute(), step, read_config(folder, say).build())
    return parent, choose_weights(folder / "checkpoints", step, wanted, say, World())


def check_alike(first: RunParent, other: RunParent, weights: Weights, others: Weights) -> None:
    """UserError if the runs' models differ in architecture or shapes, or their tokenizers."""
    from trainer.data.dataset import DatasetInfo

    here, there = ({name: shape for name, (shape, _) in found.stored().items()} for found in (weights, others))
    if first.model["name"] != other.model["name"] or here.keys() != there.keys():
        raise UserError(f"runs: {first} and {other} are of different models; merge runs of one architecture and size")
    for name, shape in here.items():
        if there[name] != shape:
            raise UserError(
                f"runs: {name} is {list(shape)} in {first}, but {list(there[name])} in {other}; merge runs of one size"
            )
    if DatasetInfo.load(first.folder).tokenizer.sha256 != DatasetInfo.load(other.folder).tokenizer.sha256:
        raise UserError(f"runs: {first} and {other} have different tokenizers, so their weights mean different things")


def write_run(
    folder: Path,
    out: Path,
    config: MergeConfig,
    parents: list[RunParent],
    manifest: dict[str, Any],
    tensors: Iterable[Any],
) -> None:
    """Write the run into `folder`, which becomes `out`. manifest: of the first parent's checkpoint."""
    import torch

    from trainer import __version__
    from trainer.checkpoint.format import retention, save
    from trainer.checkpoint.merging import MERGED
    from trainer.checkpoint.weights import MODEL
    from trainer.planning.run_config import write_config
    from trainer.runtime.distributed import World

    first = parents[0]
    kept = dataclasses.replace(first.config, model=first.model, run_dir=str(out.absolute()))
    kept.init_from, kept.init_weights, kept.branch_from = None, "evaluation", None
    facts = {
        "tokens": manifest["tokens"],
        "world_size": 1,
        "config": dataclasses.asdict(kept),
        MERGED: {**dataclasses.asdict(config), "parents": [str(parent) for parent in parents]},
        "torch": torch.__version__,
        "crescendo": __version__,
    }
    whole = {MODEL + name: tensor for name, tensor in tensors}
    save(folder / "checkpoints", first.step, whole, facts, World(), retention(1, 0))
    for name in ("dataset.json", "tokenizer.json"):
        write_file(folder / name, (first.folder / name).read_bytes())
    write_config(folder, kept)


def checked(config: MergeConfig) -> str:
    """The key `out`. UserError if a key is missing, or has no meaning for the method."""
    if config.out is None:
        raise UserError(
            "out: name the folder of the merged run, as in `python -m trainer merge runs/A runs/B --out runs/AB`"
        )
    few = 1 if config.method in OF_BASE else 2
    if len(config.runs) < few or (config.method == "slerp" and len(config.runs) > 2):
        wanted = "exactly two" if config.method == "slerp" else f"at least {few}"
        raise UserError(f"runs: {config.method} takes {wanted}; {len(config.runs)} given")
    if (config.method in OF_BASE) != (config.base is not None):
        raise UserError(
            f"base: {config.method} "
            + (
                "adds changes to a base; give the run that all began with"
                if config.base is None
                else "has no base; leave it out"
            )
        )
    if config.proportions and config.method == "slerp":
        raise UserError("proportions: slerp has slerp_t instead; leave it out")
    if config.proportions and len(config.proportions) != len(config.runs):
        raise UserError(f"proportions: {len(config.proportions)} given for {len(config.runs)} runs; give one for each")
    of_mean = config.method in ("linear", "ties")
    if config.proportions and of_mean and (min(config.proportions) < 0 or sum(config.proportions) == 0):
        raise UserError(f"proportions: {config.method} takes a mean, whose weights are not negative and not all 0")
    return config.out


def method_of(config: MergeConfig) -> Merge:
    """The function of one tensor's values in all models, the base last, that the config names."""
    from trainer.checkpoint import merging

    shares = config.proportions or [1.0] * len(config.runs)
    if config.method == "slerp":
        return lambda tensors: merging.slerp(tensors[0], tensors[1], config.slerp_t)
    if config.method == "linear":
        return functools.partial(merging.linear, weights=shares)
    if config.method == "task":
        return lambda tensors: merging.task_arithmetic(tensors[:-1], tensors[-1], shares, config.scale)
    return lambda tensors: merging.ties(tensors[:-1], tensors[-1], shares, config.scale, config.density)


VERB = Verb(
    name="merge",
    help="one run from the weights of several: mean, slerp, task arithmetic, TIES",
    config=MergeConfig,
    run=run,
    alone=True,
    words="runs",
)
