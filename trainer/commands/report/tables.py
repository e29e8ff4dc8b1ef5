"""The tables of a page: cells as text, made once for HTML, Markdown and the terminal."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from trainer.commands.report.caveats import label
from trainer.commands.report.load import Run
from trainer.commands.report.page import Table
from trainer.commands.report.results import LEVEL, Result
from trainer.commands.report.study import Arm, Study
from trainer.core.text import printable
from trainer.planning.run_config import changeable

MISSING = "n/a"
CELL = 80  # characters of a cell that comes from a folder
MOST_ROWS = 200  # of tables that list runs or keys
SAMPLE = 400  # characters of a sample
GIB = 1024**3


def show(value: float | None, form: str) -> str:
    return MISSING if value is None else format(value, form)


def _names_header(study: Study) -> list[str]:
    return ["arm"] if len(study.scales) == 1 else ["arm", "scale"]


def _names(study: Study, arm: Arm) -> list[str]:
    """The first cells of an arm's row: its name, and its scale if there are several."""
    return [arm.name, f"{arm.scale:g}"][: len(_names_header(study))]


def p_cell(p: float | None) -> str:
    return MISSING if p is None else "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def span(interval: tuple[float, float] | None) -> str:
    return MISSING if interval is None else f"[{interval[0]:+.4f}, {interval[1]:+.4f}]"


def final_table(study: Study, results: list[Result], target: float | None) -> Table:
    """What each arm reached, and how it differs from the baseline."""
    unit = "nats" if results[0].metric == "loss" else "bits/byte"
    header = [
        *_names_header(study),
        "seeds",
        "loss",
        "sd",
        "bits/byte",
        "difference",
        "claim",
        "95 % t",
        "95 % bootstrap",
    ]
    header += ["p", "p, Holm", "seeds needed", *([] if target is None else [f"p, loss < {target:g}"])]
    rows = []
    for one in results:
        losses = [run.loss for run in one.arm.by_seed.values() if run.loss is not None]
        difference, interval, p = (None,) * 3 if one.test is None else (one.test.mean, one.test.interval, one.test.p)
        rows.append(
            [
                *_names(study, one.arm),
                f"{len(one.arm.by_seed)} of {one.planned}",
                show(sum(losses) / len(losses) if losses else None, ".4f"),
                show(one.sd, ".4f"),
                show(mean([run.bits for run in one.arm.by_seed.values()]), ".4f"),
                "baseline" if one.is_baseline else show(difference, "+.4f"),
                "" if one.is_baseline else "no claim" if one.claim == "none" else one.claim,
                span(interval),
                span(one.bootstrap),
                p_cell(p),
                p_cell(one.adjusted),
                MISSING if one.needed is None else f"{one.needed:,}",
                *([] if target is None else [p_cell(one.below_target)]),
            ]
        )
    notes = [
        "loss: mean validation loss (nats per token) of the finished seeds at the end of the schedule; sd: its standard "
        f"deviation between seeds{'' if unit == 'nats' else ', here of bits/byte'}",
        f"difference: arm - {study.baseline} of the same scale, in {unit}, mean over pairs of runs with the same seed; negative is "
        "better; its 95 % intervals by Student's t and by a percentile bootstrap (10,000 draws; too narrow below about 10 seeds)",
        f"p: paired t test, two-sided; p, Holm: adjusted for the number of arms of which something can be claimed; claim: p, Holm < {LEVEL:g} (modded-nanogpt's rule)",
        f"seeds needed: to show a difference of this size at p, Holm < {LEVEL:g} with a power of 80 %, if mean and spread are the true ones",
    ]
    if target is not None:
        notes.append(
            f"p, loss < {target:g}: one-sided t test of the mean loss, adjusted for the number of arms (Holm); modded-nanogpt accepts a record at p < {LEVEL:g}"
        )
    return Table(header, rows, notes)


