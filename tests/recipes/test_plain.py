"""The defaults of the recipe `plain`."""

import pytest

from trainer.recipes.plain import HIGHEST_RATE, learning_rate, warmup_steps


@pytest.mark.parametrize(
    "max_steps, steps, rule",
    [
        (100_000, 3000, "3 % of max_steps"),
        (1334, 40, "3 % of max_steps"),
        (1300, 40, "2 / (1 - beta2)"),
        (160, 40, "2 / (1 - beta2)"),
        (100, 25, "a quarter of max_steps"),
        (1, 1, "a quarter of max_steps"),
    ],
)
def test_the_warm_up_is_long_enough_for_the_second_moment(max_steps, steps, rule):
    """3 % of a short run are a few steps, and a Llama then lost 0.75 nats at the rate that was best with 40."""
    found = warmup_steps(max_steps)
    assert found.value == steps and found.rule.startswith(rule)


def test_the_learning_rate_follows_the_compute_and_a_batch_that_is_too_small():
    """Of the two laws of arXiv 2401.02954, and the root of the batch."""
    full = learning_rate(10**8, 10**7, 2 * 10**9)
    assert full.value == pytest.approx(0.3118 * 1.2e18**-0.125, rel=1e-12) and full.rule.endswith("at most 0.01")
    assert learning_rate(16 * 10**8, 10**7, 32 * 10**9).value == pytest.approx(full.value / 2, rel=1e-12)
    batch = round(0.2920 * 1.2e18**0.3271)
    assert learning_rate(10**8, batch, 2 * 10**9) == full
    quarter = learning_rate(10**8, batch // 4, 2 * 10**9)
    assert quarter.value == pytest.approx(full.value / 2, rel=1e-4) and f"{batch:,}" in quarter.rule
    assert learning_rate(1000, 10**6, 10**6).value == HIGHEST_RATE
