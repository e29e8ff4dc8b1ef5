"""The work of the verb: read the folders, make the page, write its files."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from trainer import __version__
from trainer.commands.report import ReportConfig, html, markdown, run_html, tables
from trainer.commands.report.caveats import Caveat, label, metric_of
from trainer.commands.report.claims import Judgement, claim_table, judge
from trainer.commands.report.evidence import find_caveats
from trainer.commands.report.figures import curve_figures, rate_figures
from trainer.commands.report.load import Run
from trainer.commands.report.one_run import details, run_body
from trainer.commands.report.page import Figure, Page, Section
from trainer.commands.report.results import LEVEL, Result, p_text, results
from trainer.commands.report.statistics import TTest
from trainer.commands.report.study import Study, read_studies
from trainer.commands.report.task_table import task_table
from trainer.core.files import user_path, write_file
from trainer.core.text import for_stream, printable

FORMAT = 1
MOST_NOTES = 30  # shown; report.json has all


def run(config: ReportConfig, as_json: bool) -> None:
    """Write report.html, report.md, report.json and the figures; print the tables with their caveats, or the JSON."""
    studies = read_studies(config.folders, config.baseline)
    folder = _folder(config, studies)
    made = time.strftime("%Y-%m-%d %H:%M:%S %z")
    sections, bodies = [], []
    for i, study in enumerate(studies):
        caveats = find_caveats(study)
        found = results(study, metric_of(study), caveats, config.target)
        judged = judge(study, metric_of(study), caveats)
        sections.append(section(study, f"s{i}", found, caveats, config.target))
        sections[-1].claims = claim_table(study, judged, metric_of(study))
        bodies.append(body(study, found, caveats) | {"claims": [_claim_body(one) for one in judged]})
    page = Page(_title(studies), f"Made by crescendo-lm {__version__}, {made}", sections)
    content: dict[str, Any] = {
        "format": FORMAT,
        "made": made,
        "level": LEVEL,
        "target": config.target,
        "studies": bodies,
    }
    single = only_run(studies)
    if single is not None:
        page.run = details(single, studies[0], sections[0], find_caveats(studies[0]))
        page.title = f"Run {single.name}"
        content["run"] = run_body(page.run)
    text = json.dumps(content, indent=1)
    rendered = html.render(page) if page.run is None else run_html.render(page, page.run)
    files = {"report.html": rendered, "report.md": markdown.render(page), "report.json": text + "\n"}
    for name, written in (files | markdown.figure_files(page)).items():
        write_file(folder / name, written)
    sys.stdout.write((text if as_json else for_stream(markdown.summary(page), sys.stdout)) + "\n")
    print(f"{printable(folder)}: {', '.join(files)}, {len(markdown.figure_files(page))} figures", file=sys.stderr)


def _folder(config: ReportConfig, studies: list[Study]) -> Path:
    """The folder for the files; created if it is missing."""
    if config.out is not None:
        folder = user_path(config.out, "out")
    elif len(studies) == 1 and studies[0].folder is not None:
        folder = studies[0].folder / "report"
    elif (single := only_run(studies)) is not None:
        folder = single.folder / "report"
    else:
        folder = Path("runs") / time.strftime("report-%Y%m%d-%H%M%S")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def only_run(studies: list[Study]) -> Run | None:
    """The run, if a single one is reported."""
    runs = [run for study in studies for run in study.runs]
    return runs[0] if len(runs) == 1 and not studies[0].declared else None


def _title(studies: list[Study]) -> str:
    names = [study.name for study in studies if study.declared]
    loose = sum(len(study.runs) for study in studies if not study.declared)
    parts = [f"Comparison {', '.join(names[:3])}{' and more' if len(names) > 3 else ''}"] if names else []
    return " and ".join(parts + ([f"{loose} run{'s' if loose > 1 else ''}"] if loose else []))


def section(study: Study, stem: str, found: list[Result], caveats: list[Caveat], target: float | None) -> Section:
    """All that the page shows of a study. stem: the beginning of its figures' names."""
    figures: dict[str, list[Figure]] = {}
    metric = metric_of(study)
    for kind in ("validation", "training"):
        for scale in study.scales:
            where = f", scale {scale:g}" if len(study.scales) > 1 else ""
            drawn = curve_figures(study, f"{stem}-{scale:g}".replace(".", "_"), scale, kind, metric)
            if drawn:
                figures[f"{kind.capitalize()} loss{where}"] = drawn
    rates = rate_figures(study, stem, metric)
    if rates:
        figures["Learning rates"] = rates
    return Section(
        study.name if study.declared else "Runs",
        _lead(study),
        [(one.claim, f"{one.verdict}{_where(study, one)}.") for one in found if one.verdict]
        + _targets(study, found, target),
        [caveat.text for caveat in caveats] + _first(study.notes),
        tables.final_table(study, found, target),
        tables.cost_table(study, found),
        figures,
        tables.difference_table(study),
        tables.samples(study),
        tables.failure_table(study),
        tables.environment_table(study),
        tables.data_table(study),
        tables.commands(study),
        tasks=task_table(study),
    )


