"""The plot of a bench that sweeps one number: microseconds a token over that number, a line for each other combination.

A line that stays level is a cost in proportion to the tokens. Over batch.sequence_length it tells linear models from quadratic ones.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainer.commands.bench.variants import Candidate
from trainer.core.sweep import label

POINTS = 3  # values of a key that make a line
PANELS = ("step", "forward")


@dataclass
class Curves:
    """key: what is swept; lines: panel -> name -> [(value, microseconds a token)]."""

    key: str
    lines: dict[str, dict[str, list[tuple[float, float]]]] = field(
        default_factory=lambda: {panel: {} for panel in PANELS}
    )


def curves_of(candidates: Sequence[Candidate]) -> Curves | None:
    """Lines over the key whose values are the most numbers; None if no key has POINTS of them."""
    variants = [one for one in candidates if one.kind == "trainer"]
    key = swept_number([one.details for one in variants])
    if key is None:
        return None
    curves = Curves(key)
    for one in variants:
        name = label({other: value for other, value in one.details.items() if other != key})
        name = name or str(one.plan.config.model["name"])
        step = one.plan.config.batch.tokens_per_step
        forward = one.record.phases_ms.get("forward")
        costs = {
            "step": 1e6 / statistics.median(one.record.rates),
            "forward": None if forward is None else 1e3 * forward / step,
        }
        for panel, cost in costs.items():
            if cost is not None:
                curves.lines[panel].setdefault(name, []).append((float(one.details[key]), cost))
    return curves


def swept_number(details: Sequence[dict[str, str]]) -> str | None:
    """The key with the most values, all of them numbers, at least POINTS; of two such keys the first."""
    values: dict[str, set[str]] = {}
    for changes in details:
        for key, value in changes.items():
            values.setdefault(key, set()).add(value)
    numeric = {key: len(found) for key, found in values.items() if all(is_number(value) for value in found)}
    most = max(numeric, key=lambda key: numeric[key], default="")
    return most if numeric.get(most, 0) >= POINTS else None


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def draw_curves(curves: Curves, out: Path, title: str) -> None:
    """Draw one panel for each of PANELS that was measured, both axes logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [panel for panel in PANELS if curves.lines[panel]]
    figure = Figure(figsize=(5.5 * len(panels), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        values = set()
        for name, points in curves.lines[panel].items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=name)
            values |= {value for value, _ in points}
        axis.set(xscale="log", yscale="log", xlabel=curves.key, ylabel="microseconds a token", title=panel)
        axis.set_xticks(sorted(values), [f"{value:g}" for value in sorted(values)])
        axis.tick_params(which="minor", labelbottom=False)
        axis.grid(which="both", alpha=0.3)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(out, dpi=100)
