"""A model with what the zoo does not have yet: a head tied by assignment, buffers that are saved and that are not."""

import torch
from torch import nn

from models.base import Output, cross_entropy, register
from models.presets import Gpt2


@register("odd")
class Odd(Gpt2):
    def __init__(self, config):
        super().__init__(config)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.empty(config.d_model))
        self.register_buffer("table", torch.empty(config.d_model), persistent=False)

    def init_weights(self, generator=None):
        super().init_weights(generator)
        with torch.no_grad():
            self.scale.fill_(0.5)
            self.table.copy_(torch.linspace(1, 2, len(self.table)))

    def forward(self, tokens, targets=None, documents=None, cache=None, reduction="mean"):
        x = self.embedding(tokens) * self.table + self.positions.weight[: tokens.shape[1]]
        x, *_ = self.trunk(x, [], self.context(tokens, documents, cache), cache)
        logits = self.head(self.norm(x) * self.scale)
        if targets is None:
            return Output(logits=logits)
        return Output(loss=cross_entropy(logits, targets, reduction))


@register("idle")
class Idle(Gpt2):
    """One parameter never gets a gradient."""

    def __init__(self, config):
        super().__init__(config)
        self.idle = nn.Parameter(torch.empty(3, 2))


@register("steady")
class Steady(Idle):
    """The same with zeros for a gradient."""

    def forward(self, tokens, targets=None, documents=None, cache=None, reduction="mean"):
        output = super().forward(tokens, targets, documents, cache, reduction)
        return output if targets is None else output._replace(loss=output.loss + 0 * self.idle.sum())
