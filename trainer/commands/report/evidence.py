"""The rules of evidence: what a reader must know before believing the final table. One function for each rule.

The anchors: marin's study of optimizers (arXiv 2509.02046) compares only tuned arms, at the end of their schedules and at several
sizes; modded-nanogpt accepts a claim at p < 0.01. equality.py has the rules about what must be equal between arms.
"""

from __future__ import annotations

from collections import Counter

from trainer.commands.report.caveats import FEW_SEEDS, LEAST_SEEDS, Caveat, differing, keys_of, label, listed
from trainer.commands.report.equality import EQUALITY
from trainer.commands.report.study import Study, lower_rates


def find_caveats(study: Study) -> list[Caveat]:
    """All caveats of a study, in the order of RULES."""
    return [caveat for rule in RULES for caveat in rule(study)]


# -- how the arms were tuned -----------------------------------------------------------------------------------------------


def not_swept(study: Study) -> list[Caveat]:
    """An arm at an untuned learning rate may lose only because of it."""
    arms = [arm for arm in study.arms if arm.refused is None and arm.bracketed is None]
    if not arms:
        return []
    names = listed(label(study, arm) for arm in arms)
    return [
        Caveat(
            "not_swept",
            f"No learning rates were tried for {names}: a difference may come from the learning rate alone.",
            keys_of(arms),
        )
    ]


def not_bracketed(study: Study) -> list[Caveat]:
    """The best learning rate must have worse ones on both sides (one that diverged counts), or a better one may lie beyond."""
    found = []
    for arm in study.arms:
        curve, chosen = arm.curve(), arm.learning_rate
        lower = [] if chosen is None else lower_rates(curve, chosen)
        if arm.bracketed is not False and not lower:
            continue
        tried = listed(f"{rate:g}" for rate in curve) or "unknown"
        text = f"The learning rate of {label(study, arm)} is not bracketed: "
        if lower:
            text += f"on the same seeds {listed(f'{rate:g}' for rate in lower)} ended lower than the chosen {chosen:g}."
        else:
            best = "the best" if chosen is None else f"{chosen:g}"
            text += f"{best} is at the edge of those tried ({tried})."
        found.append(Caveat("not_bracketed", text, keys_of([arm])))
    return found


def tuning_differs(study: Study) -> list[Caveat]:
    """An arm that tried more learning rates had more chances (arXiv 2509.02046)."""
    tried = {label(study, arm): len(arm.curve()) for arm in study.arms if arm.curve()}
    if len(set(tried.values())) < 2:
        return []
    shown = listed(f"{name} {count}" for name, count in tried.items())
    return [Caveat("tuning_differs", f"Not as many learning rates were tried for each arm: {shown}.")]


def tuned_on_test_runs(study: Study) -> list[Caveat]:
    """The best of several runs looks better than it is, if its own loss chose it."""
    tested = {run.seed for arm in study.arms for run in arm.test_runs}
    tuning = {run.seed for run in study.runs if run.purpose == "tuning"} | {study.tuning_seed}
    if study.declared and tuning & tested:
        text = f"Learning rates were chosen with seed {listed(tuning & tested)}, which is also a test seed: arms look better than they are."
        return [Caveat("tuned_on_test_runs", text, blocks="learning rates were chosen with a test seed")]
    arms = [arm for arm in study.arms if any(run.purpose == "both" for run in arm.runs)]
    if not arms:
        return []
    names = listed(label(study, arm) for arm in arms)
    return [
        Caveat(
            "tuned_on_test_runs",
            f"The learning rate of {names} was chosen on the runs that are shown: it looks better than it is.",
            keys_of(arms),
            "its learning rate, or the other arm's, was chosen on these runs",
        )
    ]


def warmup_differs(study: Study) -> list[Caveat]:
    """Equal are warm-ups of as many steps, or of the same share of the run (both are whole steps, so up to rounding)."""
    known = [run for run in study.test_runs if run.get("optim.warmup_steps") is not None and run.get("max_steps")]
    steps = sorted({run.get("optim.warmup_steps") for run in known})
    shares = [
        (
            (run.get("optim.warmup_steps") - 0.5) / run.get("max_steps"),
            (run.get("optim.warmup_steps") + 0.5) / run.get("max_steps"),
        )
        for run in known
    ]
    same_share = not shares or max(low for low, _ in shares) <= min(high for _, high in shares)
    recipes = differing(known, ["optim.recipe"])
    if recipes or (len(steps) > 1 and not same_share):
        what = recipes or [f"{listed(steps)} steps"]
        return [Caveat("warmup_differs", f"The warm-up rules differ between runs: {', '.join(what)}.")]
    return []


