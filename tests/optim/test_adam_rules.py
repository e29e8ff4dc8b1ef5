"""The rules that are near Adam, against torch's classes and against plain formulas in fp64."""

import math
from functools import partial

import pytest
import torch
from rule_steps import SAME, SHAPES, Steps, against_torch, drawn

from trainer.optim import Group, Optimizer
from trainer.optim.rule import GroupSettings, get_rule

close = partial(torch.testing.assert_close, rtol=SAME, atol=SAME)


def test_adam_is_torchs():
    against_torch(
        "adam", lambda p: torch.optim.Adam(p, 0.1, (0.9, 0.999), 1e-8, weight_decay=0.3), lr=0.1, weight_decay=0.3
    )


@pytest.mark.parametrize("beta2", [0.999, 0.8])  # rectified from step 6 on, and from step 2
def test_radam_is_torchs_with_decoupled_decay(beta2):
    against_torch(
        "radam",
        lambda p: torch.optim.RAdam(p, 0.1, (0.9, beta2), weight_decay=0.3, decoupled_weight_decay=True),
        steps=8,
        weight_decay=0.3,
        beta2=beta2,
    )


def test_adafactor_is_torchs():
    against_torch(
        "adafactor",
        lambda p: torch.optim.Adafactor(p, lr=0.01, weight_decay=0.3),
        lr=0.01,
        weight_decay=0.3,
        tolerance=2e-6,  # its factors are fp32
    )


def test_adafactor_takes_smaller_steps_with_a_smaller_parameter():
    """The step is proportional to the root mean square of the parameter, at least eps."""
    gradient = drawn((4, 3), seed=3)[0]
    moves = []
    for scale in (1.0, 0.1, 0.0):
        start = scale * drawn((4, 3))[0]
        moves.append((Steps("adafactor", [start], lr=0.01).take([gradient])[0] - start).norm().item())
    assert moves[1] == pytest.approx(0.1 * moves[0], rel=1e-5)
    rms = drawn((4, 3))[0].square().mean().sqrt().item()
    assert moves[2] == pytest.approx(moves[0] * 1e-3 / rms, rel=1e-5)


def adam_step(m, v, g, step, beta1, beta2):
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    return m, v, (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + 1e-8)


def test_lion_by_hand():
    start = drawn(*SHAPES)
    ours = Steps("lion", start, lr=0.01, weight_decay=0.5, beta1=0.9, beta2=0.99)
    momenta = [torch.zeros_like(p) for p in start]
    expected = [p.clone() for p in start]
    for number in range(3):
        gradients = drawn(*SHAPES, seed=1 + number)
        for p, m, g in zip(expected, momenta, gradients, strict=True):
            update = (0.9 * m + 0.1 * g).sign()
            p.mul_(1 - 0.01 * 0.5).sub_(0.01 * update)
            m.copy_(0.99 * m + 0.01 * g)
        for found, p in zip(ours.take(gradients), expected, strict=True):
            close(found, p)


def test_cautious_adamw_by_hand():
    start = drawn(*SHAPES)
    ours = Steps("cautious-adamw", start, lr=0.01, weight_decay=0.5, beta1=0.9, beta2=0.95)
    expected = [(p.clone(), torch.zeros_like(p), torch.zeros_like(p)) for p in start]
    left_out = 0
    for step in range(1, 4):
        gradients = drawn(*SHAPES, seed=step)
        for number, ((p, m, v), g) in enumerate(zip(expected, gradients, strict=True)):
            m, v, update = adam_step(m, v, g, step, 0.9, 0.95)
            mask = (update * g > 0).double()
            left_out += int((mask == 0).sum())
            update = update * mask * mask.numel() / (mask.sum() + 1)
            expected[number] = (p * (1 - 0.01 * 0.5) - 0.01 * update, m, v)
        for found, (p, _, _) in zip(ours.take(gradients), expected, strict=True):
            close(found, p)
    assert left_out > 0, "the mask was never tried"


def test_cautious_adamw_masks_by_signs_even_where_products_vanish():
    """1e-30 * 1e-30 is 0 in fp32, but both have the same sign."""
    parameter = torch.zeros(3)
    rule = get_rule("cautious-adamw")
    state = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
    group = GroupSettings(0.1, 0.0, rule.config, 0.1)
    rule.update(group, [parameter], [torch.full((3,), 1e-30)], [state], torch.tensor(1.0))
    assert (parameter < 0).all()


