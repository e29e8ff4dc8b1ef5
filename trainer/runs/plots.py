"""The curves of a run as a PNG: loss against tokens and time, bits per byte, learning rate, gradient norm, speed."""

from __future__ import annotations

import gc
import io
import warnings
from pathlib import Path

import numpy as np

from trainer.core.files import write_file
from trainer.runs.history import History, smoothed

RAW = {"linewidth": 0.6, "alpha": 0.35, "color": "C0"}
DOTS = {"marker": "o", "markersize": 3, "color": "C1"}
AVERAGE = DOTS | {"color": "C2"}


def draw(history: History, out: Path, title: str) -> None:
    """Write the picture. With fewer than two steps, write nothing."""
    steps, evaluations = history.steps(), history.evaluations()
    if len(steps["loss"]) < 2:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about characters that the font lacks
        picture = render(steps, evaluations, title.replace("$", r"\$"))
    write_file(out, picture)
    gc.collect()  # a figure is 9 MB of reference cycles, and automatic collection is off during a run


def render(steps: dict[str, np.ndarray], evaluations: dict[str, np.ndarray], title: str) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Margins are set by hand: an automatic layout takes half as long again, and the run waits for the picture.
    figure = Figure(figsize=(15, 7.5))
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        2, 3, gridspec_kw={"left": 0.055, "right": 0.985, "bottom": 0.075, "top": 0.92, "wspace": 0.25, "hspace": 0.25}
    )
    average = evaluations["ema_val_loss"]
    averaged = np.isfinite(average)  # not all, if optim.ema was switched on or off
    tokens, evaluated_tokens = steps["tokens"] / 1e6, evaluations["tokens"] / 1e6
    for axis, x, at, label in (
        (axes[0, 0], tokens, evaluated_tokens, "tokens, millions"),
        (axes[0, 1], steps["seconds"], evaluations["seconds"], "training time, seconds"),
    ):
        smooth = smoothed(steps["loss"])
        axis.fill_between(x, steps["loss_low"], steps["loss_high"], color="C0", alpha=0.15, linewidth=0)
        axis.plot(x, steps["loss"], **RAW)
        axis.plot(x, smooth, color="C0", linewidth=1.4, label="training, smoothed")
        if len(at):
            axis.plot(at, evaluations["val_loss"], label=f"validation: {evaluations['val_loss'][-1]:.4f}", **DOTS)
        if averaged.any():
            axis.plot(at, average, label=f"of the moving average: {average[averaged][-1]:.4f}", **AVERAGE)
        axis.set(xlabel=label, ylabel="loss, nats per token")
        axis.set_ylim(loss_range(smooth, np.append(evaluations["val_loss"], average)))
        axis.legend(loc="upper right")
    axes[0, 2].set(ylabel="validation, bits/byte")
    if np.isfinite(evaluations["val_bits_per_byte"]).any():
        last = f"{evaluations['val_bits_per_byte'][-1]:.4f}"
        axes[0, 2].plot(evaluated_tokens, evaluations["val_bits_per_byte"], label=last, **DOTS)
        if averaged.any():
            bits = evaluations["ema_val_bits_per_byte"]
            label = f"of the moving average: {bits[averaged][-1]:.4f}"
            axes[0, 2].plot(evaluated_tokens, bits, label=label, **AVERAGE)
        axes[0, 2].legend(loc="upper right")
    else:
        axes[0, 2].text(0.5, 0.5, "no validation yet", ha="center", transform=axes[0, 2].transAxes)
    axes[1, 0].plot(tokens, steps["lr"])
    axes[1, 0].set(ylabel="learning rate of the matrices")
    axes[1, 0].ticklabel_format(axis="y", scilimits=(-2, 3))
    for axis, key, label in ((axes[1, 1], "grad_norm", "gradient norm"), (axes[1, 2], "tokens_per_second", "tokens/s")):
        axis.plot(tokens, steps[key], **RAW)
        axis.plot(tokens, smoothed(steps[key]), color="C0", linewidth=1.4)
        axis.set(ylabel=label)
    if np.nanmin(steps["grad_norm"], initial=np.inf) > 0 and np.isfinite(steps["grad_norm"]).any():
        axes[1, 1].set_yscale("log")
    axes[1, 2].set_ylim(bottom=0)
    for axis in (axes[0, 2], *axes[1]):
        axis.set_xlabel("tokens, millions")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=100, format="png", pil_kwargs={"compress_level": 1})  # takes a third of the time
    return picture.getvalue()


def loss_range(smooth: np.ndarray, validation: np.ndarray) -> tuple[float | None, float | None]:
    """The lowest and highest loss to show. The steep fall of the first steps is left out: it would flatten the rest."""
    shown = np.concatenate([smooth[len(smooth) // 20 :], validation])
    shown = shown[np.isfinite(shown)]
    if len(shown) == 0 or shown.min() == shown.max():
        return None, None
    margin = 0.08 * (shown.max() - shown.min())
    return shown.min() - 2 * margin, shown.max() + margin
