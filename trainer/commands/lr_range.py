"""`lr-range`: trains a copy of a run while the learning rate rises, and shows where the loss falls and where it explodes.

The range test of Leslie Smith (arXiv 1506.01186). It says which learning rates are worth a sweep; it does not replace one.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.commands import Values, Verb, run_folder
from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.core.files import user_path, write_file
from trainer.core.settings import build, setting
from trainer.core.text import printable

if TYPE_CHECKING:
    from trainer.training.run import Run

SMOOTHING = 0.05  # share of a new loss in the running mean that ends the test
WINDOW = 0.1  # share of all steps in the centred mean that is shown: a running mean would lag by a factor of 30 or more
EXPLODED = 4.0  # the test ends when that mean is so many times its lowest
LEAST = 5  # losses, to say anything about a slope


@dataclass
class LrRangeConfig(RunConfig):
    """`lr-range`: a run's keys, and the range. It goes on from the newest checkpoint of run_dir if there is one."""

    low: float = setting(
        1e-7, "learning rate of the matrices in the first step; with model.mup that of its base", above=0
    )
    high: float = setting(10.0, "learning rate of the matrices in the last step", above=0)
    steps: int = setting(100, "optimiser steps from low to high; fewer if the loss explodes", low=LEAST)
    lr_range_dir: str | None = setting(None, "folder for lr-range.json and .png; auto: runs/lr-range-TIME")


@dataclass(frozen=True)
class Range:
    """The result. learning_rates, losses, smoothed: [steps]; lowest: where the smoothed loss is lowest; steepest: where it falls
    fastest per factor of the learning rate, at most at `lowest`; both None if the loss never falls."""

    learning_rates: list[float]
    losses: list[float]
    smoothed: list[float]
    steepest: float | None
    lowest: float | None
    exploded: bool


@dataclass(frozen=True)
class Asked:
    """The command: its config, and the values of the keys of a run, as given."""

    config: LrRangeConfig
    values: Values


def read(values: Values) -> Asked:
    own = {field.name for field in dataclasses.fields(LrRangeConfig)} - {f.name for f in dataclasses.fields(RunConfig)}
    return Asked(build(LrRangeConfig, values), {key: value for key, value in values.items() if key not in own})


def run(asked: Asked, as_json: bool = False) -> None:
    """Run the verb: write lr-range.json and lr-range.png, and print the result."""
    config = asked.config
    if config.low >= config.high:
        raise UserError(f"low: {config.low:g} is not below high, {config.high:g}")
    copy = open_copy(asked.values)
    found = measure(copy, config)
    copy.stream.close()
    copy.engine.close()
    if copy.world.leader:
        publish(config, copy, found, as_json)
    copy.world.stop()


def open_copy(values: Values) -> Run:
    """The run in memory, as it would begin or go on: with the weights of its newest checkpoint if it has one. Nothing is written into
    its folder."""
    from trainer.checkpoint import format as checkpoint
    from trainer.data.obtain import agree_on_dataset, obtain_dataset
    from trainer.planning.parent import with_origin
    from trainer.planning.plan import resolve
    from trainer.planning.run_config import merged_config, read_run
    from trainer.runtime.distributed import World, join, read_world
    from trainer.runtime.signals import StopSignals
    from trainer.runtime.watchdog import Watchdog
    from trainer.training.run import Run

    world = read_world()
    stored = read_run(values, world.say)
    config = merged_config(with_origin(values, stored, world.size, world.say), stored, world.size)
    obtain_dataset(config, world)
    join(world, config.device, config.engine.timeout_minutes, alone=True)
    dataset = agree_on_dataset(config, world)
    plan = world.on_leader(lambda: resolve(config, dataset))
    copy = Run(plan, world, dataset, Watchdog(World(), 1), StopSignals(world))
    chosen = None if stored is None else checkpoint.choose(copy.folder / "checkpoints", None, world.say, world)
    if chosen is None:
        copy.begin()
    else:
        copy.go_on(*chosen)
    return copy


def measure(copy: Run, config: LrRangeConfig) -> Range:
    """Train with learning rates from low to high, each a factor above the one before, until the loss explodes."""
    import numpy as np

    from trainer.runs.history import smoothed as centred
    from trainer.training.step import optimiser_step

    optimizer, first, peak = copy.engine.optimizer, copy.state.step, planned_rate(copy)

    def rate(number: int) -> float:
        return config.low * (config.high / config.low) ** (number / (config.steps - 1))

    def rise(step: int) -> float:
        return rate(step - first) / peak  # of every group: their learning rates keep their ratios

    optimizer.groups = [dataclasses.replace(group, schedule=rise) for group in optimizer.groups]
    losses: list[float] = []
    mean = lowest = math.inf
    for _ in range(config.steps):
        result = optimiser_step(copy)
        loss = result.loss
        if not result.finite:
            break
        losses.append(loss)
        mean = loss if len(losses) == 1 else SMOOTHING * loss + (1 - SMOOTHING) * mean
        lowest = min(lowest, mean)
        if mean > EXPLODED * lowest:
            break
    smoothed = [float(value) for value in centred(np.array(losses), WINDOW)]
    rates = [rate(number) for number in range(len(losses))]
    return Range(rates, losses, smoothed, *landmarks(rates, smoothed), exploded=len(losses) < config.steps)


