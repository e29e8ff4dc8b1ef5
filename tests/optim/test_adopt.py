"""ADOPT (arXiv 2411.02853), clipped."""

import pytest
import torch
from rule_steps import SAME, SHAPES, Steps, drawn


def by_hand(start, gradients, lr, decay, clip, beta1=0.9, beta2=0.9999, eps=1e-6):
    p, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for t, g in enumerate(gradients):
        if t == 0:
            v = g * g
            continue
        u = g / v.sqrt().clamp(min=eps)
        u = u.clamp(-(t**0.25), t**0.25) if clip else u
        m = beta1 * m + (1 - beta1) * u
        p = (1 - lr * decay) * p - lr * m
        v = beta2 * v + (1 - beta2) * g * g
    return p


@pytest.mark.parametrize("clip", [True, False])
def test_four_steps_by_hand(clip):
    start = drawn(*SHAPES)
    ours = Steps("adopt", start, lr=0.01, weight_decay=0.5, clip=clip)
    gradients = [drawn(*SHAPES, seed=1 + step) for step in range(4)]
    for step in range(4):
        found = ours.take(gradients[step])
        if step == 0:
            assert all(torch.equal(p, s) for p, s in zip(found, start, strict=True)), "decay, too, begins later"
    for n, p in enumerate(found):
        expected = by_hand(start[n], [g[n] for g in gradients], 0.01, 0.5, clip)
        torch.testing.assert_close(p, expected, rtol=SAME, atol=SAME)
    other = by_hand(start[0], [g[0] for g in gradients], 0.01, 0.5, not clip)
    assert (found[0] - other).abs().max() > 1e-4, "the clip does nothing here"


def test_no_number_moves_by_more_than_lr_times_the_limit():
    ours = Steps("adopt", [torch.zeros(50)], lr=0.1)
    before = ours.parameters[0].clone()
    for t in range(6):
        gradient = drawn((50,), seed=t)[0] * 10.0 ** (3 * t)
        now = ours.take([gradient])[0]
        assert ((now - before).abs() <= 0.1 * t**0.25 * (1 + SAME)).all()
        before = now


def test_a_first_gradient_of_zero_stays_bounded():
    """As of zero-initialised projections: v = 0, and the next gradient is divided by eps."""
    ours, free = Steps("adopt", [torch.zeros(3)]), Steps("adopt", [torch.zeros(3)], clip=False)
    for t, gradient in enumerate([torch.zeros(3), *([torch.ones(3)] * 5)]):
        bounded, unbounded = ours.take([gradient])[0], free.take([gradient])[0]
        assert bounded.abs().max() <= 0.1 * sum(step**0.25 for step in range(1, t + 1)) * (1 + SAME)
    assert unbounded.abs().max() > 1e3


def test_each_parameter_counts_its_own_steps():
    """One that gets its first gradient later begins then."""
    start = drawn((3,), (3,))
    ours = Steps("adopt", start)
    first, later = ours.parameters, ours.states
    for step in range(3):
        gradients = drawn((3,), (3,), seed=step)
        present = [0] if step == 0 else [0, 1]
        for n in present:
            later[n]["step"] += 1
        chosen = [first[n] for n in present], [gradients[n] for n in present], [later[n] for n in present]
        ours.rule.update(ours.group, *chosen, torch.tensor(1.0))
        assert torch.equal(first[1], start[1]) == (step < 2)
    assert torch.equal(first[0], start[0]) is False


def test_a_first_step_that_is_not_finite_is_none():
    ours, plain = Steps("adopt", drawn((3,))), Steps("adopt", drawn((3,)))
    ours.take([torch.full((3,), float("nan"))], finite=0.0)
    for step in range(3):
        gradients = drawn((3,), seed=step)
        assert torch.equal(ours.take(gradients)[0], plain.take(gradients)[0])
