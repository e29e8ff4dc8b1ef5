"""All that the page of one run shows, besides its curves: read from the run's folder, nothing guessed.

What cannot be read becomes a line in `Run.notes`.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from trainer.commands.report.caveats import Caveat
from trainer.commands.report.load import Run
from trainer.commands.report.page import RunDetails, Section
from trainer.commands.report.run_tables import (
    amounts_table,
    checkpoints_table,
    config_table,
    evaluations_table,
    read_plan,
    results_table,
    roles_table,
    starts_table,
)
from trainer.commands.report.series import charts, read_columns, thinned
from trainer.commands.report.study import Study
from trainer.commands.report.tables import CELL, GIB, MISSING, show
from trainer.core.files import system_error
from trainer.core.text import printable

SAMPLES = 200  # of samples.txt that the page holds
SAMPLE_LENGTH = 2000  # characters of each
SAMPLES_BYTES = 64 << 20  # read of samples.txt
HEADER = re.compile(r"^=== (step [^\n]*)\n", re.MULTILINE)
# Rules of evidence that concern a single run.
OF_A_RUN = ("data_repeated", "batch_multiplied", "machines_differ", "code_differs")


def details(run: Run, study: Study, section: Section, caveats: list[Caveat]) -> RunDetails:
    """All that the page shows of `run`, the only one of `study`. section: what a page of several runs would show."""
    run.notes = []
    columns = _columns(run)
    series, plan = thinned(columns), read_plan(run)
    tables = {
        "Evaluations": evaluations_table(columns),
        "Tasks": results_table(run),
        "Planned and measured": amounts_table(run, plan, columns),
        "Parameters": roles_table(run),
        "Checkpoints": checkpoints_table(run),
        "Configuration": config_table(run, plan),
        "Data": section.data,
        "Starts": starts_table(run),
        "Environment": section.environment,
    }
    samples = read_samples(run)
    told = [caveat.text for caveat in caveats if caveat.rule in OF_A_RUN]
    return RunDetails(
        run.name,
        "ended early" if run.ended_early and run.state == "unfinished" else run.state,
        _lead(run),
        _tiles(run, columns),
        own_caveats(run, columns) + told + study.notes + run.notes,
        series,
        charts(series),
        section.figures,
        samples,
        tables,
        section.commands,
    )


def _columns(run: Run) -> dict[str, np.ndarray]:
    try:
        return read_columns(run.folder / "metrics.jsonl")
    except OSError:  # load.py has noted it
        return {}


def _lead(run: Run) -> list[str]:
    name, scale = run.get("model.name"), run.get("model_scale")
    size = MISSING if run.parameters is None else f"{run.parameters:,} parameters"
    where = f"{run.device}, {run.get('precision')}, strategy {run.get('engine.strategy')}"
    lines = [f"{name} at model_scale {show(scale, 'g')}, {size}; {where}; seed {run.seed}", str(run.folder)]
    for key, word in (("init_from", "began with the weights of"), ("branch_from", "branched from")):
        if run.get(key):
            lines.append(f"{word} {run.get(key)}")
    return lines


def _tiles(run: Run, columns: dict[str, np.ndarray]) -> list[tuple[str, str, str]]:
    """The most important numbers: name, value, what else to know."""
    from trainer.runs.console import format_duration

    losses = columns.get("val_loss", np.array([]))
    rows = np.flatnonzero(np.isfinite(losses))
    tiles = []
    if len(rows):
        best, last = int(rows[np.argmin(losses[rows])]), int(rows[-1])
        at = f"at step {int(columns['step'][last]):,}"
        tiles.append(("validation loss", f"{losses[last]:.4f}", f"nats per token, {at}"))
        if best != last:
            tiles.append(("best validation loss", f"{losses[best]:.4f}", f"at step {int(columns['step'][best]):,}"))
        bits = columns.get("val_bits_per_byte", losses)[last]
        if np.isfinite(bits) and "val_bits_per_byte" in columns:
            tiles.append(("bits per byte", f"{bits:.4f}", at))
    tiles.append(("steps", f"{run.step:,}", f"of {show(run.get('max_steps'), ',.0f')}"))
    tiles.append(("tokens", show(run.tokens, ",.0f"), "" if run.epochs is None else f"{run.epochs:.3g} epochs"))
    if run.seconds is not None:
        tiles.append(("training time", format_duration(run.seconds), "without validation and saving"))
    tiles.append(("tokens/s", show(run.rate, ",.0f"), "median"))
    if run.peak_memory_bytes:
        tiles.append(("peak memory", f"{run.peak_memory_bytes / GIB:.2f} GiB", "of rank 0"))
    return tiles


def run_body(run: RunDetails) -> dict[str, Any]:
    """The same for report.json: tables as lists of rows with their header."""
    return {
        "name": run.name,
        "state": run.state,
        "summary": {name: value for name, value, _ in run.tiles},
        "caveats": run.caveats,
        "every": run.series["every"],
        "curves": {"steps": run.series["points"], "evaluations": run.series["evaluations"]},
        "samples": [{"at": header, "text": text} for header, text in run.samples],
        "tables": {
            title: {"header": table.header, "rows": table.rows} for title, table in run.tables.items() if table.rows
        },
    }


def read_samples(run: Run) -> list[tuple[str, str]]:
    """(header, text) of the samples in samples.txt, the first ones first; of very many some, evenly spaced, the last one always."""
    try:
        with (run.folder / "samples.txt").open("rb") as file:
            text = file.read(SAMPLES_BYTES).decode("utf-8", "replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        run.note(str(system_error(error, f"{run.name}: samples.txt: cannot be read")))
        return []
    pieces = HEADER.split(text)[1:]
    pairs = [
        (printable(header, CELL), body.strip("\n")) for header, body in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    if len(pairs) > SAMPLES:
        run.note(f"{run.name}: the page shows {SAMPLES} of {len(pairs):,} samples; samples.txt has all")
        pairs = [pairs[i] for i in np.linspace(0, len(pairs) - 1, SAMPLES).round().astype(int)]
    return [(header, body if len(body) <= SAMPLE_LENGTH else body[:SAMPLE_LENGTH] + " ...") for header, body in pairs]


def own_caveats(run: Run, columns: dict[str, np.ndarray]) -> list[str]:
    """What a reader of this one run should know, beside the rules of evidence."""
    found = []
    if run.message:
        found.append(f"The run is {run.state}: {run.message}.")
    losses = columns.get("val_loss", np.array([]))
    rows = np.flatnonzero(np.isfinite(losses))
    if len(rows) > 1:
        best = int(rows[np.argmin(losses[rows])])
        if best != rows[-1]:
            found.append(
                f"The lowest validation loss, {losses[best]:.4f}, was at step {int(columns['step'][best]):,}; the last one is "
                f"{losses[rows[-1]]:.4f}."
            )
    steps = columns.get("loss", np.array([]))
    skipped = int(np.sum(~np.isfinite(steps)))
    if skipped:
        found.append(f"{skipped:,} steps had a loss or gradient that was not finite.")
    if run.get("evaluation.max_tokens") and len(rows):
        found.append(
            f"Evaluations before the last step are on about {run.get('evaluation.max_tokens'):,} tokens of the validation split."
        )
    return found
