"""The defaults of the recipe `plain`."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from test_zoo import ZOO

from models.base import get_model
from models.counting import build_on_meta
from trainer.core.config import BatchConfig, OptimConfig, RunConfig
from trainer.optim import names_by_role
from trainer.optim.groups import shapes_of
from trainer.recipes import RECIPES
from trainer.recipes.hlb import rate_at_batch, tokens_per_microbatch
from trainer.recipes.plain import HIGHEST_RATE, RATE_RULE, learning_rate, warmup_steps


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
    full, batch = learning_rate(10**8, 10**7, 2 * 10**9), 0.2920 * 1.2e18**0.3271
    assert full == pytest.approx(0.3118 * 1.2e18**-0.125, rel=1e-12)
    assert learning_rate(16 * 10**8, 10**7, 32 * 10**9) == pytest.approx(full / 2, rel=1e-12)
    assert learning_rate(10**8, round(batch) + 1, 2 * 10**9) == full
    assert learning_rate(10**8, round(batch / 4), 2 * 10**9) == pytest.approx(full / 2, rel=1e-4)
    assert learning_rate(1000, 10**6, 10**6) == HIGHEST_RATE


def test_a_model_that_is_trained_already_has_the_rate_of_a_long_run():
    """A short run from the start has a high rate; it would undo what the weights have learned."""
    facts = SimpleNamespace(base_non_embedding=10**8, has_base=False)
    run = RunConfig(max_steps=10, batch=BatchConfig(tokens_per_step=2**13))
    first = RECIPES["plain"].optim_defaults(run, facts)["lr"]
    tuned = RECIPES["plain"].optim_defaults(replace(run, init_from="runs/parent"), facts)["lr"]
    assert first.value == learning_rate(10**8, 2**13, 10 * 2**13) and first.rule == RATE_RULE
    assert tuned.value == learning_rate(10**8, 2**13, 20 * 10**8) < first.value / 5 and "D at least 20 N" in tuned.rule


def test_hlbs_rate_is_that_of_its_batch():
    fitted = tokens_per_microbatch(1)
    assert rate_at_batch(2.5e-3, fitted, 1) == rate_at_batch(2.5e-3, 4 * fitted, 1) == 2.5e-3
    assert rate_at_batch(2.5e-3, fitted // 4, 1) == pytest.approx(2.5e-3 / 2, rel=1e-3)


SHAPES = {
    "rwkv7": [{}, {"form": "preview"}],
    "gated-delta-net": [{}, {"decay": "channel"}],
    "ftp": [{"mode": "chunked"}],
}


@pytest.mark.parametrize("name", ZOO)
def test_what_decays(name):
    """Tables and matrices; no short convolution, token shift or low-rank part, though they have two dimensions."""
    optim = OptimConfig(lr=1e-3, schedule="cosine", weight_decay=0.1, warmup_steps=40)
    config = SimpleNamespace(optim=optim, max_steps=1000)
    for choices in SHAPES.get(name, [{}]):
        model_class = get_model(name)
        model = build_on_meta(model_class, model_class.Config(vocab_size=64, **choices))
        role_of = {parameter: role for role, names in names_by_role(model).items() for parameter in names}
        groups = RECIPES["plain"].groups(model, shapes_of(model), config)
        assert [group.weight_decay for group in groups] == [0.1, 0.0][: len(groups)]
        decayed = {role_of[parameter] for parameter in groups[0].parameters}
        assert {"matrix", "embedding"} <= decayed <= {"matrix", "embedding", "head", "position"}
        assert sorted(parameter for group in groups for parameter in group.parameters) == sorted(role_of)
        assert all(
            model.get_parameter(other).dim() < 2 or role_of[other] in ("norm", "bias")
            for other in groups[-1].parameters
        )
