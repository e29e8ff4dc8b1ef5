"""Speculative decoding: the texts of plain decoding, with any draft, in fewer passes of the model."""

import itertools
import math

import pytest
import torch
from test_generate import VOCAB, Letters, Runner, counted_tokens

from models.transformer import Transformer, TransformerConfig
from trainer.inference import decoding as g
from trainer.inference.reader import CHECKED_TOKENS
from trainer.inference.speculative import Account

PROMPTS = [[3], [1, 4, 1, 5, 9, 2], [6, 5]]


def runner_of(seed=1, factor=3.0, **switches):
    """A Runner of a small transformer with these switches."""
    runner = Runner.__new__(Runner)
    shape = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "positions": "rotary"}
    runner.model = Transformer(TransformerConfig(**shape | switches))
    runner.model.init_weights(torch.Generator().manual_seed(seed))
    for parameter in runner.model.parameters():
        parameter.data.mul_(factor)
    runner.device, runner.precision = torch.device("cpu"), "fp32"
    return runner


def near(runner, noise=0.15):
    """A draft model: the same one with weights that are a little off."""
    other = Runner.__new__(Runner)
    other.__dict__ = dict(runner.__dict__)
    other.model = type(runner.model)(runner.model.config)
    other.model.load_state_dict(runner.model.state_dict())
    generator = torch.Generator().manual_seed(9)
    for parameter in other.model.parameters():
        parameter.data.add_(noise * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator))
    return other


ARCHITECTURES = {
    "plain": {},
    "learned positions": {"positions": "learned", "max_context": 64},
    "window": {"window": 5},
    "window of one": {"window": 1, "forget_gate": True},
    "recurrent": {"kv_shift": True},
    "recurrent, window": {"kv_shift": True, "window": 4, "forget_gate": True},
    "latent": {"attention": "latent"},
}
OPTIONS = [
    {"temperature": 0},
    {"temperature": 0.7, "top_k": 10},
    {"top_p": 0.9, "repetition_penalty": 1.4},
    {"min_p": 0.05, "temperature": 1.5},
    {"temperature": 0, "repetition_penalty": 2.0},
]


