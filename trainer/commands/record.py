"""`record`: trains the comparisons of a folder, and writes what they show of the claims in their specs. configs/record/README.md is the guide.

runs/record/NAME/      the comparison of NAME.yaml, as `compare` keeps it
FOLDER/NAME.json .svg  its results, and its losses over FLOPs, which stay when the runs are gone
FOLDER/RECORD.md       the page, from all these results
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.commands import Values, Verb
from trainer.core.errors import UserError
from trainer.core.settings import build, merge, setting
from trainer.core.text import markdown_table, printable, printable_lines

if TYPE_CHECKING:
    from trainer.commands.compare import CompareConfig
    from trainer.commands.compare.budget import Length

    Lengths = dict[tuple[str, float], Length]  # of arms, by their keys

KEPT = ("name", "spec", "budget", "baseline", "arms", "claims", "caveats", "environment")  # of a study in report.json
DATA = ("fingerprint", "tokenizer", "training tokens", "validation tokens", "validation bytes")  # and of its data
PAGE = "RECORD.md"
SECONDS_PER_HOUR = 3600


@dataclass
class RecordConfig:
    """`record`: which specs, where their runs are, and how they run."""

    folder: str = setting("configs/record", "folder of the specs and of the page (the flag is optional)")
    runs: str = setting("runs/record", "folder of the comparisons, each in a folder with the name of its spec")
    common: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "keys of a run, over those of each spec; common.data.source is for the specs that name one"},
    )
    jobs: int | None = setting(None, "runs at a time; auto: one per GPU, one on a CPU", low=1)
    price: float | None = setting(None, "price of one device for one hour, in any currency", above=0)
    estimate: bool = setting(False, "measure speeds, print what is left to train and what it costs, and stop")
    train: bool = setting(True, "false: train nothing; write the page from the comparisons and results that there are")


def read(values: Values) -> RecordConfig:
    """The config; what belongs to runs stays text, as in a spec."""
    config = build(RecordConfig, values)
    config.common = values.get("common") or {}
    return config


def run(config: RecordConfig) -> None:
    """Run the verb. UserError for a spec that makes no sense, and at the end if comparisons wait for their data or variants were left out."""
    from trainer.core.files import user_path

    folder = user_path(config.folder, "folder")
    specs = dict(read_specs(folder, config))
    waiting: dict[str, str] = {}
    left_out: list[str] = []
    if config.train or config.estimate:
        lengths, waiting = size_all(specs)
        left_out = print_estimate(specs, lengths, waiting, config)
        if not config.estimate:
            left_out = train_all(specs, lengths)
    if not config.estimate:
        for name, spec in specs.items():
            keep_results(Path(str(spec.compare_dir)) / "report" / "report.json", folder / f"{name}.json")
        write_page(folder, specs)
    refuse_left_out(waiting, left_out)


def read_specs(folder: Path, config: RecordConfig) -> Iterator[tuple[str, CompareConfig]]:
    """The name and the spec of each comparison. UserError if there is none, or one makes no sense."""
    from trainer.commands import compare

    paths = sorted(folder.glob("*.yaml"))
    if not paths:
        raise UserError(f"folder: {printable(folder)} holds no spec of a comparison (*.yaml)")
    for path in paths:
        values = with_common(compare.spec_file(str(path), {}), config.common)
        values["compare_dir"] = str(Path(config.runs) / path.stem)
        spec = compare.read(values)
        spec.jobs = config.jobs or spec.jobs
        yield path.stem, spec


def with_common(values: Values, common: dict[str, Any]) -> Values:
    """The values of a spec, under the keys of a run that all specs get. data.source is only for those that name a text: the data of
    others are made in another way."""
    own, data = (values.get("common") or {}).get("data") or {}, common.get("data") or {}
    if "source" not in own and "source" in data:
        common = {**common, "data": {key: value for key, value in data.items() if key != "source"}}
    return merge(values, {"common": common}) if common else values


def size_all(specs: dict[str, CompareConfig]) -> tuple[dict[str, Lengths], dict[str, str]]:
    """The lengths of the arms of each comparison that has data, and why each of the others has none.

    This comes before any speed is measured, which takes long. UserError for a spec that makes no sense.
    """
    from trainer.commands.compare.command import opened
    from trainer.commands.compare.experiment import facts_of
    from trainer.commands.compare.spec import arms
    from trainer.core.errors import Absent

    for spec in specs.values():  # a wrong key is told before any text is prepared
        facts_of(spec, "", [], arms(spec))
    lengths, waiting = {}, {}
    for name, spec in specs.items():
        try:
            with opened(spec) as work:
                lengths[name] = work.experiment.lengths
        except Absent as error:
            waiting[name] = str(error)
    return lengths, waiting


def train_all(specs: dict[str, CompareConfig], lengths: dict[str, Lengths]) -> list[str]:
    """Train what is missing of the comparisons that have data, and name the variants that were left out. lengths: of their arms."""
    from trainer.commands.compare.command import opened

    left_out = []
    for name, known in lengths.items():
        with opened(specs[name], known) as work:
            work.train()
            left_out += [f"{variant} of {name}" for variant in work.left_out()]
    return left_out


def print_estimate(
    specs: dict[str, CompareConfig], lengths: dict[str, Lengths], waiting: dict[str, str], config: RecordConfig
) -> list[str]:
    """Print what is left to train, of each comparison and in all, and name the variants that cannot be. lengths, waiting: see `size_all`."""
    from trainer.commands.compare.command import opened

    left_out: list[str] = []
    rows, runs, hours, at_once = [["comparison", "runs at most", "hours"]], 0, 0.0, 1
    for name, known in lengths.items():
        with opened(specs[name], known) as work:
            found, at_once = work.estimate(config.price), len(work.slots)
        left_out += [f"{variant} of {name}" for variant in found.left_out]
        sys.stdout.write(printable_lines(f"{name}\n\n{found.text}\n\n"))
        rows.append([name, str(found.runs), f"{found.hours:.2f}"])
        runs, hours = runs + found.runs, hours + found.hours
    rows += [[name, "no data", ""] for name in waiting]
    cost = "" if config.price is None else f"; {hours * config.price:,.2f} at {config.price:g} an hour and device"
    rows.append(["in all", str(runs), f"{hours:.2f}"])
    reasons = [f"{name} waits for its data: {printable(why)}" for name, why in waiting.items()]
    last = f"{hours / at_once:.2f} hours with {at_once} at a time{cost}"
    print(printable_lines("\n".join([*markdown_table(rows), "", *reasons, last])), flush=True)
    return left_out


def refuse_left_out(waiting: dict[str, str], left_out: list[str]) -> None:
    """UserError if comparisons wait for their data, or variants were left out. waiting: see `size_all`."""
    parts = [f"for want of data: {', '.join(waiting)}"] if waiting else []
    parts += [", ".join(left_out)] if left_out else []
    if parts:
        raise UserError(
            f"left out {printable('; and '.join(parts))}; the reasons are above and in the reports; mend them, then give the same command again"
        )


def keep_results(report: Path, kept: Path) -> None:
    """Copy what a page needs from a comparison's report.json to `kept`, if the comparison has a report with finished runs."""
    from trainer.core.files import read_json, sealed, write_file

    if not report.exists():
        return
    content = read_json(report)
    study = content["studies"][0]
    finished = [run for run in study["runs"] if run["state"] == "finished"]
    if not finished:
        return
    hours = sum(run["seconds"] or 0 for run in study["runs"]) / SECONDS_PER_HOUR
    facts = {"made": content["made"], "runs": len(study["runs"]), "finished": len(finished), "hours": hours}
    data = {"data": {fact: study["data"][fact] for fact in DATA}}
    write_file(kept, sealed(facts | {key: study[key] for key in KEPT} | data))
    if figures := sorted(report.parent.glob("*-validation-flops-log.svg")):
        write_file(kept.with_suffix(".svg"), figures[0].read_text(encoding="utf-8"))


