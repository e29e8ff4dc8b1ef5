"""Merging: each rule on vectors whose result is known by hand, and at its edges."""

import math

import pytest
import torch
from torch import tensor

from trainer.checkpoint.merging import largest, linear, slerp, task_arithmetic, ties

X, Y = tensor([1.0, 0.0]), tensor([0.0, 1.0])


def test_slerp_follows_the_arc():
    torch.testing.assert_close(slerp(X, Y, 0.5), tensor([1.0, 1.0]) / math.sqrt(2))
    torch.testing.assert_close(slerp(X, Y, 1 / 3), tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)]))
    a, b = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    torch.testing.assert_close(slerp(a, b, 0.3), slerp(b, a, 0.7))
    b = b * a.norm() / b.norm()
    torch.testing.assert_close(slerp(a, b, 0.4).norm(), a.norm(), msg="equal lengths stay")


@pytest.mark.parametrize(
    "a, b",
    [(X, X), (X, 3 * X), (X, -X), (X, tensor([1.0, 1e-3])), (X, 0 * X), (0 * X, 0 * X)],
    ids=["equal", "parallel", "opposite", "nearly parallel", "zero", "both zero"],
)
def test_where_there_is_no_arc_slerp_is_a_straight_line(a, b):
    torch.testing.assert_close(slerp(a, b, 0.25), 0.75 * a + 0.25 * b, rtol=0, atol=0)


def test_slerp_and_the_straight_line_meet_where_one_takes_over():
    """At |cos| = 0.9995 the arc of unit vectors leaves the line by 1 - cos(angle / 2), so that nothing jumps."""
    angle = math.acos(0.9995) * 1.001
    b = tensor([math.cos(angle), math.sin(angle)])
    assert 0 < (slerp(X, b, 0.5) - X.lerp(b, 0.5)).norm() < 1.1 * (1 - math.cos(angle / 2))


def test_means_and_task_arithmetic():
    torch.testing.assert_close(linear([X, Y], [3.0, 1.0]), tensor([0.75, 0.25]))
    base = tensor([1.0, 1.0])
    torch.testing.assert_close(task_arithmetic([X, Y], base, [1.0, 1.0], 1.0), tensor([0.0, 0.0]))
    torch.testing.assert_close(task_arithmetic([X], base, [-1.0], 0.5), tensor([1.0, 1.5]), msg="a negated task")


def test_ties_trims_elects_and_averages():
    base = tensor([10.0, 10.0, 10.0, 10.0])
    a, b, c = (
        base + tensor([4.0, 1.0, -3.0, 0.5]),
        base + tensor([2.0, -5.0, 4.0, 0.1]),
        base + tensor([6.0, 1.0, 2.0, 0.0]),
    )
    # The two largest of each: a 4, -3; b -5, 4; c 6, 2. Signs: +, -, + (4 + 2 - 3 > 0), none. Means: 5, -5, 3, 0.
    torch.testing.assert_close(ties([a, b, c], base, [1.0] * 3, 1.0, 0.5), base + tensor([5.0, -5.0, 3.0, 0.0]))
    # Twice a: the third sum is 2 * -3 + 4 + 2 = 0, so it has no sign; the first mean is (2 * 4 + 6) / 3.
    found = ties([a, b, c], base, [2.0, 1.0, 1.0], 0.5, 0.5)
    torch.testing.assert_close(found, base + 0.5 * tensor([14 / 3, -5.0, 0.0, 0.0]))
    torch.testing.assert_close(ties([a], base, [1.0], 1.0, 1.0), a, msg="one model, nothing trimmed")


def test_the_largest_changes():
    change = tensor([[1.0, -4.0], [3.0, -2.0]])
    assert largest(change, 0.5).tolist() == [[0, -4], [3, 0]]
    assert largest(change, 1e-9).tolist() == [[0, -4], [0, 0]], "one at least"
    assert largest(change, 1.0).equal(change)
