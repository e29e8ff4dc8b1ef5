"""AU-Net: what only it promises, besides the contract of every model."""

import pytest
import torch
import torch.nn.functional as F

from models.aunet import AUNet, AUNetConfig
from models.layers.causal import Context
from models.layers.plain_attention import visible
from models.materialise import materialise
from models.state import DecodingState, StaticState
from trainer.core.config import RunConfig
from trainer.core.settings import build
from trainer.engine.meta import build_meta
from trainer.optim.groups import shapes_of
from trainer.planning.plan import resolve
from trainer.recipes import groups_of
from trainer.testing import numbers
from trainer.testing.subject import Failed, Subject

TINY = {"d_model": 32, "n_layers": 2, "n_heads": 2, "byte_layers": 1, "word_layers": 1, "byte_window": 1}
TEXT = b"one two, three four. five"  # words end at bytes 0, 3, 7, 14 and 19


def built(cls=AUNet, **fields):
    config = AUNetConfig(**{**TINY, **fields})
    model = materialise(build_meta(cls, config), torch.device("cpu"), torch.Generator().manual_seed(0)).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)
    return model


def by_definition(model, level, x, text):
    """The stages of one text in loops over its positions; x [1, n, width]."""
    c, weight = model.config, model.embedding.weight
    windows = (c.byte_window if level == 0 else 0,)
    seen = visible("torch", windows, c.head_dim, weight, x[..., 0], Context())
    if level == c.stages - 1:
        for layer in model.layers:
            x = layer(x, Context(visible=seen))
        return x
    for layer in model.early[level]:
        x = layer(x, Context(visible=seen))
    if level == 0:
        letter = [chr(byte).isalnum() for byte in text]
        ends = [i for i in range(len(text)) if i == 0 or i > 1 and letter[i - 1] and not letter[i]]
    else:
        ends = list(range(0, x.shape[1], c.group_words))
    short = by_definition(model, level + 1, model.down[level](x[:, ends]), text)
    matrices = model.up[level].matrix.weight.unflatten(0, (c.places[level], -1))
    added = []
    for i in range(x.shape[1]):
        last = max(n for n, end in enumerate(ends) if end <= i)
        place = min(i - ends[last], c.places[level] - 1)
        added.append(F.linear(model.up[level].norm(short[:, last]), matrices[place]))
    x = x + torch.stack(added, dim=1)
    for layer in model.late[level]:
        x = layer(x, Context(visible=seen))
    return x


@pytest.mark.parametrize("stages", [2, 3, 4])
@torch.no_grad()
def test_it_is_what_the_paper_defines(stages):
    """Rows of one batch, whose words end at other places, each as by loops over its own positions."""
    model = built(stages=stages, upsample_places=3, byte_window=5, group_words=2 if stages == 4 else 3)
    rows = [TEXT, TEXT[::-1], b"a b c d e f g h i j k l m"]
    logits = model(torch.tensor([list(row) for row in rows])).logits
    for row, found in zip(rows, logits, strict=True):
        x = by_definition(model, 0, model.embedding(torch.tensor([list(row)])), row)
        expected = F.linear(model.norm(x), model.head.weight)[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_only_bytes_that_end_a_word_are_seen_by_later_ones():
    """With windows of one byte, all that a byte knows of others comes from the stages of words."""
    model, ends = built(), [0, 3, 7, 14, 19]
    tokens = torch.tensor([list(TEXT)])
    logits = model(tokens).logits
    for i in range(len(TEXT)):
        changed = tokens.clone()
        changed[0, i] += 1 if TEXT[i : i + 1].isalpha() else 11  # letters stay letters, and the others no letters
        differs = (model(changed).logits != logits).any(-1)[0].tolist()
        assert differs == [j >= i if i in ends else j == i for j in range(len(TEXT))], i


class PlacesOfTheFirstRow(AUNet):
    """BlaGPT's: where words end in the first row, vectors are taken from all rows."""

    def from_below(self, level, x, choice, below):
        return super().from_below(level, x, choice._replace(at=choice.at[:1].expand_as(choice.at)), below)


def test_places_of_one_row_for_all_are_found():
    case = Subject("aunet", PlacesOfTheFirstRow, {**TINY, "byte_window": 64})
    with pytest.raises(Failed, match="changes the logits of those before it, or of other rows"):
        numbers.no_token_sees_the_future(case)


@torch.no_grad()
def test_what_there_is_room_for_does_not_depend_on_what_follows():
    """Far more words than there is room for: a row, its beginning, and the same step by step."""
    model = built(word_size=50.0)
    tokens = torch.tensor([list(b"a b " * 30), list(b"abcd" * 30)])
    assert model.config.rules[0].slots(120) == 19
    logits = model(tokens).logits
    for stop in (1, 2, 40, 77, 119):
        torch.testing.assert_close(model(tokens[:, :stop]).logits, logits[:, :stop], rtol=1e-4, atol=1e-4)
    state = model.new_state(2, 120, torch.device("cpu"), torch.float32)
    found = torch.cat([model(part, cache=state).logits for part in tokens.split([35, *[1] * 30, 55], 1)], 1)
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_step_in_the_middle_of_a_word_runs_no_deeper_stage():
    model, calls = built(), []
    state = model.new_state(1, len(TEXT), torch.device("cpu"), torch.float32)
    for part, name in ((model.early[1][0], "word"), (model.layers[0], "group"), (model.up[0].matrix, "up")):
        part.register_forward_hook(lambda *_, name=name: calls.append((state.length, name)))
    for byte in TEXT:
        model(torch.tensor([[byte]]), cache=state)
    assert [at for at, name in calls if name == "word"] == [0, 3, 7, 14, 19]
    assert [at for at, name in calls if name == "group"] == [0, 7, 19]


@torch.no_grad()
def test_steps_of_fixed_shapes_are_refused():
    growing = DecodingState()
    with pytest.raises(ValueError, match="its steps have no fixed shapes"):
        built()(torch.tensor([[1]]), cache=StaticState(growing, 24, torch.device("cpu")))


def test_each_stage_can_have_a_learning_rate():
    values = {
        "device": "cpu",
        "data": {"tokenizer": "bytes"},
        "optim": {"lr": 1e-3, "roles": {"bytes": {"lr": 3e-3}, "words": {"lr": 2e-3}}},
    }
    plan = resolve(build(RunConfig, {**values, "model": {"name": "aunet", **TINY}}))
    model = build_meta(plan.model_class, plan.model_config)
    rates = {name: group.lr for group in groups_of(plan.config, model, shapes_of(model)) for name in group.parameters}
    assert rates["early.0.0.mlp.up.weight"] == rates["up.0.matrix.weight"] == 3e-3
    assert rates["late.1.0.attention.qkv.weight"] == rates["down.1.matrix.weight"] == 2e-3
    assert rates["layers.1.mlp.up.weight"] == rates["early.0.0.mlp_norm.weight"] == 1e-3


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"stages": 1}, "stages must be at least 2"),
        ({"n_heads": 1}, "byte_width must be whole heads of 32 channels, but 16 is not"),
        ({"word_width": 24}, "word_width must be whole heads of 16 channels, but 24 is not"),
        ({"n_heads": 5}, "n_heads must divide d_model"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        AUNetConfig(**{**TINY, **fields})
