"""hlb-gpt's network (github.com/tysam-code/hlb-gpt): attention and MLP fused in one block, one head, one norm.

Half of a block's GeGLU channels stay local and half are the attention's values. Positions enter only through a bias that is linear
in the distance, with one learned slope per layer (like ALiBi, arXiv 2108.12409, but with a learned slope).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Hidden, LanguageModel, Split, register
from models.config import check_ranges, setting
from models.layers import compute_dtype, flex, normal_
from models.layers.distance_attention import DENSE_LENGTH, BlockMask, Reach, attend_dense, attend_flex, flex_refusal
from models.layers.linear_cross_entropy import describe_kernel, linear_cross_entropy, linear_nll
from models.layers.positions import number_documents
from models.state import DecodingState

QUANTISED_CONTEXT = 1024  # length of hlb-gpt's table of positions


@dataclass(frozen=True)
class HlbConfig:
    vocab_size: int = setting(50304, "rows of the embedding and of the output projection", low=1, high=10**9)
    d_model: int = setting(384, "width of the residual stream and of the attention's values", low=1, high=10**6)
    n_layers: int = setting(8, "blocks", low=1, high=1000)
    qk_divisor: int = setting(8, "queries and keys are d_model // qk_divisor wide", low=1)
    expand_factor: int = setting(2, "GeGLU channels per d_model; all except d_model stay local", low=1, high=1000)
    position_bias_quantised: bool = setting(
        False, "use bfloat16 distances (wrong by up to 4), to reproduce hlb-gpt exactly"
    )
    attention_kernel: str = setting("auto", "auto, flex (fused, no [T, T] tensor) or torch (plain products)")
    norm_eps: float = setting(1e-5, "added to the variance in LayerNorm", above=0, high=10**6)
    dropout: float = setting(
        0.0, "part of the embeddings, and of what each block adds, that is zero in training", low=0, high=0.99
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.qk_divisor > self.d_model:
            raise ValueError(f"qk_divisor must be at most d_model ({self.d_model}), not {self.qk_divisor}")
        if self.attention_kernel not in ("auto", "flex", "torch"):
            raise ValueError(f"attention_kernel must be auto, flex or torch, not {self.attention_kernel!r}")
        if self.attention_kernel == "flex" and self.position_bias_quantised:
            raise ValueError("attention_kernel must be auto or torch with position_bias_quantised, not flex")

    @property
    def d_qk(self) -> int:
        return self.d_model // self.qk_divisor

    @property
    def d_expand(self) -> int:
        return self.d_model * self.expand_factor

    @classmethod
    def for_scale(cls, scale: float, vocab_size: int) -> HlbConfig:
        """hlb-gpt's law: width 64 rint(6 log2(1+s)), depth rint(8 log2(1+s)); at least 64 and 1."""
        growth = math.log2(1 + scale)
        return cls(vocab_size=vocab_size, d_model=max(64, 64 * round(6 * growth)), n_layers=max(1, round(8 * growth)))


class LatentAttention(nn.Module):
    """x + W_out [local, softmax(q k^T / sqrt(d_qk) + softplus(m) (j - i)) values], with x [B, T, D] and q, k, local, values from x."""

    def __init__(self, config: HlbConfig, layer: int) -> None:
        super().__init__()
        d, d_qk, d_expand = config.d_model, config.d_qk, config.d_expand
        self.layer = layer
        self.widths = [d_qk, d_qk, d_expand, d_expand]  # query, key, linear, gate
        self.norm = nn.LayerNorm(d, eps=config.norm_eps, bias=False)
        self.expand = nn.Linear(d, sum(self.widths), bias=False)
        self.project = nn.Linear(d_expand, d, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.position_bias = nn.Parameter(torch.ones(1))  # m; shape [1], because FSDP cannot shard scalars

    def forward(self, x: Tensor, reach: Reach | BlockMask, cache: DecodingState | None = None) -> Tensor:
        q, k, linear, gate = self.expand(self.norm(x)).split(self.widths, dim=-1)
        u = linear * F.gelu(gate)  # [B, T, D_expand]
        local, v = u.split([u.shape[-1] - x.shape[-1], x.shape[-1]], dim=-1)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v, dim=1)
        slope = F.softplus(self.position_bias.float())  # [1]
        if isinstance(reach, BlockMask):
            attended = attend_flex(q, k, v, slope, reach)
        else:
            attended = attend_dense(q, k, v, slope, reach)
        return x + self.dropout(self.project(torch.cat((local, attended), dim=-1)))