def _first(notes: list[str]) -> list[str]:
    more = len(notes) - MOST_NOTES
    return (
        notes
        if more <= 0
        else [*notes[:MOST_NOTES], f"{more:,} more files could not be read as they should; report.json names them."]
    )


def _lead(study: Study) -> list[str]:
    finished = sum(run.finished for run in study.runs)
    lines = [f"{len(study.arms)} arms, {len(study.runs)} runs, {finished} of them finished; baseline: {study.baseline}"]
    if study.declared:
        seeds = ", ".join(map(str, study.seeds))
        tuning = "" if study.tuning_seed is None else f"; tuning seed {study.tuning_seed}"
        lines += [f"budget: equal {study.budget}; seeds {seeds}{tuning}", f"learning rates: {study.rule}"]
    return lines


def _where(study: Study, one: Result) -> str:
    return f" (scale {one.arm.scale:g})" if len(study.scales) > 1 else ""


def _targets(study: Study, found: list[Result], target: float | None) -> list[tuple[str, str]]:
    """A sentence about the arms whose loss is below the target, and one about the others: modded-nanogpt's own test."""
    if target is None:
        return []
    lines = []
    for kind, words in (("better", "Mean loss below"), ("none", "Mean loss not shown to be below")):
        arms = [
            one for one in found if (one.below_target is not None and one.below_target < LEVEL) == (kind == "better")
        ]
        names = (
            f"{label(study, one.arm)} ({'too few seeds, or equal losses' if one.below_target is None else p_text(one.below_target)})"
            for one in arms
        )
        if arms:
            lines.append((kind, f"{words} {target:g} (one-sided, p < {LEVEL:g}): {', '.join(names)}."))
    return lines


def body(study: Study, found: list[Result], caveats: list[Caveat]) -> dict[str, Any]:
    """The numbers of a study, for the JSON. README.md documents its fields."""
    return {
        "name": study.name,
        "folder": None if study.folder is None else str(study.folder),
        "spec": study.spec,
        "budget": study.budget,
        "baseline": study.baseline,
        "arms": [_arm_body(one) for one in found],
        "caveats": [{"rule": caveat.rule, "text": caveat.text, "arms": caveat.arms} for caveat in caveats],
        "notes": study.notes,
        "environment": {fact: value for fact, value in tables.environment_table(study).rows},
        "data": {fact: value for fact, value in tables.data_table(study).rows},
        "runs": [
            {
                "folder": str(run.folder),
                "arm": arm.name,
                **{key: tables.json_number(getattr(run, key)) for key in RUN_KEYS},
            }
            for arm in study.arms
            for run in arm.runs
        ],
    }


RUN_KEYS = (
    "scale",
    "seed",
    "learning_rate",
    "purpose",
    "state",
    "message",
    "step",
    "loss",
    "bits",
    "tokens",
    "flops",
    "seconds",
)


def _claim_body(one: Judgement) -> dict[str, Any]:
    return {
        "claim": one.claim.words,
        "source": one.claim.source,
        "scale": one.scale,
        "verdict": one.verdict,
        "pairs": [
            {
                "better": pair.better.name,
                "worse": pair.worse.name,
                "difference": _test_body(pair.test),
                "p_holm": pair.adjusted,
                "blocked": pair.blocked,
            }
            for pair in one.pairs
        ],
    }


def _test_body(test: TTest | None) -> dict[str, Any] | None:
    return None if test is None else {key: tables.json_number(value) for key, value in dataclasses.asdict(test).items()}


def _arm_body(one: Result) -> dict[str, Any]:
    return {
        "name": one.arm.name,
        "scale": one.arm.scale,
        "learning_rate": one.arm.learning_rate,
        "bracketed": one.arm.bracketed,
        "metric": one.metric,
        "values": one.values,
        "planned": one.planned,
        "mean": one.mean,
        "sd": one.sd,
        "bits_per_byte": tables.mean([run.bits for run in one.arm.by_seed.values()]),
        "difference": _test_body(one.test),
        "bootstrap": one.bootstrap,
        "p_holm": one.adjusted,
        "seeds_needed": one.needed,
        "p_below_target": one.below_target,
        "claim": one.claim,
        "verdict": one.verdict,
        **{key: one.median(key) for key in ("parameters", "tokens", "flops", "seconds", "rate", "peak_memory_bytes")},
    }
