"""The statistics of a report: paired t test, intervals, Holm's correction, seeds needed. Pure functions on numbers.

Equal values have no spread. Then t is infinite (p = 0), or 0 if all values are 0 (p = 1), and the interval is one point.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import mpmath
import numpy as np

CONFIDENCE = 0.95  # of every interval
POWER = 0.8  # chance to see a difference that is there, for `seeds_needed`
DRAWS = 10_000  # of the bootstrap
MOST_SEEDS = 10_000  # `seeds_needed` looks no further
NODES, REACH = 100, 8.0  # of the integral over u, whose standard deviation is below 1 around sqrt(degrees)
ROUNDING = 1e-12  # relative: values that differ by less are equal up to the rounding of a subtraction


@dataclass(frozen=True)
class TTest:
    """A t test of the mean of `n` values against a number.

    mean, sd: of the values (sd: None for one value); t, p: None for one value
    interval: 95 % interval of the mean; None for one value
    """

    n: int
    mean: float
    sd: float | None = None
    t: float | None = None
    p: float | None = None
    interval: tuple[float, float] | None = None


def t_cdf(t: float, degrees: int) -> float:
    """P(T <= t) for Student's t. The tails are exact: no 1 - x for x near 1."""
    if math.isinf(t):
        return float(t > 0)
    tail = float(mpmath.betainc(degrees / 2, 0.5, 0, degrees / (degrees + t * t), regularized=True)) / 2
    return tail if t < 0 else 1 - tail


@functools.cache
def t_quantile(p: float, degrees: int) -> float:
    """The t with P(T <= t) = p, for 0 < p < 1. By bisection to the last digit: t may be in the millions for one degree of freedom."""
    if p < 0.5:
        return -t_quantile(1 - p, degrees)
    low, high = 0.0, 1.0
    while t_cdf(-high, degrees) > 1 - p:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if t_cdf(-middle, degrees) > 1 - p else (low, middle)
    return high


def mean_and_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1; None for one value). ValueError for none, and for values that are not finite."""
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"statistics need finite values, got {list(values)[:5]}")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, None
    if max(values) - min(values) <= ROUNDING * max(map(abs, values)):
        return mean, 0.0
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def t_test(values: Sequence[float], against: float = 0.0) -> TTest:
    """Two-sided test of the mean of `values` (paired differences, for a paired test) against a number."""
    mean, sd = mean_and_sd(values)
    n = len(values)
    if sd is None:
        return TTest(n, mean)
    t = _t(mean - against, sd, n)
    reach = t_quantile(0.5 + CONFIDENCE / 2, n - 1) * sd / math.sqrt(n)
    p = 2 * t_cdf(-abs(t), n - 1)
    return TTest(n, mean, sd, t, p, (mean - reach, mean + reach))


def p_below(values: Sequence[float], target: float) -> float | None:
    """One-sided: the p value of "the mean is not below `target`". None for one value, or equal ones, which say nothing about chance."""
    mean, sd = mean_and_sd(values)
    return t_cdf(_t(mean - target, sd, len(values)), len(values) - 1) if sd else None


def _t(difference: float, sd: float, n: int) -> float:
    if sd == 0:
        return math.copysign(math.inf, difference) if difference else 0.0
    return difference / (sd / math.sqrt(n))


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Percentile interval of the mean (Efron 1979). The same values and seed give the same interval."""
    sample = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(sample), size=(DRAWS, len(sample)))
    low, high = np.quantile(sample[drawn].mean(axis=1), [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])
    return float(low), float(high)


def holm(ps: Sequence[float]) -> list[float]:
    """p values adjusted for their number (Holm 1979): the chance of even one false claim among them stays below the level."""
    adjusted = [0.0] * len(ps)
    highest = 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        highest = max(highest, min(1.0, ps[i] * (len(ps) - rank)))
        adjusted[i] = highest
    return adjusted


def power(effect: float, n: int, level: float) -> float:
    """Chance that the two-sided t test of n values rejects. effect: true mean / standard deviation.

    The noncentral t distribution: the tails of a normal distribution, integrated over u, the square root of a chi-square variable.
    """
    degrees = n - 1
    bound, shift = t_quantile(1 - level / 2, degrees) / math.sqrt(degrees), abs(effect) * math.sqrt(n)
    log_scale = (degrees / 2 - 1) * math.log(2) + math.lgamma(degrees / 2)

    def at(u: float) -> float:
        density = math.exp((degrees - 1) * math.log(u) - u * u / 2 - log_scale)
        return density * (_below(shift - bound * u) + _below(-shift - bound * u))

    low, high = max(0.0, math.sqrt(degrees) - REACH), math.sqrt(degrees) + REACH
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    points = low + (high - low) * (nodes + 1) / 2
    return float((high - low) / 2 * sum(weight * at(u) for u, weight in zip(points, weights, strict=True)))


def _below(x: float) -> float:
    """P(X <= x) for a standard normal X."""
    return math.erfc(-x / math.sqrt(2)) / 2


def seeds_needed(mean: float, sd: float, level: float, least: int = 2) -> int | None:
    """The fewest seeds, `least` or more, that show a difference of `mean` at `level` with a power of 80 %. None: no difference, or above
    MOST_SEEDS.

    mean, sd: of the paired differences; both are taken as if they were the true ones.
    """
    if mean == 0:
        return None
    if sd == 0:
        return least
    effect = mean / sd
    tails = [float(mpmath.erfinv(2 * p - 1)) * math.sqrt(2) for p in (1 - level / 2, POWER)]
    n = max(
        least, math.ceil((sum(tails) / effect) ** 2)
    )  # of the normal distribution: a lower bound, and close to the answer
    if n > MOST_SEEDS:
        return None
    while power(effect, n, level) < POWER:
        n += 1
    return n
