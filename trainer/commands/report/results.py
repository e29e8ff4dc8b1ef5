"""What each arm reached, and how surely it differs from the baseline of its scale."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from trainer.commands.report.caveats import FEW_SEEDS, LEAST_SEEDS, Caveat
from trainer.commands.report.statistics import (
    TTest,
    bootstrap_interval,
    holm,
    mean_and_sd,
    p_below,
    seeds_needed,
    t_test,
)
from trainer.commands.report.study import Arm, Study

LEVEL = 0.01  # of a claim: modded-nanogpt's rule, p < 0.01
UNITS = {"loss": "nats", "bits": "bits/byte"}


@dataclass
class Result:
    """An arm's row. metric: loss or bits, by which the arms are compared; values: of it, by seed.

    planned: number of test runs; mean, sd: of `values`, None where there are too few; test: of the paired differences to the
    baseline, negative is better, None without pairs; bootstrap: their 95 % interval by the percentile bootstrap; adjusted: its p after
    Holm's correction, None if nothing can be claimed; needed: seeds for this claim, with that correction
    below_target: p of "the mean loss is not below the target", after Holm's correction; claim: better, worse or none; verdict: a sentence
    """

    arm: Arm
    metric: str
    planned: int
    values: dict[int, float]
    is_baseline: bool
    mean: float | None = None
    sd: float | None = None
    test: TTest | None = None
    bootstrap: tuple[float, float] | None = None
    adjusted: float | None = None
    needed: int | None = None
    below_target: float | None = None
    claim: str = "none"
    verdict: str = ""

    @property
    def unit(self) -> str:
        return UNITS[self.metric]

    def median(self, name: str) -> float | None:
        """The median of an attribute over the finished runs; None if one of them lacks it."""
        values = [getattr(run, name) for run in self.arm.by_seed.values()]
        return None if not values or None in values else statistics.median(values)


def results(study: Study, metric: str, caveats: list[Caveat], target: float | None) -> list[Result]:
    """A result for each arm, the baseline of each scale first, then in the order of the study."""
    found = [_measured(study, arm, metric, target) for scale in study.scales for arm in _baseline_first(study, scale)]
    _adjust(found, caveats, study)
    for one in found:
        if not one.is_baseline:
            _judge(one, study.baseline, objections(caveats, one.arm, study.baseline_of(one.arm), one.test))
    return found


def _adjust(found: list[Result], caveats: list[Caveat], study: Study) -> None:
    """Holm's correction, over all arms of which something can be claimed: what the caveats forbid was known before the losses. For the
    target it is over all arms."""
    ps = [
        (one, one.test)
        for one in found
        if one.test
        and one.test.p is not None
        and not objections(caveats, one.arm, study.baseline_of(one.arm), one.test)
    ]
    for (one, _), adjusted in zip(ps, holm([test.p for _, test in ps if test.p is not None]), strict=True):
        one.adjusted = adjusted
    for one, test in ((one, one.test) for one in found):
        if test is not None and test.sd is not None:
            one.needed = seeds_needed(test.mean, test.sd, LEVEL / max(1, len(ps)), LEAST_SEEDS)
    aimed = [one for one in found if one.below_target is not None]
    for one, adjusted in zip(
        aimed, holm([one.below_target for one in aimed if one.below_target is not None]), strict=True
    ):
        one.below_target = adjusted


def objections(caveats: Iterable[Caveat], arm: Arm, other: Arm | None, test: TTest | None) -> list[str]:
    """Why nothing can be claimed of two arms; empty if something can. test: of their paired differences."""
    found = [caveat.blocks for caveat in caveats if caveat.stops(arm, other)]
    return [*found, FEW_SEEDS] if test is not None and test.n < LEAST_SEEDS and FEW_SEEDS not in found else found


def _baseline_first(study: Study, scale: float) -> list[Arm]:
    return sorted(study.at(scale), key=lambda arm: arm.name != study.baseline)


def _measured(study: Study, arm: Arm, metric: str, target: float | None) -> Result:
    values = {seed: getattr(run, metric) for seed, run in arm.by_seed.items() if getattr(run, metric) is not None}
    planned = max(len(study.seeds) if study.declared else 0, len(arm.test_runs))
    baseline = study.baseline_of(arm)
    result = Result(arm, metric, planned, values, arm is baseline)
    if values:
        result.mean, result.sd = mean_and_sd(list(values.values()))
    losses = [run.loss for run in arm.by_seed.values() if run.loss is not None]
    if target is not None and len(losses) >= LEAST_SEEDS:
        result.below_target = p_below(losses, target)
    if baseline is None or arm is baseline:
        return result
    differences = paired_differences(arm, baseline, metric)
    if differences:
        result.test = t_test(differences)
        if result.test.sd is not None:
            result.bootstrap = bootstrap_interval(differences)
    return result


def paired_differences(arm: Arm, other: Arm, metric: str) -> list[float]:
    """arm - other, of each seed of which both have a finished run, by seed."""
    mine, theirs = arm.by_seed, other.by_seed
    pairs = [(getattr(mine[seed], metric), getattr(theirs[seed], metric)) for seed in sorted(mine) if seed in theirs]
    return [one - two for one, two in pairs if one is not None and two is not None]


def _judge(one: Result, baseline: str, blocks: list[str]) -> None:
    """Decide on the claim, and say it in a sentence. blocks: reasons against any claim."""
    name, test = one.arm.name, one.test
    if test is None:
        reason = (
            f"{name} has no finished run"
            if not one.values
            else f"no seed has a finished run of both {name} and {baseline}"
        )
        one.verdict = f"no claim: {reason}"
        return
    direction = "better" if test.mean < 0 else "worse"
    size = f"{name} is {direction} than {baseline} by {abs(test.mean):.4f} {one.unit}"
    if test.mean == 0:
        size = f"{name} and {baseline} are equal"
    if test.interval is None:
        one.verdict = f"no claim: {size} on one seed, which says nothing about chance"
        return
    low, high = test.interval if test.mean > 0 else (-test.interval[1], -test.interval[0])
    p = ""
    if one.adjusted is not None:
        p = f", {p_text(one.adjusted)}" + ("" if one.adjusted == test.p else " (Holm)")
    facts = f"[{low:.4f}, {high:.4f}]{p}, {test.n} seeds"
    if test.sd == 0:
        one.verdict = f"no claim: {size} on each of {test.n} seeds; equal differences say nothing about chance"
    elif blocks:
        one.verdict = f"no claim: {size} {facts}, but {blocks[0]}"
    elif one.adjusted is not None and one.adjusted < LEVEL:
        one.claim, one.verdict = direction, f"{size} {facts}"
    else:
        more = "" if one.needed is None else f"; if this difference is real, about {one.needed:,} seeds show it"
        one.verdict = f"no claim: {size} {facts}, where a claim needs p < {LEVEL:g}{more}"


def p_text(p: float) -> str:
    return "p < 0.0001" if p < 0.0001 else f"p = {p:.2g}"
