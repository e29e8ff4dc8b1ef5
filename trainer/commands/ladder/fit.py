"""Fits of losses: L(N, D) = E + A N^-alpha + B D^-beta (arXiv 2203.15556), and E + k C^-gamma. Pure numpy, no randomness but the
bootstrap's own seed.

For given exponents the law is linear in the other numbers. So only the exponents are searched, and for each of them the rest
is the exact non-negative least-squares solution. Residuals are relative, and those beyond DELTA count linearly (Huber), so that
one run that went wrong does not bend the law.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from trainer.planning.laws import Fit, Law

DELTA = 1e-2  # relative residual from which a point counts linearly: some times what a seed moves the loss of such runs
EXPONENTS = np.geomspace(0.02, 2.0, 41)  # of the first search; arXiv 2203.15556 has 0.34 and 0.28
OF_DRAWS = EXPONENTS[
    ::2
]  # fewer, but as wide: a draw may lie far from the law, and its search must not be what bounds an interval
REFINEMENTS = 6  # times that the search is repeated around the best exponents, each four times as fine
REWEIGHTINGS = 8  # iterations of the Huber weights


def fit(names: Sequence[str], points: Sequence[Sequence[float]], losses: Sequence[float], draws: int = 200) -> Fit:
    """The law of `losses` [n] at `points` [n, len(names)], with a parametric bootstrap.

    The residuals of few points tell the scatter of a run only roughly: of n - p degrees of freedom, p numbers being fitted. So each draw
    has its own scatter, by the chi-squared distribution. For a law that is linear in its numbers, this gives Student's t.

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
    freedom = len(y) - best.numbers
    deviation = np.sqrt(((y / expected - 1) ** 2).sum() / freedom)
    generator = np.random.default_rng(0)
    drawn, scatter = [], []
    for _ in range(draws):
        size = deviation * np.sqrt(freedom / generator.chisquare(freedom))
        sample = expected * np.exp(size * generator.standard_normal(len(y)))
        drawn.append(solve(tuple(names), x, sample, OF_DRAWS))
        scatter.append(float(np.expm1(size * generator.standard_normal())))
    return Fit(best, tuple(drawn), tuple(scatter))


def solve(names: tuple[str, ...], x: np.ndarray, y: np.ndarray, exponents: np.ndarray = EXPONENTS) -> Law:
    """The law with the smallest Huber loss of relative residuals. exponents: of the first search, for each term."""
    grids = [exponents] * len(names)
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
            solution = least_squares(part, weights[rows])
            with np.errstate(invalid="ignore", over="ignore"):
                errors = (((part @ solution[..., None])[..., 0] - weights[rows]) ** 2).sum(axis=1)
            better = (solution >= 0).all(axis=1) & (errors < best[rows])  # false for a solution that is not finite
            at = rows[better]
            best[at], found[at] = errors[better], 0.0
            found[np.ix_(at, kept)] = solution[better]
        if size == count:
            rows = rows[~np.isfinite(best)]  # where all numbers are positive, no smaller set is better
    return found


def least_squares(columns: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The solutions [G, k] of columns [G, n, k] s = values [G, n], not finite where columns depend on each other. By QR, a quarter of the
    time of the singular values, and as exact."""
    q, r = np.linalg.qr(columns)
    right = (q.swapaxes(1, 2) @ values[..., None])[..., 0]
    solution = np.zeros_like(right)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for i in reversed(range(right.shape[1])):
            solution[:, i] = (right[:, i] - (r[:, i, i + 1 :] * solution[:, i + 1 :]).sum(axis=1)) / r[:, i, i]
    return solution
