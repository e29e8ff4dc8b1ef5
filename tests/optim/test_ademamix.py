"""AdEMAMix (arXiv 2409.03137): its steps by hand, its schedules, and their source."""

import math

import pytest
import torch
from conftest import tiny_values
from rule_steps import SAME, SHAPES, Steps, against_torch, drawn

from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import build
from trainer.optim.rules.ademamix import AdEMAMixConfig, schedules
from trainer.planning.plan import resolve
from trainer.planning.run_config import check_unchanged, merged_config, read_config, write_config


def test_three_steps_by_hand():
    start, total = drawn(*SHAPES), 10
    ours = Steps("ademamix", start, lr=0.01, weight_decay=0.5, total_steps=total)
    expected = [(p.clone(), *(torch.zeros_like(p) for _ in range(3))) for p in start]
    for t in range(1, 4):
        alpha = 5 * t / total
        inverse = (1 - t / total) / math.log(0.9) + t / total / math.log(0.9999)  # 1 / log(beta3) goes straight
        beta3 = math.exp(1 / inverse)
        gradients = drawn(*SHAPES, seed=t)
        for n, ((p, m1, m2, nu), g) in enumerate(zip(expected, gradients, strict=True)):
            m1, m2, nu = 0.9 * m1 + 0.1 * g, beta3 * m2 + (1 - beta3) * g, 0.999 * nu + 0.001 * g * g
            root = (nu / (1 - 0.999**t)).sqrt() + 1e-8
            p = p - 0.01 * ((m1 / (1 - 0.9**t) + alpha * m2) / root + 0.5 * p)
            expected[n] = (p, m1, m2, nu)
        for found, (p, *_) in zip(ours.take(gradients), expected, strict=True):
            torch.testing.assert_close(found, p, rtol=SAME, atol=SAME)


def test_without_the_slow_mean_it_is_adamw():
    against_torch(
        "ademamix",
        lambda p: torch.optim.AdamW(p, 0.1, (0.9, 0.999), 1e-8, 0.3),
        weight_decay=0.3,
        alpha=0,
        total_steps=10,
    )


def test_the_slow_mean_is_not_corrected():
    """The first update for g = 1 and lr = 1 with no schedule is 1 + 5 * (1 - 0.9999), not 1 + 5."""
    moved = Steps("ademamix", [torch.zeros(1)], lr=1.0, total_steps=0).take([torch.ones(1)])[0]
    assert moved.item() == pytest.approx(-1.0005, rel=SAME)


def test_schedules_end_where_they_should_and_never_fall():
    own = AdEMAMixConfig(total_steps=1000)
    steps = torch.arange(0, 1501).double()
    alpha, beta3 = schedules(own, steps)
    assert (alpha[0], beta3[0].item()) == (0, pytest.approx(own.beta1, rel=1e-12))
    assert alpha[1000] == alpha[1500] == own.alpha
    assert beta3[1000].item() == beta3[1500].item() == pytest.approx(own.beta3, rel=1e-12)
    assert (alpha.diff() >= 0).all() and (beta3.diff() >= 0).all()
    alpha, beta3 = schedules(AdEMAMixConfig(total_steps=0), torch.ones(1).double())
    assert (alpha.item(), beta3.item()) == (5, pytest.approx(0.9999, rel=1e-12))


def test_with_a_constant_gradient_the_update_becomes_one_plus_alpha():
    ours = Steps("ademamix", [torch.zeros(1)], lr=1e-3, beta3=0.99, alpha=5, total_steps=0)
    before = torch.zeros(1)
    for _ in range(2000):
        before, now = ours.parameters[0].clone(), ours.take([torch.ones(1)])[0]
    # 1 - 0.99^2000 = 1 - 2e-9 of the slow mean is there.
    assert (before - now).item() / 1e-3 == pytest.approx(1 + 5, rel=1e-5)


def test_the_schedules_span_the_run_and_stay_when_it_grows(tiny_dataset, tmp_path):
    values = tiny_values(tiny_dataset, tmp_path / "r", optim__name="ademamix", optim__recipe="plain")
    plan = resolve(build(RunConfig, values))
    assert plan.config.optim.settings == {"total_steps": 12}
    assert ("optim.settings.total_steps", 12) in [(entry.key, entry.value) for entry in plan.entries]
    (tmp_path / "r").mkdir()
    write_config(tmp_path / "r", plan.config)
    stored = read_config(tmp_path / "r", print)
    given = {"max_steps": 20}
    longer = resolve(merged_config(given, stored, 1)).config
    assert (longer.max_steps, longer.optim.settings) == (20, {"total_steps": 12})
    check_unchanged(stored, longer, given, lambda config: config)
    given = {"optim": {"settings": {"total_steps": 20}}}
    other = resolve(merged_config(given, stored, 1)).config
    with pytest.raises(UserError, match="^optim.settings.total_steps: .* was started with 12, now it is 20"):
        check_unchanged(stored, other, given, lambda config: config)
