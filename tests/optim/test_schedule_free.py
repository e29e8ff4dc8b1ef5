"""Schedule-free AdamW (arXiv 2405.15682), against the authors' package."""

import pytest
import torch
from conftest import tiny_values
from rule_steps import SHAPES, Steps, drawn
from tiny_runs import make, weights

from trainer.commands.train import run
from trainer.core.errors import UserError
from trainer.optim.rules.schedule_free import average_share
from trainer.recipes import recipe_rows, schedule_change
from trainer.runs.metrics import read_rows
from trainer.runs.opening import open_run


@pytest.mark.parametrize("warmup", [0, 1, 3, 20])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_weights_and_averages_are_those_of_the_package(warmup, decay):
    schedulefree = pytest.importorskip("schedulefree", reason="the reference: pip install schedulefree")
    start = drawn(*SHAPES)
    ours = Steps("schedule-free", start, lr=0.05, weight_decay=decay, warmup_steps=warmup)
    theirs = [p.clone().requires_grad_() for p in start]
    reference = schedulefree.AdamWScheduleFree(theirs, 0.05, (0.9, 0.999), weight_decay=decay, warmup_steps=warmup)
    reference.train()
    for step in range(8):
        gradients = drawn(*SHAPES, seed=1 + step)
        found = ours.take(gradients)
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient.clone()
        reference.step()
        averages = [
            ours.rule.evaluation_weights(p, state) for p, state in zip(ours.parameters, ours.states, strict=True)
        ]
        # lr and c_t are fp32 here: 2^-24, added up over eight steps.
        for mine, yours in zip(found, theirs, strict=True):
            torch.testing.assert_close(mine, yours.detach(), rtol=2e-6, atol=2e-6)
        reference.eval()
        for mine, yours in zip(averages, theirs, strict=True):
            torch.testing.assert_close(mine, yours.detach(), rtol=2e-6, atol=2e-6)
        reference.train()


@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_shares_are_squares_over_their_sum(warmup):
    rates = [min(1.0, t / max(1, warmup)) ** 2 for t in range(1, 13)]
    expected = [rate / sum(rates[: n + 1]) for n, rate in enumerate(rates)]
    assert average_share(torch.arange(1, 13).double(), warmup).tolist() == pytest.approx(expected, rel=1e-12)


def test_before_the_first_step_the_average_is_the_weight():
    ours = Steps("schedule-free", drawn((3,)))
    ours.take([torch.full((3,), float("nan"))], finite=0.0)
    assert torch.equal(ours.rule.evaluation_weights(ours.parameters[0], ours.states[0]), ours.parameters[0])


def test_a_run_has_no_other_schedule_and_evaluates_with_the_average(tiny_dataset, tmp_path):
    changes = {"optim__name": "schedule-free", "optim__recipe": "plain", "optim__lr": 1e-2, "optim__warmup_steps": 2}
    one = make(tiny_dataset, tmp_path / "plan", **changes)
    assert one.config.optim.settings == {"warmup_steps": 2}
    for step in (0, 5, 11):
        one.engine.optimizer.prepare(step, torch.tensor(1.0))
        assert {group["lr"] for group in one.engine.optimizer.param_groups} == {1e-2}
    assert schedule_change(one.config, before=6, step=4) == ""
    run(tiny_values(tiny_dataset, tmp_path / "r", max_steps=4, checkpoint__every=4, **changes))
    stored, opened = weights(tmp_path / "r", 4), open_run(str(tmp_path / "r"), None, "cpu", "auto")
    for name, parameter in opened.model.named_parameters():
        average = stored[f"model.{name}"] - (1 / 0.9 - 1) * stored[f"optimizer.{name}.z_minus_y"]
        torch.testing.assert_close(parameter.detach(), average, rtol=1e-6, atol=1e-7)
        assert not torch.equal(parameter.detach(), stored[f"model.{name}"])
    rows = read_rows(tmp_path / "r" / "metrics.jsonl")
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_the_plan_promises_no_schedule(tiny_dataset, tmp_path):
    one = make(tiny_dataset, tmp_path, optim__name="schedule-free")
    assert [row.rule for row in recipe_rows(one.config, one.model)].count(
        "constant, because schedule-free needs no schedule"
    ) == 3


def test_bf16_state_is_refused(tiny_dataset, tmp_path):
    with pytest.raises(
        UserError, match="^optim.state_precision: schedule-free cannot keep its state in bf16: .* use fp32"
    ):
        make(tiny_dataset, tmp_path, optim__name="schedule-free", optim__state_precision="bf16")
