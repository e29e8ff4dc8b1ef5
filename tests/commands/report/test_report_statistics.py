"""The statistics of `report`, against scipy and against what must hold for any sample."""

import math
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.commands.report.statistics import (
    TTest,
    bootstrap_interval,
    holm,
    mean_and_sd,
    p_below,
    power,
    seeds_needed,
    t_cdf,
    t_quantile,
    t_test,
)

scipy_stats = pytest.importorskip("scipy.stats", reason="scipy is the reference; it is in the extra `dev`")

# Student's sleep (1908): hours gained by ten patients with a second drug beyond those with the first.
SLEEP = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
SAMPLES = st.lists(st.floats(-1e3, 1e3).map(lambda x: round(x, 6)), min_size=2, max_size=12)


@pytest.mark.parametrize("degrees", [1, 2, 3, 9, 200])
def test_the_t_distribution_is_scipys(degrees):
    """To 1e-9: both are computed in double precision, whose errors in the tail are some 1e-12."""
    for t in (-50.0, -3.0, -0.5, 0.0, 0.1, 2.7, 12.0):
        assert t_cdf(t, degrees) == pytest.approx(scipy_stats.t.cdf(t, degrees), rel=1e-9)
    for p in (0.005, 0.2, 0.5, 0.9, 0.975, 0.9995, 1 - 0.01 / 18, 1 - 1e-7):
        assert t_quantile(p, degrees) == pytest.approx(scipy_stats.t.ppf(p, degrees), rel=1e-9, abs=1e-12)


def test_a_known_sample():
    """Student's own result: t = 4.06."""
    found = t_test(SLEEP)
    reference = scipy_stats.ttest_1samp(SLEEP, 0)
    interval = reference.confidence_interval(0.95)
    assert found.n == 10 and found.t == pytest.approx(4.0621, abs=5e-5)
    assert (found.t, found.p) == pytest.approx((reference.statistic, reference.pvalue), rel=1e-9)
    assert found.interval == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert p_below(SLEEP, 2.0) == pytest.approx(
        scipy_stats.ttest_1samp(SLEEP, 2.0, alternative="less").pvalue, rel=1e-9
    )


def test_two_runs_are_paired_as_scipy_pairs_them():
    one, other = np.random.default_rng(1).normal(3, 0.1, (2, 6))
    found = t_test([float(a - b) for a, b in zip(one, other, strict=True)])
    assert found.p == pytest.approx(scipy_stats.ttest_rel(one, other).pvalue, rel=1e-9)


@given(SAMPLES)
@settings(max_examples=60, deadline=None)
def test_what_holds_for_any_sample(values):
    found, mirrored = t_test(values), t_test([-value for value in values])
    assert found.interval is not None and found.p is not None
    low, high = found.interval
    assert low <= found.mean <= high and 0 <= found.p <= 1
    assert mirrored.p == found.p and mirrored.mean == -found.mean
    # The interval excludes 0 exactly if p < 0.05; near the edge rounding decides.
    if abs(found.p - 0.05) > 1e-6:
        assert (low > 0 or high < 0) == (found.p < 0.05)
    below = p_below(values, 0.0)
    half = found.p / 2 if found.mean < 0 else 1 - found.p / 2
    assert below == (pytest.approx(half, abs=1e-12) if found.sd else None)


def test_one_value_has_no_interval():
    assert t_test([0.3]) == TTest(1, 0.3)
    assert p_below([0.3], 1.0) is None


def test_equal_values_are_exact():
    """0.1 + 0.2 is not 0.3: differences of equal pairs differ by rounding, which is no spread."""
    equal = [(0.1 + 0.2) - 0.25, 0.3 - 0.25, 0.05]
    found = t_test(equal)
    assert len(set(equal)) > 1 and found.sd == 0 and found.p == 0 and found.interval == (found.mean, found.mean)
    assert t_test([0.0, 0.0]).p == 1
    assert p_below([2.0, 2.0], 2.0) is None and p_below([2.0, 2.0], 2.5) is None  # which says nothing about chance
    assert bootstrap_interval([0.5, 0.5]) == (0.5, 0.5)


