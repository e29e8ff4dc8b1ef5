"""Attention whose scores each head multiplies by a learned temperature of its own."""

import torch
from torch import nn

from models.layers.attention import HEADS, SoftmaxHeads


class TemperatureHeads(SoftmaxHeads):
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.log_temperature = nn.Parameter(torch.empty(config.n_heads))

    def reset(self):
        nn.init.zeros_(self.log_temperature)

    def attend(self, q, k, v, context, attention_bias):  # q: [B, H, T, head_dim]
        return super().attend(q * self.log_temperature.exp()[:, None, None].to(q.dtype), k, v, context, attention_bias)


HEADS["temperature"] = TemperatureHeads
