"""SOAP and PaLM-SOAP: steps by hand in fp64, and what must hold of any such rule."""

import math
from dataclasses import replace

import pytest
import torch
from rule_steps import Steps, drawn

from trainer.optim.rules.soap import next_basis

# Averages are updated with fp64 factors here and there; only the order of sums differs.
SAME = 1e-9
SHAPES = ((4, 6), (5, 5), (4, 6))
RULES = ("soap", "palm-soap")


class Run(Steps):
    """Steps that are numbered, as those of a run."""

    taken = 0

    def take(self, gradients, finite=1.0):
        self.group = replace(self.group, step=self.taken)
        self.taken += 1
        return super().take(gradients, finite)


def palm_beta2(t):
    return 1 - t**-0.8


def test_palms_schedule():
    printed = {1: 0, 2: 0.426, 10: 0.842, 100: 0.975, 1000: 0.996, 5100: 0.9989}
    rule = Run("palm-soap", drawn((2, 2))).rule
    found = rule.decays(rule.config, torch.tensor(list(printed), dtype=torch.float64))[0].tolist()
    assert [round(value, 4 if t == 5100 else 3) for t, value in zip(printed, found, strict=True)] == list(
        printed.values()
    )


class ByHand:
    """One matrix, by the formulas; betas(t) of the means' t-th step."""

    def __init__(self, weight, beta1, beta2, frequency, correct, sides=(True, True)):
        self.w, self.beta1, self.beta2, self.frequency, self.correct, self.sides = (
            weight, beta1, beta2, frequency, correct, sides,
        )  # fmt: skip
        m, n = weight.shape
        self.L, self.R = torch.zeros(m, m).double(), torch.zeros(n, n).double()
        self.QL, self.QR = torch.eye(m).double(), torch.eye(n).double()
        self.m, self.v = torch.zeros(m, n).double(), torch.zeros(m, n).double()
        self.gradients = 0

    def step(self, g, lr, decay):
        self.gradients += 1
        t = self.gradients - 1
        if t:
            self.m = self.beta1 * self.m + (1 - self.beta1) * g
            turned = self.QL.T @ g @ self.QR
            self.v = self.beta2(t) * self.v + (1 - self.beta2(t)) * turned**2
            mean = self.QL.T @ self.m @ self.QR / (1 - self.beta1**t)
            square = self.v / (1 - self.beta2(t) ** t) if self.correct else self.v
            n = self.QL @ (mean / (square.sqrt() + 1e-8)) @ self.QR.T
            self.w = (1 - lr * decay) * self.w - lr * n
        share = 1 - self.beta2(self.gradients)
        self.L = (1 - share) * self.L + share * g @ g.T
        self.R = (1 - share) * self.R + share * g.T @ g
        for left in (True, False):
            if not self.sides[not left]:
                continue
            p, q = (self.L, self.QL) if left else (self.R, self.QR)
            if t == 0:
                q = torch.linalg.eigh(p)[1].flip(1)
            elif t % self.frequency == 0:
                order = sorted(range(len(p)), key=lambda i: -(q[:, i] @ p @ q[:, i]))
                q = torch.linalg.qr(p @ q[:, order])[0]
                self.v = self.v[order] if left else self.v[:, order]
            self.QL, self.QR = (q, self.QR) if left else (self.QL, q)


@pytest.mark.parametrize("rule, beta1, beta2, correct", [
    ("soap", 0.95, lambda t: 0.95, True), ("palm-soap", 0.9, palm_beta2, False),
])  # fmt: skip
@pytest.mark.parametrize("longest, shapes, sides", [
    (10, ((4, 4), (5, 5), (4, 4)), (True, True)),  # of full rank: eigenvectors of one eigenvalue 0 among several are anything
    (5, ((4, 6), (4, 6), (3, 7)), (True, False)),
])  # fmt: skip
def test_steps_by_hand(rule, beta1, beta2, correct, longest, shapes, sides):
    """Two changes of the basis by QR are within. A side that is longer than max_precond_dim keeps its axes."""
    run = Run(rule, drawn(*shapes), lr=0.1, weight_decay=0.3, frequency=2, max_precond_dim=longest)
    hands = [ByHand(weight, beta1, beta2, 2, correct, sides) for weight in drawn(*shapes)]
    for number in range(6):
        gradients = drawn(*shapes, seed=1 + number)
        found = run.take(gradients)
        for hand, gradient, weight, state in zip(hands, gradients, found, run.states, strict=True):
            hand.step(gradient, 0.1, 0.3)
            torch.testing.assert_close(weight, hand.w, rtol=SAME, atol=SAME)
            torch.testing.assert_close(state["L"], hand.L, rtol=SAME, atol=SAME)
            assert ("R" in state) == sides[1]


@pytest.mark.parametrize("rule", RULES)
def test_the_first_step_changes_no_weight(rule):
    """Nor does its decay; a step that was not finite does not count as the first."""
    run = Run(rule, drawn(*SHAPES), weight_decay=0.5)
    for finite in (0.0, 1.0):
        for found, weight in zip(run.take(drawn(*SHAPES, seed=1), finite), drawn(*SHAPES), strict=True):
            assert torch.equal(found, weight)
    for found, weight in zip(run.take(drawn(*SHAPES, seed=2)), drawn(*SHAPES), strict=True):
        assert (found != weight).all()


@pytest.mark.parametrize("rule", RULES)
def test_a_late_first_step_begins_with_the_identity_and_then_turns(rule):
    run = Run(rule, drawn((4, 6)), frequency=3)
    run.take(drawn((4, 6)), 0.0)
    run.take(drawn((4, 6), seed=1))
    assert torch.equal(run.states[0]["Q_L"], torch.eye(4).double())
    for seed in (2, 3):
        run.take(drawn((4, 6), seed=seed))
    q = run.states[0]["Q_L"]
    assert not torch.equal(q, torch.eye(4).double())
    torch.testing.assert_close(q.T @ q, torch.eye(4).double(), rtol=0, atol=SAME)


