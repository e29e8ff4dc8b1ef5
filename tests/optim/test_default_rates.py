"""The learning rate that a run has without optim.lr: by optimizer, architecture and model_scale, with its source."""

import json

import pytest

from models.base import load_models
from trainer.__main__ import dispatch
from trainer.core.config import RunConfig
from trainer.core.settings import build
from trainer.optim.rule import get_rule, registered_rules
from trainer.planning.plan import resolve
from trainer.planning.resolver import rate_of
from trainer.recipes.hlb import learning_rate as of_hlb
from trainer.recipes.plain import learning_rate
from trainer.recipes.recipe import Default

load_models()
ADAMW = Default(3e-3, "a rule")
# What the authors publish: name -> (factor of AdamW's rate, part of the source). Any other built-in rule takes AdamW's and says so.
RELATIVE = {
    "adam-mini": (1, "2406.16793"),
    "adamuon": (1, "2507.11005"),
    "lion": (0.2, "2302.06675, section 5"),
    "muon": (1, "2502.16982"),
}
UNKNOWN = ("adam", "ademamix", "adopt", "cautious-adamw", "palm-soap", "radam", "soap", "torch:NAdam")


def rate(name, **settings) -> Default:
    return rate_of(get_rule(name, settings), name, ADAMW)


@pytest.mark.parametrize("name", RELATIVE)
def test_a_published_ratio_follows_adamw(name):
    factor, source = RELATIVE[name]
    found = rate(name)
    assert found.value == pytest.approx(factor * 3e-3, rel=1e-12)
    assert source in found.rule and found.rule.endswith("; AdamW's: a rule")


def test_a_published_rate_is_the_same_for_every_model():
    assert rate("adafactor").value == 0.01 and "1804.04235" in rate("adafactor").rule
    assert rate("muon", scale="spectral").value == 0.02


@pytest.mark.parametrize("name, source, rates", [
    # 2e-3 and 6e-3 are the authors' for GPT-2 of 770 M and 125 M, where AdamW has 2e-4 and 6e-4.
    ("mars", "2411.10438", {2e-4: 2e-3, 6e-4: 6e-3, 3e-3: 6e-3, 0.1: 0.1}),
    ("schedule-free", "2405.15682", {6e-4: 1.2e-3, 2e-3: 2.5e-3, 0.1: 0.1}),
])  # fmt: skip
def test_a_larger_rate_ends_where_its_authors_stop(name, source, rates):
    """hlb's AdamW has rates far above those that any author tried: nothing is multiplied there."""
    for adamw, expected in rates.items():
        found = get_rule(name).default_lr(adamw)
        assert found[0] == pytest.approx(expected, rel=1e-12) and source in found[1]


def test_where_nothing_is_published_this_is_said():
    for name in UNKNOWN:
        assert rate(name) == (3e-3, f"a rule; AdamW's, for no rate of {name} is published")
    assert rate("adamw") == ADAMW
    ours = {name for name, rule in registered_rules().items() if rule.__module__.startswith("trainer.")}
    assert ours - {"adamw", "adafactor", "mars", "schedule-free", *RELATIVE} == set(UNKNOWN) - {"torch:NAdam"}


def planned(model, scale, **optim):
    values = {"device": "cpu", "model_scale": scale, "model": {"name": model}, "data": {"tokenizer": "bytes"}}
    plan = resolve(build(RunConfig, {**values, "optim": optim}))
    return plan, next(entry for entry in plan.entries if entry.key == "optim.lr")


def of_plain(plan):
    batch = plan.config.batch.tokens_per_step
    return learning_rate(plan.non_embedding, batch, batch * plan.config.max_steps)


@pytest.mark.parametrize("scale", [0.02, 0.2])
def test_the_plan_follows_architecture_and_scale(scale):
    plan, row = planned("gpt2", scale, name="lion")
    assert row.value == plan.config.optim.lr == pytest.approx(0.2 * of_plain(plan), rel=1e-12)
    assert "Lion" in row.rule and "0.3118 C^-0.125" in row.rule
    plan, row = planned("hlb", scale, name="lion")
    assert row.value == pytest.approx(0.2 * of_hlb(plan.parameters), rel=1e-12) and "2.62 * 9e7" in row.rule
    plan, row = planned("ngpt", scale)
    assert row[1:] == (15e-4, "what ngpt is made for (arXiv 2410.01131, whose lr is 15e-4 to 30e-4)")
    assert planned("ngpt", scale, name="lion")[1].value == pytest.approx(3e-4, rel=1e-12)
    assert planned("gpt2", scale, name="lion", lr=1e-5)[1][1:] == (1e-5, "set")


def test_the_list_of_optimizers_tells_each_rate(capsys):
    dispatch(["optimizers", "--json"])
    rates = {row["name"]: row["learning_rate"] for row in json.loads(capsys.readouterr().out)}
    assert rates["lion"].startswith("0.2 x AdamW's") and rates["adafactor"].startswith("0.01: ")
    assert rates["soap"] == "AdamW's; no rate of its own is published" and rates["adamw"] == "that of the recipe"
    dispatch(["optimizers"])
    assert f"{'lion':<15} {rates['lion']}" in capsys.readouterr().out.splitlines()
