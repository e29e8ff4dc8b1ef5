"""What others claim of the arms, and whether the comparison shows it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from trainer.commands.report.caveats import Caveat, label
from trainer.commands.report.page import Table
from trainer.commands.report.results import LEVEL, UNITS, objections, p_text, paired_differences
from trainer.commands.report.statistics import TTest, holm, t_test
from trainer.commands.report.study import Arm, Claim, Study

EQUAL, ALIKE = "equal on every seed", "every seed differs by the same amount, which says nothing about chance"


@dataclass
class Pair:
    """Two arms of a claim. test: of the paired differences better - worse, None without pairs; adjusted: its p by Holm over all
    pairs of all claims of which something can be claimed, None for another; blocked: why nothing can be claimed, or empty."""

    better: Arm
    worse: Arm
    test: TTest | None
    blocked: str
    adjusted: float | None = None

    @property
    def arms(self) -> frozenset[tuple[str, float]]:
        return frozenset((arm.name, arm.scale) for arm in (self.better, self.worse))

    @property
    def shown(self) -> bool | None:
        """Whether the claimed order (true) or the opposite (false) is shown; None: neither."""
        if self.test is None or self.adjusted is None or self.adjusted >= LEVEL or self.blocked or not self.test.sd:
            return None
        return self.test.mean < 0

    def words(self) -> str:
        """What the two differ by."""
        if self.test is None:
            return "no seed has a finished run of both"
        if self.test.interval is None:
            return f"{self.test.mean:+.4f}, one seed"
        low, high = self.test.interval
        p = "" if self.adjusted is None else f", {p_text(self.adjusted)}"
        return f"{self.test.mean:+.4f} [{low:+.4f}, {high:+.4f}]{p}" + (f"; {self.blocked}" if self.blocked else "")


@dataclass
class Judgement:
    """A claim at one scale, with its pairs."""

    claim: Claim
    scale: float
    pairs: list[Pair]

    @property
    def verdict(self) -> str:
        """shown, contradicted, or not decided with the direction of the means."""
        shown = [pair.shown for pair in self.pairs]
        if all(shown):
            return "shown"
        if False in shown:
            return "contradicted"
        means = [pair.test.mean for pair in self.pairs if pair.test is not None]
        if len(means) < len(self.pairs):
            return "not decided: runs are missing"
        same = sum(mean < 0 for mean in means)
        order = (
            "the claimed" if same == len(means) else "the opposite" if all(mean > 0 for mean in means) else "another"
        )
        return f"not decided: the means have {order} order"


def judge(study: Study, metric: str, caveats: list[Caveat]) -> list[Judgement]:
    """Each claim of the study at each scale. metric: loss or bits, by which arms are compared.

    Holm's correction counts each two arms once, whatever claims they stand in, and not those of which nothing can be claimed: what
    the caveats forbid was known before the losses.
    """
    found = []
    for claim in study.claims:
        for scale in study.scales:
            by_name = {arm.name: arm for arm in study.at(scale)}
            pairs = [_pair(by_name[better], by_name[worse], metric, caveats) for better, worse in claim.pairs]
            found.append(Judgement(claim, scale, pairs))
    pairs = [pair for one in found for pair in one.pairs]
    ps = {pair.arms: pair.test.p for pair in pairs if pair.test and pair.test.p is not None and not pair.blocked}
    adjusted = dict(zip(ps, holm(list(ps.values())), strict=True))
    for pair in pairs:
        pair.adjusted = adjusted.get(pair.arms)
    return found


def _pair(better: Arm, worse: Arm, metric: str, caveats: Iterable[Caveat]) -> Pair:
    differences = paired_differences(better, worse, metric)
    test = t_test(differences) if differences else None
    blocked = objections(caveats, better, worse, test)
    if test is not None and test.sd == 0:
        blocked.insert(0, ALIKE if test.mean else EQUAL)
    return Pair(better, worse, test, next(iter(blocked), ""))


def claim_table(study: Study, judged: list[Judgement], metric: str) -> Table:
    """A row for each pair of each claim."""
    rows = []
    for one in judged:
        for i, pair in enumerate(one.pairs):
            names = f"{label(study, pair.better)} before {label(study, pair.worse)}"
            said = (one.claim.words, one.claim.source, one.verdict) if i == 0 else ("", "", "")
            rows.append([*said, names, pair.words()])
    notes = [
        f"difference: of the validation loss at the end, in {UNITS[metric]}, mean over pairs of runs with the same seed; negative: as "
        "claimed; its 95 % interval by Student's t; p: paired t test, two-sided, Holm over all pairs of which something can be claimed",
        f"shown: every pair is as claimed at p < {LEVEL:g}; contradicted: a pair is the other way round at p < {LEVEL:g}",
    ]
    return Table(["claim", "source", "verdict", "pair", "difference"], rows, notes if rows else [])
