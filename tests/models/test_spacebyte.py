"""SpaceByte: what only it promises, besides the contract of every model."""

import pytest
import torch

from models.materialise import materialise
from models.spacebyte import SpaceByte, SpaceByteConfig
from trainer.engine.meta import build_meta

TINY = {"d_model": 32, "n_layers": 2, "n_heads": 2, "local_layers": 1, "local_window": 1}


def built(**fields):
    config = SpaceByteConfig(**{**TINY, **fields})
    model = materialise(build_meta(SpaceByte, config), torch.device("cpu"), torch.Generator().manual_seed(0)).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)
    return model


@torch.no_grad()
def test_only_bytes_that_end_a_word_see_those_before():
    """With windows of one byte, all that a byte knows of others comes from the global layers."""
    model, text = built(), b"one two, three"
    tokens = torch.tensor([list(text)])
    logits = model(tokens).logits
    changed = tokens.clone()
    changed[0, 3] = ord("-")  # the first byte that ends a word, after the first byte, which is a patch of its own
    differs = (model(changed).logits != logits).any(-1)[0].tolist()
    assert [text[i : i + 1] for i, one in enumerate(differs) if one] == [b" ", b","]
    assert not differs[8], "the space after the comma is no first space-like byte"


@torch.no_grad()
def test_what_there_is_room_for_does_not_depend_on_what_follows():
    """Far more words than there is room for: a row and its beginning have the same logits."""
    model = built(patch_size=50.0)
    tokens = torch.tensor([list(b"a b " * 30)])
    assert model.config.rule.slots(120) == 19
    logits = model(tokens).logits
    for stop in (1, 2, 40, 77, 119):
        torch.testing.assert_close(model(tokens[:, :stop]).logits, logits[:, :stop], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_step_in_the_middle_of_a_word_runs_no_global_layer():
    model, text = built(), b"one two, three"
    state, calls = model.new_state(1, len(text), torch.device("cpu"), torch.float32), []
    model.layers[0].register_forward_hook(lambda *_: calls.append(text[state.length : state.length + 1]))
    logits = [model(torch.tensor([[byte]]), cache=state).logits for byte in text]
    assert calls == [b"o", b" ", b","]
    whole = model(torch.tensor([list(text)])).logits
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_loss_is_of_the_targets_as_they_are_given():
    """They are the next bytes already, and are not shifted once more."""
    model, tokens = built(), torch.tensor([list(b"one two, three")])
    expected = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).logits[0], tokens[0, 1:])
    torch.testing.assert_close(model(tokens[:, :-1], tokens[:, 1:]).loss, expected)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"patching": "entropy"}, "patching must be space or static, not 'entropy'"),
        ({"n_heads": 1}, "n_heads must be even"),
        ({"n_heads": 5}, "n_heads must divide d_model"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SpaceByteConfig(**{**TINY, **fields})
