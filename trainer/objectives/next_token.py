"""Cross-entropy of the next token: the usual objective of pretraining."""

from __future__ import annotations

from typing import Any

from models.base import Batch
from trainer.objectives.base import Loss, Objective, register_objective


@register_objective("next_token")
class NextToken(Objective):
    """The model's own training loss, including further heads and z-loss; each target counts with its weight."""

    counts_every_token = True

    def forward(self, model: Any, batch: Batch) -> Loss:
        tokens, targets, documents = batch["tokens"], self.targets(batch), batch.get("documents")
        weights = batch.get("weights")
        if weights is None:
            output = model(tokens, targets=targets, documents=documents, reduction="sum")
            return Loss(output.loss, self.count(batch), output.parts, output.measures)
        hidden = model.hidden(tokens, documents=documents)
        loss, parts = model.loss(hidden, targets, "sum", weights)
        return Loss(loss, self.count(batch), parts or None, model.measures(hidden, targets, weights) or None)