@register("hlb")
class Hlb(LanguageModel):
    """Embedding, LatentAttention blocks, LayerNorm, untied output projection; no bias anywhere."""

    Config = HlbConfig
    kernel_fields, device_kernels = ("attention_kernel",), ("flex",)
    mup_refusal = (
        "its recipe has laws of learning rate and decay over the size instead, and no rule is written for its blocks"
    )
    masks_documents = True

    def __init__(self, config: HlbConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(LatentAttention(config, layer) for layer in range(config.n_layers))
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=False)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.max_context = QUANTISED_CONTEXT if config.position_bias_quantised else None

    def hidden(self, tokens: Tensor, *, documents: Tensor | None = None, state: DecodingState | None = None) -> Hidden:
        reach = self._reach(tokens, None if documents is None else number_documents(documents), state)
        x = self.dropout(self.embedding(tokens))  # [B, T, D]
        for block in self.layers:
            x = block(x, reach, state)
        if state is not None:
            state.length += tokens.shape[1]
        return Hidden(self.norm(x))

    def logits(self, hidden: Hidden) -> Tensor:
        return self.head(hidden.states)

    def nll(self, hidden: Hidden, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        return linear_nll(hidden.states, self.head.weight, targets, weights)

    def loss(
        self, hidden: Hidden, targets: Tensor, reduction: str = "mean", weights: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return linear_cross_entropy(hidden.states, self.head.weight, targets, reduction, weights=weights), {}

    def _reach(self, tokens: Tensor, documents: Tensor | None, cache: DecodingState | None) -> Reach | BlockMask:
        length, device = tokens.shape[1], tokens.device
        n_keys = length if cache is None else cache.n_keys(length)
        if self.max_context is not None and n_keys > self.max_context:
            raise ValueError(f"a sequence of {n_keys} tokens exceeds the quantised table of {self.max_context}")
        if cache is None and self._flex_refusal(length, device) is None:
            return flex.causal_blocks(length, device) if documents is None else flex.document_blocks(documents)
        j = torch.arange(n_keys, device=device)
        i = (j if cache is None else cache.positions(length, device))[:, None]
        if self.config.position_bias_quantised:
            # hlb-gpt rounds positions -1023 .. 0 to bf16, and takes those of shorter sequences from the coarse end.
            table = torch.arange(1 - QUANTISED_CONTEXT, 1, device=device).bfloat16()
            distance = table[j] - table[i]
        else:
            distance = j - i
        visible = j <= i
        if documents is not None:
            visible = visible & (documents[:, :, None] == documents[:, None, :])
        return Reach(distance, visible)

    def _flex_refusal(self, length: int, device: torch.device) -> str | None:
        """Why attention over `length` tokens does not use Flex; None if it does."""
        if self.config.attention_kernel != "auto":
            return None if self.config.attention_kernel == "flex" else "asked for"
        if self.config.position_bias_quantised:
            return "the quantised bias is a lookup table"
        return flex_refusal(length, self.config.d_qk, compute_dtype(self.embedding.weight, device), device)

    def describe_kernels(self, device: torch.device | None = None, documents: bool = False) -> str:
        device = device or self.embedding.weight.device
        return "; ".join(filter(None, (self._describe_attention(device), describe_kernel(device))))

    def _describe_attention(self, device: torch.device) -> str:
        if self.config.attention_kernel == "flex" and device.type != "cuda":
            raise ValueError(
                f"attention_kernel flex cannot be used: it has no kernel that trains on {device.type}; use auto or torch"
            )
        refusal = self._flex_refusal(DENSE_LENGTH + 1, device)
        if refusal is not None:
            return f"attention: torch ({refusal})"
        if self.config.attention_kernel == "flex":
            return "attention: flex (no [T, T] tensors), torch when decoding"
        return f"attention: torch up to {DENSE_LENGTH} tokens and when decoding, flex for more (no [T, T] tensors)"

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        std = self.config.d_model**-0.5
        normal_(self.embedding.weight, 0.25 * std, generator)
        normal_(self.head.weight, 0.5 * std, generator)
        nn.init.ones_(self.norm.weight)
        for block in self.modules():
            if isinstance(block, LatentAttention):
                normal_(block.expand.weight, 0.5 * std / self.config.expand_factor, generator)
                # scaled by 1/L, not by 1/sqrt(2L) as in GPT-2
                normal_(block.project.weight, std / self.config.expand_factor / self.config.n_layers, generator)
                nn.init.ones_(block.norm.weight)
                nn.init.ones_(block.position_bias)

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def fused_matrices(self) -> dict[str, Split]:
        c = self.config
        parts = {"query": c.d_qk, "key": c.d_qk, "linear": c.d_expand, "gate": c.d_expand}
        return {f"layers.{layer}.expand.weight": Split(0, parts) for layer in range(c.n_layers)}

    def parameter_groups(self) -> dict[str, list[str]]:
        role = {"embedding": "embedding", "head": "head", "norm": "norm", "position_bias": "position"}
        groups: dict[str, list[str]] = {}
        for name, _ in self.named_parameters():
            part = name.removesuffix(".weight").rsplit(".", 1)[-1]
            groups.setdefault(role.get(part, "matrix"), []).append(name)
        return groups

    @classmethod
    def config_for_scale(cls, scale: float, vocab_size: int, target_parameters: int, **choices: Any) -> HlbConfig:
        # The target is the parameter count of this law.
        return replace(HlbConfig.for_scale(scale, vocab_size), **choices)
