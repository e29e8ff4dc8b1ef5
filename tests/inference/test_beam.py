"""Beam search: equal to exhaustive search where it is as wide, to greedy decoding where it is one beam wide."""

import itertools

import pytest
import torch
from test_generate import VOCAB, Runner, greedy_without_cache

from trainer.inference.beam import beam_search
from trainer.inference.sampling import penalised, seen_mask


@pytest.fixture(params=["hlb", "gpt2"])
def runner(request):
    return Runner(request.param)


def exhaustive(model, prompt, length, vocab, end, length_penalty, repetition_penalty):
    """[(score, tokens)] of every continuation, best first, by whole forward passes."""
    found = []
    for count in range(1, length + 1):
        for tokens in itertools.product(range(vocab), repeat=count):
            whole = count == length and end not in tokens[:-1]
            if not (whole or (tokens[-1] == end and end not in tokens[:-1])):
                continue
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, :, :vocab]
            total = 0.0
            for i, token in enumerate(tokens):
                seen = seen_mask([[*prompt, *tokens[:i]]], vocab, logits.device)[0]
                row = penalised(logits[len(prompt) + i - 1], repetition_penalty, seen)
                total += row.double().log_softmax(-1)[token].item()
            found.append((total / count**length_penalty, list(tokens[:-1] if tokens[-1] == end else tokens)))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("length_penalty, repetition_penalty", [(0.0, 1.0), (1.0, 1.0), (1.0, 1.5), (-0.5, 1.0)])
def test_a_wide_search_is_exhaustive(runner, length_penalty, repetition_penalty):
    """4 tokens, texts of up to 3: 16 beams hold every text of 2."""
    wanted = exhaustive(runner.model, [2, 3, 1], 3, 4, 0, length_penalty, repetition_penalty)
    found = beam_search(
        runner, [2, 3, 1], 3, 4, 16, end=0, length_penalty=length_penalty, repetition_penalty=repetition_penalty
    )
    assert [beam.tokens for beam in found] == [tokens for _, tokens in wanted[:16]]
    assert [beam.score for beam in found] == pytest.approx([score for score, _ in wanted[:16]], rel=1e-4)


def test_one_beam_is_greedy(runner):
    [found] = beam_search(runner, [3, 1, 4, 1, 5], 12, VOCAB, 1)
    assert found.tokens == greedy_without_cache(runner.model, [3, 1, 4, 1, 5], 12)


def test_more_beams_find_no_worse_text(runner):
    scores = [beam_search(runner, [3, 1], 6, VOCAB, beams, length_penalty=0.0)[0].score for beams in (1, 50)]
    assert scores[1] >= scores[0] - 1e-4
    found = beam_search(runner, [3, 1], 6, VOCAB, 5, end=7)
    assert [beam.score for beam in found] == sorted((beam.score for beam in found), reverse=True) and len(found) == 5