@pytest.mark.parametrize("switches", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_texts_are_those_of_plain_decoding(switches):
    """For prompts of different lengths in one batch, with a draft that is often right and one that never is."""
    runner = runner_of(**switches)
    for draft, options in ((near(runner), OPTIONS[0]), (near(runner), OPTIONS[2]), (runner_of(seed=5), OPTIONS[1])):
        plain, account = g.generate(runner, PROMPTS, 14, VOCAB, seed=7, **options), Account()
        assert g.generate(runner, PROMPTS, 14, VOCAB, seed=7, draft=draft, account=account, **options) == plain
        assert account.drafted > 0 and account.tokens == 3 * 14


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_draft_that_is_the_model_is_accepted_whole(options):
    runner, account = runner_of(), Account()
    plain = g.generate(runner, [[3, 1]], 21, VOCAB, **options)
    spoken = g.generate(runner, [[3, 1]], 21, VOCAB, draft=runner, draft_tokens=4, account=account, **options)
    assert spoken == plain
    # 21 tokens are four passes of 4 + 1 and one of the last, which is no draft's.
    assert (account.forwards, account.drafted, account.accepted, account.draft_forwards) == (5, 16, 16, 16)


@pytest.mark.parametrize("name", ["hlb", "ngpt", "gpt2"])
def test_other_architectures_check_drafts(name):
    runner = Runner(name)
    for options in OPTIONS[1:3]:
        plain = g.generate(runner, PROMPTS, 10, VOCAB, **options)
        assert g.generate(runner, PROMPTS, 10, VOCAB, draft=near(runner), **options) == plain


HEADS = {
    "linear": {"n_predict": 4, "prediction_heads": "linear"},
    "own unembedding": {"n_predict": 3, "prediction_heads": "linear", "share_unembedding": False},
    "blocks": {"n_predict": 3, "prediction_heads": "transformer"},
    "blocks, window": {"n_predict": 3, "prediction_heads": "transformer", "window": 4},
    "blocks, recurrent": {"n_predict": 3, "prediction_heads": "transformer", "kv_shift": True},
}


@pytest.mark.parametrize("switches", HEADS.values(), ids=HEADS)
def test_further_heads_draft(switches):
    runner = runner_of(**switches)
    for options in OPTIONS[1:3]:
        plain, account = g.generate(runner, PROMPTS, 12, VOCAB, **options), Account()
        assert g.generate(runner, PROMPTS, 12, VOCAB, draft="mtp", account=account, **options) == plain
        assert account.drafted > 0 and account.draft_forwards == 0


@pytest.mark.parametrize("prediction_heads", ["linear", "transformer"])
def test_drafts_of_further_heads_are_their_predictions(prediction_heads, monkeypatch):
    """Computed without a cache from the whole text so far."""
    runner = runner_of(n_predict=3, prediction_heads=prediction_heads)
    drafts, prompt = {}, [3, 1, 4]
    monkeypatch.setattr(
        "trainer.inference.speculative.write_drafts",
        lambda tokens, known, position, chosen: (
            drafts.update({(int(known[0]), position): int(chosen[0])}) or tokens[:, position].copy_(chosen)
        ),
    )
    [new] = g.generate(runner, [prompt], 12, VOCAB, temperature=0, draft="mtp")
    text = prompt + new
    assert len(drafts) >= 6
    for (known, position), draft in drafts.items():
        with torch.no_grad():
            hidden = runner.model.hidden(torch.tensor([text[: known - 1]]))
            states = runner.model.states_of_heads(hidden)[position - known + 1]
            logits = runner.model.logits_of_head(position - known + 1, states)[0, -1, :VOCAB]
        assert draft == int(logits.argmax())


def test_the_distribution_is_that_of_the_model():
    """Texts of three tokens from three: their frequencies over 3000 seeds against products of the model's probabilities."""
    runner, vocab, count, how = runner_of(factor=2.0), 3, 3000, {"temperature": 1.3, "repetition_penalty": 1.2}
    found: dict = {}
    for first in range(0, count, 500):
        for text in g.generate(
            runner, [[1]] * 500, 3, vocab, seed=first, draft=near(runner, 0.5), draft_tokens=2, **how
        ):
            found[tuple(text)] = found.get(tuple(text), 0) + 1
    chi_square = 0.0
    for text in itertools.product(range(vocab), repeat=3):
        probability = 1.0
        for i, token in enumerate(text):
            held = [1, *text[:i]]
            with torch.no_grad():
                logits = runner.model(torch.tensor([held])).logits[0, -1, :vocab].double()
            for seen in set(held):
                logits[seen] = logits[seen] / 1.2 if logits[seen] > 0 else logits[seen] * 1.2
            probability *= (logits / 1.3).softmax(-1)[token].item()
        expected = count * probability
        chi_square += (found.get(text, 0) - expected) ** 2 / expected
    assert chi_square < 54.05, "of 26 degrees of freedom, exceeded by chance once in 1000"


def test_the_acceptance_is_at_least_that_of_the_paper():
    """Two distributions, d apart, choose the same token with probability (1 - d) / (1 + d) or more (arXiv 2408.07978)."""
    from trainer.inference.sampling import Sampling, choose

    generator = torch.Generator().manual_seed(3)
    noise = torch.empty(4000, 10).exponential_(generator=generator)
    for size in (0.3, 1.0, 3.0):
        p = torch.randn(10, generator=generator)
        q = p + size * torch.randn(10, generator=generator)
        apart = (p.softmax(-1) - q.softmax(-1)).abs().sum().item() / 2
        same = (choose(p, Sampling(), noise) == choose(q, Sampling(), noise)).double().mean().item()
        error = 4 * math.sqrt(0.25 / 4000)  # four standard errors of a share
        assert (1 - apart) / (1 + apart) - error < same < 1 - apart + error


def test_end_stop_strings_and_events_within_an_accepted_block():
    runner = runner_of()
    options = {"temperature": 0, "draft": near(runner, 0.02), "draft_tokens": 6}
    plain = g.generate(runner, PROMPTS, 20, VOCAB, temperature=0)
    for place in range(1, 12):
        end, events = plain[1][place], []
        expected = [row[: row.index(end)] if end in row else row for row in plain]
        account = Account()
        new = g.generate(
            runner, PROMPTS, 20, VOCAB, end=end, on_token=events.append, alternatives=1, account=account, **options
        )
        assert new == expected and account.tokens == sum(map(len, expected))
        assert [[event.token for event in events if event.row == row] for row in range(3)] == expected
        assert all(event.log_probability == event.alternatives[0][1] for event in events), "greedy takes the likeliest"
    [text] = g.complete(runner, Letters(), ["abc"], 20, [], temperature=0)
    for place in range(1, 8):
        stop = text[place : place + 2]
        expected = text[: text.index(stop)]
        assert g.complete(runner, Letters(), ["abc"], 20, [stop], **options) == [expected]


@pytest.mark.parametrize("tokens", [1, 2, 5, 6])
def test_no_more_tokens_than_asked_for(tokens):
    runner, made = runner_of(), []
    new = g.generate(runner, PROMPTS, tokens, VOCAB, draft=runner, draft_tokens=4, on_token=made.append)
    assert [len(row) for row in new] == [tokens] * 3 and len(made) == 3 * tokens
    draft, calls = near(runner), counted_tokens(runner)
    g.generate(runner, [[3]], tokens, VOCAB, draft=draft, draft_tokens=4, temperature=0)
    trial = 2 + CHECKED_TOKENS // 2  # passes of the trial of the cache
    assert len(calls) > trial and max(calls[trial:]) <= min(tokens, 5), "no pass reads more than what may still be made"


@pytest.mark.parametrize("limit, draft_limit", [(8, 64), (64, 8), (9, 8)])
def test_past_the_context_texts_are_those_of_plain_decoding(limit, draft_limit):
    runner = runner_of(positions="learned", max_context=64)
    draft = near(runner, 0.05)
    runner.model.max_context, draft.model.max_context = limit, draft_limit
    for options in OPTIONS[1:3]:
        plain = g.generate(runner, PROMPTS, 24, VOCAB, **options)
        assert g.generate(runner, PROMPTS, 24, VOCAB, draft=draft, **options) == plain


def test_a_model_without_a_cache_checks_drafts():
    runner = runner_of()
    runner.model.decodes_incrementally = False
    plain, account = g.generate(runner, PROMPTS, 12, VOCAB), Account()
    assert g.generate(runner, PROMPTS, 12, VOCAB, draft=near(runner), account=account) == plain
    assert account.accepted > 0
