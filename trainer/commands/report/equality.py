"""Rules of evidence about what must be equal between arms: data, validation, compute, machine, code. See evidence.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trainer.commands.report.caveats import Caveat, differing, distinct, keys_of, label, listed, tokenizer_of
from trainer.commands.report.load import Run
from trainer.commands.report.study import Arm, Study

TOLERANCE = {
    "tokens": 0.01,
    "flops": 0.01,
    "parameters": 0.03,
    "seconds": 0.03,
}  # relative, for amounts to count as equal
WORDS = {"tokens": "tokens", "flops": "FLOPs", "parameters": "parameters", "seconds": "seconds"}
ORDER = ("data.order", "data.packing", "data.separate_documents", "batch.tokens_per_step")
SEQUENCES = ("batch.sequence_start", "batch.sequence_length", "batch.sequence_double_every")


def tokenizers_differ(study: Study) -> list[Caveat]:
    """A nat per token means another thing for each tokenizer, and so does a token; a bit per byte does not."""
    found = distinct(study.test_runs, tokenizer_of)
    if len(found) < 2:
        return []
    names = distinct(study.test_runs, lambda run: run.data["tokenizer"].get("name") if tokenizer_of(run) else None)
    text = f"The tokenizers differ ({listed(names.values())}): bits per byte decide, losses in nats per token cannot be compared, and as many tokens are not as much text."
    return [Caveat("tokenizers_differ", text)]


def data_differs(study: Study) -> list[Caveat]:
    """Arms must read the same data, and be judged on the same text."""
    several = len(distinct(study.test_runs, tokenizer_of)) > 1
    validation = distinct(study.test_runs, lambda run: _validation(run, several))
    indexes = {} if several else distinct(study.test_runs, _index)
    prints = distinct(study.test_runs, lambda run: run.data.get("fingerprint"))
    if len(validation) > 1 or len(indexes) > 1:
        text = "The validation splits differ between runs: their losses cannot be compared."
        return [Caveat("data_differs", text, blocks="the validation splits differ")]
    if len(prints) > 1 and not several:
        shown = listed(str(one)[:12] for one in prints.values())
        return [Caveat("data_differs", f"The data differ between runs (fingerprints {shown}).")]
    return []


def _validation(run: Run, several_tokenizers: bool) -> Any:
    """The size of the validation split; between tokenizers only that of its text."""
    splits = run.data.get("splits")
    split = splits.get("validation") if isinstance(splits, dict) else None
    if not isinstance(split, dict):
        return None
    return [split.get(key) for key in ("bytes", "documents", *(() if several_tokenizers else ("tokens",)))]


def _index(run: Run) -> Any:
    """The hash of the validation split's tokens; None in runs of 0.2.0 and earlier."""
    indexes = run.data.get("indexes")
    return indexes.get("validation") if isinstance(indexes, dict) else None


def order_differs(study: Study) -> list[Caveat]:
    """With the same seed, order and batch, all arms see the same tokens at the same step."""
    found = [key for scale in study.scales for key in differing(_at(study, scale), ORDER)]
    if not found:
        return []
    return [Caveat("order_differs", f"The order of the data or the batch differs between runs: {listed(found)}.")]


def sequences_differ(study: Study) -> list[Caveat]:
    """The lengths of the training sequences are a part of the recipe."""
    found = [key for scale in study.scales for key in differing(_at(study, scale), SEQUENCES)]
    if not found:
        return []
    return [Caveat("sequences_differ", f"The sequence lengths of training differ between runs: {listed(found)}.")]


def protocol_differs(study: Study) -> list[Caveat]:
    """Losses compare only by the same protocol. Nothing is claimed of arms with another than the baseline's. The losses are those at the
    end, which are of the whole split: evaluation.max_tokens limits only the earlier ones."""
    keys = ["evaluation.sequence_length"]
    found = differing(study.test_runs, keys)
    protocols = distinct(study.test_runs, _protocol)
    if len(protocols) > 1:
        found.append(f"evaluation.protocol ({listed(protocols.values())})")
    if not found:
        return []

    def protocol(arm: Arm | None) -> set[str]:
        runs = [] if arm is None else list(arm.by_seed.values())
        return {repr([*map(run.get, keys), _protocol(run)]) for run in runs}

    others = [arm for arm in study.arms if len(protocol(arm) | protocol(study.baseline_of(arm))) > 1]
    text = f"The validation protocol differs between runs: {listed(found)}."
    return [Caveat("protocol_differs", text, keys_of(others), "the validation protocol differs")]


def _protocol(run: Run) -> str | None:
    """The protocol that val_loss is of: with `both`, the full one."""
    protocol = run.get("evaluation.protocol")
    return "full" if protocol == "both" else protocol


def compute_differs(study: Study) -> list[Caveat]:
    """At a budget, an arm that used more of it has an advantage. The reader is also told what else is equal, and what is not."""
    found = [] if study.budget is None else _beyond_budget(study, study.budget)
    equal, unequal = _amounts(study)
    if study.budget is None and (equal or unequal):
        parts = [f"{what}: {listed(names)}" for what, names in (("equal", equal), ("not equal", unequal)) if names]
        text = f"No budget was declared for these runs. Between arms of a scale, {'; '.join(parts)}."
        found.append(Caveat("compute_differs", text))
    elif unequal:
        found.append(Caveat("compute_differs", f"Not equal between arms of a scale: {listed(unequal)}."))
    return found


