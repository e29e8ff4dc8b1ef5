"""MegaByte, Hourglass and future token prediction: their definitions, and the traps of BlaGPT's versions.

What the contract asks for is asked of more of their configs here, and of wrong models, which must fail it.
"""

import pytest
import torch
from torch import Tensor

from models.base import IGNORE, cross_entropy, get_model, load_models
from models.ftp import Ftp
from models.hourglass import Hourglass, HourglassConfig, Shortening, Stage, parse_hierarchy
from models.megabyte import MegaByte
from models.state import DecodingState, StaticState
from trainer.testing import numbers
from trainer.testing.subject import Failed, Subject

load_models()
TINY = {"d_model": 32, "n_heads": 2, "n_layers": 3}


def subject(name, model_class=None, **choices) -> Subject:
    return Subject(name, model_class or get_model(name), {**TINY, **choices})


def disturbed(case: Subject):
    """A model in which no weight is small: everything that can be seen changes the logits."""
    model, draw = case.model.eval(), torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=draw)
    return model


def influences(compute, x: Tensor) -> Tensor:
    """[n of x, n of the output] bool: whether entry j of x [1, n, ...] changes entry i of what `compute` returns."""
    before, found = compute(x), []
    for j in range(x.shape[1]):
        changed = x.clone()
        changed[:, j] = changed[:, j] + 1
        found.append((compute(changed) != before).flatten(2).any(-1)[0])
    return torch.stack(found)


# -- every config ----------------------------------------------------------------------------------------------------------

CONFIGS = [
    ("megabyte", {"patch_size": 1}),
    ("megabyte", {"patch_size": 5, "token_shift": True, "positions": "none"}),  # BlaGPT's; no multiple of 5 is 24
    ("ftp", {"decoder_every": 1, "predict_tokens": 3}),
    ("ftp", {"mode": "chunked", "predict_tokens": 1}),
    ("ftp", {"mode": "chunked", "predict_tokens": 5, "gamma": 0.7}),
    ("hourglass", {"shortening": "avg", "upsampling": "attention", "shorten_factor": 3}),
    ("hourglass", {"shortening": "attention", "upsampling": "repeat", "shorten_factor": 2}),
    ("hourglass", {"shortening": "linear", "upsampling": "linear"}),
    ("hourglass", {"hierarchy": "1@1,1@2,1@6,1@2,1@1", "n_layers": 5}),
    ("hourglass", {"hierarchy": "0@1,1@1,0@1", "n_layers": 1}),
]


@pytest.mark.parametrize("name, choices", CONFIGS, ids=str)
def test_every_config_keeps_the_contract(name, choices):
    """Every position, patch borders included, bit for bit; documents; cached decoding in any parts; the next token's loss apart."""
    case = subject(name, **choices)
    numbers.no_token_sees_the_future(case, tolerance=0)
    numbers.inputs_stay_as_they_are(case)
    numbers.loss_is_the_cross_entropy(case)
    numbers.ignored_targets_do_not_count(case)
    numbers.documents_are_kept_apart(case)
    numbers.cached_decoding_equals_the_whole(case)


@pytest.mark.parametrize("up", ["repeat", "linear", "attention"])
@pytest.mark.parametrize("down", ["avg", "linear", "attention"])
def test_hourglasses_of_every_kind_are_causal(down, up):
    for k in (2, 3, 4):
        case = subject("hourglass", shortening=down, upsampling=up, shorten_factor=k)
        numbers.no_token_sees_the_future(case, tolerance=0)


@torch.no_grad()
@pytest.mark.parametrize("name, choices", [("megabyte", {}), ("ftp", {}), ("ftp", {"mode": "chunked"}), ("hourglass", {})], ids=str)  # fmt: skip
def test_a_token_reaches_itself_and_all_later_ones_and_no_other(name, choices):
    case = subject(name, **choices)
    model = disturbed(case)
    found = influences(lambda tokens: model(tokens).logits, case.tokens[:1])
    assert torch.equal(found, torch.ones_like(found).triu())


@torch.no_grad()
@pytest.mark.parametrize("name", ["megabyte", "hourglass"])
def test_steps_of_fixed_shapes_are_refused_with_the_reason(name):
    case = subject(name)
    growing = DecodingState()
    case.model(case.tokens[:, :5], cache=growing)
    with pytest.raises(ValueError, match="its steps have no fixed shapes: what stands for several tokens is computed"):
        case.model(case.tokens[:, 5:6], cache=StaticState(growing, 24, torch.device("cpu")))