def mean(values: list[float | None]) -> float | None:
    """The mean; None if a value is missing, or there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def cost_table(study: Study, results: list[Result]) -> Table:
    """What each arm cost: medians over the finished seeds."""
    header = [
        *_names_header(study),
        "learning rate",
        "parameters",
        "tokens",
        "FLOPs",
        "seconds",
        "tokens/s",
        "peak memory, GiB",
    ]
    rows = []
    for one in results:
        peak = one.median("peak_memory_bytes")
        rows.append(
            [
                *_names(study, one.arm),
                show(one.arm.learning_rate or one.median("learning_rate"), ".3g"),
                show(one.median("parameters"), ",.0f"),
                show(one.median("tokens"), ",.0f"),
                show(one.median("flops"), ".3e"),
                show(one.median("seconds"), ",.1f"),
                show(one.median("rate"), ",.0f"),
                MISSING if peak is None else f"{peak / GIB:.3f}",
            ]
        )
    notes = [
        "medians over the finished seeds; seconds: training alone, without validation and saving; FLOPs: of training, as the model "
        "counts them, attention over the whole square; tokens/s: median of the steps after the first",
    ]
    return Table(header, rows, notes)


def difference_table(study: Study) -> Table:
    """The keys in which the configs of arms differ."""
    shown = [(arm, arm.example) for arm in study.arms]
    unimportant = {key for _, run in shown if run for key in changeable(run.get("model.name"))} - {"max_steps"}
    free = (*unimportant, "seed", "data.source", "log.")
    known = [run for _, run in shown if run is not None]
    keys = [key for key in dict.fromkeys(key for run in known for key in run.values) if not key.startswith(free)]
    values = {key: {repr(run.values.get(key, MISSING)) for run in known} for key in keys}
    # A field of one architecture says nothing beyond its name, unless it differs among the arms that have it.
    differing = [key for key in keys if len(values[key] - {repr(MISSING)}) > 1]
    only_some = [key for key in keys if len(values[key]) > 1 and key not in differing]
    differing += dict.fromkeys(
        key for arm in study.arms if not arm.example for key in arm.changes if key not in differing
    )
    rows = [[key, *(_setting(arm, run, key) for arm, run in shown)] for key in differing[:MOST_ROWS]]
    notes = ["*: inferred, as the run's plan.txt says; n/a: not set, or this model has no such key"]
    if only_some:
        notes.append(f"{len(only_some)} keys are not shown that only some models have, with equal values")
    if len(differing) > MOST_ROWS:
        notes.append(f"{len(differing) - MOST_ROWS} more keys differ")
    return Table(["key", *(label(study, arm) for arm in study.arms)], rows, notes)


def _setting(arm: Arm, run: Run | None, key: str) -> str:
    value = arm.changes.get(key) if run is None else run.get(key)
    if value is None:
        return MISSING
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return printable(text, CELL) + ("*" if run is not None and key in run.inferred else "")


def failure_table(study: Study) -> Table:
    """Runs that are not finished, and arms that were refused, with what they said."""
    rows = [
        [label(study, arm), "", "refused", printable(arm.refused, 300)] for arm in study.arms if arm.refused is not None
    ]
    for arm in study.arms:
        rows += [[label(study, arm), run.name, run.state, run.message] for run in arm.runs if not run.finished]
    notes = [f"{len(rows) - MOST_ROWS} more"] if len(rows) > MOST_ROWS else []
    return Table(["arm", "run", "state", "message"], rows[:MOST_ROWS], notes)


def environment_table(study: Study) -> Table:
    """Versions, machine and git of all starts of all runs."""
    facts: dict[str, Callable[[dict[str, Any]], Any]] = {
        "host": lambda start: start.get("host"),
        "CPUs": lambda start: start.get("cpus"),
        "processes": lambda start: start.get("processes"),
        "Python": lambda start: start.get("python"),
    }
    names = list(
        dict.fromkeys(name for run in study.runs for start in run.starts for name in start.get("versions", {}))
    )
    rows = [
        ["device", _spread(run.device for run in study.runs)],
        ["precision", _spread(run.get("precision") for run in study.runs)],
    ]
    rows += [
        [fact, _spread(value(start) for run in study.runs for start in run.starts)] for fact, value in facts.items()
    ]
    for name in names[:20]:
        versions = (start.get("versions", {}).get(name) for run in study.runs for start in run.starts)
        rows.append([printable(name, CELL), _spread(versions)])
    rows.append(["git", _spread(_commit(start.get("git")) for run in study.runs for start in run.starts)])
    times = sorted(str(start.get("time")) for run in study.runs for start in run.starts if start.get("time"))
    rows.append(["started", MISSING if not times else printable(f"{times[0]} to {times[-1]}", 2 * CELL)])
    return Table(["fact", "value (number of starts, if several)"], rows)


def _commit(git: Any) -> str | None:
    if not isinstance(git, dict):
        return None
    return str(git.get("sha"))[:12] + (" with uncommitted changes" if git.get("dirty") else "")


def data_table(study: Study) -> Table:
    """What dataset.json says."""

    def split(data: dict[str, Any], name: str, what: str) -> Any:
        found = data.get("splits", {})
        inner = found.get(name) if isinstance(found, dict) else None
        value = inner.get(what) if isinstance(inner, dict) else None
        return f"{value:,}" if isinstance(value, int) else None

    def tokenizer(data: dict[str, Any]) -> Any:
        found = data.get("tokenizer")
        return f"{found.get('name')}, {found.get('vocab_size')} tokens" if isinstance(found, dict) else None

    facts: dict[str, Callable[[dict[str, Any]], Any]] = {
        "fingerprint": lambda data: data.get("fingerprint"),
        "source": lambda data: data.get("source"),
        "tokenizer": tokenizer,
        "training tokens": lambda data: split(data, "train", "tokens"),
        "validation tokens": lambda data: split(data, "validation", "tokens"),
        "validation bytes": lambda data: split(data, "validation", "bytes"),
    }
    runs = [run for run in study.runs if run.values]
    return Table(
        ["fact", "value (number of runs, if several)"],
        [[fact, _spread(value(run.data) for run in runs)] for fact, value in facts.items()],
    )


def _spread(values: Iterable[Any]) -> str:
    """The different known values, the most frequent first, with how often each occurs if there are several."""
    counts = Counter(printable(value, CELL) for value in values if value is not None).most_common()
    if len(counts) < 2:
        return counts[0][0] if counts else MISSING
    more = f", {len(counts) - 8} more" if len(counts) > 8 else ""
    return ", ".join(f"{value} ({count})" for value, count in counts[:8]) + more


def samples(study: Study) -> dict[str, str]:
    """The beginning of the last sample of each arm's first seed."""
    found = {}
    for arm in study.arms:
        if arm.example is not None and arm.example.sample:
            text = arm.example.sample
            found[label(study, arm)] = text[:SAMPLE] + ("..." if len(text) > SAMPLE else "")
    return found


def commands(study: Study) -> list[str]:
    """The exact commands: of the comparison, then of each start of each run."""
    found = [shlex.join(study.command)] if study.command else []
    starts = [start["command"] for run in study.runs for start in run.starts if start.get("command")]
    for words in starts:
        first, *rest = map(str, words)
        program = "python -m trainer" if first.endswith("__main__.py") else shlex.quote(first)
        found.append(f"{program} {shlex.join(rest)}")
    found = [printable(line, 1000) for line in dict.fromkeys(found)]
    return found[:MOST_ROWS] + ([f"# {len(found) - MOST_ROWS} more"] if len(found) > MOST_ROWS else [])


def json_number(value: Any) -> Any:
    """`value` for JSON, which has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