def test_adam_mini_by_hand():
    start = drawn(*SHAPES)
    ours = Steps("adam-mini", start, lr=0.01, weight_decay=0.5, beta1=0.9, beta2=0.95)
    assert [tuple(state["v"].shape) for state in ours.states] == [(4, 1), (1,)]
    expected = [p.clone() for p in start]
    means, squares = [torch.zeros_like(p) for p in start], [torch.zeros(4, 1).double(), torch.zeros(1).double()]
    for step in range(1, 4):
        gradients = drawn(*SHAPES, seed=step)
        for n, g in enumerate(gradients):
            block = (g * g).mean(-1, keepdim=True)  # a row, and the whole vector
            means[n] = 0.9 * means[n] + 0.1 * g
            squares[n] = 0.95 * squares[n] + 0.05 * block
            root = (squares[n] / (1 - 0.95**step)).sqrt() + 1e-8
            expected[n] = expected[n] * (1 - 0.01 * 0.5) - 0.01 * means[n] / (1 - 0.9**step) / root
        for found, p in zip(ours.take(gradients), expected, strict=True):
            close(found, p)


@pytest.mark.parametrize("size", [0.1, 10.0])  # norms below 1, and above
def test_mars_by_hand(size):
    start = drawn(*SHAPES)
    ours = Steps("mars", start, lr=0.01, weight_decay=0.5)
    expected = [(p.clone(), torch.zeros_like(p), torch.zeros_like(p)) for p in start]
    last = [size * g for g in drawn(*SHAPES, seed=1)]  # the first correction is 0
    for step in range(1, 4):
        gradients = [size * g for g in drawn(*SHAPES, seed=step)]
        for n, ((p, m, v), g) in enumerate(zip(expected, gradients, strict=True)):
            c = g + 0.025 * 0.95 / 0.05 * (g - last[n])
            assert (c.norm() > 1) == (size > 1)
            m, v, update = adam_step(m, v, c / max(1.0, c.norm().item()), step, 0.95, 0.99)
            expected[n], last[n] = (p * (1 - 0.01 * 0.5) - 0.01 * update, m, v), g
        for found, (p, _, _) in zip(ours.take(gradients), expected, strict=True):
            close(found, p)


def test_mars_keeps_a_copy_of_the_last_gradient():
    """A reference would change with the buffer that gradients are summed in, and the correction would be 0."""
    ours = Steps("mars", drawn((3,)))
    gradient = torch.ones(3, dtype=torch.float64)
    ours.states[0]["step"] += 1
    ours.rule.update(ours.group, ours.parameters, [gradient], ours.states, torch.tensor(1.0))
    gradient.fill_(7)
    assert ours.states[0]["last_grad"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("lr", [0.1, 0.01])
def test_independent_decay_follows_the_schedule_and_not_the_learning_rate(lr):
    """arXiv 2309.14322: w = (1 - s decay) w. With gradients of 0 nothing else moves w."""
    parameter = torch.nn.Parameter(torch.ones(3))
    given = {"independent_decay": True}
    group = Group("g", ["p"], lr, [1.0, 0.5].__getitem__, 0.25, given=given)
    cpu = torch.device("cpu")
    optimizer = Optimizer([group], {"p": parameter.shape}, {"p": parameter}, 1.0, torch.zeros_like, cpu)
    for step, expected in enumerate((0.75, 0.75 * 0.875)):
        parameter.grad = torch.zeros(3)
        optimizer.prepare(step, torch.tensor(1.0))
        optimizer.step()
        assert parameter.tolist() == pytest.approx([expected] * 3, rel=4 * 2**-24)


def test_no_bf16_average_that_can_never_fall():
    """1 - beta below half a spacing: 0.999 takes off less than rounding puts back."""
    assert get_rule("adam").narrow_refusal() == (
        "a bf16 average never falls with optim.settings.beta2 0.999; use at most 0.9961"
    )
    assert get_rule("adamw").narrow_refusal() == get_rule("mars").narrow_refusal() == ""
    assert "optim.settings.betas 0.999;" in get_rule("torch:Adam").narrow_refusal()
    assert get_rule("torch:Adam", {"betas": [0.9, 0.95]}).narrow_refusal() == ""
    assert "optim.settings.beta3 0.9999" in get_rule("ademamix").narrow_refusal()
    stuck = torch.tensor(1.0, dtype=torch.bfloat16)
    assert stuck * math.nextafter(1 - 2**-9, 1) == stuck and stuck * (1 - 2**-8) != stuck
