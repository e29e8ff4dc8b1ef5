"""Beam search: the likeliest continuations of a prompt that a search of limited width finds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from trainer.inference.reader import Reader, tell
from trainer.inference.sampling import penalised, seen_mask


@dataclass(frozen=True)
class Beam:
    """A continuation. tokens: the new ones, without the end-of-text id; log_probability: the sum over its tokens, with that id if it
    ended; score: log_probability / (their number)^length_penalty."""

    tokens: list[int]
    log_probability: float
    score: float


@torch.no_grad()
def beam_search(
    runner: Any,
    prompt: list[int],
    max_new_tokens: int,
    vocab_size: int,
    beams: int,
    *,
    length_penalty: float = 1.0,
    repetition_penalty: float = 1.0,
    end: int | None = None,
    say: Callable[[str], None] = tell,
) -> list[Beam]:
    """Up to `beams` continuations of a prompt (at least one token id), best score first.

    Each step expands every live beam by all tokens, and keeps the `beams` likeliest; one that takes `end` is finished. The search
    ends when no live beam can still come among the best, or at max_new_tokens (at least 1). length_penalty 0 compares sums, which
    favours short texts; 1 compares means. repetition_penalty: as in sampling, for the tokens of the prompt and of the beam itself.
    With beams >= vocab_size ** (max_new_tokens - 1) this is an exhaustive search. Other arguments: as for `generate`.
    """
    model, device = runner.model, runner.device
    training = model.training
    model.eval()
    reader = Reader(runner, vocab_size, 1, len(prompt) + max_new_tokens - 1, say)
    texts = torch.tensor([prompt], device=device)  # [live, T]
    live: list[tuple[list[int], float]] = [([], 0.0)]  # (tokens, log-probability), likeliest first
    finished: list[Beam] = []

    def finish(tokens: list[int], total: float, count: int) -> None:
        finished.append(Beam(tokens, total, total / count**length_penalty))
        finished.sort(key=lambda beam: -beam.score)
        del finished[beams:]

    for length in range(1, max_new_tokens + 1):
        logits = reader.read(texts, texts.shape[1])[:, 0, :vocab_size].cpu()  # [live, V]
        seen = seen_mask([prompt + tokens for tokens, _ in live], vocab_size, logits.device)
        steps = penalised(logits, repetition_penalty, seen).log_softmax(-1).double()
        totals = steps + torch.tensor([total for _, total in live], dtype=torch.float64)[:, None]
        # Of 2 * beams candidates at most `live` take `end`, so that enough others are left.
        best = totals.flatten().topk(min(2 * beams, totals.numel()))
        following: list[tuple[int, int, float]] = []  # (row, token, log-probability)
        for total, place in runner.agree(list(zip(best.values.tolist(), best.indices.tolist(), strict=True))):
            row, token = divmod(place, vocab_size)
            if token == end:
                finish(live[row][0], total, length)
            elif len(following) < beams:
                following.append((row, token, total))
        live = [(live[row][0] + [token], total) for row, token, total in following]
        if (
            length == max_new_tokens
            or not live
            or hopeless(live[0][1], finished, beams, length, max_new_tokens, length_penalty)
        ):
            break
        reader.select([row for row, _, _ in following])
        texts = torch.tensor([prompt + tokens for tokens, _ in live], device=device)
    for tokens, total in live:
        if len(tokens) == max_new_tokens:
            finish(tokens, total, max_new_tokens)
    model.train(training)
    return finished


def hopeless(best: float, finished: list[Beam], beams: int, length: int, longest: int, length_penalty: float) -> bool:
    """Whether no live beam, of which the likeliest has log-probability `best`, can become better than the finished ones.

    Its sum only falls, and is at best divided by the largest number that a longer text can have.
    """
    most = max((length + 1) ** length_penalty, longest**length_penalty)
    return len(finished) == beams and best / most <= finished[-1].score
