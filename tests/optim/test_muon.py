"""Muon and AdaMuon: Newton-Schulz against singular values, steps by hand in fp64, torch.optim.Muon."""

import math

import pytest
import torch
from rule_steps import SAME, Steps, drawn

from trainer.optim import newton_schulz
from trainer.optim.newton_schulz import COEFFICIENTS, orthogonalised
from trainer.optim.rules import muon

NS5 = (3.4445, -4.7750, 2.0315)
SHAPES = ((4, 6), (6, 4), (4, 6), (5, 5))


def ns5(matrix, steps=5):
    """The polynomial on the singular values: what the products of matrices must amount to."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = s / matrix.norm()
    for _ in range(steps):
        s = NS5[0] * s + NS5[1] * s**3 + NS5[2] * s**5
    return u @ torch.diag(s) @ vh


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5)])
def test_newton_schulz_acts_on_singular_values_alone(shape):
    several = torch.stack(drawn(*[shape] * 3))
    found = orthogonalised(several, COEFFICIENTS["ns5"])
    for one, matrix in zip(found, several, strict=True):
        torch.testing.assert_close(one, ns5(matrix), rtol=1e-9, atol=1e-9)
    assert torch.equal(orthogonalised(torch.zeros(1, 3, 2), COEFFICIENTS["ns5"]), torch.zeros(1, 3, 2))


@pytest.mark.parametrize("name, low, high, smallest", [("ns5", 0.68, 1.15, 0.01), ("polar_express", 0.99, 1.01, 0.001)])
def test_how_near_singular_values_come_to_one(name, low, high, smallest):
    """In fp64, of a matrix whose singular values lie between `smallest` and 1 of its norm."""
    spread = torch.logspace(math.log10(smallest), -0.5, 40, dtype=torch.float64)
    square = drawn((40, 40))[0]
    u, _, vh = torch.linalg.svd(square)
    matrix = u @ torch.diag(spread) @ vh
    matrix = torch.block_diag(matrix, (1 - matrix.square().sum()).clamp(min=0).sqrt()[None, None])  # of norm 1
    assert spread[0] / matrix.norm() >= 0.9 * smallest
    values = torch.linalg.svdvals(orthogonalised(matrix[None], COEFFICIENTS[name])[0])
    assert low <= values.min() and values.max() <= high, (values.min(), values.max())


def test_more_steps_than_polynomials_repeat_the_last():
    taken = COEFFICIENTS["polar_express"].take(10)
    assert len(taken) == 10 and taken[7] == taken[8] == taken[9] == (1.875, -1.25, 0.375)
    assert len(COEFFICIENTS["polar_express"].take(None)) == 6 and len(COEFFICIENTS["ns5"].take(None)) == 5


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", ["match_rms", "spectral", "none"])
def test_steps_by_hand(nesterov, scale):
    steps = Steps("muon", drawn(*SHAPES), lr=0.1, weight_decay=0.3, nesterov=nesterov, scale=scale)
    weights, momenta = drawn(*SHAPES), [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    for number in range(3):
        gradients = drawn(*SHAPES, seed=1 + number)
        found = steps.take(gradients)
        for i, gradient in enumerate(gradients):
            momenta[i] = 0.95 * momenta[i] + 0.05 * gradient
            ahead = 0.05 * gradient + 0.95 * momenta[i] if nesterov else momenta[i]
            m, n = gradient.shape
            factor = {"match_rms": 0.2 * math.sqrt(max(m, n)), "spectral": math.sqrt(max(1, m / n)), "none": 1}[scale]
            weights[i] = (1 - 0.1 * 0.3) * weights[i] - 0.1 * factor * ns5(ahead)
            torch.testing.assert_close(found[i], weights[i], rtol=SAME, atol=SAME)


def test_normuon_by_hand():
    """Rows are divided by their running root mean square; the update keeps its norm."""
    steps = Steps("muon", drawn(*SHAPES), lr=0.1, normuon=True, beta2=0.8, nesterov=False, momentum=0.0)
    weights, v = drawn(*SHAPES), [torch.zeros(shape[0], dtype=torch.float64) for shape in SHAPES]
    for number in range(3):
        gradients = drawn(*SHAPES, seed=1 + number)
        found = steps.take(gradients)
        for i, gradient in enumerate(gradients):
            update = ns5(gradient)
            v[i] = 0.8 * v[i] + 0.2 * torch.stack([row.dot(row) / len(row) for row in update])
            rows = torch.stack([row / v[i][j].sqrt() for j, row in enumerate(update)])
            weights[i] -= 0.1 * 0.2 * math.sqrt(max(gradient.shape)) * rows * update.norm() / rows.norm()
            torch.testing.assert_close(found[i], weights[i], rtol=SAME, atol=SAME)
            assert steps.states[i]["v"].shape == gradient.shape[:1]


def test_cautious_decay_by_hand():
    """Only weights that the update already brings towards zero decay."""
    plain, cautious = (
        Steps("muon", drawn((4, 6)), lr=0.1, weight_decay=decay, cautious_decay=decay > 0) for decay in (0, 0.5)
    )
    [weight], gradients = drawn((4, 6)), drawn((4, 6), seed=1)
    [without], [found] = plain.take(gradients), cautious.take(gradients)
    update = weight - without
    agrees = torch.sign(update) == torch.sign(weight)
    assert 0 < agrees.sum() < agrees.numel()
    torch.testing.assert_close(found, torch.where(agrees, without - 0.1 * 0.5 * weight, without), rtol=SAME, atol=SAME)


def test_adamuon_by_hand():
    steps = Steps("adamuon", drawn(*SHAPES), lr=0.1, weight_decay=0.3, beta2=0.9)
    weights, momenta, v = (
        drawn(*SHAPES),
        [0 * weight for weight in drawn(*SHAPES)],
        [0 * weight for weight in drawn(*SHAPES)],
    )
    for number in range(3):
        gradients = drawn(*SHAPES, seed=1 + number)
        found = steps.take(gradients)
        for i, gradient in enumerate(gradients):
            momenta[i] = 0.95 * momenta[i] + 0.05 * gradient
            update = ns5((0.05 * gradient + 0.95 * momenta[i]).sign())
            v[i] = 0.9 * v[i] + 0.1 * update**2
            update = update / (v[i].sqrt() + 1e-8)
            update = 0.2 * update / (update**2).mean().sqrt()
            weights[i] = (1 - 0.1 * 0.3) * weights[i] - 0.1 * update
            torch.testing.assert_close(found[i], weights[i], rtol=SAME, atol=SAME)


@pytest.mark.parametrize("shape", [(16, 16), (16, 64), (64, 16)])
@pytest.mark.parametrize("rule, settings", [("muon", {"coefficients": "polar_express"}), ("adamuon", {})])
def test_updates_have_the_size_of_adamws(rule, settings, shape):
    """Root mean square 0.2, so that AdamW's learning rate suits; of Muon within Polar Express's 1 %."""
    steps = Steps(rule, drawn(shape), lr=1.0, **settings)
    [found] = steps.take(drawn(shape, seed=1))
    assert (found - drawn(shape)[0]).square().mean().sqrt().item() == pytest.approx(0.2, rel=0.01)
    assert steps.rule.default_lr(1e-3)[0] == 1e-3
    assert Steps("muon", drawn(shape), scale="spectral").rule.default_lr(1e-3)[0] == 0.02


def test_equal_shapes_are_one_product(monkeypatch):
    """And give what each gives alone: small products are summed in the same order here, within fp64's rounding."""
    shapes, calls = ((4, 6), (6, 4), (4, 6), (4, 6)), []

    def counting(matrices, *arguments):
        calls.append(len(matrices))
        return orthogonalised(matrices, *arguments)

    monkeypatch.setattr(muon, "orthogonalised", counting)
    together = Steps("muon", drawn(*shapes)).take(drawn(*shapes, seed=1))
    assert sorted(calls) == [1, 3]
    for weight, gradient, found in zip(drawn(*shapes), drawn(*shapes, seed=1), together, strict=True):
        torch.testing.assert_close(Steps("muon", [weight]).take([gradient])[0], found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize("ours, theirs", [("match_rms", "match_rms_adamw"), ("spectral", "original")])
def test_torchs_muon(monkeypatch, shape, ours, theirs):
    """Iterations in bf16, as there: every update is bit for bit torch's. The weights then differ by fp32's rounding alone: lr is a
    double there and an fp32 number here, 2^-24 of each product, four products and sums a step."""
    monkeypatch.setattr(newton_schulz, "iteration_dtype", lambda matrices: torch.bfloat16)
    start = drawn(shape)[0].float()
    steps = Steps("muon", [start], lr=0.05, weight_decay=0.1, scale=ours)
    steps.parameters, steps.states = [start.clone()], [{"momentum": torch.zeros(shape)}]
    parameter = torch.nn.Parameter(start.clone())
    reference = torch.optim.Muon([parameter], lr=0.05, weight_decay=0.1, adjust_lr_fn=theirs)
    for number in range(3):
        gradient = drawn(shape, seed=1 + number)[0].float()
        steps.rule.update(steps.group, steps.parameters, [gradient.clone()], steps.states, torch.tensor(1.0))
        parameter.grad = gradient
        reference.step()
        assert torch.equal(steps.states[0]["momentum"], reference.state[parameter]["momentum_buffer"])
        largest = start.abs().max().item()
        torch.testing.assert_close(
            steps.parameters[0], parameter.detach(), rtol=0, atol=(number + 1) * 4 * 2**-24 * 2 * largest
        )
