"""Where patches end, against plain loops; what is known of a text's first bytes does not change when it goes on."""

import itertools

import pytest
import torch

from models.layers.patching import RULES, Rule, attend_to_own_bytes, cut, overlong, pooled, space_like
from models.layers.positions import number_documents
from trainer.data import dataset

LENGTH = 40
CASES = [Rule(kind, size, 0.0, longest) for kind in RULES for size in (1.5, 4.5) for longest in (0, 3)]
CASES += [
    Rule("entropy", 100.0, -1e9),
    Rule("entropy", 100.0, 1e9),
]  # all bytes, of which there is no room for most; one patch


def inputs(seed, length=LENGTH):
    """(tokens, documents, entropies) [3, length]; entropies are above 0 in about half of the places."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(257, (3, length), generator=generator)
    changes = torch.rand(3, length, generator=generator) < 0.15
    documents = number_documents(changes.cumsum(1))
    return tokens, documents, torch.randn(3, length, generator=generator)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("rule", CASES, ids=str)
def test_a_prefix_is_cut_as_the_whole(rule, apart):
    tokens, documents, entropies = inputs(0)
    documents = documents if apart else None
    whole = cut(tokens, rule, documents, entropies)
    for stop in range(1, LENGTH):
        part = cut(tokens[:, :stop], rule, None if documents is None else documents[:, :stop], entropies[:, :stop])
        for name in ("ids", "last", "places", "inside", "known"):
            expected, found = getattr(whole, name), getattr(part, name)
            assert expected is None and found is None or torch.equal(found, expected[:, :stop]), (name, stop)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("rule", CASES, ids=str)
def test_patches_are_the_row_in_order(rule, apart):
    tokens, documents, entropies = inputs(1)
    found = cut(tokens, rule, documents if apart else None, entropies)
    slots = rule.slots(LENGTH, documents=apart)
    assert slots <= LENGTH and found.ids.max() < slots
    assert torch.equal(found.ids[:, 0], torch.zeros(3, dtype=torch.long)) and found.last[:, 0].eq(0).all()
    steps = found.ids.diff(dim=1)
    assert ((steps == 0) | (steps == 1)).all()
    lengths = torch.stack([torch.bincount(row, minlength=slots) for row in found.ids])
    assert lengths.sum(1).eq(LENGTH).all() and lengths[:, 0].eq(1).all(), "the first byte is a patch of its own"
    # A byte knows its own patch only if the next byte begins another.
    assert ((found.last == found.ids) | (found.last == found.ids - 1)).all()
    assert (found.last == found.ids)[:, :-1][(steps == 0)].logical_not().all()
    if not apart:
        assert torch.equal((found.last == found.ids)[:, :-1], steps == 1)
    else:
        begins = torch.nn.functional.pad(documents.diff(dim=1) != 0, (1, 0), value=True)
        full = found.ids + 1 >= rule.room(torch.arange(1, LENGTH + 1).double())  # no further patch may begin
        assert (found.known | full | ~found.inside)[begins].all(), (
            "a document's first byte knows its own patch, if there is room"
        )
        assert (found.of_document.gather(1, found.last.clamp(min=0)) == documents)[found.known].all()


def test_room_runs_out_as_in_a_loop():
    """A patch begins only while fewer have begun than there is room for; a wish that is not met is forgotten."""
    tokens, _, entropies = inputs(2, 400)
    for rule in (Rule("entropy", 2.0), Rule("entropy", 7.0), Rule("entropy", 3.0, -1.0)):
        found = cut(tokens, rule, None, entropies)
        for row, numbers in zip(entropies, found.ids, strict=True):
            count, expected = 0, []
            for t in range(400):
                wanted = t in (0, 1) or bool(row[t - 1] > rule.threshold)
                count += wanted and count < rule.room(t)
                expected.append(count - 1)
            assert numbers.tolist() == expected
        assert found.ids.max() < rule.slots(400) == rule.room(399)


def test_the_rules_by_hand():
    def pieces(text, rule, entropies=None):
        tokens = torch.tensor([list(text)])
        values = None if entropies is None else torch.tensor([entropies])
        ids = cut(tokens, rule, None, values).ids[0].tolist()
        return [
            bytes(text[i] for i, _ in group) for _, group in itertools.groupby(enumerate(ids), lambda pair: pair[1])
        ]

    assert pieces(b"Hello, big  world!\n", Rule("space", 1)) == [b"H", b"ello,", b" big ", b" world!", b"\n"]
    text = (
        "na\u00efve \u2013 1st".encode()
    )  # \u00ef is c3 af, \u2013 is e2 80 93: first bytes are space-like, the others continue
    assert pieces(text, Rule("space", 1)) == [b"n", b"a\xc3", b"\xafve ", b"\xe2\x80\x93 ", b"1st"]
    assert pieces(b"abcdefghij", Rule("static", 3)) == [b"a", b"bcd", b"efg", b"hij"]
    assert pieces(b"abcdefghij", Rule("static", 2.5)) == [b"a", b"bcd", b"ef", b"ghi", b"j"]
    assert pieces(b"abcdefghij", Rule("static", 9, longest=2)) == [b"a", b"bc", b"de", b"fg", b"hi", b"j"]
    entropies = [9.0, 1.0, 2.0, 2.5, 0.5, 2.0, 0.1]  # of what comes after each byte
    assert pieces(b"abcdefg", Rule("entropy", 1, 1.9), entropies) == [b"a", b"bc", b"d", b"ef", b"g"]
    assert pieces(b"abcdefg", Rule("monotonic", 1, 0.9), entropies) == [b"a", b"bc", b"def", b"g"]


def test_space_like_bytes():
    others = {*b"0123456789", *range(ord("a"), ord("z") + 1), *range(ord("A"), ord("Z") + 1), *range(0x80, 0xC0)}
    expected = [byte not in others for byte in range(300)]
    assert space_like(torch.arange(300)).tolist() == expected


def test_overlong_patches_are_split_as_in_a_loop():
    _, documents, entropies = inputs(3)
    places = (
        torch.arange(LENGTH)
        - torch.where(torch.nn.functional.pad(documents.diff(dim=1) != 0, (1, 0), value=True), torch.arange(LENGTH), 0)
        .cummax(1)
        .values
    )
    ends = (entropies > 1) | (places == 0)
    for longest in (1, 2, 5):
        split = overlong(ends, places, longest) | ends
        for i in range(3):
            length = 0
            for t in range(LENGTH):
                length = 1 if places[i, t] == 0 else length + 1
                expected = bool(ends[i, t]) or length == longest
                assert bool(split[i, t]) == expected
                length = 0 if expected else length


def test_attention_and_maximum_are_over_the_own_bytes_alone():
    generator = torch.Generator().manual_seed(0)
    b, m, k, h, d, t = 2, 5, 3, 2, 4, 12
    q = torch.randn(b, m, k, h, d, generator=generator, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(b, t, h, d, generator=generator, dtype=torch.float64, requires_grad=True) for _ in "kv")
    ids = torch.tensor([[0, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3]] * b)  # patch 4 has no bytes
    inside = torch.ones(b, t, dtype=torch.bool)
    inside[1, 2] = False
    found = attend_to_own_bytes(q, key, value, ids, inside, 0.5)
    mask = (ids[:, None] == torch.arange(m)[:, None]) & inside[:, None]  # [B, M, T]
    scores = torch.einsum("bmkhd,bthd->bmkht", q, key) * 0.5
    weights = scores.masked_fill(~mask[:, :, None, None], -1e9).softmax(-1) * mask.any(-1)[:, :, None, None, None]
    expected = torch.einsum("bmkht,bthd->bmkhd", weights, value)
    torch.testing.assert_close(found, expected)
    slope = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    for mine, reference in zip(
        torch.autograd.grad((found * slope).sum(), (q, key, value)),
        torch.autograd.grad((expected * slope).sum(), (q, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference)
    x = torch.randn(b, t, 3, generator=generator)
    best = pooled(x, ids, inside, m)
    for row, patch in itertools.product(range(b), range(m)):
        chosen = x[row][mask[row, patch]]
        assert torch.equal(best[row, patch], chosen.max(0).values if len(chosen) else torch.zeros(3))


def test_the_column_has_one_name():
    from models.layers import patching

    assert dataset.ENTROPIES == patching.ENTROPIES
