"""Byte Latent Transformer: what only it promises, besides the contract of every model."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.blt import Blt, BltConfig, without_tables
from models.layers.causal import Context
from models.layers.entropy_model import EntropyModel
from models.layers.ngrams import BASE, ngram_hash
from models.layers.plain_attention import visible
from models.materialise import materialise
from models.presets import Gpt2
from trainer.engine.meta import build_meta

LENGTH = 24
TINY = {"d_model": 32, "n_layers": 2, "n_heads": 2, "decoder_layers": 2, "hash_size": 50, "local_window": 7}


def built(cls=Blt, factor=3.0, **fields):
    """With a factor of 3 the logits are far from uniform."""
    config = cls.Config(**{**TINY, **fields} if cls is Blt else fields)
    model = materialise(build_meta(cls, config), torch.device("cpu"), torch.Generator().manual_seed(0)).eval()
    for parameter in model.parameters():
        parameter.data.mul_(factor)
    return model


def drawn(seed, length=LENGTH, rows=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(257, (rows, length), generator=generator), torch.randn(rows, length, generator=generator)


def entropy_model():
    model = built(Gpt2, vocab_size=320, d_model=16, n_layers=1, n_heads=1)
    return EntropyModel(model, 257, None)


def test_hashes_are_those_of_whole_numbers_modulo_2_to_the_64():
    ids, _ = drawn(0)
    for n in (3, 4, 5, 6, 7, 8):
        found = ngram_hash(ids, n)
        for row in range(len(ids)):
            for t in range(n - 1, LENGTH):
                number = sum(int(ids[row, t - j]) * BASE**j for j in range(n)) % 2**64
                number -= 2**64 if number >= 2**63 else 0
                assert found[row, t] == number
                assert found[row, t] % 50 == number % 50
    # Computed once with Python's integers.
    text = torch.tensor([list(b"byte latent")])
    assert [ngram_hash(text, n)[0, -1].item() for n in (3, 8)] == [8766281155452247755, -8276049885933984769]


def test_ngrams_do_not_begin_before_the_document():
    model = built()
    tokens, _ = drawn(1)
    places = torch.arange(LENGTH).expand_as(tokens) % 10
    found = model.ngrams(tokens, places, LENGTH)
    for start in range(0, LENGTH, 10):
        part = tokens[:, start : start + 10]
        alone = model.ngrams(part, torch.arange(part.shape[1]).expand_as(part), part.shape[1])
        torch.testing.assert_close(found[:, start : start + 10], alone)
    assert not found[:, :2].any(), "no n-gram of 3 bytes ends at the first two"
    x = model.embed_bytes(tokens, places, LENGTH)
    torch.testing.assert_close(x, (model.embedding(tokens) + found) / 7)


PATCHINGS = {"random": 0.0, "all ones": 0.0, "one": 99.0}


@pytest.mark.parametrize("patching", PATCHINGS)
@torch.no_grad()
def test_no_byte_sees_the_future_however_it_is_cut(patching):
    """Byte and entropy of every place are changed in turn: the logits before are the same, bit for bit."""
    model = built(patching="entropy", threshold=PATCHINGS[patching], patch_size=1.0)
    tokens, entropies = drawn(2)
    if patching == "all ones":
        entropies = entropies.abs() + 1
    logits = model(tokens, entropies=entropies).logits
    for j in range(1, LENGTH):
        changed, other = tokens.clone(), entropies.clone()
        changed[:, j] = (changed[:, j] + 1) % 257
        other[:, j] *= 2 if patching == "all ones" else -1
        perturbed = model(changed, entropies=other).logits
        assert torch.equal(perturbed[:, :j], logits[:, :j]), j
        assert (perturbed[:, j] != logits[:, j]).any()


@torch.no_grad()
def test_a_byte_learns_of_a_patch_when_that_has_ended():
    """With windows of one byte and no n-grams, only patches tell a byte of those before it."""
    model = built(patching="entropy", threshold=0.0, local_window=1, largest_ngram=0)
    tokens, _ = drawn(3)
    entropies = torch.full((3, LENGTH), -1.0)
    entropies[:, 9] = 1.0  # patches are byte 0, 1 to 9, and the rest
    logits = model(tokens, entropies=entropies).logits
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 257
    differs = (model(changed, entropies=entropies).logits != logits).any(-1).all(0)
    assert differs.tolist() == [t == 4 or t >= 9 for t in range(LENGTH)]


@torch.no_grad()
def test_with_patches_of_one_byte_and_one_vector_it_is_a_transformer_of_bytes():
    """Cross-attention to a single key is a linear map of its value, so the same can be written without patches."""
    model = built(
        patching="static", patch_size=1.0, sub_vectors=1, n_heads=2, encoder_layers=2, largest_ngram=4, hash_size=9
    )
    tokens, _ = drawn(4)
    context = model.context(tokens, None, None)
    seen = visible("auto", (0,), model.attention_head_dim, model.embedding.weight, tokens, Context())
    e = x = model.embed_bytes(tokens, torch.arange(LENGTH).expand_as(tokens), LENGTH)
    patch = model.pool(e)
    for layer in model.encoder:
        x = layer.layer(x, context)
        patch = patch + layer.cross.out(layer.cross.kv(layer.cross.byte_norm(x)).chunk(2, -1)[1])
    for layer in model.layers:
        patch = layer(patch, Context(visible=seen))
    vector = model.unpool(patch)
    for layer in model.decoder:
        x = layer.layer(x + layer.cross.out(layer.cross.kv(layer.cross.byte_norm(vector)).chunk(2, -1)[1]), context)
    expected = F.linear(model.norm(x), model.head.weight)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_places_that_are_not_used_change_nothing():
    """A row of fewer patches, among rows of more, and with more room."""
    length = 2 * LENGTH
    tokens, entropies = drawn(5, length)
    entropies[1] = -1.0
    narrow, wide = (built(patching="entropy", threshold=0.5, patch_size=size) for size in (3.0, 1.0))
    assert narrow.config.rule.slots(length) < wide.config.rule.slots(length)
    expected = wide(tokens, entropies=entropies).logits
    torch.testing.assert_close(narrow(tokens, entropies=entropies).logits, expected, rtol=1e-5, atol=1e-5)
    for row in range(3):
        alone = narrow(tokens[row : row + 1], entropies=entropies[row : row + 1]).logits
        torch.testing.assert_close(alone, expected[row : row + 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", ["entropy", "monotonic"])
@pytest.mark.parametrize("incremental", [True, False])
@torch.no_grad()
def test_decoding_with_a_patcher_equals_the_whole(rule, incremental):
    """The entropy model steps along, with a state of its own or, if it has none, from the beginning each time."""
    model = built(patching=rule, threshold=5.3 if rule == "entropy" else 0.0, max_patch=5)
    model.patcher = entropy_model()
    if not incremental:
        model.patcher.new_state = lambda *args: None
    tokens, _ = drawn(6)
    entropies = model.patcher.entropies(tokens)
    assert 0.2 < (entropies > 5.3).float().mean() < 0.8
    whole = model(tokens).logits
    assert torch.equal(whole, model(tokens, entropies=entropies).logits)
    for parts in ([1] * LENGTH, [9, 1, 1, 13], [LENGTH]):
        state = model.new_state(3, LENGTH, torch.device("cpu"), torch.float32)
        found = torch.cat([model(part, cache=state).logits for part in tokens.split(parts, 1)], 1)
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)
    state.reset()
    model(tokens[:, :9], cache=state)
    mark = state.snapshot()
    model(tokens[:, 9:].flip(1), cache=state)
    state.restore(mark)
    state.select(torch.tensor([2, 0]))
    found = model(tokens[[2, 0], 9:], cache=state).logits
    torch.testing.assert_close(found, whole[[2, 0], 9:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_step_in_which_no_patch_ends_does_not_run_the_latent_transformer():
    model = built(patching="static", patch_size=8.0)
    tokens, _ = drawn(7)
    state, calls = model.new_state(3, LENGTH, torch.device("cpu"), torch.float32), []
    model.layers[0].register_forward_hook(lambda *_: calls.append(state.length))
    for t in range(LENGTH):
        model(tokens[:, t : t + 1], cache=state)
    assert calls == [0, 8, 16]


def test_without_entropies_the_error_says_what_to_do():
    model = built(patching="entropy")
    with pytest.raises(ValueError, match="prepare the data with --patches RUN"):
        model(drawn(8)[0])


def test_an_even_distribution_has_log2_of_the_vocabulary_bits():
    model = built(vocab_size=260)
    model.head.weight.data.zero_()
    tokens = torch.randint(260, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    assert model(tokens, tokens).loss.item() / math.log(2) == pytest.approx(math.log2(260), rel=1e-6)


def test_hash_tables_fill_what_the_shape_leaves_of_the_target():
    for scale, target in ((1, 20_000_000), (8, 200_000_000)):
        config = Blt.config_for_scale(scale, 320, target)
        assert Blt.count_parameters(config) == pytest.approx(target, rel=1e-3)
        assert 0.1 < 1 - without_tables(config) / target < 0.4
    chosen = Blt.config_for_scale(1, 320, 20_000_000, hash_size=777)
    assert chosen.hash_size == 777


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"patching": "words"}, "patching must be entropy, monotonic, space, static, not 'words'"),
        ({"n_heads": 3, "d_model": 48}, "n_heads must be a multiple of sub_vectors"),
        ({"n_heads": 5}, "n_heads must divide d_model"),
        ({"largest_ngram": 2}, "largest_ngram must be 0 or at least smallest_ngram"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        BltConfig(**{**TINY, **fields})
