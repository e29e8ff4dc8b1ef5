"""A picture of how an entropy model cuts text into patches: how often it is how uncertain, and a text with its patches coloured."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch

from models.layers.patching import Rule, cut
from trainer.data.dataset import ENTROPIES, PatchesInfo
from trainer.data.stream import Split

COLOURS = ("#bcd7f2", "#f6cfa8", "#c6e3bd", "#f2bfc3", "#dccbe9", "#f4e6a1")
COLUMNS, LINES = 84, 4  # of each coloured text
SHOWN = {10: "\u21b5", 13: "\u21b5", 9: "\u2192"}  # bytes that have no glyph


def patch_sizes(split: Split, info: PatchesInfo) -> dict[str, float]:
    """Mean tokens of a patch of the split, by rule: those that follow from the thresholds, without a limit and without documents."""
    rows = [split.sample(number)[ENTROPIES][1:].astype(np.float32) for number in range(split.counts.samples)]
    counts = {
        "entropy": sum(int((row > info.thresholds["entropy"]).sum()) for row in rows),
        "monotonic": sum(int((np.diff(row) > info.thresholds["monotonic"]).sum()) for row in rows),
    }
    total = sum(len(row) for row in rows)
    return {rule: total / max(1, count) for rule, count in counts.items()}


def render_patches(split: Split, info: PatchesInfo, name: str) -> bytes:
    """The picture, a PNG. split: whose first tokens are shown."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sizes = patch_sizes(split, info)
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    top, *texts = figure.subplots(4, 1, height_ratios=[2.2, 1, 1, 1])
    top.stairs(
        np.array(info.histogram) / max(1, sum(info.histogram)), np.arange(len(info.histogram) + 1) / 10, fill=True
    )
    threshold = info.thresholds["entropy"]
    told = f"a patch ends above {threshold:.3g} nats: {sizes['entropy']:.2f} tokens on average in {split.name}"
    top.axvline(threshold, color="0.2", linestyle=":", label=told)
    top.set(xlabel="entropy of the next token, nats", ylabel="share of tokens", title=name.replace("$", r"\$"))
    top.legend()
    sample = split.sample(0)
    # What is stored of a token says whether the patch before it ends.
    tokens = torch.from_numpy(sample["tokens"].astype(np.int64))[None, : COLUMNS * LINES]
    entropies = torch.from_numpy(sample[ENTROPIES].astype(np.float32))[None, 1 : COLUMNS * LINES + 1]
    tokens = tokens[:, : entropies.shape[1]]
    for axis, rule in zip(
        texts,
        (Rule("entropy", 1.0, threshold), Rule("space", 1.0), Rule("static", info.patch_size)),
        strict=True,
    ):
        colour_text(axis, tokens[0].tolist(), cut(tokens, rule, None, entropies).ids[0].tolist(), rule.kind)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=80, format="png")
    return picture.getvalue()


def colour_text(axis: Any, tokens: list[int], patches: list[int], title: str) -> None:
    """Write one token a cell, in the colour of its patch."""
    from matplotlib.patches import Rectangle

    for i, (token, patch) in enumerate(zip(tokens, patches, strict=True)):
        line, column = divmod(i, COLUMNS)
        axis.add_patch(Rectangle((column, line), 1, 1, color=COLOURS[patch % len(COLOURS)], linewidth=0))
        shown = chr(token) if 32 <= token < 127 else SHOWN.get(token, "\u00b7")
        axis.text(
            column + 0.5,
            line + 0.5,
            shown.replace("$", r"\$"),
            family="monospace",
            fontsize=8,
            ha="center",
            va="center",
        )
    axis.set(xlim=(0, COLUMNS), ylim=(LINES, 0), xticks=[], yticks=[])
    mean = len(tokens) / (patches[-1] + 1)
    axis.set_title(f"{title}: {mean:.2f} tokens on average here", fontsize=9, loc="left")
