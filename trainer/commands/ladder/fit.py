"""Fits of losses: L(N, D) = E + A N^-alpha + B D^-beta (arXiv 2203.15556), and E + k C^-gamma. Pure numpy, no randomness but the
bootstrap's own seed.

For given exponents the law is linear in the other numbers. So only the exponents are searched, and for each of them the rest
is the exact non-negative least-squares solution. Residuals are relative, and those beyond DELTA count linearly (Huber), so that
one run that went wrong does not bend the law.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

DELTA = 1e-2  # relative residual from which a point counts linearly: ten times what a seed moves the loss of such runs
EXPONENTS = np.geomspace(0.02, 2.0, 41)  # of the first search; arXiv 2203.15556 has 0.34 and 0.28
REFINEMENTS = 6  # times that the search is repeated around the best exponents, each four times as fine
REWEIGHTINGS = 8  # iterations of the Huber weights


@dataclass(frozen=True)
class Law:
    """irreducible + sum_i scales[i] x_i^-exponents[i]. names: of the x_i, such as ("N", "D")."""

    names: tuple[str, ...]
    irreducible: float
    scales: tuple[float, ...]
    exponents: tuple[float, ...]

    def loss(self, *values: float) -> float:
        """The loss at these values, in nats a token."""
        terms = (scale * value**-power for scale, power, value in zip(self.scales, self.exponents, values, strict=True))
        return self.irreducible + sum(terms)

    @property
    def numbers(self) -> int:
        """Numbers that the fit chooses."""
        return 1 + 2 * len(self.names)

    def formula(self) -> str:
        """The law as text, such as `1.69 + 406 N^-0.34 + 411 D^-0.28`."""
        terms = (
            f"{scale:.4g} {name}^-{power:.3f}"
            for name, scale, power in zip(self.names, self.scales, self.exponents, strict=True)
        )
        return " + ".join([f"{self.irreducible:.4f}", *terms])


@dataclass(frozen=True)
class Fit:
    """law: of all points; draws: laws of the bootstrap's samples; errors: relative residuals of the points, in their order."""

    law: Law
    draws: tuple[Law, ...]
    errors: tuple[float, ...]

    def predict(self, *values: float, share: float = 0.9) -> tuple[float, float, float]:
        """(loss, low, high): the middle `share` of what a new run may have: the law's uncertainty, and a run's own scatter."""
        scatter = np.random.default_rng(0).choice(inflated(self), len(self.draws))
        losses = [law.loss(*values) * (1 + error) for law, error in zip(self.draws, scatter, strict=True)]
        low, high = np.quantile(losses, [(1 - share) / 2, (1 + share) / 2])
        return self.law.loss(*values), float(low), float(high)

    def interval(self, number: Callable[[Law], float], share: float = 0.9) -> tuple[float, float]:
        """The middle `share` of one number of the law over the bootstrap."""
        low, high = np.quantile([number(law) for law in self.draws], [(1 - share) / 2, (1 + share) / 2])
        return float(low), float(high)


def fit(names: Sequence[str], points: Sequence[Sequence[float]], losses: Sequence[float], draws: int = 200) -> Fit:
    """The law of `losses` [n] at `points` [n, len(names)], with a bootstrap of its residuals.

    Raises ValueError if there are not more points than numbers to choose, or the points do not tell two terms apart.
    """
    x, y = np.asarray(points, dtype=float), np.asarray(losses, dtype=float)
    needed = 2 + 2 * len(names)
    if len(y) < needed:
        raise ValueError(f"{len(y)} points for a law of {needed - 1} numbers; {needed} are needed")
    for name, column in zip(names, x.T, strict=True):
        if len(set(column)) < 3:
            raise ValueError(f"{len(set(column))} values of {name}; three are needed to tell a power of it")
    best = solve(tuple(names), x, y)
    expected = np.array([best.loss(*row) for row in x])
    errors = y / expected - 1
    one = Fit(best, (), tuple(errors))
    generator = np.random.default_rng(0)
    near = np.array(best.exponents)
    drawn = []
    for _ in range(draws):
        sample = expected * (1 + generator.choice(inflated(one), len(y)))
        drawn.append(solve(tuple(names), x, sample, near))
    return Fit(best, tuple(drawn), tuple(errors))


