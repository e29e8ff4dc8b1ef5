"""The curves of a run as a PNG: loss against tokens and against time, learning rate, gradient norm."""

from __future__ import annotations

from pathlib import Path

from trainer.metrics.record import read_rows


def draw(metrics: Path, out: Path, title: str) -> None:
    """Read metrics.jsonl and write the picture; needs two rows at least, else writes nothing."""
    rows = read_rows(metrics)
    if len(rows) < 2:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Margins set by hand: a run waits for the picture, which takes half as long again where the layout is worked out.
    figure = Figure(figsize=(11, 7))
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        2, 2, gridspec_kw={"left": 0.09, "right": 0.98, "bottom": 0.08, "top": 0.92, "wspace": 0.26, "hspace": 0.25}
    )
    tokens = [row["tokens"] / 1e6 for row in rows]
    seconds = [row["seconds"] for row in rows]
    evaluated = [row for row in rows if row["val_loss"] is not None]
    for axis, x, label, key, unit in (
        (axes[0, 0], tokens, "tokens, millions", "tokens", 1e6),
        (axes[0, 1], seconds, "training time, seconds", "seconds", 1),
    ):
        axis.plot(x, [row["loss"] for row in rows], linewidth=0.8, alpha=0.7, label="training")
        if evaluated:
            at = [row[key] / unit for row in evaluated]
            axis.plot(at, [row["val_loss"] for row in evaluated], marker="o", markersize=3, label="validation")
        axis.set(xlabel=label, ylabel="loss, nats per token")
        axis.legend()
    axes[1, 0].plot(tokens, [row["lr"] for row in rows])
    axes[1, 0].set(xlabel="tokens, millions", ylabel="learning rate of the matrices")
    norms = [row["grad_norm"] for row in rows]
    axes[1, 1].plot(tokens, norms, linewidth=0.8)
    axes[1, 1].set(xlabel="tokens, millions", ylabel="gradient norm")
    if all(norm and norm > 0 for norm in norms):
        axes[1, 1].set_yscale("log")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(out, dpi=110)
