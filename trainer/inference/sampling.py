"""How the next token is chosen from the logits: for all texts of a batch at once, on their device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GREEDY_BELOW = 1e-5  # a temperature as good as 0: logits / temperature would overflow


@dataclass(frozen=True)
class Sampling:
    """temperature: 0 is the likeliest token. The others leave only some tokens to choose from, each of what the one before it left:
    the top_k likeliest (0: all), the likeliest that hold the share top_p of probability, those that are at least min_p times as
    likely as the likeliest (arXiv 2407.01082). repetition_penalty: see `penalised`; 1: none.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @property
    def draws(self) -> bool:
        """Whether a choice needs random numbers."""
        return self.temperature >= GREEDY_BELOW


def choose(logits: Tensor, how: Sampling, noise: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
    """A token for each row of logits [..., V], int64 [...].

    noise: [..., V], independent exponential numbers. The token with the largest probability / noise is a sample of the
    probabilities: of exponential clocks with these rates it is the one that rings first. None: only if nothing is drawn.
    seen: [..., V] bool, the tokens of each text so far, for the penalty of repetition; None: no penalty.
    """
    if seen is not None:
        logits = penalised(logits, how.repetition_penalty, seen)
    if not how.draws:
        return logits.argmax(-1)
    assert noise is not None
    return (probabilities_of(logits / how.temperature, how) / noise).argmax(-1)


def probabilities_of(logits: Tensor, how: Sampling) -> Tensor:
    """Probabilities [..., V], 0 for what top_k, top_p and min_p leave out; their sum may be less than 1."""
    if 0 < how.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(how.top_k).values[..., -1:], float("-inf"))
    probabilities = logits.softmax(-1)
    if how.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        outside = ordered.cumsum(-1) - ordered >= how.top_p  # the token that crosses top_p stays in
        probabilities = probabilities.scatter(-1, order, ordered.masked_fill(outside, 0))
    if how.min_p > 0:
        least = how.min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    return probabilities


def penalised(logits: Tensor, penalty: float, seen: Tensor) -> Tensor:
    """CTRL's penalty of repetition (arXiv 1909.05858) on logits [..., V]: those of tokens that are `seen` [..., V] are divided by it if
    they are positive, and multiplied if negative, so that a penalty above 1 never makes a seen token likelier."""
    if penalty == 1:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


class Noise:
    """Exponential random numbers for the new tokens of a batch of texts, [V] for each.

    Each text draws from a generator of its own, one token after the other: neither the other texts nor how many tokens are
    computed in one pass change what it gets. On a CPU these are the numbers that torch.multinomial draws.
    """

    def __init__(self, seed: int, batch: int, vocab_size: int, device: torch.device) -> None:
        """Text i has the seed `seed` + i."""
        self._generators = [torch.Generator(device).manual_seed(seed + i) for i in range(batch)]
        self._ones = torch.ones(vocab_size, device=device)
        self._drawn: list[dict[int, Tensor]] = [{} for _ in range(batch)]  # place of a new token in its text -> numbers
        self._next = [0] * batch

    def at(self, places: Sequence[int | None]) -> Tensor:
        """[B, V], the numbers for new token places[i] of text i (0 is the first one; None: ones, as nothing is chosen)."""
        return torch.stack([self._row(i, place) for i, place in enumerate(places)])

    def _row(self, i: int, place: int | None) -> Tensor:
        if place is None:
            return self._ones
        while self._next[i] <= place:
            drawn = torch.empty_like(self._ones).exponential_(generator=self._generators[i])
            self._drawn[i][self._next[i]] = drawn
            self._next[i] += 1
        return self._drawn[i][place]

    def forget(self, i: int, before: int) -> None:
        """Free the numbers of the new tokens before this place of text i, which are chosen."""
        self._drawn[i] = {place: drawn for place, drawn in self._drawn[i].items() if place >= before}


def seen_mask(texts: Sequence[Sequence[int]], vocab_size: int, device: torch.device) -> Tensor:
    """[B, V] bool: the tokens that each text holds."""
    seen = torch.zeros(len(texts), vocab_size, dtype=torch.bool)
    for row, text in zip(seen, texts, strict=True):
        row[torch.tensor([token for token in text if token < vocab_size], dtype=torch.long)] = True
    return seen.to(device)