def baseline_changed(study: Study) -> list[Caveat]:
    """Of several baselines, one against which an arm is claimed to be better may be found by chance."""
    if not study.first_baseline:
        return []
    text = f"The comparison declared {study.first_baseline} as its baseline: who chooses {study.baseline} after seeing results must say so."
    return [Caveat("baseline_changed", text)]


# -- how many runs, of what sizes, how far ---------------------------------------------------------------------------------


def few_seeds(study: Study) -> list[Caveat]:
    """Two runs cannot show how much runs differ by chance."""
    arms = [arm for arm in study.arms if len(arm.by_seed) < LEAST_SEEDS and arm.refused is None]
    if not arms:
        return []
    names = listed(f"{label(study, arm)} ({len(arm.by_seed)})" for arm in arms)
    text = f"Fewer than {LEAST_SEEDS} finished seeds: {names}. A claim needs {LEAST_SEEDS} or more."
    return [Caveat("few_seeds", text, keys_of(arms), FEW_SEEDS)]


def seeds_added(study: Study) -> list[Caveat]:
    """Whoever adds seeds until p is small finds a small p at last, also of nothing."""
    if not study.added_seeds:
        return []
    text = f"Seeds {listed(study.added_seeds)} were added after the comparison began. If its results were seen before, p is too small."
    return [Caveat("seeds_added", text)]


def equal_seeds(study: Study) -> list[Caveat]:
    """Runs that do not depend on their seed say nothing about chance."""
    arms = [arm for arm in study.arms if len(arm.by_seed) > 1 and len({run.loss for run in arm.by_seed.values()}) == 1]
    if not arms:
        return []
    text = f"All seeds of {listed(label(study, arm) for arm in arms)} end with the same loss: the seed changes nothing there, so nothing is known about chance."
    return [Caveat("equal_seeds", text, keys_of(arms), "its seeds, or the baseline's, all end with the same loss")]


def one_scale(study: Study) -> list[Caveat]:
    """An order of arms at one size may be another at the next (arXiv 2509.02046)."""
    if len(study.scales) == 1:
        text = f"All runs have one size (model_scale {study.scales[0]:g}): this says nothing about other sizes."
        return [Caveat("one_scale", text)]
    measured = Counter(arm.name for arm in study.arms if arm.by_seed)
    lone = [arm for arm in study.arms if measured[arm.name] == 1 and arm.by_seed]
    if not lone:
        return []
    names = listed(label(study, arm) for arm in lone)
    return [
        Caveat(
            "one_scale", f"Measured at one scale only, which says nothing about other sizes: {names}.", keys_of(lone)
        )
    ]


def unfinished(study: Study) -> list[Caveat]:
    """Losses before the end of the schedule mislead: a decaying learning rate decides late."""
    runs = [run for run in study.runs if run.state == "unfinished"]
    if not runs:
        return []
    names = listed(f"{run.name} ({run.message})" for run in runs)
    return [Caveat("unfinished", f"Not at the end of the schedule, so not in the table: {names}.")]


def not_all_ran(study: Study) -> list[Caveat]:
    """Failures are results too: an arm that only sometimes survives is worse than its mean."""
    found = []
    for state in ("diverged", "failed", "refused", "running", "waiting"):
        runs = [run for run in study.runs if run.state == state]
        if runs:
            verb = {"running": "Still running", "waiting": "Not started yet"}.get(state, state.capitalize())
            text = (
                f"{verb}: {listed(run.name for run in runs)} ({len(runs)} of {len(study.runs)} runs); not in the table."
            )
            found.append(Caveat("not_all_ran", text))
    arms = [arm for arm in study.arms if arm.refused is not None]
    return found + [
        Caveat("not_all_ran", f"Refused: {label(study, arm)}: {arm.refused}", keys_of([arm])) for arm in arms
    ]


def pairs_missing(study: Study) -> list[Caveat]:
    """Arms are compared seed by seed."""
    found = []
    for arm in study.arms:
        baseline = study.baseline_of(arm)
        if baseline is None:
            text = f"There is no {study.baseline} at scale {arm.scale:g}: {arm.name} is compared with nothing there."
            found.append(Caveat("pairs_missing", text, keys_of([arm])))
        elif arm is not baseline and arm.by_seed and baseline.by_seed and set(arm.by_seed) != set(baseline.by_seed):
            lone = sorted(set(arm.by_seed) ^ set(baseline.by_seed))
            text = f"{label(study, arm)} and {study.baseline} do not have the same seeds: without a partner are {listed(lone)}, which the difference leaves out."
            found.append(Caveat("pairs_missing", text, keys_of([arm])))
    return found


RULES = (
    not_swept,
    not_bracketed,
    tuning_differs,
    tuned_on_test_runs,
    baseline_changed,
    few_seeds,
    seeds_added,
    equal_seeds,
    pairs_missing,
    unfinished,
    not_all_ran,
    one_scale,
    warmup_differs,
    *EQUALITY,
)