def write_page(folder: Path, specs: dict[str, CompareConfig]) -> None:
    """Write RECORD.md from the results in `folder`."""
    from trainer.core.files import read_json, write_file

    found = {name: read_json(folder / f"{name}.json") for name in specs if (folder / f"{name}.json").exists()}
    missing = [name for name in specs if name not in found]
    lines = ["# Record", "", "Written by `python -m trainer record`; README.md says how to read it.", ""]
    lines += claim_lines(found)
    for name, study in found.items():
        lines += ["", *study_lines(name, study), *changed_since(specs[name], study)]
        if (folder / f"{name}.svg").exists():
            lines += ["", f"![{name}: validation loss against training FLOPs, of each arm]({name}.svg)"]
    if missing:
        lines += ["", f"Not measured yet: {', '.join(f'[{name}]({name}.yaml)' for name in missing)}."]
    write_file(folder / PAGE, "\n".join(lines) + "\n")
    print(f"{printable(folder / PAGE)}: {len(found)} comparisons, {len(missing)} not measured yet", file=sys.stderr)


def changed_since(spec: CompareConfig, study: dict[str, Any]) -> list[str]:
    """What the spec asks for and its results are not of, for it was changed since."""
    from trainer.commands.compare.experiment import facts_of
    from trainer.commands.compare.spec import arms
    from trainer.commands.report.markdown import escape

    judged = {claim["claim"] for claim in study["claims"]}
    lines = [f"- Not judged yet: {escape(str(words))}." for words in spec.claims if str(words) not in judged]
    now = facts_of(spec, "", [], arms(spec))["spec"]
    if study["spec"] != now:
        lines.append("- **The spec was changed since:** these are results of an earlier one.")
    return lines


