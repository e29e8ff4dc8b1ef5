"""`check coordinates`: whether activations stay flat with width and depth under model.mup; a table, and a picture beside the standard
parametrisation."""

from __future__ import annotations

import io
import sys
from typing import Any

import torch

from models.base import get_model, load_models, model_names
from models.transformer import Transformer
from trainer.commands.check import CoordinatesConfig
from trainer.core.errors import UserError
from trainer.core.files import user_path, write_file
from trainer.core.text import printable
from trainer.testing.coordinates import HIGHEST, LOWEST, Growth, Trial

KINDS = {"standard": False, "mup": True}


def run(config: CoordinatesConfig) -> None:
    """Run the verb: write the picture, print a line for each part; exit with code 1 if mup lets one grow or vanish.
    UserError as of `check`, and if activations are not finite, or 0."""
    check(config)
    out = user_path(config.out, "out")
    if not out.parent.is_dir():
        raise UserError(f"out: there is no folder {printable(out.parent)}")
    torch.set_num_threads(1)  # the models are small
    found = {kind: measured(config, on) for kind, on in KINDS.items()}
    write_file(out, render(config, found))
    failed = False
    for kind, pair in found.items():
        for over, one in pair.items():
            for part, slope in one.slopes().items():
                flat = LOWEST < slope < HIGHEST
                failed |= kind == "mup" and not flat
                told = "ok" if flat else "FAILED" if kind == "mup" else "grows"
                sys.stdout.write(f"  {told:<8} {kind:<10} {part:<12} {over}^{slope:+.2f}\n")
    sys.stdout.write(f"{config.model['name']}: powers from {LOWEST} to {HIGHEST} are flat; {printable(out)}\n")
    sys.stdout.flush()
    if failed:
        raise SystemExit(1)


def check(config: CoordinatesConfig) -> None:
    """UserError for a model or for sizes that cannot be compared. Fills in the model's name."""
    load_models()
    name = config.model.setdefault("name", "llama")
    if name not in model_names():
        raise UserError(f"model.name: {name!r} is not known (allowed: {', '.join(model_names())})")
    if not issubclass(get_model(name), Transformer):
        raise UserError(f"model.name: {name} has no mup: {get_model(name).mup_refusal}; name a decoder such as llama")
    for key, sizes in (("widths", config.widths), ("depths", config.depths)):
        if sizes != sorted(set(sizes)) or min(sizes, default=0) < 1:
            raise UserError(
                f"{key}: {' '.join(map(str, sizes))}: give sizes from the smallest to the largest, each once"
            )
    if len(config.widths) < 2:
        raise UserError("widths: a slope needs two or more")
    if any(width % config.head_width for width in config.widths):
        raise UserError(f"widths: each must be a multiple of head_width, {config.head_width}")
    ours = {"d_model", "n_layers", "n_heads", "mup", "mup_base_width", "mup_base_depth"} & config.model.keys()
    if ours:
        raise UserError(
            f"model.{min(ours)}: the check sets it itself, from --widths, --depths and --head_width; leave it out"
        )


def measured(config: CoordinatesConfig, on: bool) -> dict[str, Growth]:
    """By what grows."""
    base = (config.widths[0], config.depths[0]) if on else None
    optim = {"name": config.optimizer, "lr": config.lr}
    trial = Trial(config.model, optim, config.steps, range(config.seeds), config.head_width, base)
    found = {"width": trial.over_widths(config.widths, config.depths[0])}
    return found | ({"depth": trial.over_depths(config.depths, config.widths[0])} if len(config.depths) > 1 else {})


def render(config: CoordinatesConfig, found: dict[str, dict[str, Growth]]) -> bytes:
    """The picture: a column for each parametrisation, a row for width and for depth."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = list(found["mup"])
    figure = Figure(figsize=(11, 4 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(len(rows), len(found), sharey="row", squeeze=False)
    for column, (kind, pair) in enumerate(found.items()):
        for row, over in enumerate(rows):
            axis, one = axes[row][column], pair[over]
            for number, (part, slope) in enumerate(one.slopes().items()):
                style = "--" if part.startswith("scores") else "-"
                label = f"{part}: {over}$^{{{slope:+.2f}}}$"
                axis.plot(
                    one.sizes, one.means[part], style, marker="o", markersize=3, color=f"C{number % 10}", label=label
                )
            axis.set(xscale="log", yscale="log", xlabel=over, title=f"{kind}, over {over}")
            axis.set_xticks(one.sizes, [str(size) for size in one.sizes], minor=False)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
        axes[0][0].set_ylabel("mean absolute value")
    name = str(config.model["name"]).replace("$", r"\$")
    figure.suptitle(f"{name} after {config.steps} steps of {config.optimizer}, lr {config.lr:.4g} at the smallest size")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=90, format="png")
    return picture.getvalue()