@pytest.mark.parametrize("wrong", [[], [math.nan, 1.0], [1.0, math.inf]])
def test_what_is_not_a_number_is_refused(wrong):
    with pytest.raises(ValueError, match="finite values"):
        mean_and_sd(wrong)


def test_the_bootstrap_is_scipys():
    """Both draw 10,000 times. Their ends have a standard error near 1 % of the width; the bound is five of them."""
    found = bootstrap_interval(SLEEP)
    reference = scipy_stats.bootstrap(
        (SLEEP,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(7)
    )
    width = found[1] - found[0]
    assert found == pytest.approx(tuple(reference.confidence_interval), abs=0.05 * width)
    assert bootstrap_interval(SLEEP) == found != bootstrap_interval(SLEEP, seed=1)


def test_holm_by_hand():
    """0.01 * 4, 0.02 * 3, 0.03 * 2; the last, 0.04 * 1, is raised to the one before it."""
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == [] and holm([0.004]) == [0.004]


@given(st.lists(st.floats(0, 1), max_size=8))
@settings(max_examples=50, deadline=None)
def test_holm_raises_every_p_and_keeps_their_order(ps):
    adjusted = holm(ps)
    assert all(p <= a <= min(1.0, p * len(ps)) + 1e-12 for p, a in zip(ps, adjusted, strict=True))
    assert all(adjusted[i] <= adjusted[j] for i in range(len(ps)) for j in range(len(ps)) if ps[i] < ps[j])


@pytest.mark.parametrize("effect", [0.5, 1.0, 3.0])
def test_seeds_needed_is_the_first_number_with_the_power(effect):
    """Against scipy's noncentral t, for each n from 2 on. To 1e-6: the quadrature's error is below 1e-9."""

    def by_scipy(n):
        critical, shift = scipy_stats.t.ppf(0.995, n - 1), effect * math.sqrt(n)
        return scipy_stats.nct.sf(critical, n - 1, shift) + scipy_stats.nct.cdf(-critical, n - 1, shift)

    needed = seeds_needed(-0.02 * effect, 0.02, 0.01)
    assert needed == next(n for n in range(2, 200) if by_scipy(n) >= 0.8)
    assert power(effect, needed, 0.01) == pytest.approx(by_scipy(needed), abs=1e-6)


def test_seeds_needed_at_its_ends():
    assert seeds_needed(0.0, 1.0, 0.01) is None  # no number shows that nothing is something
    assert seeds_needed(1e-6, 1.0, 0.01) is None  # more than anybody will train
    assert seeds_needed(0.1, 0.0, 0.01) == 2 and seeds_needed(0.1, 0.0, 0.01, least=3) == 3
    assert seeds_needed(0.1, 0.0001, 0.01, least=3) == 3


def claims(p_values: list[float], level: float) -> tuple[int, tuple[float, float]]:
    """How often a claim was made, and the binomial bounds that a right test leaves once in a million each."""
    bounds = scipy_stats.binom.ppf([1e-6, 1 - 1e-6], len(p_values), level)
    return sum(p < level for p in p_values), tuple(bounds)


def test_a_null_comparison_claims_at_the_stated_rate():
    """The same variant twice with 20 seeds each, 1500 times: neither more nor clearly fewer claims than stated."""
    runs = np.random.default_rng(5).normal(3.0, 0.02, (1500, 2, 20))
    ps = [t_test((one - other).tolist()).p for one, other in runs]
    for level in (0.01, 0.05):
        made, (fewest, most) = claims(ps, level)
        assert fewest <= made <= most


def test_many_arms_claim_no_more_than_one():
    """Six arms that are all the baseline: the chance of even one claim among them stays below the level."""
    runs = np.random.default_rng(6).normal(3.0, 0.02, (200, 7, 4))
    smallest = [min(holm([t_test((arm - arms[0]).tolist()).p for arm in arms[1:]])) for arms in runs]
    made, (_, most) = claims(smallest, 0.05)
    assert made <= most
    uncorrected = [min(t_test((arm - arms[0]).tolist()).p for arm in arms[1:]) for arms in runs]
    assert claims(uncorrected, 0.05)[0] > most  # what the correction is for


def test_statistics_need_no_torch():
    code = (
        "import sys, trainer.commands.report.statistics; assert not {'torch', 'matplotlib', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
