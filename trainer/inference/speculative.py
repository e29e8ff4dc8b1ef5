"""Speculative decoding: a cheap draft of several tokens, which the model checks in one pass (arXiv 2211.17192, 2302.01318).

A draft is chosen with the same random numbers as the model's own token at that place (arXiv 2408.07978): the token with the largest
probability / noise, with the draft's probabilities instead of the model's. The model's choice is what plain decoding chooses,
whatever the draft is, and a draft is accepted where it is the same token. So a text, not only its distribution, is that of plain
decoding with the same seed, up to the rounding of the logits. Two distributions that differ by d in total variation choose
the same token with a probability of at least (1 - d) / (1 + d); accepting at random, as in the first two papers, reaches 1 - d, but
then a text depends on its draft and on the other texts of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.inference.reader import Reader

Choose = Callable[[Tensor, int], Tensor]  # (logits [B, V], position) -> tokens [B]


@dataclass
class Account:
    """What decoding did. tokens: new ones; forwards: passes of the model; drafted, accepted: tokens of drafts; draft_forwards: passes of
    the draft model."""

    tokens: int = 0
    forwards: int = 0
    drafted: int = 0
    accepted: int = 0
    draft_forwards: int = 0

    def line(self) -> str:
        """What speculation brought, for the user."""
        share = f"{self.accepted / self.drafted:.0%}" if self.drafted else "none"
        passes = f"{self.tokens / max(1, self.forwards):.2f} tokens per forward pass"
        drafting = f", {self.draft_forwards:,} passes of the draft model" if self.draft_forwards else ""
        return f"drafts: {share} of {self.drafted:,} tokens accepted; {passes} ({self.forwards:,} passes{drafting})"


class Drafter(Protocol):
    """tokens [B, T]: the texts, to which drafts are written; known [B]: how many tokens of each text are no drafts."""

    @property
    def forwards(self) -> int:
        """Passes of the draft model."""
        ...

    def propose(self, tokens: Tensor, known: Tensor, first: int, count: int, choose: Choose) -> int:
        """Write drafts of the positions from `first` on, at most `count`, where a text's tokens are not known. Returns of how many
        positions. The tokens before `first` are known in all texts."""
        ...

    def rewind(self, tokens: Tensor, length: int) -> None:
        """Forget what was read of the texts after `length` tokens."""
        ...


class DraftModel:
    """Drafts by a smaller model, one pass for each token."""

    def __init__(self, runner: Any, vocab_size: int, batch: int, max_length: int, say: Callable[[str], None]) -> None:
        runner.model.eval()
        self.vocab_size = vocab_size
        self.reader = Reader(runner, vocab_size, batch, max_length, say)

    @property
    def forwards(self) -> int:
        return self.reader.forwards

    def propose(self, tokens: Tensor, known: Tensor, first: int, count: int, choose: Choose) -> int:
        for position in range(first, first + count):
            logits = self.reader.read(tokens, position)[:, 0, : self.vocab_size]  # [B, V]
            if position == first:
                self.reader.mark()
            write_drafts(tokens, known, position, choose(logits, position))
        return count

    def rewind(self, tokens: Tensor, length: int) -> None:
        self.reader.rewind(tokens, length)


class FurtherHeads:
    """Drafts by the model's own heads for later tokens (arXiv 2404.19737), from the pass that checked the last drafts."""

    forwards = 0

    def __init__(self, reader: Reader, vocab_size: int) -> None:
        """reader: of the model; from now on its passes run all heads."""
        self.reader, self.vocab_size = reader, vocab_size
        self.states: list[Tensor] = []  # of each further head, [B, T, D]
        reader.predict = self.predict

    def predict(self, tokens: Tensor, cache: Any = None) -> Tensor:
        model = self.reader.runner.model
        hidden = model.hidden(tokens, state=cache)
        self.states = model.states_of_heads(hidden, cache)[1:]
        return model.logits(hidden)

    def propose(self, tokens: Tensor, known: Tensor, first: int, count: int, choose: Choose) -> int:
        if not self.states:
            return 0
        count, model = min(count, len(self.states)), self.reader.runner.model
        # At the last token that was read in the making of the last known one, head i predicts i places after that one.
        columns = self.states[0].shape[1]
        column = (known - 2 - (self.reader.last_stop - columns)).clamp(0, columns - 1)  # [B]
        rows = torch.arange(len(tokens), device=tokens.device)
        with self.reader.runner.autocast():
            own = [states[rows, column] for states in self.states]  # [B, D] each
            logits = torch.stack([model.logits_of_head(i, x) for i, x in enumerate(own, 1)])  # [heads, B, V]
        for position in range(first, first + count):
            head = (position - known).clamp(0, len(own) - 1)  # [B]
            mine = logits[head, rows, : self.vocab_size].float()
            write_drafts(tokens, known, position, choose(mine, position))
        return count

    def rewind(self, tokens: Tensor, length: int) -> None:
        pass  # the heads share the state of the model


def write_drafts(tokens: Tensor, known: Tensor, position: int, drafts: Tensor) -> None:
    """Write the drafts [B] of a position where a text's token is not known."""
    tokens[:, position] = torch.where(known > position, tokens[:, position], drafts)