def unit_of(study: dict[str, Any]) -> str:
    """What the arms are compared by."""
    from trainer.commands.report.results import UNITS

    return UNITS[study["arms"][0]["metric"]]


def budget_of(study: dict[str, Any]) -> str:
    """What the arms have in common."""
    return "FLOPs" if study["budget"] == "flops" else str(study["budget"])


def at_scale(study: dict[str, Any], one: dict[str, Any]) -> str:
    """The scale of an arm or a claim, where the study has several."""
    return f" at scale {one['scale']:g}" if len({arm["scale"] for arm in study["arms"]}) > 1 else ""


def claim_lines(found: dict[str, Any]) -> list[str]:
    """The table of all claims."""
    from trainer.commands.report.markdown import escape

    rows = [["claim", "source", "here", "verdict", "comparison"]]
    for name, study in found.items():
        for claim in study["claims"]:
            pairs = "; ".join(pair_words(pair, unit_of(study)) for pair in claim["pairs"])
            said = [
                escape(claim["claim"] + at_scale(study, claim)),
                escape(claim["source"]),
                escape(pairs),
                claim["verdict"],
            ]
            rows.append([*said, f"[{name}](#{name}), equal {budget_of(study)}"])
    return ["## Claims", "", *markdown_table(rows)] if len(rows) > 1 else []


def pair_words(pair: dict[str, Any], unit: str) -> str:
    """What two neighbours of a claimed order differ by."""
    from trainer.commands.report.tables import span

    test = pair["difference"]
    names = f"{pair['better']} - {pair['worse']}"
    if test is None or test["interval"] is None:
        return f"{names}: {'no pair of runs' if test is None else 'one seed'}"
    p = "" if pair["p_holm"] is None else f", p {pair['p_holm']:.2g}"
    why_not = f"; {pair['blocked']}" if pair["blocked"] else ""
    return f"{names} {test['mean']:+.4f} {unit} {span(test['interval'])}{p}{why_not}"


def study_lines(name: str, study: dict[str, Any]) -> list[str]:
    """The results of one comparison."""
    from trainer.commands.report.markdown import escape

    facts = study["environment"]
    lead = (
        f"Equal {budget_of(study)}, spec [{name}.yaml]({name}.yaml); {study['finished']} of {study['runs']} runs finished, "
        f"{study['hours']:.2f} hours of training; {facts.get('device', 'n/a')}, {facts.get('precision', 'n/a')}, torch "
        f"{facts.get('torch', 'n/a')}; started {facts.get('started', 'n/a')}."
    )
    header = [
        "arm",
        "learning rate",
        "loss",
        f"sd, {unit_of(study)}",
        "bits/byte",
        f"difference to {study['baseline']}, {unit_of(study)}",
        "p, Holm",
        "claim",
    ]
    rows = [[*header, "parameters", "tokens", "TFLOP", "tokens/s", "peak GiB"]]
    rows += [arm_cells(arm, study["baseline"], at_scale(study, arm)) for arm in study["arms"]]
    data = "; ".join(f"{fact} {value}" for fact, value in study["data"].items())
    caveats = [f"- {escape(caveat['text'])}" for caveat in study["caveats"]]
    return [
        f"## {name}",
        "",
        escape(lead).replace("\\[", "[").replace("\\]", "]"),
        "",
        *markdown_table(rows),
        "",
        f"- Data: {escape(data)}.",
        *caveats,
    ]


def arm_cells(arm: dict[str, Any], baseline: str, scale: str) -> list[str]:
    """The row of an arm. scale: told after its name."""
    from trainer.commands.report.tables import p_cell, show, span

    test, name = arm["difference"], arm["name"]
    difference = "n/a" if test is None else f"{test['mean']:+.4f} {span(test['interval'])}"
    judged = ["baseline", "", ""] if name == baseline else [difference, p_cell(arm["p_holm"]), arm["claim"]]
    tera = None if arm["flops"] is None else arm["flops"] / 1e12
    peak = None if arm["peak_memory_bytes"] is None else arm["peak_memory_bytes"] / 2**30
    loss = arm["mean"] if arm["metric"] == "loss" else None
    reached = [show(arm["learning_rate"], ".3g"), show(loss, ".4f"), show(arm["sd"], ".4f")]
    costs = [
        show(arm["parameters"], ",.0f"),
        show(arm["tokens"], ",.0f"),
        show(tera, ",.1f"),
        show(arm["rate"], ",.0f"),
    ]
    return [name + scale, *reached, show(arm["bits_per_byte"], ".4f"), *judged, *costs, show(peak, ".2f")]


VERB = Verb(
    name="record",
    help="train the comparisons of a folder, and say which claims of others they bear out",
    config=RecordConfig,
    run=run,
    alone=True,
    positional=lambda word, flags: {"folder": word},
    read=read,
    interrupted="interrupted; the same command goes on",
)
