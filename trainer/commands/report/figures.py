"""The figures of a page, as SVG: curves over the seeds of each arm, and final losses against learning rates.

Every line has a gid, so each can be found in the page: STEM-curve-0 is the first arm's. Text and axes have the colour FOREGROUND,
which html.py replaces by the reader's; the arms have COLOURS, replaced likewise.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from trainer.commands.report.load import AXES, Run
from trainer.commands.report.page import Figure
from trainer.commands.report.study import Arm, Study
from trainer.core.text import printable

FOREGROUND = "#010203"
# Wong's palette (Nature Methods 8, 441), darkened where it is too light for a white page. Neighbours also differ in line style.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b8528e", "#9a7400", "#3a9bd1", "#444444", "#6a3d9a")
STYLES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (6, 2, 1.5, 2)), (0, (1.5, 1.5)))
LABELS = {"tokens": "training tokens", "flops": "training FLOPs", "seconds": "seconds of training"}
WORDS = {"loss": "nats per token", "bits": "bits per byte"}
TABS = {"tokens": "tokens", "flops": "FLOPs", "seconds": "seconds"}
GRID = 300  # most points of a curve
FEW = 40  # evaluations that are drawn as dots
SIZE = (6.6, 3.8)  # inches, without the legend
LEGEND_ROW, LEGEND_CHARACTERS = 0.21, 96  # inches of a row, characters that fit into it


def curve_figures(study: Study, stem: str, scale: float, kind: str, metric: str = "loss") -> list[Figure]:
    """`kind` (validation or training) loss of all arms of a scale, against each of AXES, linear and logarithmic.

    metric: loss, or bits if the tokenizers differ. Training losses have no common unit then, and are not drawn.
    """
    found: list[Figure] = []
    for axis in AXES if (kind, metric) != ("training", "bits") else ():
        bands = [(arm, band) for arm in study.at(scale) if (band := band_of(arm, kind, axis, metric)) is not None]
        if not bands:
            continue
        for log in (False, True) if axis != "seconds" else (False,):
            name = f"{stem}-{kind}-{axis}{'-log' if log else ''}"
            caption = (
                f"{kind.capitalize()} loss{', smoothed,' if kind == 'training' else ''} against {LABELS[axis]}: median of the finished "
                "seeds, and the band from the lowest to the highest, as far as all of them go"
            )
            svg = _draw_curves(study, bands, kind, axis, name, log, metric)
            found.append(Figure(name, TABS[axis] + (", log" if log else ""), caption, svg))
    return found


def band_of(arm: Arm, kind: str, axis: str, metric: str = "loss") -> np.ndarray | None:
    """[4, points]: x, median, lowest, highest over the finished seeds, on the part of the axis that all of them cover.

    Without a finished seed: of those that are not. None if nothing is known.
    """
    runs = list(arm.by_seed.values()) or [run for run in arm.test_runs if run.step]
    curves = [curve for run in runs if (curve := _points(run, kind, axis, metric)) is not None]
    if not curves:
        return None
    first, last = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    grid = np.unique(np.concatenate([x for x, _ in curves]))
    grid = grid[(grid >= first) & (grid <= last)]
    if len(grid) > GRID:
        grid = np.linspace(first, last, GRID)
    if not len(grid):
        return None
    losses = np.array([np.interp(grid, x, loss) for x, loss in curves])
    return np.array([grid, np.median(losses, axis=0), losses.min(axis=0), losses.max(axis=0)])


def _points(run: Run, kind: str, axis: str, metric: str) -> tuple[np.ndarray, np.ndarray] | None:
    """The finite points of a run's curve; None if there are none."""
    curve = run.training if kind == "training" else run.validation
    if not curve:
        return None
    there = np.isfinite(curve[axis]) & np.isfinite(curve[metric])
    return (curve[axis][there], curve[metric][there]) if there.any() else None


