"""How often the interval of a ladder's prediction holds a new run: points of a known law with a known scatter, many times over.

python tests/commands/ladder_coverage.py POINTS [REPETITIONS [SCATTER]]      POINTS: 9 or 16
"""

import sys

import numpy as np

from trainer.commands.ladder.fit import fit
from trainer.planning.laws import SHARE, Law

LAW = Law(("N", "D"), 1.69, (406.4, 410.7), (0.34, 0.28))  # arXiv 2203.15556
DRAWS = 80


def holds(seed: int, sizes: int, scatter: float) -> bool:
    """Whether a run of twice the largest size is inside the interval of a ladder of `sizes` sizes at as many lengths."""
    generator = np.random.default_rng(seed)
    points = [(1e6 * 2**i, 1e6 * 2**i * 5 * 2**j) for i in range(sizes) for j in range(sizes)]
    losses = [LAW.loss(*point) * np.exp(scatter * generator.standard_normal()) for point in points]
    new = 1e6 * 2**sizes, 1e7 * 2**sizes
    measured = LAW.loss(*new) * np.exp(scatter * generator.standard_normal())
    _, low, high = fit(("N", "D"), points, losses, draws=DRAWS).predict(*new)
    return low <= measured <= high


if __name__ == "__main__":
    given = [*map(float, sys.argv[1:])]
    points, repetitions, scatter = given + [9, 100, 0.002][len(given) :]
    held = [holds(seed, round(points**0.5), scatter) for seed in range(int(repetitions))]
    share = float(np.mean(held))
    error = (share * (1 - share) / len(held)) ** 0.5
    print(
        f"{points:.0f} points: {sum(held)} of {len(held)} new runs inside, {share:.0%} +- {error:.0%}, nominal {SHARE:.0%}"
    )
