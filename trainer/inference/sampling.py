"""How the next token is chosen from the logits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


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


def sample(logits: Tensor, how: Sampling, draw: torch.Generator, seen: Iterable[int] = ()) -> int:
    """One token from logits [V]. seen: tokens of the text so far, which the penalty of repetition is for."""
    logits = penalised(logits, how.repetition_penalty, seen)
    if how.temperature < 1e-5:  # as good as 0, and logits / temperature would overflow
        return int(logits.argmax())
    logits = logits / how.temperature
    if 0 < how.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(how.top_k).values[-1], float("-inf"))
    probabilities = logits.softmax(-1)
    if how.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        outside = ordered.cumsum(-1) - ordered >= how.top_p  # the token that crosses top_p stays in
        probabilities[order[outside]] = 0
    if how.min_p > 0:
        probabilities[probabilities < how.min_p * probabilities.max()] = 0
    return int(torch.multinomial(probabilities, 1, generator=draw))


def penalised(logits: Tensor, penalty: float, seen: Iterable[int]) -> Tensor:
    """CTRL's penalty of repetition (arXiv 1909.05858) on logits [V]: those of seen tokens are divided by it if they are positive, and
    multiplied if negative, so that a penalty above 1 never makes a seen token likelier."""
    if penalty == 1:
        return logits
    index = torch.tensor(sorted(set(seen)), dtype=torch.long)
    values = logits[index]
    return logits.index_copy(0, index, torch.where(values > 0, values / penalty, values * penalty))
