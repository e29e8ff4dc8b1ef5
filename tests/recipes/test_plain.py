"""The defaults of the recipe `plain`."""

import pytest

from trainer.recipes.plain import HIGHEST_RATE, learning_rate, recommended_batch, warmup_steps


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


def test_the_learning_rate_follows_the_size_and_a_batch_that_is_too_small():
    assert learning_rate(10**8, 10**9).value == pytest.approx(0.3118 * (6 * 10**8 * 20 * 10**8) ** -0.125, rel=1e-12)
    assert learning_rate(10**8, 10**7).value / learning_rate(16 * 10**8, 10**7).value == pytest.approx(2, rel=1e-12)
    full = recommended_batch(10**8)
    quarter = learning_rate(10**8, full // 4)
    assert (
        quarter.value == pytest.approx(learning_rate(10**8, full).value / 2, rel=1e-4) and f"{full:,}" in quarter.rule
    )
    assert learning_rate(1000, 10**6).value == HIGHEST_RATE