def look(study: Study, arm: Arm) -> dict[str, Any]:
    """Colour and line style of an arm: the same at all scales and in all figures."""
    names = list(dict.fromkeys(one.name for one in study.arms))
    i = names.index(arm.name)
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[(i + i // len(COLOURS)) % len(STYLES)]}


def _draw_curves(
    study: Study, bands: list[tuple[Arm, np.ndarray]], kind: str, axis: str, name: str, log: bool, metric: str
) -> str:
    from matplotlib.ticker import EngFormatter

    figure, axes, columns = _figure([arm.name for arm, _ in bands])
    for i, (arm, (x, middle, low, high)) in enumerate(bands):
        style = look(study, arm)
        partial = "" if arm.by_seed else " (not finished)"
        marker = {"marker": "o", "markersize": 2.5} if kind == "validation" and len(x) <= FEW else {}
        axes.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0, gid=f"band-{i}")
        axes.plot(x, middle, linewidth=1.5, label=_text(arm.name) + partial, gid=f"curve-{i}", **style, **marker)
    axes.set(xlabel=LABELS[axis], ylabel=f"loss, {WORDS[metric]}")
    if log:
        axes.set_xscale("log")
    elif axis != "seconds":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k, 1.5G
    low, high = _loss_range([band for _, band in bands])
    axes.set_ylim(low, high)
    _legend(axes, columns)
    return _svg(figure, name)


def _loss_range(bands: list[np.ndarray]) -> tuple[float | None, float | None]:
    """The losses to show: without the steep fall at the beginning, which would flatten the rest."""
    late = [band[2:, (band[0] >= 0.1 * band[0, -1]) | (band[0] == band[0, -1])] for band in bands]
    low, high = min(part.min() for part in late), max(part.max() for part in late)
    margin = 0.06 * (high - low)
    return (low - margin, high + margin) if margin else (None, None)


def rate_figures(study: Study, stem: str, metric: str = "loss") -> list[Figure]:
    """Loss at the end against the learning rate: a figure for each scale at which learning rates were tried."""
    found = []
    for scale in study.scales:
        arms = [arm for arm in study.at(scale) if len(arm.curve()) > 1]
        if arms:
            name = f"{stem}-learning-rate-{scale:g}".replace(".", "_")
            caption = (
                "Validation loss at the end against the learning rate, mean over seeds; a star is the chosen value. At the upper edge: "
                "x diverged, triangle not finished or failed"
            )
            found.append(Figure(name, f"scale {scale:g}", caption, _draw_rates(study, arms, name, metric)))
    return found


def _draw_rates(study: Study, arms: list[Arm], name: str, metric: str) -> str:
    figure, axes, columns = _figure([arm.name for arm in arms])
    for i, arm in enumerate(arms):
        style, curve = look(study, arm), arm.curve()
        ends = {rate: [getattr(run, metric) for run in runs] for rate, runs in curve.items()}
        ends = {rate: [loss for loss in losses if loss is not None] for rate, losses in ends.items()}
        means = {rate: float(np.mean(losses)) for rate, losses in ends.items() if losses}
        axes.plot(
            list(means),
            list(means.values()),
            label=_text(arm.name),
            linewidth=1.5,
            marker="o",
            markersize=3.5,
            gid=f"curve-{i}",
            **style,
        )
        if arm.learning_rate in means:
            axes.plot(
                [arm.learning_rate],
                [means[arm.learning_rate]],
                "*",
                color=style["color"],
                markersize=13,
                gid=f"chosen-{i}",
            )
        for marker, states in (("x", ("diverged",)), ("^", ("unfinished", "failed", "running"))):
            at = [rate for rate, runs in curve.items() if any(run.state in states for run in runs)]
            # The y of these marks is a share of the height; neighbours are shifted, so that none hides another.
            axes.plot(
                at,
                [0.97 - 0.035 * (i % 6)] * len(at),
                marker,
                color=style["color"],
                markersize=7,
                transform=axes.get_xaxis_transform(),
            )
    axes.set(xlabel="learning rate", ylabel=f"loss at the end, {WORDS[metric]}")
    axes.set_xscale("log")
    shown = spread(sorted({rate for arm in arms for rate in arm.curve()}))
    axes.set_xticks(shown, [f"{rate:.3g}" for rate in shown])
    axes.set_xticks([], minor=True)
    axes.margins(y=0.15)
    _legend(axes, columns)
    return _svg(figure, name)


def spread(rates: list[float], most: int = 10) -> list[float]:
    """Those of the ascending `rates` whose labels do not touch on a logarithmic axis that has room for `most` of them."""
    room = math.log(rates[-1] / rates[0]) / most
    shown = rates[:1]
    for rate in rates[1:]:
        if math.log(rate / shown[-1]) > room:
            shown.append(rate)
    return shown


# -- matplotlib ------------------------------------------------------------------------------------------------------------


def _text(name: str) -> str:
    """A name for a legend: no formulas, no leading underscore (which would hide it)."""
    words = printable(name, 60).replace("$", r"\$")
    return f" {words}" if words.startswith("_") else words


def _figure(names: list[str]) -> tuple[Any, Any, int]:
    """An empty figure with room above its axes for a legend of `names`: figure, axes, columns of the legend."""
    from matplotlib.figure import Figure as Canvas

    columns = max(1, min(4, LEGEND_CHARACTERS // (max(map(len, names)) + 8)))
    width, height = SIZE
    height += LEGEND_ROW * math.ceil(len(names) / columns)
    # Margins are set by hand: an automatic layout draws everything twice.
    figure = Canvas(figsize=(width, height))
    margins = {
        "left": 0.66 / width,
        "right": 1 - 0.25 / width,
        "bottom": 0.5 / height,
        "top": (SIZE[1] - 0.05) / height,
    }
    axes = figure.subplots(gridspec_kw=margins)
    axes.grid(color=FOREGROUND, alpha=0.15, linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set(visible=side in ("left", "bottom"), color=FOREGROUND, alpha=0.5)
    axes.tick_params(which="both", color=FOREGROUND, labelcolor=FOREGROUND)
    axes.xaxis.label.set_color(FOREGROUND)
    axes.yaxis.label.set_color(FOREGROUND)
    axes.patch.set_alpha(0)
    figure.patch.set_alpha(0)
    return figure, axes, columns


def _legend(axes: Any, columns: int) -> None:
    """Above the axes, where it hides no curve."""
    where = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "ncols": columns}
    axes.legend(
        **where, labelcolor=FOREGROUND, framealpha=0, fontsize=9, handlelength=3.2, borderpad=0, columnspacing=1.5
    )


def _svg(figure: Any, name: str) -> str:
    """The figure as SVG with text as text, the same for the same data. All its ids begin with `name`, to be unique in a page."""
    import matplotlib

    written = io.StringIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        warnings.simplefilter("ignore")  # about characters that the font lacks: the reader's has them
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", written.getvalue(), flags=re.DOTALL)
    return in_tags(text, lambda tag: re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{name}-", tag))


def in_tags(svg: str, change: Callable[[str], str]) -> str:
    """`svg` with its tags changed and its text, such as the name of an arm, as it was."""
    return re.sub(r"<[^>]*>", lambda found: change(found[0]), svg)


def all_figures(groups: dict[str, list[Figure]]) -> Iterator[Figure]:
    for figures in groups.values():
        yield from figures
