"""Multi-token prediction's loss, against whole logits and autograd head by head (arXiv 2404.19737)."""

import contextlib

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from test_linear_cross_entropy import Watch
from torch._subclasses.fake_tensor import FakeTensorMode

from models.base import IGNORE
from models.layers import linear_cross_entropy as module
from models.layers.linear_cross_entropy import linear_cross_entropy
from models.layers.multi_token import multi_token_loss, shifted_targets

B, T, V, D = 2, 9, 31, 6
SHAPES = {"none": {}, "softcap": {"softcap": 1.5}, "z_loss": {"z_loss": 0.1}, "padded": {"vocab_size": 23}}
SHAPES["all"] = SHAPES["softcap"] | SHAPES["z_loss"] | SHAPES["padded"]
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2, 2], [5, 5, 5, 5, 5, 5, 6, 6, 7]])
FACTORS = (1.0, 0.5, 2.0, 0.25)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks to a call, that begin and end inside of heads, and several tiles to a chunk."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 0)
    monkeypatch.setattr(module, "MIN_CHUNK_ROWS", 7)
    monkeypatch.setattr(module, "TILE_BYTES_PER_CORE", -(-2 * V * 8 // torch.get_num_threads()))


def inputs(n=4, dtype=torch.float64, shared=True, vocab_size=23):
    """Hidden states of each head, the matrix or matrices, all with gradients, and targets."""
    draw = torch.Generator().manual_seed(0)

    def leaf(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()

    hidden = [leaf(B, T, D) for _ in range(n)]
    weights = leaf(V, D) if shared else [leaf(V, D) for _ in range(n)]
    targets = torch.randint(vocab_size, (B, T), generator=draw)
    targets[0, 2] = targets[1, 0] = IGNORE
    return hidden, weights, targets


def by_hand(targets, i, documents=None):
    """Position by position."""
    shifted = torch.full_like(targets, IGNORE)
    for b in range(B):
        for t in range(T - i):
            if documents is None or documents[b, t + i] == documents[b, t]:
                shifted[b, t] = targets[b, t + i]
    return shifted


def matrices(weights, n):
    return [weights] * n if isinstance(weights, torch.Tensor) else weights


def plain(hidden, weights, targets, reduction, documents=None, factors=FACTORS, softcap=None, z_loss=0.0, vocab_size=V):
    """By the book, whole logits: (cross-entropies of the heads, z-losses), weighted, in one autograd graph."""
    shares, z_losses = [], []
    for i, (x, weight) in enumerate(zip(hidden, matrices(weights, len(hidden)), strict=True)):
        labels = by_hand(targets, i, documents).flatten()
        logits = F.linear(x, weight).flatten(0, 1)[:, :vocab_size]
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        shares.append(factors[i] * F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum"))
        z_losses.append(factors[i] * z_loss * logits[labels != IGNORE].logsumexp(-1).square().sum())
    count = (targets != IGNORE).sum() if reduction == "mean" else 1
    return torch.stack(shares) / count, torch.stack(z_losses).sum() / count


def gradients(loss, hidden, weights):
    leaves = [*hidden, *([weights] if isinstance(weights, torch.Tensor) else weights)]
    return torch.autograd.grad(3 * loss, leaves)


# fp64 on both sides: a few hundred roundings of 1.1e-16 of numbers of order 100.
def assert_equal(actual, expected):
    assert actual.dtype == expected.dtype
    assert torch.allclose(actual, expected, rtol=1e-13, atol=1e-13)


# -- targets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["packed", "documents"])
def test_targets_are_those_i_places_ahead(documents):
    targets = inputs()[2]
    for i in range(T):
        assert torch.equal(shifted_targets(targets, i, documents), by_hand(targets, i, documents))
    assert torch.equal(shifted_targets(targets, 0, documents), targets)


def test_a_row_shorter_than_the_distance_has_no_targets():
    targets = inputs()[2]
    for i in (T, T + 1, 3 * T):
        assert torch.equal(shifted_targets(targets, i), torch.full_like(targets, IGNORE))


# -- the loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("as_list", [False, True])
def test_one_head_is_next_token_prediction_bit_for_bit(shape, reduction, dtype, as_list):
    (x,), weight, targets = inputs(1, dtype)
    options = SHAPES[shape]
    expected = linear_cross_entropy(x, weight, targets, reduction, **options)
    weights = [weight] if as_list else weight
    loss, parts = multi_token_loss([x], weights, targets, reduction, head_weights=[1.0], **options)
    assert torch.equal(loss, expected) and loss.dtype == torch.float32
    assert set(parts) == ({"z_loss"} if "z_loss" in options else set())
    for actual, correct in zip(gradients(loss, [x], weights), gradients(expected, [x], weight), strict=True):
        assert torch.equal(actual, correct)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["packed", "documents"])
@pytest.mark.parametrize("scorer", [module.score_in_tiles, module.score_at_once], ids=["tiles", "for_a_compiler"])
def test_loss_parts_and_gradients_are_those_of_whole_logits(shape, reduction, shared, documents, scorer):
    """Of each head a hand-shifted cross-entropy, in one autograd graph; the compiler's form without one."""
    hidden, weights, targets = inputs(shared=shared)
    options = SHAPES[shape]
    shares, z_loss = plain(hidden, weights, targets, reduction, documents, **options)
    with module.scored_by(scorer):
        loss, parts = multi_token_loss(
            hidden, weights, targets, reduction, documents=documents, head_weights=FACTORS, **options
        )
    assert_equal(loss, shares.sum() + z_loss)
    expected = {f"head_{i}": share for i, share in enumerate(shares[1:], 2)}
    expected |= {"z_loss": z_loss} if "z_loss" in options else {}
    assert list(parts) == list(expected)
    for name, part in parts.items():
        assert part.shape == () and not part.requires_grad
        assert_equal(part, expected[name].detach())
    assert_equal(loss - sum(parts.values()), shares[0])  # validation may report the next token alone
    theirs = gradients(shares.sum() + z_loss, hidden, weights)
    for actual, correct in zip(gradients(loss, hidden, weights), theirs, strict=True):
        assert_equal(actual, correct)


def test_fp32_gradients_are_those_of_the_joint_graph():
    """A logit is a sum of D = 6 products, off by D eps of sum |x w| (10 here); so is, relatively, its probability.

    A gradient is a sum of at most V or 4 B T products with these, all of order 1: 200 eps of the largest.
    """
    hidden, weights, targets = inputs(dtype=torch.float32)
    shares, _ = plain(hidden, weights, targets, "mean")
    loss, parts = multi_token_loss(hidden, weights, targets, "mean", head_weights=FACTORS)
    eps = 200 * torch.finfo(torch.float32).eps
    assert loss.dtype == torch.float32 and all(part.dtype == torch.float32 for part in parts.values())
    assert (loss - shares.sum()).abs() < eps * loss
    theirs = gradients(shares.sum(), hidden, weights)
    for actual, correct in zip(gradients(loss, hidden, weights), theirs, strict=True):
        assert (actual - correct).abs().max() < eps * correct.abs().max()


@pytest.mark.parametrize("options", [{}, {"softcap": 1.5, "z_loss": 0.1, "vocab_size": 4}], ids=["none", "all"])
def test_gradients_are_differences_of_the_loss(options):
    """Central ones, h = 1e-5: off by h^2 times the third derivative (order 1) and eps / h of the loss (10), 1e-9."""
    draw = torch.Generator().manual_seed(0)
    targets = torch.tensor([[0, IGNORE, 3, 2, 1]])
    leaves = [torch.randn(size, generator=draw, dtype=torch.float64) for size in [(1, 5, 2)] * 3 + [(5, 2)]]

    def loss_of(*leaves):
        return multi_token_loss(leaves[:3], leaves[3], targets, "mean", head_weights=(1.0, 0.3, 1.7), **options)[0]

    wanting = [leaf.clone().requires_grad_() for leaf in leaves]
    for number, gradient in enumerate(torch.autograd.grad(loss_of(*wanting), wanting)):
        for place in range(gradient.numel()):
            moved = []
            for h in (1e-5, -1e-5):
                changed = [leaf.clone() for leaf in leaves]
                changed[number].view(-1)[place] += h
                moved.append(loss_of(*changed))
            difference = (moved[0] - moved[1]) / 2e-5
            assert (difference - gradient.view(-1)[place]).abs() < 1e-8


def test_the_shares_do_not_depend_on_how_targets_are_batched():
    """Sums over two halves of the targets are the sum over all, and the mean is that by head 1's count."""
    hidden, weights, targets = inputs()
    first, second = targets.clone(), targets.clone()
    first[0], second[1] = IGNORE, IGNORE
    first[1, 4:], second[1, 4:] = IGNORE, targets[1, 4:]
    whole, one, two = (
        multi_token_loss(hidden, weights, t, "sum", head_weights=FACTORS)[0] for t in (targets, first, second)
    )
    assert_equal(one + two, whole)
    mean, _ = multi_token_loss(hidden, weights, targets, "mean", head_weights=FACTORS)
    assert_equal(mean * (B * T - 2), whole)


def test_a_tied_matrix_gets_all_gradients():
    _, weight, targets = inputs()
    tokens = torch.arange(B * T).view(B, T) % V

    def loss_of(function):
        x = F.embedding(tokens, weight)
        return function([x.tanh(), x.sin(), x.cos(), x.sigmoid()])

    ours = loss_of(lambda hidden: multi_token_loss(hidden, weight, targets, "mean", head_weights=FACTORS)[0])
    theirs = loss_of(lambda hidden: plain(hidden, weight, targets, "mean")[0].sum())
    assert_equal(*(torch.autograd.grad(loss, weight)[0] for loss in (ours, theirs)))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_but_ignored_targets(shared, reduction):
    hidden, weights, targets = inputs(shared=shared)
    targets.fill_(IGNORE)
    loss, parts = multi_token_loss(hidden, weights, targets, reduction, head_weights=FACTORS, z_loss=0.1)
    for value in (loss, *parts.values()):
        assert value == 0 if reduction == "sum" else value.isnan()
    assert all((gradient == 0).all() for gradient in gradients(loss, hidden, weights))


def test_without_gradients_the_bits_are_the_same():
    hidden, weights, targets = inputs(dtype=torch.float32)
    loss, parts = multi_token_loss(hidden, weights, targets, "mean", head_weights=FACTORS, z_loss=0.1)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            alone, same = multi_token_loss(hidden, weights, targets, "mean", head_weights=FACTORS, z_loss=0.1)
        assert not alone.requires_grad and torch.equal(alone, loss)
        assert all(torch.equal(same[name], part) for name, part in parts.items())


def test_under_autocast_the_losses_are_fp32():
    """The logits are those that autocast makes, bit for bit; only the order of the sums differs."""
    hidden, weights, targets = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, parts = multi_token_loss(hidden, weights, targets, "sum", head_weights=FACTORS)
        logits = [F.linear(x, weights).float() for x in hidden]
    for i, part in enumerate([loss - sum(parts.values()), *parts.values()]):
        labels = by_hand(targets, i).flatten()
        expected = FACTORS[i] * F.cross_entropy(logits[i].flatten(0, 1), labels, ignore_index=IGNORE, reduction="sum")
        assert part.dtype == torch.float32 and torch.allclose(part, expected, rtol=1e-5)


def test_heads_that_do_not_match_are_refused():
    hidden, weights, targets = inputs()
    for wrong in ((1.0,), (1.0, 1.0, 1.0), (1.0,) * 5, (0.25,) * 4):
        with pytest.raises(ValueError, match="head_weights must be 4 numbers, one for each head, with 1 as the first"):
            multi_token_loss(hidden, weights, targets, "mean", head_weights=wrong)
    with pytest.raises(ValueError, match="weights must be one matrix or one for each of 4 heads, not 2"):
        multi_token_loss(hidden, [weights] * 2, targets, "mean", head_weights=FACTORS)
    with pytest.raises(ValueError, match="reduction must be mean or sum, not 'none'"):
        multi_token_loss(hidden, weights, targets, "none", head_weights=FACTORS)


def test_nothing_waits_for_the_device():
    """No .item() and the like, which tensors without values refuse."""
    with FakeTensorMode():
        hidden = [torch.empty(B, T, D, requires_grad=True) for _ in range(4)]
        weight, targets = torch.empty(V, D, requires_grad=True), torch.empty(B, T, dtype=torch.long)
        facts = {"documents": torch.empty(B, T, dtype=torch.long), "head_weights": FACTORS, "z_loss": 0.1}
        loss, _ = multi_token_loss(hidden, weight, targets, "mean", **facts)
        assert gradients(loss, hidden, weight)[-1].shape == (V, D)


@pytest.mark.slow
def test_compiled_scores_and_a_compiled_caller_give_the_same():
    """Within 200 eps, as in test_fp32_gradients_are_those_of_the_joint_graph."""
    hidden, weights, targets = inputs(dtype=torch.float32)
    facts = {"documents": DOCUMENTS, "head_weights": FACTORS, **SHAPES["all"]}
    eager, eager_parts = multi_token_loss(hidden, weights, targets, "mean", **facts)
    expected = gradients(eager, hidden, weights)
    eps = 200 * torch.finfo(torch.float32).eps
    with contextlib.closing(_reset_dynamo()):
        for scorer, function in (
            (torch.compile(module.score_at_once, dynamic=True), multi_token_loss),
            (module.score_in_tiles, torch.compile(multi_token_loss, dynamic=True)),
        ):
            with module.scored_by(scorer):
                loss, parts = function(hidden, weights, targets, "mean", **facts)
            assert (loss - eager).abs() < eps * eager
            assert all((part - eager_parts[name]).abs() < eps * eager for name, part in parts.items())
            for actual, correct in zip(gradients(loss, hidden, weights), expected, strict=True):
                assert (actual - correct).abs().max() < eps * correct.abs().max()


class _reset_dynamo:
    close = staticmethod(torch._dynamo.reset)


# -- memory ------------------------------------------------------------------------------------------------------------


def peak(loss_of, hidden, weights, train=True):
    """Most bytes held at once beyond the inputs, forward and, where `train`, backward."""
    with Watch() as watch, torch.set_grad_enabled(train):
        loss = loss_of(hidden, weights)
        if train:
            gradients(loss, hidden, weights)
    return watch.peak


@pytest.mark.parametrize("train", [True, False])
def test_further_heads_cost_no_logits_and_no_gradient_of_the_matrix(train):
    """A further head adds its rows [B, T, D] at most four times (joined, their gradient, copies of both for a while).

    And a few numbers a row. A chunk (7 rows of 4001) or a gradient of the matrix per head would be more than all that.
    """
    rows, columns = 28, 4001  # four whole chunks a head
    draw = torch.Generator().manual_seed(0)
    targets = torch.randint(columns, (1, rows), generator=draw)

    def head():
        return torch.randn(1, rows, D, generator=draw, requires_grad=True)

    def ours(hidden, weights):
        return multi_token_loss(hidden, weights, targets, "mean", head_weights=[1.0] * len(hidden))[0]

    def whole(hidden, weights):
        return sum(F.cross_entropy(F.linear(x, weights).flatten(0, 1), targets.flatten()) for x in hidden)

    weights = torch.randn(columns, D, generator=draw, requires_grad=True)
    hidden = [head() for _ in range(8)]
    one, eight = (peak(ours, hidden[:n], weights, train) for n in (1, 8))
    small = 7 * (4 * rows * D * 4 + 64 * rows)
    chunk, matrix = 7 * columns * 4, columns * D * 4
    assert eight - one < small < min(chunk, matrix)
    if train:
        assert peak(whole, hidden, weights) > 5 * eight, "the watch sees nothing"


def test_the_states_of_one_head_are_not_copied(monkeypatch):
    given = []

    def watched(x, *rest, **options):
        given.append(x)
        return module.weighted_linear_cross_entropy(x, *rest, **options)

    monkeypatch.setattr("models.layers.multi_token.weighted_linear_cross_entropy", watched)
    hidden, weights, targets = inputs(1)
    multi_token_loss(hidden, weights, targets, "sum", head_weights=[1.0])
    assert given[0] is hidden[0]