def planned_rate(copy: Run) -> float:
    """The peak learning rate of the matrices, which an entry of optim.roles may set; with model.mup, that of its base."""
    first = copy.engine.optimizer.groups[0]
    return first.lr / first.width_factor


def landmarks(rates: list[float], smoothed: list[float]) -> tuple[float | None, float | None]:
    """(steepest, lowest) as in Range. The slope at a point is that between its neighbours, per factor of the learning rate."""
    if len(smoothed) < LEAST or min(smoothed) == smoothed[0]:
        return None, None
    lowest = smoothed.index(min(smoothed))
    # Equal steps on a logarithmic axis. Beyond the lowest point the loss falls only from where a too large rate has put it.
    slopes = [smoothed[i + 1] - smoothed[i - 1] for i in range(1, min(lowest + 1, len(smoothed) - 1))]
    steepest = 1 + slopes.index(min(slopes))
    return rates[steepest], rates[lowest]


def publish(config: LrRangeConfig, copy: Run, found: Range, as_json: bool) -> None:
    """Write the files, and print a few lines or the JSON."""
    folder = user_path(
        config.lr_range_dir or str(Path("runs") / time.strftime("lr-range-%Y%m%d-%H%M%S")), "lr_range_dir"
    )
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{copy.config.model['name']}, {copy.plan.parameters:,} parameters, {copy.config.optim.name}"
    facts = {
        "format": 1,
        "what": name,
        "planned": planned_rate(copy),
        "from_step": copy.state.step - len(found.losses),
    }
    text = json.dumps({**facts, **dataclasses.asdict(found)}, indent=1)
    write_file(folder / "lr-range.json", text + "\n")
    write_file(folder / "lr-range.png", render(found, name, planned_rate(copy)))
    sys.stdout.write((text if as_json else "\n".join(lines(found, name, planned_rate(copy)))) + "\n")
    print(f"{printable(folder)}: lr-range.json, lr-range.png", file=sys.stderr)


def lines(found: Range, name: str, planned: float) -> list[str]:
    """The result in words."""
    end = found.learning_rates[-1] if found.learning_rates else math.nan
    how = "the loss exploded" if found.exploded else "the end of the range"
    told = [f"{name}: {len(found.losses)} steps, up to a learning rate of {end:.3g} ({how}); plan: {planned:.3g}"]
    if found.steepest is None or found.lowest is None:
        return [
            *told,
            "the loss never falls below that of the first step: begin lower (--low), or with more steps (--steps)",
        ]
    return [
        *told,
        f"the loss falls fastest at {found.steepest:.3g} and is lowest at {found.lowest:.3g}; a sweep of peak learning rates "
        f"between {found.steepest / 3:.2g} and {found.lowest:.2g} is worth its time (`compare`)",
    ]


def render(found: Range, name: str, planned: float) -> bytes:
    """The picture: loss against the learning rate, as measured and smoothed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.plot(found.learning_rates, found.losses, linewidth=0.6, alpha=0.35, color="C0")
    axis.plot(found.learning_rates, found.smoothed, color="C0", label="loss, smoothed")
    for at, label, style in (
        (found.steepest, "falls fastest", ":"),
        (found.lowest, "lowest", "--"),
        (planned, "plan", "-"),
    ):
        if at is not None:
            axis.axvline(at, color="0.4", linestyle=style, linewidth=1, label=f"{label}: {at:.3g}")
    if found.smoothed:
        axis.set_ylim(min(found.smoothed) - 0.5, max(found.smoothed[0], min(found.smoothed)) + 1)
    axis.set(
        xscale="log",
        xlabel="learning rate of the matrices",
        ylabel="training loss, nats per token",
        title=name.replace("$", r"\$"),
    )
    axis.grid(alpha=0.3)
    axis.legend()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=100, format="png")
    return picture.getvalue()


VERB = Verb(
    name="lr-range",
    help="learning-rate range test on a copy of a run: where the loss falls, and where it explodes",
    config=LrRangeConfig,
    run=run,
    json=True,
    positional=run_folder,
    read=read,
    resolved=lambda asked: asked.config,
)