def inflated(fit: Fit) -> np.ndarray:
    """The residuals, without their mean, as large as those of new points: a fit with p numbers makes its own smaller."""
    errors = np.array(fit.errors)
    left = max(1, len(errors) - fit.law.numbers)
    return (errors - errors.mean()) * np.sqrt(len(errors) / left)


def solve(names: tuple[str, ...], x: np.ndarray, y: np.ndarray, near: np.ndarray | None = None) -> Law:
    """The law with the smallest Huber loss of relative residuals. near: exponents to start the search at; None: all EXPONENTS."""
    grids = [EXPONENTS] * len(names) if near is None else [power * np.geomspace(0.5, 2.0, 9) for power in near]
    best: tuple[float, np.ndarray, np.ndarray] = (np.inf, np.zeros(0), np.zeros(0))
    for _ in range(REFINEMENTS):
        powers = np.stack([part.ravel() for part in np.meshgrid(*grids, indexing="ij")], axis=1)  # [G, k]
        losses, scales = linear(x, y, powers)
        at = int(losses.argmin())
        if losses[at] < best[0]:
            best = (float(losses[at]), powers[at], scales[at])
        step = grids[0][1] / grids[0][0]
        grids = [power * step ** np.linspace(-1, 1, 9) for power in best[1]]
    _, found, numbers = best
    return Law(names, float(numbers[0]), tuple(map(float, numbers[1:])), tuple(map(float, found)))


def linear(x: np.ndarray, y: np.ndarray, powers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Huber losses [G] and [E, A, B ...] [G, k + 1] of the best non-negative numbers at exponents [G, k]. x [n, k]; y [n]."""
    terms = np.exp(-np.log(x)[None] * powers[:, None])  # [G, n, k]
    columns = np.concatenate([np.ones((*terms.shape[:2], 1)), terms], axis=2) / y[None, :, None]  # relative to the loss
    sizes = columns.max(axis=1, keepdims=True)
    weights = np.ones(columns.shape[:2])
    for _ in range(REWEIGHTINGS):
        scales = non_negative(columns / sizes, weights)
        errors = np.abs((columns / sizes @ scales[..., None])[..., 0] - 1)
        before, weights = weights, np.sqrt(np.minimum(1.0, DELTA / np.maximum(errors, 1e-300)))
        if np.allclose(weights, before, atol=1e-6):
            break
    losses = np.where(errors > DELTA, DELTA * (errors - DELTA / 2), errors**2 / 2).sum(axis=1)
    return losses, scales / sizes[:, 0]


def non_negative(columns: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The weighted least-squares solutions [G, k] of columns s = 1 with s >= 0: the best over all sets of positive numbers, so exact.
    columns [G, n, k]; weights [G, n]."""
    count = columns.shape[2]
    best, found = np.full(len(columns), np.inf), np.zeros((len(columns), count))
    rows = np.arange(len(columns))
    for size in range(count, 0, -1):
        for kept in itertools.combinations(range(count), size):
            if not len(rows):
                break
            part = columns[rows][:, :, kept] * weights[rows][:, :, None]
            solution = (np.linalg.pinv(part) @ weights[rows][..., None])[..., 0]
            errors = (((part @ solution[..., None])[..., 0] - weights[rows]) ** 2).sum(axis=1)
            better = (solution >= 0).all(axis=1) & (errors < best[rows])
            at = rows[better]
            best[at], found[at] = errors[better], 0.0
            found[np.ix_(at, kept)] = solution[better]
        if size == count:
            rows = rows[~np.isfinite(best)]  # where all numbers are positive, no smaller set is better
    return found