@torch.no_grad()
@pytest.mark.parametrize("name", ["megabyte", "hourglass"])
def test_a_state_reads_no_more_than_it_was_made_for(name):
    case = subject(name)
    state = numbers.state_of(case.model, 2, 9)
    case.model(case.tokens[:, :9], cache=state)
    with pytest.raises(ValueError, match="the state was made for 9 tokens, but 10 are to be read"):
        case.model(case.tokens[:, 9:10], cache=state)


@pytest.mark.slow
@pytest.mark.parametrize("name, choices", [("megabyte", {}), ("ftp", {}), ("ftp", {"mode": "chunked"}), ("hourglass", {})], ids=str)  # fmt: skip
def test_blocks_compile_without_a_break(name, choices):
    case = subject(name, **choices)
    model = case.model
    expected = model(case.tokens, case.targets).loss
    for block in model.blocks():
        block.forward = torch.compile(block.forward, backend="eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(model(case.tokens, case.targets).loss, expected)
    torch._dynamo.reset()


# -- wrong models fail the contract ----------------------------------------------------------------------------------------


class Shifts(MegaByte):
    """BlaGPT's: makes one sequence of tokens and targets in the memory of the tokens."""

    def forward(self, tokens, targets=None, documents=None, cache=None, reduction="mean"):
        tokens[:, :-1] = tokens[:, 1:].clone()
        return super().forward(tokens, targets, documents, cache, reduction)


class Flattened(MegaByte):
    """AU-Net's in BlaGPT: takes places from the flattened batch, which is right for one row only."""

    def hidden(self, tokens, *, documents=None, state=None):
        found = super().hidden(tokens.view(1, -1))
        return found._replace(states=found.states.view(*tokens.shape, -1))


class FirstChunkLeaks(Ftp):
    """BlaGPT's: the first chunk gets the encoder's first vector, which has seen the whole chunk."""

    def contexts(self, patches, documents=None, state=None, read=None):
        added, memory, mask = super().contexts(patches, documents, state, read)
        own = self.encode_chunks(patches[:, :1], None, None, None)
        return added, torch.cat((own[:, :, :1].expand(-1, -1, memory.shape[2], -1), memory[:, 1:]), dim=1), mask


class SeesLaterCoarseTokens(Hourglass):
    """BlaGPT's of 2024: coarse token i is visible from token i on, and not from token ik on."""

    def __init__(self, config):
        super().__init__(config)
        for part in self.upsample:
            part.may_see = lambda queries, keys, k=part.k: keys // k <= queries[:, None]


class GroupsLookAhead(Hourglass):
    """Without the shift by k - 1 a coarse token is made of tokens after its position."""

    def __init__(self, config):
        super().__init__(config)
        for part in self.shorten:
            part.groups = lambda x, fine, coarse, k=part.k: x.unflatten(1, (-1, k))


@pytest.mark.parametrize(
    "check, name, wrong, choices, told",
    [
        (numbers.inputs_stay_as_they_are, "megabyte", Shifts, {}, "the model writes into the tokens"),
        (numbers.no_token_sees_the_future, "megabyte", Flattened, {}, "token 1 changes the logits of those before it, or of"),
        (numbers.no_token_sees_the_future, "ftp", FirstChunkLeaks, {"mode": "chunked"}, "token 1 changes the logits of those"),
        (numbers.no_token_sees_the_future, "hourglass", SeesLaterCoarseTokens, {}, "token 2 changes the logits of those"),
        (numbers.no_token_sees_the_future, "hourglass", GroupsLookAhead, {"shortening": "linear", "upsampling": "linear"}, "token 1 changes the"),
    ],
)  # fmt: skip
def test_what_must_not_be_is_found(check, name, wrong, choices, told):
    with pytest.raises(Failed, match=told):
        check(subject(name, wrong, **choices))


# -- MegaByte --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_megabytes_large_model_runs_once_per_patch(monkeypatch):
    case, read = subject("megabyte", patch_size=4), []
    run_global = MegaByte.run_global
    monkeypatch.setattr(
        MegaByte, "run_global", lambda self, x, *rest: read.append(x.shape[1]) or run_global(self, x, *rest)
    )
    model, state = case.model, DecodingState()
    for token in case.tokens.split(1, dim=1):
        model(token, cache=state)
    assert read == [1] * 6  # of 24 tokens: the start, and five patches before the last


@torch.no_grad()
def test_a_token_that_begins_a_patch_knows_the_whole_patch_before():
    """In BlaGPT's form its prediction, the last of the patch before, does not know the large model's state of that patch."""
    case = subject("megabyte", patch_size=4)
    model = disturbed(case)
    for layer in model.layers:  # without the small model's attention only the large one tells of other tokens
        layer.attention.out.weight.zero_()
    found = influences(lambda tokens: model(tokens).logits, case.tokens[:1])
    earlier = torch.arange(24)[:, None] // 4 < torch.arange(24) // 4
    assert torch.equal(found, earlier | torch.eye(24, dtype=torch.bool))


# -- future token prediction -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_papers_loss_is_that_of_every_step_at_every_position():
    """Against a loop over the steps: what the decoder predicts i tokens ahead, with the true tokens before it."""
    case = subject("ftp", predict_tokens=3, decoder_every=1, gamma=0.5)
    model, tokens, targets = case.model.eval(), case.tokens, case.targets
    encoded = model.hidden(tokens).heads[0]
    expected, length = {}, tokens.shape[1]
    for i in (1, 2, 3):
        count = length - i + 1  # positions with a target i tokens ahead
        x = torch.stack([model.embedding(tokens[:, j : j + count]) for j in range(i)], dim=2)  # [B, count, i, D]
        last = model.decode_steps(encoded[:, :count].flatten(0, 1), x.flatten(0, 1))[:, -1]
        logits = model.norm(last) @ model.unembedding().T
        expected[i] = cross_entropy(logits.unsqueeze(0), targets[:, i - 1 :].reshape(1, -1), "sum")
    loss, _, parts, _ = model(tokens, targets, reduction="sum")
    torch.testing.assert_close(parts["step_2"], 0.5 * expected[2])
    torch.testing.assert_close(parts["step_3"], 0.25 * expected[3])
    torch.testing.assert_close(loss, expected[1] + 0.5 * expected[2] + 0.25 * expected[3])


@torch.no_grad()
def test_positions_left_out_are_made_up_for_on_average(monkeypatch):
    cases = [subject("ftp", predict_tokens=5, decoder_every=every) for every in (1, 5)]
    every, some = (case.model.eval() for case in cases)
    some.load_state_dict(every.state_dict())
    targets = cases[0].targets
    targets[0, 3:9] = IGNORE
    found = []
    for first in range(5):
        monkeypatch.setattr(Ftp, "first_place", lambda self, tokens, first=first: torch.full((2, 1), first))
        found.append(some(cases[0].tokens, targets, reduction="sum").loss)
    monkeypatch.setattr(Ftp, "first_place", lambda self, tokens: torch.zeros(2, 1, dtype=torch.long))
    torch.testing.assert_close(torch.stack(found).mean(), every(cases[0].tokens, targets, reduction="sum").loss)


@torch.no_grad()
def test_no_step_predicts_from_one_document_into_the_next():
    case = subject("ftp", predict_tokens=4, decoder_every=1)
    model, tokens, targets = case.model.eval(), case.tokens, case.targets
    documents = (torch.arange(24) >= 9).long().expand(2, -1)
    packed = model(tokens, targets, documents, reduction="sum").loss
    alone = [model(tokens[:, part], targets[:, part], reduction="sum").loss for part in (slice(9), slice(9, 24))]
    torch.testing.assert_close(packed, sum(alone))


@torch.no_grad()
def test_chunks_know_of_others_through_the_context_alone():
    case = subject("ftp", mode="chunked", predict_tokens=4)
    model = disturbed(case)
    model.expand.weight.zero_()
    for layer in model.layers:
        layer.cross.out.weight.zero_()
    found = influences(lambda tokens: model(tokens).logits, case.tokens[:1])
    chunks = torch.arange(24) // 4
    assert torch.equal(found, (chunks[:, None] == chunks).triu())


@torch.no_grad()
def test_with_chunks_of_one_token_the_context_is_the_token_before():
    model = disturbed(subject("ftp", mode="chunked", predict_tokens=1))
    patches = torch.arange(6).view(1, 6, 1)
    _, memory, mask = model.contexts(patches[:, :-1])
    assert mask[0, :, 0].tolist() == [[False, True]] + [[True, False]] * 5  # the start vector, then one vector each
    torch.testing.assert_close(memory[:, 1:, 0], model.encode_chunks(patches[:, :-1], None, None, None)[:, :, 0])


@torch.no_grad()
def test_weights_of_places_have_the_mean_one():
    plain, weighted = subject("ftp", mode="chunked"), subject("ftp", mode="chunked", gamma=0.5)
    one, other = plain.model.eval(), weighted.model.eval()
    other.load_state_dict(one.state_dict())
    nll = one.nll(one.hidden(plain.tokens), plain.targets)  # [B, T]
    factors = 0.5 ** (torch.arange(24) % 8).float()
    found = other(plain.tokens, plain.targets, reduction="sum")
    torch.testing.assert_close(found.loss, (nll * factors / factors.mean()).sum())
    torch.testing.assert_close(found.loss - found.parts["chunk_weights"], nll.sum())


# -- Hourglass -------------------------------------------------------------------------------------------------------------


def shortened(k, change=lambda part: None):
    part = Shortening(HourglassConfig(**TINY, vocab_size=8), 0, k)
    part.reset(torch.Generator().manual_seed(0))
    change(part)
    fine = Stage(0, 13, 1)
    return influences(lambda x: part(x, fine, fine.below(k)), torch.randn(1, 13, 32))


@torch.no_grad()
@pytest.mark.parametrize("k", [2, 3, 4])
def test_a_coarse_token_sees_every_token_up_to_its_position(k):
    """BlaGPT's mask is aligned to the top left: coarse token i attends to tokens 0 ... i only."""
    expected = torch.arange(13)[:, None] <= k * torch.arange(-(-13 // k))
    assert torch.equal(shortened(k), expected)

    def cut(part):
        part.may_see = lambda queries, keys: keys <= queries[:, None] // k

    assert not torch.equal(shortened(k, cut), expected)


@torch.no_grad()
def test_every_block_of_the_hierarchy_runs_once_at_its_length():
    case, lengths = subject("hourglass", hierarchy="2@1,1@2,3@4,0@2,1@1", n_layers=7), []
    model = case.model
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda module, given: lengths.append(given[0].shape[1]))
    model(case.tokens)
    assert len(model.layers) == 7 and lengths == [24, 24, 12, 6, 6, 6, 24]
    default = HourglassConfig()  # BlaGPT builds 18 blocks for it
    assert default.path == parse_hierarchy("3@1,9@4,3@1")
    assert len(get_model("hourglass")(HourglassConfig(vocab_size=8, d_model=24)).layers) == 15


@torch.no_grad()
def test_coarse_tokens_are_computed_when_their_position_is_read():
    case, read = subject("hourglass", shorten_factor=4), []
    model, state = case.model, DecodingState()
    model.layers[1].register_forward_pre_hook(lambda module, given: read.append(given[0].shape[1]))
    for i, token in enumerate(case.tokens.split(1, dim=1)):
        model(token, cache=state)
        assert sum(read) == i // 4 + 1
    assert read == [1] * 6


@torch.no_grad()
@pytest.mark.parametrize("upsampling", ["repeat", "linear", "attention"])
def test_the_skip_is_added_once(upsampling):
    part = subject("hourglass", upsampling=upsampling).model.upsample[0]
    for parameter in part.parameters():
        parameter.zero_()
    fine, x = Stage(0, 10, 1), torch.randn(1, 10, 32)
    coarse = fine.below(4)
    assert torch.equal(part(x, torch.zeros(1, coarse.length, 32), fine, coarse), x)


@torch.no_grad()
def test_a_factor_of_one_is_a_deep_stack():
    case = subject("hourglass", shorten_factor=1, shortening="avg", upsampling="repeat")
    model = disturbed(case)
    x = model.embedding(case.tokens)
    context = model.context_of(x, Stage(0, 24, 1))
    first, middle, last = model.layers
    x = first(x, context)
    x = last(x + middle(x, context), context)
    torch.testing.assert_close(model.logits(model.hidden(case.tokens)), model.norm(x) @ model.unembedding().T)


@pytest.mark.parametrize(
    "text",
    ["3@1", "3@1,2@4", "3@2,9@4,3@2", "1@1,1@4,1@6,1@4,1@1", "1@1,0@4,1@1", "1@1,2@4,1@2", "a@1,2@4,1@1", "1,2,3"],
)
def test_what_is_no_hierarchy_is_refused_in_one_line(text):
    with pytest.raises(ValueError, match="^hierarchy must") as told:
        parse_hierarchy(text)
    assert "\n" not in str(told.value)


def test_n_layers_are_those_of_the_hierarchy():
    with pytest.raises(ValueError, match="^n_layers must be 7, the blocks of hierarchy 2@1,3@4,2@1, not 15$"):
        HourglassConfig(hierarchy="2@1,3@4,2@1")
    config = Hourglass.config_for_scale(1, 257, 3_000_000, hierarchy="2@1,3@4,2@1")
    assert config.n_layers == 7 and Hourglass.count_parameters(config) == pytest.approx(3_000_000, rel=0.03)
