"""Label smoothing (arXiv 1512.00567): a share of every target's probability is spread evenly over the vocabulary."""

from dataclasses import dataclass

from models.config import setting
from trainer.objectives import Loss, Objective, register_objective


@dataclass(frozen=True)
class SmoothingConfig:
    smoothing: float = setting(0.1, "share of the probability that is spread", low=0, high=1)


@register_objective("label_smoothing")
class LabelSmoothing(Objective):
    Config = SmoothingConfig

    def forward(self, model, batch):
        hidden = model.hidden(batch["tokens"], documents=batch.get("documents"))
        ones = (batch["targets"] >= 0) * batch.get("weights", 1.0)
        even = model.logits(hidden).float().log_softmax(-1).mean(-1)  # [B, T]
        s, nll = self.config.smoothing, model.nll(hidden, batch["targets"], ones).sum()
        return Loss((1 - s) * nll - s * (even * ones).sum(), self.count(batch))
