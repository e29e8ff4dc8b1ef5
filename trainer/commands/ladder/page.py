"""ladder.md, ladder.json and ladder.png: points, laws, the prediction beside what came, and where the rule of lr is off."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.commands.ladder.fit import fit
from trainer.commands.ladder.rates import GOAL, Optimum
from trainer.commands.ladder.spec import Rung, means_of, whose
from trainer.core.files import write_file
from trainer.core.text import markdown_table, printable_lines
from trainer.planning.laws import LAWS, ONCE, SHARE, Fit, Law, PowerLaw, middle_of, numbers_of
from trainer.runtime.environment import environment

Points = Sequence[tuple[Rung, int, float]]


class Swept(NamedTuple):
    """What a sweep changes. key: of a run's config; name: of its files; word: in the table; axis: in the figure; shown: its values as
    text."""

    key: str
    name: str
    title: str
    word: str
    axis: str
    shown: Callable[[float], str]
    notes: tuple[str, ...] = ()


RATES = Swept("optim.lr", "learning-rates", "Learning rates of the ladder", "lr", "learning rate", "{:.3g}".format)
BATCHES = Swept(
    *("batch.tokens_per_step", "batches", "Batches of the ladder", "B", "tokens of a step", "{:,.0f}".format),
    (
        "B: tokens of a step; each run of a size trains on as many tokens; lr follows the square root of B from the plan's at the plan's B",
    ),
)


def publish_losses(
    folder: Path, about: str, points: Points, found: Fit, held_out: Rung, prediction: dict[str, Any], measured: float
) -> None:
    """Write the page of the loss law, and print it. about: a line on its runs; measured: loss of the held-out run."""
    off = measured - prediction["loss"]
    inside = prediction["low"] <= measured <= prediction["high"]
    rows = [["scale", "N", "tokens", "tokens / N", "seed", "lr", "loss", "law", "off"]]
    for one, seed, loss in points:
        expected = found.law.loss(*one.point)
        rows.append([*cells(one, seed), f"{loss:.4f}", f"{expected:.4f}", f"{loss / expected - 1:+.2%}"])
    lines = [
        f"L(N, D) = {found.law.formula()}, in nats a token",
        intervals(found),
        *compute_laws(points),
        *repeated([*(one for one, _, _ in points), held_out]),
        f"predicted before the run: scale {held_out.arm.scale:g}, N {held_out.size:,}, {held_out.length.tokens:,} tokens: "
        f"{prediction['loss']:.4f}, {prediction['share']:.0%} between {prediction['low']:.4f} and {prediction['high']:.4f}",
        *earlier_fit(found, prediction),
        f"measured: {measured:.4f}, {off:+.4f} nats ({off / prediction['loss']:+.2%}), "
        f"{'inside' if inside else 'outside'} the interval",
        "N: parameters without embeddings and head; the interval: bootstrap by the scatter of the residuals, with a run's own scatter",
        about,
        f"{LAWS} holds this law: `plan --dial {folder / LAWS}` says which loss a run should end with",
    ]
    body = {
        "law": found.law.formula(),
        "numbers": law_numbers(found),
        "points": [
            {"scale": one.arm.scale, "N": one.size, "D": one.length.tokens, "seed": seed, "loss": loss}
            for one, seed, loss in points
        ],
        "prediction": prediction,
        "measured": measured,
    }
    publish(folder, "ladder", "Ladder of losses", rows, lines, body)
    draw_losses(folder / "ladder.png", points, found.law, held_out, prediction, measured)


def earlier_fit(found: Fit, prediction: dict[str, Any]) -> list[str]:
    """A line if the prediction is of another law than the page's: a prediction stays when more runs make a new fit."""
    before = prediction["law"]
    return [] if before == found.law.formula() else [f"the prediction is of an earlier fit: L(N, D) = {before}"]


def repeated(rungs: Iterable[Rung]) -> list[str]:
    """A line if runs read their data more than once: they learn less from that than from new tokens (arXiv 2305.16264)."""
    most = max(one.epochs for one in rungs)
    return [f"the data are read up to {most:.3g} times: this law is not one of new tokens"] if most > ONCE else []


def cells(one: Rung, seed: int) -> list[str]:
    return [
        f"{one.arm.scale:g}",
        f"{one.size:,}",
        f"{one.length.tokens:,}",
        ratio(one.length.tokens / one.size),
        str(seed),
        f"{one.length.learning_rate:.3g}",
    ]


