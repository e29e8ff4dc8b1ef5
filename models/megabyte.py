"""MegaByte (arXiv 2305.07185): a large model over patches of P tokens, and a small one over the tokens of each patch.

    g_0 = a learned vector, g_k = embedding of patch k - 1          the input of the large model, [B, T / P, d_model]
    h = large(g), causal                                            so h_k knows all tokens before patch k
    x_kP+p = E[token kP+p] + w(h_k)[p]                              the input of the small model, [B T / P, P, local_width]

The small model is causal within its patch. Its last states predict the next tokens, so the first token of a patch is predicted
by the last state of the patch before, as tokens are given and targets are shifted. This is the paper's form. BlaGPT's (after
lucidrains) puts a start token before every patch, so its first prediction knows one patch less. It has no positions at all;
here both models are rotary (`positions: none` for BlaGPT's). It has biases in MLPs and head, and shifts tokens (`token_shift`).
Initial values are PyTorch's, as there.
Documents: see layers/patches_fixed.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from models.base import register
from models.config import check_choice, check_ranges, setting
from models.layers import normal_
from models.layers.attend import KERNELS
from models.layers.causal import Context
from models.layers.mlp import ACTIVATIONS, hidden_width
from models.layers.norms import RMSNorm
from models.layers.patches_fixed import Learned, Level, PatchStack, WithinPatch
from models.layers.plain_attention import visible
from models.layers.plain_block import PlainBlock, Shape
from models.state import DecodingState


@dataclass(frozen=True)
class MegaByteConfig:
    vocab_size: int = setting(50304, "rows of the embeddings and of the output projection", low=1, high=10**9)
    d_model: int = setting(768, "width of the large model", low=1, high=10**6)
    n_layers: int = setting(10, "blocks of the large model", low=1, high=1000)
    n_heads: int = setting(12, "attention heads of the large model", low=1, high=10**4)
    patch_size: int = setting(4, "tokens of a patch (P)", low=1, high=10**4)
    local_width: int = setting(
        0, "width of the small model; 0: a third of d_model, in multiples of 16", low=0, high=10**6
    )
    local_layers: int = setting(0, "blocks of the small model; 0: a fifth of n_layers", low=0, high=1000)
    local_heads: int = setting(0, "attention heads of the small model; 0: of about 64 channels", low=0, high=10**4)
    positions: str = setting("rotary", "rotary (positions of patches, and of tokens in a patch) or none")
    rope_theta: float = setting(1e4, "base of the rotary wavelengths", above=1, high=1e12)
    token_shift: bool = setting(
        False, "half of the channels that attention and MLP read are those of the patch, or token, before"
    )
    mlp: str = setting("gelu", "activation of the MLPs, see layers/mlp.py; they are as wide as there")
    norm_eps: float = setting(1e-6, "added to the mean square in RMSNorm", above=0, high=1)
    init_std: float = setting(
        0.0,
        "standard deviation of the initial matrices; 0: PyTorch's, 1 / sqrt(3 inputs), and 1 of embeddings, as 0.02 is little for a "
        "narrow small model",
        low=0,
        high=1,
    )
    tied: bool = setting(False, "the output projection is the embedding of the small model")
    dropout: float = setting(0.0, "part of what each branch adds that is zero in training", low=0, high=0.99)
    attention_kernel: str = setting("auto", "auto, torch, sdpa, cudnn, flex, flash or flash3")

    def __post_init__(self) -> None:
        check_ranges(self)
        check_choice(self, "attention_kernel", ("auto", *KERNELS))
        if self.positions not in ("rotary", "none"):
            raise ValueError(f"positions must be rotary or none, not {self.positions!r}")
        if self.mlp not in ACTIVATIONS:
            raise ValueError(f"mlp must be one of {', '.join(ACTIVATIONS)}, not {self.mlp!r}")
        self.shape.check("n_heads")
        self.local_shape.check("local_heads")
        if self.token_shift and (self.d_model % 2 or self.local % 2):
            raise ValueError("token_shift must be false for odd widths: it moves half of the channels")

    @property
    def local(self) -> int:
        return self.local_width or max(16, round(self.d_model / 48) * 16)

    @property
    def locals(self) -> int:
        return self.local_layers or max(1, round(self.n_layers / 5))

    @property
    def shape(self) -> Shape:
        return self._shape(self.d_model, self.n_heads, self.n_layers)

    @property
    def local_shape(self) -> Shape:
        return self._shape(self.local, self.local_heads, self.locals)

    def _shape(self, width: int, heads: int, depth: int) -> Shape:
        theta = self.rope_theta if self.positions == "rotary" else 0.0
        hidden = hidden_width(self.mlp, width, 8)
        numbers = theta, self.norm_eps, self.init_std, depth, self.dropout, False, self.token_shift
        return Shape(width, heads, self.mlp, hidden, *numbers)


class PatchEmbedder(nn.Module):
    """[B, K, P] tokens -> [B, K, D]: the embeddings of a patch side by side, through one matrix, with a norm before and after."""

    def __init__(self, config: MegaByteConfig) -> None:
        super().__init__()
        c = config
        self.embedding = nn.Embedding(c.vocab_size, c.local)
        self.norm = RMSNorm(c.patch_size * c.local, c.norm_eps)
        self.matrix = nn.Linear(c.patch_size * c.local, c.d_model, bias=False)
        self.last_norm = RMSNorm(c.d_model, c.norm_eps)

    def forward(self, patches: Tensor, seen: Tensor | None) -> Tensor:
        """seen: [B, K, P] bool, tokens that count; None: all."""
        x = self.embedding(patches)  # [B, K, P, local]
        if seen is not None:
            x = x * seen.unsqueeze(-1).to(x.dtype)
        return self.last_norm(self.matrix(self.norm(x.flatten(2))))


@register("megabyte")
class MegaByte(PatchStack):
    """Two stacks of pre-norm blocks, each with a final RMSNorm."""

    Config = MegaByteConfig
    n_contexts = 1

    def __init__(self, config: MegaByteConfig) -> None:
        c = config
        local = [PlainBlock(c.local_shape, ("local", i)) for i in range(c.locals)]
        super().__init__(c, local, RMSNorm(c.local, c.norm_eps), c.local)
        self.patch_size = self.document_grid = c.patch_size
        self.attention_head_dim = c.shape.head_dim
        self.embedding_std = c.local_shape.std(c.local)
        self.patch_embedder, self.start = PatchEmbedder(c), Learned(c.d_model)
        self.global_layers: Any = nn.ModuleList(PlainBlock(c.shape, ("global", i)) for i in range(c.n_layers))
        self.global_norm = RMSNorm(c.d_model, c.norm_eps)
        self.to_local = nn.Linear(c.d_model, c.patch_size * c.local, bias=False)

    def contexts(
        self,
        patches: Tensor,
        documents: Tensor | None = None,
        state: DecodingState | None = None,
        read: int | None = None,
    ) -> tuple[Tensor, ...]:
        """([B, K, P, local],): w(h_k) for each patch."""
        start = self.start()
        owner = None if documents is None else documents[:, :, 0]  # [B, K], the document of a patch
        seen = None if documents is None or owner is None else documents[:, :-1].eq(owner[:, 1:, None])
        x = self.patch_embedder(patches, seen)
        start = start.to(x.dtype)
        if seen is not None:  # the first of its document
            x = x.where(seen.any(-1, keepdim=True), start)
        if read is None:
            x = torch.cat((start.expand(len(x), 1, -1), x), dim=1)
        if documents is None or owner is None:
            return (self.run_global(x, None, None if state is None else Level(state, 0 if read is None else read + 1)),)
        # One more, by itself: what documents see that begin inside a patch.
        x = torch.cat((x, start.expand(len(x), 1, -1)), dim=1)
        x = self.run_global(x, torch.cat((owner, owner[:, -1:] + 1), dim=1), None)
        inside = documents.ne(owner.unsqueeze(-1)).unsqueeze(-1)  # [B, K, P, 1]
        return (torch.where(inside, x[:, -1:], x[:, :-1]),)

    def run_global(self, x: Tensor, documents: Tensor | None, level: Level | None) -> Tensor:
        """[B, K, D] -> [B, K, P, local]"""
        context = Context(documents, level)  # type: ignore[arg-type]
        weight, kernel = self.embedding.weight, self.config.attention_kernel
        context = context._replace(visible=visible(kernel, (0,), self.attention_head_dim, weight, x, context))
        for layer in self.global_layers:
            x = layer(x, context)
        return self.to_local(self.global_norm(x)).unflatten(-1, (self.patch_size, -1))

    def decode(
        self,
        tokens: Tensor,
        contexts: tuple[Tensor, ...],
        documents: Tensor | None = None,
        memory: WithinPatch | None = None,
    ) -> Tensor:
        start, shape = 0 if memory is None else memory.length, tokens.shape
        x = self.embedding(tokens) + contexts[0][:, :, start : start + shape[2]]
        flat = None if documents is None else documents.flatten(0, 1)
        context = self.seen_within(tokens.flatten(0, 1), flat, memory, self.config.local_shape.head_dim)
        return self.run_layers(x.flatten(0, 1), context).unflatten(0, shape[:2])

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        super().init_weights(generator)
        c = self.config
        if not (c.init_std or c.tied):
            normal_(self.embedding.weight, 1.0, generator)
        normal_(self.patch_embedder.embedding.weight, c.init_std or 1.0, generator)
        for matrix in (self.patch_embedder.matrix, self.to_local):
            normal_(matrix.weight, c.shape.std(matrix.in_features), generator)
        self.start.reset(1.0, generator)  # of the size of a patch's embedding, after its norm
        for layer in self.global_layers:
            layer.reset(generator)
        for norm in (self.global_norm, self.patch_embedder.norm, self.patch_embedder.last_norm):
            norm.reset()

    def blocks(self) -> list[nn.Module]:
        return [*self.global_layers, *self.layers]

    @classmethod
    def check_sizes(cls, config: MegaByteConfig, tokens: int | None = None, longest: int | None = None) -> None:
        if longest is not None and config.patch_size > longest:
            raise ValueError(
                f"patch_size: {config.patch_size} is more than the longest sequence ({longest}), so there would be one patch; "
                "lower it"
            )

    @classmethod
    def inferred(cls, config: MegaByteConfig) -> dict[str, int]:
        return {"local_width": config.local, "local_layers": config.locals, "local_heads": config.local_shape.heads}

    @classmethod
    def kinds(cls, config: MegaByteConfig) -> list[str]:
        return ["global"] * config.n_layers + ["local"] * config.locals

    @classmethod
    def parts(cls, config: MegaByteConfig, kind: str) -> list[nn.Module]:
        return [PlainBlock(config.shape if kind == "global" else config.local_shape, (kind, 0))]

    @classmethod
    def shallowest(cls, config: MegaByteConfig) -> MegaByteConfig:
        return replace(config, n_layers=1, local_layers=1)
