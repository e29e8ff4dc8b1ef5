"""`prepare --teacher`: what a model predicts of each token, stored beside it for the objective `distill`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from models.base import Hidden
from trainer.core.config import PrepareConfig
from trainer.core.errors import UserError
from trainer.data.dataset import TEACHER_IDS, TEACHER_LOG_PROBS, ColumnInfo, TokenizerInfo, dtype_of
from trainer.data.documents import document_numbers
from trainer.engine.base import with_weights
from trainer.engine.meta import build_meta
from trainer.objectives import FrozenModel, FrozenSpec
from trainer.planning.frozen import Frozen, open_weights, portable, told_as
from trainer.planning.parent import RunParent, find_parent
from trainer.runtime.device import choose_device
from trainer.runtime.distributed import World


class Teacher:
    """Predicts samples from their first token on: in bf16 on a GPU, else in fp32. columns: what `predict` gives of each token.

    UserError if there is no such model, it has another tokenizer, or it cannot read samples of this length.
    """

    def __init__(self, config: PrepareConfig, tokenizer: TokenizerInfo) -> None:
        assert config.teacher is not None
        world = World()
        with told_as("teacher"):
            parent = find_parent(config.teacher, world.say)
            parent.check_tokenizer(tokenizer, config.source, config.end_of_text)
        frozen = Frozen(FrozenSpec(str(parent)), portable(parent.model))
        meta = build_meta(*frozen.classes())
        if meta.max_context is not None and meta.max_context < config.sample_length:
            raise UserError(
                f"teacher: {parent} reads {meta.max_context} tokens at most; set sample_length ({config.sample_length}) to that or less"
            )
        apart = isinstance(parent, RunParent) and parent.config.data.separate_documents
        self.end_of_text = tokenizer.eot_id if apart else None  # documents are kept apart as in its training
        self.device = choose_device("auto", 0)
        meta = meta if self.device.type == "cpu" else meta.to(torch.bfloat16)
        self.model = FrozenModel(with_weights(meta, open_weights(frozen, "teacher", world), self.device))
        self.ids = tokenizer.vocab_size  # others are padding
        self.k = min(config.teacher_top_k, self.ids)
        self.columns = {
            TEACHER_IDS: ColumnInfo(dtype_of(self.ids), [self.k]),
            TEACHER_LOG_PROBS: ColumnInfo("float16", [self.k]),
        }

    def facts(self, log: Any) -> dict[str, Any]:
        return {}

    def predict(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """Of token 1 and all later ones of samples [N, L + 1]: the k likeliest ids, likeliest first, and their log-probabilities, of
        a distribution over all ids: [N, L, k] each."""
        given = torch.from_numpy(tokens[:, :-1].astype(np.int64)).to(self.device)
        states = self.model.hidden(given, documents=document_numbers(given, self.end_of_text)).states
        logits = (self.model.logits(Hidden(row[None]))[0, :, : self.ids].float() for row in states)  # [L, V] at a time
        top = [row.log_softmax(-1).topk(self.k) for row in logits]
        log_probs, ids = (torch.stack(part).cpu().numpy() for part in zip(*top, strict=True))
        return {
            TEACHER_IDS: ids.astype(self.columns[TEACHER_IDS].dtype),
            TEACHER_LOG_PROBS: log_probs.astype(np.float16),
        }