def ratio(value: float) -> str:
    """Three significant digits, and from 100 on all digits before the point: 0.0312, 5, 20.5, 1,250."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def law_numbers(found: Fit) -> dict[str, dict[str, float]]:
    """Each number of L(N, D) or L(C), with the middle 90 % of the bootstrap."""
    names = ("E", "A", "alpha", "B", "beta") if len(found.law.names) == 2 else ("E", "k", "gamma")
    numbers = {}
    drawn = zip(*map(numbers_of, found.draws), strict=True)  # of each number
    for name, value, values in zip(names, numbers_of(found.law), drawn, strict=True):
        low, high = middle_of(values, SHARE)
        numbers[name] = {"value": value, "low": low, "high": high}
    return numbers


def intervals(found: Fit) -> str:
    """The numbers of a law as text."""
    shown = (f"{name} {n['value']:.4g} [{n['low']:.4g}, {n['high']:.4g}]" for name, n in law_numbers(found).items())
    return "90 % intervals: " + ", ".join(shown)


def compute_laws(points: Points) -> list[str]:
    """L(C) = E + k C^-gamma at each number of tokens a parameter that has enough sizes; C: training FLOPs."""
    lines = []
    means = means_of(points)
    for multiple in sorted({one.multiple for one, _ in means}):
        part = [(one.length.flops, loss) for one, loss in means if one.multiple == multiple]
        try:
            found = fit(("C",), [[flops] for flops, _ in part], [loss for _, loss in part])
        except ValueError:
            continue  # a power with an irreducible term needs four points
        formula = f"L(C) = {found.law.formula()}, C in training FLOPs"
        lines.append(f"at {multiple:g} tokens a parameter: {formula}; {intervals(found)}")
    return lines


def publish_sweeps(
    folder: Path,
    about: str,
    what: Swept,
    rungs: Sequence[Rung],
    found: Sequence[tuple[Optimum, Mapping[float, Sequence[float]]]],
    law: PowerLaw | None,
) -> None:
    """Write the page of the sweeps, and print it. about: a line on its runs; found: the optimum of each rung, and the losses of each value
    by seed; law: in laws.yaml, None if there are too few optima."""
    word, shown, source = what.word, what.shown, whose(rungs[0], what.key)
    rows = [["scale", "N", "tokens", f"{source} {word}", f"best {word}", "its loss", "lowest", "it loses", "verdict"]]
    for one, (best, _) in zip(rungs, found, strict=True):
        lost = f"{best.lost:.4f}" + (f" ± {best.error:.4f}" if best.error else "")
        sizes = f"{one.arm.scale:g}", f"{one.size:,}", f"{one.length.tokens:,}", shown(best.own), shown(best.best)
        rows.append([*sizes, f"{best.own_loss:.4f}", f"{best.lowest:.4f}", lost, best.verdict])
    kept = (
        f"{LAWS} has no law of it: fewer than two sizes have an optimum with worse neighbours"
        if law is None
        else f"in {LAWS}, through the optima with worse neighbours, N without embeddings and head: {law.law}"
    )
    seeds = len(next(iter(found[0][1].values())))
    noise = (
        "one seed, which may move such a difference by as much"
        if seeds == 1
        else f"losses: means of {seeds} seeds; ±: standard error of the difference; the lowest of noisy means is a little too low"
    )
    curves = [
        f"scale {one.arm.scale:g}, {word} and loss: "
        + ", ".join(f"{shown(value)} {np.mean(of):.4f}" for value, of in sorted(losses.items()))
        for one, (_, losses) in zip(rungs, found, strict=True)
    ]
    lines = [
        kept,
        *curves,
        f"best: lowest point of a parabola in ln {word} through the best and its neighbours; goal: the {source} {word} loses {GOAL:g} nats "
        f"or less; {noise}",
        *([f"{what.key} is given: this says nothing of its rule"] if source == "given" else []),
        *what.notes,
        about,
    ]
    body = {
        "law": None if law is None else law.law,
        "sizes": [
            {
                **{"scale": one.arm.scale, "N": one.size, "D": one.length.tokens, "own": best.own, "best": best.best},
                **{"lowest": best.lowest, "lost": finite(best.lost), "error": best.error, "bracketed": best.bracketed},
                "losses": {f"{value:g}": [finite(loss) for loss in of] for value, of in sorted(losses.items())},
            }
            for one, (best, losses) in zip(rungs, found, strict=True)
        ],
    }
    publish(folder, what.name, what.title, rows, lines, body)
    draw_sweeps(folder / f"{what.name}.png", what, rungs, found)


def finite(loss: float) -> float | None:
    """None for the loss of a run that diverged: JSON has no infinity."""
    return loss if np.isfinite(loss) else None


def publish(folder: Path, name: str, title: str, rows: list[list[str]], lines: list[str], body: dict[str, Any]) -> None:
    """Write NAME.md and NAME.json, and print the table."""
    markdown = "\n".join([f"# {title}", "", *markdown_table(rows), "", *(f"- {line}" for line in lines)])
    write_file(folder / f"{name}.md", markdown + "\n")
    write_file(folder / f"{name}.json", json.dumps({"environment": environment(), **body}, indent=1) + "\n")
    sys.stdout.write(printable_lines(markdown) + "\n")


def draw_losses(
    out: Path, points: Points, law: Law, held_out: Rung, prediction: dict[str, Any], measured: float
) -> None:
    """Loss over tokens, a line of the law for each size, and the prediction with what was measured."""
    figure, axis = new_figure()
    sizes = sorted({one.size for one, _, _ in points})
    longest = max(one.length.tokens for one, _, _ in points)
    shortest = min(one.length.tokens for one, _, _ in points)
    tokens = np.geomspace(shortest, max(longest, held_out.length.tokens), 60)
    for index, size in enumerate([*sizes, held_out.size]):
        colour = f"C{index}"
        axis.plot(tokens, [law.loss(size, d) for d in tokens], color=colour, linewidth=1, label=f"N {size:,}")
        own = [(one.length.tokens, loss) for one, _, loss in points if one.size == size]
        axis.plot(*zip(*own, strict=True), "o", color=colour, markersize=4) if own else None
    low, high = prediction["loss"] - prediction["low"], prediction["high"] - prediction["loss"]
    at = held_out.length.tokens
    axis.errorbar([at], [prediction["loss"]], [[low], [high]], fmt="s", color="k", capsize=4, label="predicted, 90 %")
    axis.plot([at], [measured], "r*", markersize=11, label="measured")
    axis.set(xlabel="training tokens", ylabel="validation loss, nats a token")
    logarithmic(axis)
    axis.set_title(f"L(N, D) = {law.formula()}", fontsize=9)
    axis.legend(fontsize=8)
    figure.savefig(out, dpi=100)


def draw_sweeps(
    out: Path,
    what: Swept,
    rungs: Sequence[Rung],
    found: Sequence[tuple[Optimum, Mapping[float, Sequence[float]]]],
) -> None:
    """Loss above the lowest over what was swept, means over the seeds, a line for each size; the plan's value is ringed."""
    figure, axis = new_figure()
    for index, (one, (best, losses)) in enumerate(zip(rungs, found, strict=True)):
        means = [(value, float(np.mean(of)) - best.lowest) for value, of in sorted(losses.items())]
        points = [(value, mean) for value, mean in means if np.isfinite(mean)]
        axis.plot(*zip(*points, strict=True), "o-", color=f"C{index}", markersize=4, label=f"N {one.size:,}")
        axis.plot([best.own], [best.lost], "o", color=f"C{index}", markersize=11, fillstyle="none")
        axis.axvline(best.best, color=f"C{index}", linewidth=0.8, linestyle=":")
    axis.axhline(GOAL, color="k", linewidth=0.8, linestyle="--")
    label = f"{what.axis} (ringed: {whose(rungs[0], what.key)}; dotted: the optimum)"
    axis.set(xlabel=label, ylabel="nats above the lowest")
    logarithmic(axis)
    axis.legend(fontsize=8)
    figure.savefig(out, dpi=100)


def logarithmic(axis: Any) -> None:
    """The x axis, with plain numbers in each decade: matplotlib's own, as powers of 10, run into each other."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    thousands = EngFormatter(sep="\N{NO-BREAK SPACE}")
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}" if value < 1 else thousands(value))
    axis.xaxis.set_minor_formatter(NullFormatter())


def new_figure() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.grid(which="both", alpha=0.3)
    return figure, axis
