"""The order of data: every token a target once in an epoch, whatever the lengths; steps of many texts; the same for ever."""

import random

import numpy as np
import pytest

from trainer.data import order as order_module
from trainer.data.order import Order, SampleOrder, WindowOrder

LENGTH = 64  # of a sample


def test_epochs_differ_and_seeds_differ():
    places = np.arange(250)
    first = Order([100, 50, 75, 30], 250, seed=1)(0, places).tolist()
    assert sorted(first) == places.tolist()
    assert first != Order([100, 50, 75, 30], 250, seed=1)(1, places).tolist()
    assert first != Order([100, 50, 75, 30], 250, seed=2)(0, places).tolist()


def test_order_is_pinned():
    """The order is part of the resumption contract: a change of it must not slip in."""
    order = Order([5, 5], 9, seed=7)
    assert order(0, np.arange(9)).tolist() == PINNED
    assert [int(order(0, i)) for i in range(9)] == PINNED
    assert sorted(order(3, np.arange(9))) == list(range(9))


PINNED = [8, 0, 7, 1, 3, 6, 2, 4, 5]


def test_large_orders_are_shuffled_block_by_block(monkeypatch):
    monkeypatch.setattr(order_module, "SHUFFLE_BLOCK", 64)
    values = Order([100, 50, 75, 30], 250, seed=3)(2, np.arange(250))
    assert sorted(values) == list(range(250))
    shuffled_again = Order([100, 50, 75, 30], 250, seed=3)
    np.testing.assert_array_equal(shuffled_again(2, np.array([200, 10, 130])), values[[200, 10, 130]])


def test_both_orders_of_windows_are_pinned():
    shuffled = Order([5, 5], 9, seed=7)
    for kind, expected in ((SampleOrder, PINNED_SAMPLES), (WindowOrder, PINNED_WINDOWS)):
        samples, offsets = kind(shuffled, LENGTH).windows(2 * LENGTH, 32, 1, 8)
        assert list(zip(samples.tolist(), offsets.tolist(), strict=True)) == expected


PINNED_SAMPLES = [(7, 32), (1, 0), (1, 32), (3, 0), (3, 32), (6, 0), (6, 32), (2, 0)]
PINNED_WINDOWS = [(6, 0), (2, 0), (4, 0), (5, 0), (7, 32), (4, 32), (8, 32), (2, 32)]


def test_at_the_full_length_both_orders_are_one():
    shuffled = Order([100, 50, 75, 30], 250, seed=3)
    for position in (0, 17 * LENGTH, 249 * LENGTH):
        by_sample = SampleOrder(shuffled, LENGTH).windows(position, LENGTH, 2, 40)
        by_window = WindowOrder(shuffled, LENGTH).windows(position, LENGTH, 2, 40)
        np.testing.assert_array_equal(by_sample, by_window)


@pytest.mark.parametrize("length", [2, 16, 64])
def test_a_step_of_windows_is_of_as_many_samples_as_there_are(monkeypatch, length):
    monkeypatch.setattr(order_module, "GROUP_TOKENS", 50 * LENGTH)
    order = WindowOrder(Order([100, 50, 75, 30], 250, seed=3), LENGTH)
    column, rest = 50 * length, 250 * LENGTH
    for position in range(0, rest, column):
        samples, offsets = order.windows(position, length, 0, 50)
        assert len(set(samples)) == 50 and len(set(offsets)) == 1
    samples, offsets = order.windows(0, length, 0, rest // length)
    assert len(set(zip(samples.tolist(), offsets.tolist(), strict=True))) == rest // length, "an epoch is all windows"


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", [SampleOrder, WindowOrder])
def test_no_token_is_a_target_twice_in_an_epoch_while_lengths_grow(monkeypatch, kind, seed):
    draw = random.Random(seed)
    monkeypatch.setattr(order_module, "GROUP_TOKENS", draw.choice([64, 200, 640, 10**6]))
    n = draw.randint(1, 60)
    order = kind(Order([n], n, seed), LENGTH)
    targets: set[tuple[int, int, int]] = set()
    position, before, read = 0, 4, 0
    for length in draw.choice([(4, 8, 16, 32, 64), (4, 16, 64), (4, 4, 8, 64, 64)]):
        for _ in range(draw.randint(1, 30)):
            began = order.start(position, length, before)
            passed_over = n * (length - before) if kind is WindowOrder else length - before
            assert position <= began <= position + passed_over
            count = draw.randint(1, 7)
            samples, offsets = order.windows(began, length, 0, count)
            epochs = (began + length * np.arange(count)) // order.epoch_tokens
            for epoch, sample, offset in zip(epochs, samples, offsets, strict=True):
                targets |= {(int(epoch), int(sample), int(offset) + i) for i in range(length)}
            read += count * length
            position, before = began + count * length, length
    assert len(targets) == read
    assert max(offset for _, _, offset in targets) < LENGTH


@pytest.mark.parametrize("kind", [SampleOrder, WindowOrder])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_shares_of_ranks_make_the_global_step(kind, size):
    order = kind(Order([30], 30, seed=1), LENGTH)
    whole = np.stack(order.windows(128, 16, 0, 11))
    shares = [(11 * rank // size, 11 * (rank + 1) // size) for rank in range(size)]
    parts = [np.stack(order.windows(128, 16, first, after - first)) for first, after in [*shares, (5, 5)]]
    np.testing.assert_array_equal(whole, np.concatenate(parts, axis=1))
