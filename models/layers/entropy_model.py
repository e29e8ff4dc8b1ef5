"""How uncertain a language model is of each next token: what decides where patches end (arXiv 2412.09871)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.base import Hidden, with_hidden
from models.layers import without_autocast
from models.layers.positions import number_documents


class EntropyModel:
    """A frozen model. It is no nn.Module, so the model that holds it neither trains it nor stores it.

    It computes in fp32 everywhere, and entropies are rounded to float16, as datasets store them: texts should be cut alike when data are
    prepared, in training and while decoding. On another machine, or in another batch, an entropy beside a rounding edge of float16 may
    still be the next number, and one beside the threshold cuts elsewhere.

    ids: of the tokenizer, others are padding. end: id that ends documents, if the model was trained with documents kept apart; None: they
    were not.
    """

    def __init__(self, model: Any, ids: int, end: int | None) -> None:
        self.model = with_hidden(model.requires_grad_(False).eval().float())
        self.ids, self.end = ids, end

    @torch.no_grad()
    def entropies(self, tokens: Tensor, documents: Tensor | None = None, state: Any = None) -> Tensor:
        """Of the prediction after each token, in nats, fp32 [B, T]. tokens: [B, T], after those that `state` has read; documents: if they
        are known, see models.base.Batch."""
        if self.end is None or state is not None:
            documents = None
        elif documents is None:
            ends = (tokens == self.end).long()
            documents = number_documents(ends.cumsum(-1) - ends)
        with without_autocast(tokens.device.type):
            states = self.model.hidden(
                tokens, documents=documents, **({} if state is None else {"state": state})
            ).states
            found = [self.of_logits(self.model.logits(Hidden(row[None]))[0]) for row in states]  # [T, V] at a time
        return torch.stack(found)

    def of_logits(self, logits: Tensor) -> Tensor:
        """[T, V] -> [T]"""
        log_probs = logits[:, : self.ids].float().log_softmax(-1)
        return -(log_probs.exp() * log_probs).sum(-1).half().float()

    def new_state(self, batch: int, max_length: int | None, device: torch.device) -> Any:
        """None: the model does not decode incrementally."""
        return self.model.new_state(batch, max_length, device, torch.float32)
