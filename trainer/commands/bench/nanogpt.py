"""A yardstick: GPT-2 in the way nanoGPT writes it (github.com/karpathy/nanoGPT), with whole logits and no dropout.

Parameters have the names and shapes of our `gpt2`, so that `load_state_dict` takes the weights of ours as they are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import IGNORE


class Attention(nn.Module):
    """x [B, T, D] -> [B, T, D], causal."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=config.bias)
        self.out = nn.Linear(config.d_model, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [B, H, T, D / H]
        return self.out(attended.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """x [B, T, D] -> [B, T, D]."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.up = nn.Linear(config.d_model, config.hidden, bias=config.bias)
        self.out = nn.Linear(config.hidden, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.up(x)))


class Block(nn.Module):
    """x [B, T, D] -> [B, T, D], pre-norm."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.d_model, bias=config.bias)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.d_model, bias=config.bias)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class NanoGpt(nn.Module):
    """tokens, targets [B, T] -> sum of the token losses in nats. config: of our `gpt2`."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.max_context, config.d_model)
        self.layers = nn.Sequential(*(Block(config) for _ in range(config.n_layers)))
        self.norm = nn.LayerNorm(config.d_model, bias=config.bias)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.norm(self.layers(self.embedding(tokens) + self.positions(positions)))  # [B, T, D]
        logits = F.linear(x, self.embedding.weight)  # [B, T, V]
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
