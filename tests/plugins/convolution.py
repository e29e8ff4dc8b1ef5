"""A language model of gated causal convolutions; its decoding state is the last inputs of each convolution."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from models.base import Hidden, LanguageModel, register
from models.config import check_ranges, setting
from models.layers import normal_


@dataclass(frozen=True)
class ConvolutionConfig:
    vocab_size: int = setting(50304, "rows of the embedding", low=1)
    d_model: int = setting(256, "channels", low=1)
    n_layers: int = setting(4, "blocks", low=1)
    kernel: int = setting(4, "tokens that a convolution sees", low=2)

    def __post_init__(self):
        check_ranges(self)


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.layer, self.kernel, self.norm = layer, c.kernel, nn.LayerNorm(c.d_model, bias=False)
        self.mix = nn.Linear(c.kernel * c.d_model, 2 * c.d_model, bias=False)

    def forward(self, x, state):
        y = self.norm(x)
        before = y.new_zeros(y.shape[0], self.kernel - 1, y.shape[2])  # [B, kernel - 1, D]
        y = torch.cat((before if state is None else state.recall(self.layer, before), y), dim=1)
        if state is not None:
            state.remember(self.layer, y[:, 1 - self.kernel :])
        windows = y.unfold(1, self.kernel, 1).flatten(2)  # [B, T, D * kernel]
        return x + F.glu(self.mix(windows))


@register("convolution")
class Convolution(LanguageModel):
    Config = ConvolutionConfig

    def __init__(self, c):
        super().__init__(c)
        self.embedding = nn.Embedding(c.vocab_size, c.d_model)
        self.layers = nn.ModuleList(Block(c, i) for i in range(c.n_layers))
        self.head = nn.Linear(c.d_model, c.vocab_size, bias=False)

    def hidden(self, tokens, *, documents=None, state=None):
        x = self.embedding(tokens)
        for block in self.layers:
            x = block(x, state)
        if state is not None:
            state.length += tokens.shape[1]
        return Hidden(x)

    def logits(self, hidden):
        return self.head(hidden.states)

    def blocks(self):
        return list(self.layers)

    def init_weights(self, generator=None):
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, nn.Linear | nn.Embedding):
                normal_(module.weight, 0.02, generator)

    def parameter_groups(self):
        roles = {"embedding.weight": "embedding", "head.weight": "head"}
        groups = {}
        for name, _ in self.named_parameters():
            groups.setdefault(roles.get(name, "norm" if ".norm." in name else "matrix"), []).append(name)
        return groups