def _beyond_budget(study: Study, budget: str) -> list[Caveat]:
    found = []
    for arm in study.arms:
        baseline = study.baseline_of(arm)
        ours, theirs = _amount(arm, budget), None if baseline is None else _amount(baseline, budget)
        if ours and theirs and abs(ours / theirs - 1) > TOLERANCE[budget]:
            text = (
                f"The budget is equal {WORDS[budget]}, but {label(study, arm)} used {ours / theirs:.3f} times those of "
                f"{study.baseline} ({ours:,.4g} and {theirs:,.4g})."
            )
            found.append(Caveat("compute_differs", text, keys_of([arm])))
    return found


def _amounts(study: Study) -> tuple[list[str], list[str]]:
    """What is equal between the arms of every scale, and what is not (with the widest span); the budget is left out."""
    equal, unequal = [], []
    for name, word in WORDS.items():
        known = [[amount for arm in study.at(scale) if (amount := _amount(arm, name))] for scale in study.scales]
        spans = [(min(amounts), max(amounts)) for amounts in known if len(amounts) > 1]
        if not spans or name == study.budget:
            continue
        low, high = max(spans, key=lambda span: span[1] / span[0])
        if high > low * (1 + TOLERANCE[name]):
            unequal.append(f"{word} ({low:,.4g} to {high:,.4g})")
        else:
            equal.append(word)
    return equal, unequal


def _amount(arm: Arm, name: str) -> float | None:
    """The mean of an amount over the finished test runs; None without any, or if one is not known."""
    amounts = [getattr(run, name) for run in arm.by_seed.values()]
    return None if not amounts or None in amounts or not sum(amounts) else sum(amounts) / len(amounts)


def frozen_not_counted(study: Study) -> list[Caveat]:
    """A teacher computes too, and may be larger than the model that learns from it."""
    arms = [arm for arm in study.arms if any(run.frozen for run in arm.by_seed.values())]
    if not arms:
        return []
    keys = listed(key for arm in arms for run in arm.by_seed.values() for key in run.frozen)
    names = listed(label(study, arm) for arm in arms)
    text = (
        f"FLOPs and parameters leave out the frozen models of {names} ({keys}): these arms compute more than they say."
    )
    return [Caveat("frozen_not_counted", text, keys_of(arms))]


def data_repeated(study: Study) -> list[Caveat]:
    """On repeated data, arms that memorise less look better."""
    runs = [run for run in study.test_runs if run.epochs is not None and run.epochs > 1]
    if not runs:
        return []
    most = max(run.epochs or 0 for run in runs)
    return [
        Caveat(
            "data_repeated",
            f"The training data were seen more than once (up to {most:.3g} times) in {len(runs)} run{'s' if len(runs) > 1 else ''}.",
        )
    ]


def batch_multiplied(study: Study) -> list[Caveat]:
    """With hlb's dynamic batch, equal steps are not equal tokens, and the batch is a part of what is compared."""
    arms = [arm for arm in study.arms if any(run.multiplied for run in arm.by_seed.values())]
    if not arms:
        return []
    names = listed(label(study, arm) for arm in arms)
    text = f"The batch of {names} grew with hlb's multiplier: equal steps are not equal tokens."
    return [Caveat("batch_multiplied", text, keys_of(arms))]


def machines_differ(study: Study) -> list[Caveat]:
    """Seconds and tokens per second compare only on one kind of machine and one version of torch."""
    facts: dict[str, Callable[[dict[str, Any]], Any]] = {
        "host": lambda start: start.get("host"),
        "torch": lambda start: start.get("versions", {}).get("torch"),
        "processes": lambda start: start.get("processes"),
    }
    devices = distinct(study.test_runs, lambda run: run.device)
    found = [f"device ({listed(devices.values())})"] if len(devices) > 1 else []
    for name, fact in facts.items():
        values = _of_starts(study, fact)
        if len(values) > 1:
            found.append(f"{name} ({listed(values)})")
    if not found:
        return []
    text = f"The runs were not made on equal machines: {listed(found)}. Their seconds and tokens/s cannot be compared."
    return [
        Caveat(
            "machines_differ",
            text,
            blocks="the budget is seconds, on different machines" if study.budget == "seconds" else "",
        )
    ]


def code_differs(study: Study) -> list[Caveat]:
    """A result belongs to a state of the code that can be found again."""
    found = []
    states = _of_starts(study, lambda start: start.get("git") if isinstance(start.get("git"), dict) else None)
    if any(state.get("dirty") for state in states):
        found.append(
            Caveat(
                "code_differs", "Some runs were made with uncommitted changes in git: the commit does not say what ran."
            )
        )
    commits = sorted({str(state.get("sha"))[:12] for state in states})
    releases = _of_starts(study, lambda start: start.get("versions", {}).get("crescendo-lm"))
    if len(commits) > 1 or len(releases) > 1:
        found.append(
            Caveat(
                "code_differs",
                f"The runs were made by different code (commits {listed(commits)}; releases {listed(releases)}).",
            )
        )
    return found


def _of_starts(study: Study, fact: Callable[[dict[str, Any]], Any]) -> list[Any]:
    """The different known values of a fact over all starts of the test runs."""
    values = [fact(start) for run in study.test_runs for start in run.starts]
    return list({repr(value): value for value in values if value is not None}.values())


def _at(study: Study, scale: float) -> list[Run]:
    return [run for arm in study.at(scale) for run in arm.by_seed.values()]


EQUALITY = (
    tokenizers_differ,
    data_differs,
    order_differs,
    sequences_differ,
    protocol_differs,
    compute_differs,
    frozen_not_counted,
    data_repeated,
    batch_multiplied,
    machines_differ,
    code_differs,
)