@pytest.mark.parametrize("rule, beta1, beta2", [("soap", 0.95, None), ("palm-soap", 0.9, palm_beta2)])
def test_without_rotation_it_is_adam(rule, beta1, beta2):
    """max_precond_dim 1 leaves the axes as they are: Adam, from the second gradient on, with that schedule of beta2."""
    run = Run(rule, drawn((4, 6)), lr=0.1, max_precond_dim=1)
    weight = drawn((4, 6))[0].requires_grad_()
    m = v = torch.zeros(4, 6).double()
    reference = torch.optim.Adam([weight], 0.1, (0.95, 0.95), 1e-8)
    for number in range(5):
        [gradient] = drawn((4, 6), seed=1 + number)
        [found] = run.take([gradient])
        assert set(run.states[0]) == {"step", "m", "v"}
        if number == 0:
            continue
        if beta2 is None:
            weight.grad = gradient.clone()
            reference.step()
        else:
            m = beta1 * m + (1 - beta1) * gradient
            v = beta2(number) * v + (1 - beta2(number)) * gradient**2
            weight = weight.detach() - 0.1 * m / (1 - beta1**number) / (v.sqrt() + 1e-8)
        # A quotient m / v of a first step is a sign: fp32's count of steps is exact, the rest is fp64.
        torch.testing.assert_close(found, weight.detach(), rtol=SAME, atol=SAME)


@pytest.mark.parametrize("rule", RULES)
def test_rotated_gradients_give_the_rotated_update(rule):
    """With the basis of eigh. Signs and order of eigenvectors have no effect, because Adam treats each number alike."""
    u, v = (torch.linalg.qr(matrix)[0] for matrix in drawn((5, 5), (4, 4), seed=9))
    zero = torch.zeros(5, 4).double()
    plain, turned = Run(rule, [zero], frequency=100), Run(rule, [zero], frequency=100)
    for number in range(3):
        [gradient] = drawn((5, 4), seed=1 + number)
        [found], [expected] = turned.take([u @ gradient @ v.T]), plain.take([gradient])
        # L has rank 4 of 5: the eigenvector of 0 is found only within rounding, 1e-16 over the gap squared.
        torch.testing.assert_close(found, u @ expected @ v.T, rtol=1e-6, atol=1e-6)
    assert expected.abs().max() > 0.05


def test_the_basis_stays_orthogonal_in_fp32():
    run = Run("soap", [matrix.float() for matrix in drawn((24, 40))], frequency=1)
    run.parameters = [p.float() for p in run.parameters]
    run.states = [
        {k: torch.zeros(s, dtype=d) for k, (s, d) in run.rule.state(p.shape, p.dtype).items()} for p in run.parameters
    ]
    draw = torch.Generator().manual_seed(0)
    for number in range(40):
        run.group = replace(run.group, step=number)
        run.states[0]["step"] += 1
        run.rule.update(run.group, run.parameters, [torch.randn(24, 40, generator=draw)], run.states, torch.tensor(1.0))
    for q in (run.states[0]["Q_L"], run.states[0]["Q_R"]):
        assert q.dtype == torch.float32 and (q.T @ q - torch.eye(len(q))).abs().max() < 1e-5


def test_power_iterations_find_the_eigenvectors_in_order():
    q = torch.linalg.qr(drawn((6, 6))[0])[0]
    values = torch.tensor([32.0, 16, 8, 4, 2, 1]).double()
    mean, basis = q @ torch.diag(values) @ q.T, torch.eye(6).double()[None]
    for _ in range(60):  # each halves what is left, 2^-60
        order, basis = next_basis(mean[None], basis)
    torch.testing.assert_close((basis[0].T @ q).abs(), torch.eye(6).double(), rtol=0, atol=1e-8)
    assert order[0].tolist() == list(range(6))


@pytest.mark.parametrize("rule", RULES)
def test_decay_shrinks_the_weights(rule):
    """By 1 - lr decay a step, where gradients are 0. (HeavyBall's grew.)"""
    run = Run(rule, drawn((4, 6)), lr=0.1, weight_decay=0.5)
    zero = [torch.zeros(4, 6).double()]
    for _ in range(4):
        [found] = run.take(zero)
    torch.testing.assert_close(found, drawn((4, 6))[0] * 0.95**3, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_a_rotated_quadratic_needs_fewer_steps_than_adam(rule):
    """f(W) = tr(W^T A W B) / 2 with condition 1,000 of A and of B, their axes turned: Adam scales axes that mean nothing."""
    a, b = ((q := torch.linalg.qr(matrix)[0]) @ torch.diag(torch.logspace(-3, 0, 8).double()) @ q.T
            for matrix in drawn((8, 8), (8, 8), seed=5))  # fmt: skip

    def steps_to_a_thousandth(name, lr, **settings):
        run = Run(name, drawn((8, 8)), lr=lr, **settings)
        first = (run.parameters[0] * (a @ run.parameters[0] @ b)).sum()
        for number in range(400):
            weight = run.parameters[0]
            if (weight * (a @ weight @ b)).sum() < first / 1000:
                return number
            run.take([a @ weight @ b])
        return math.inf

    rates = (0.3, 0.1, 0.03, 0.01)
    best = {
        "adam": min(steps_to_a_thousandth(rule, lr, max_precond_dim=1) for lr in rates),
        "soap": min(steps_to_a_thousandth(rule, lr) for lr in rates),
    }
    assert best["soap"] < best["adam"] <= 400
