"""Recurrent models and hybrids as a whole, on texts of several chunks: what the contract's 24 tokens and default forms do not reach."""

import itertools

import pytest
import torch
from test_hybrids import LFM, RENE, ZAMBA, disturbed

from models.base import get_model, load_models
from trainer.testing import numbers
from trainer.testing.subject import Skipped, Subject

load_models()
SSM = {"state_size": 16, "ssm_head_dim": 16}
SMALL = {"vocab_size": 64, "d_model": 32, "n_layers": 2}
FORMS = {
    "mamba2": ("mamba2", {**SMALL, **SSM, "n_groups": 2}),
    "rwkv7": ("rwkv7", {**SMALL, "head_dim": 16}),
    "rwkv7 preview": ("rwkv7", {**SMALL, "head_dim": 16, "form": "preview"}),
    "gated delta net": ("gated-delta-net", {**SMALL, "head_dim": 8}),
    "KDA": ("gated-delta-net", {**SMALL, "head_dim": 8, "decay": "channel"}),
    "zamba2": ("zamba2", {**ZAMBA, "attention_adapter": True, "rope_theta": 1e4}),
    "rene": ("rene", RENE),
    "lfm2": ("lfm2", LFM),
}
LENGTH = 203  # three chunks of 64 tokens, and a part of one


def recurrent_model(form):
    """With weights that are nowhere zero."""
    name, choices = FORMS[form]
    cls = get_model(name)
    model = cls(cls.Config(**choices))
    model.init_weights(torch.Generator().manual_seed(0))
    return disturbed(model)


@pytest.fixture(params=FORMS)
def model(request):
    return recurrent_model(request.param)


@pytest.fixture
def tokens():
    return torch.randint(64, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def assert_same(found, expected):
    """In fp64, but for the order of sums."""
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12 * expected.abs().max().item())


@torch.no_grad()
def test_pieces_with_a_state_equal_the_whole(model, tokens):
    model = model.double()
    whole = model(tokens).logits
    for pieces in ([64, 64, 64, 11], [1, 63, 64, 75], [65, 1, 1, 62, 74], [2, 3, 128, 70], [190] + [1] * 13):
        state = model.new_state(2, None, torch.device("cpu"), torch.float64)
        parts = [model(part, cache=state).logits for part in tokens.split(pieces, dim=1)]
        assert_same(torch.cat(parts, dim=1), whole)


KEEP_KEYS = ("zamba2", "lfm2", "rene")  # of all tokens; rene's of a window, as long as no token follows


@torch.no_grad()
@pytest.mark.parametrize("form", [form for form in FORMS if form not in KEEP_KEYS])
def test_a_long_prompt_leaves_a_state_as_small_as_a_short_one(form, tokens):
    model, sizes = recurrent_model(form), []
    for prompt in (tokens[:, :20], tokens):
        state = model.new_state(2, None, torch.device("cpu"), torch.float32)
        model(prompt, cache=state)
        sizes.append(state.nbytes)
    assert sizes[1] == sizes[0]


@torch.no_grad()
def test_documents_that_begin_at_and_beside_the_edge_of_a_chunk(model, tokens):
    model, lengths = model.double(), [64, 1, 62, 6, 70]
    numbers = torch.repeat_interleave(torch.tensor([0, 1, 0, 1, 2]), torch.tensor(lengths)).expand(2, -1)
    packed = model(tokens, documents=numbers).logits
    for start, end in itertools.pairwise([0, *itertools.accumulate(lengths)]):
        assert_same(packed[:, start:end], model(tokens[:, start:end]).logits)


TWO_BLOCKS = {key: value for key, value in ZAMBA.items() if key != "vocab_size"} | {"shared_blocks": 2}
# Forms that the zoo's defaults do not have at the size of the contract: channels that decay apart, the preview, shared blocks in turn.
SUBJECTS = {
    "KDA": Subject("gated-delta-net", get_model("gated-delta-net"), {"decay": "channel"}),
    "rwkv7 preview": Subject("rwkv7", get_model("rwkv7"), {"form": "preview"}),
    "zamba2, three uses of two blocks": Subject("zamba2", get_model("zamba2"), TWO_BLOCKS),
}


@pytest.mark.parametrize("check", numbers.CHECKS, ids=lambda check: check.name)
@pytest.mark.parametrize("form", SUBJECTS)
def test_contract(form, check):
    try:
        check.run(SUBJECTS[form])
    except Skipped as why:
        pytest.skip(str(why))
