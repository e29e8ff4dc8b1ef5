"""Fill in the middle (arXiv 2207.14255): a document is cut into prefix, middle and suffix, and the middle is written last.

Rows stay as long as they are: the longest piece of a document in a row loses its first three tokens to the three sentinels. Cuts
are between tokens, where the paper's are between characters. Which rows are rearranged, and where they are cut, follows from their own
tokens, so it is the same on any number of ranks, and the same whenever a row comes again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.base import IGNORE, Batch
from models.config import check_ranges, setting
from trainer.objectives.base import Loss, register_objective
from trainer.objectives.next_token import NextToken

SENTINELS = 3
SHORTEST = SENTINELS + 2  # tokens of a piece that is cut
PRIME, FACTOR = 2**31 - 1, 48_271  # Park and Miller's generator of random numbers


@dataclass(frozen=True)
class FillInTheMiddleConfig:
    rate: float = setting(0.5, "share of the rows that are rearranged", low=0, high=1)
    spm_rate: float = setting(
        0.5, "share of these in which the suffix comes first, then prefix and middle together", low=0, high=1
    )
    prefix: str = setting("<|fim_prefix|>", "token of the tokenizer before the prefix; no text should hold it")
    suffix: str = setting("<|fim_suffix|>", "token before the suffix")
    middle: str = setting("<|fim_middle|>", "token before the middle")
    ids: list[int] | None = setting(None, "ids of these and of the token that ends a text; the plan sets them")

    def __post_init__(self) -> None:
        check_ranges(self)
        if len({self.prefix, self.suffix, self.middle}) < SENTINELS:
            raise ValueError("prefix, suffix and middle must be three tokens")


@register_objective("fim")
class FillInTheMiddle(NextToken):
    """next_token on rows of which some are rearranged. All their tokens are targets."""

    Config = FillInTheMiddleConfig
    records = ("text",)
    token_fields = ("prefix", "suffix", "middle")

    def forward(self, model: Any, batch: Batch) -> Loss:
        return super().forward(model, self.rearranged(batch))

    def rearranged(self, batch: Batch) -> Batch:
        """The batch with some of its rows rearranged; what is IGNORE stays so."""
        tokens, targets = batch["tokens"], batch["targets"]  # [B, T]
        *sentinels, end = self.config.ids or [0] * (SENTINELS + 1)  # a plan without data computes with any
        last = targets[:, -1:].where(targets[:, -1:] != IGNORE, end)
        text = torch.cat([tokens, last], 1)  # [B, T + 1]
        source = self.sources(text, end)
        marks = torch.tensor(sentinels, device=text.device).expand(len(text), -1)  # [B, 3]
        text = torch.cat([text, marks], 1).gather(1, source)
        return {**batch, "tokens": text[:, :-1], "targets": text[:, 1:].where(targets != IGNORE, IGNORE)}

    def sources(self, text: Tensor, end: int) -> Tensor:
        """For each place of rows [B, T + 1]: the place that its token comes from. The sentinels are behind the row."""
        width = text.shape[1]
        places = torch.arange(width, device=text.device)
        begin, size = longest_piece(text, end)  # [B, 1]
        length = (size - SENTINELS).clamp(min=0)  # of prefix, middle and suffix
        whether, how, *cuts = draws(text, end, 4)  # [B, 1] each
        first, second = torch.cat([(cut * (length + 1)).long() for cut in cuts], 1).sort(1).values.split(1, 1)
        suffix = length - second
        content = begin + SENTINELS
        at = places - begin  # [B, T + 1], the place in the piece
        suffix_first = how < self.config.spm_rate
        before = torch.where(suffix_first, 0, first)  # tokens between the first sentinel and the second
        # prefix sentinel, prefix, suffix sentinel, suffix, middle sentinel, middle; or with the prefix before the middle.
        source = content + at - suffix - SENTINELS
        source = torch.where(at == before + suffix + 2, width + 2, source)
        source = torch.where(at < before + suffix + 2, content + second + at - before - 2, source)
        source = torch.where(at == before + 1, width + 1, source)
        source = torch.where(at < before + 1, content + at - 1, source)
        source = torch.where(at == 0, width, source)
        moved = (at >= 0) & (at < size) & (size >= SHORTEST) & (whether < self.config.rate)
        return source.where(moved, places)


def longest_piece(text: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """(first place, tokens) [B, 1] of the longest piece of a document in each row [B, T], without its end-of-text id."""
    places = torch.arange(text.shape[1], device=text.device)
    before = places.where(text == end, -1).cummax(1).values  # the last end of a document so far
    size, last = (places - before).max(1, keepdim=True)
    return last - size + 1, size


def draws(text: Tensor, end: int, count: int) -> list[Tensor]:
    """Numbers from 0 to below 1 that follow from the tokens of each row [B, T]: `count` fp64 tensors [B, 1].

    End-of-text ids do not enter: padding consists of them, and how much there is depends on the other rows."""
    places = torch.arange(1, text.shape[1] + 1, device=text.device)
    factors = (places * 2_654_435_761 % 2**32) >> 12  # below 2^20, so that the sum of 2^24 tokens fits in 63 bits
    state = (text.where(text != end, 0) * factors).sum(1, keepdim=True) % (PRIME - 1) + 1
    found = []
    for _ in range(count):
        state = state * FACTOR % PRIME
        found.append((state - 1).double() / (PRIME - 1))
    return found
