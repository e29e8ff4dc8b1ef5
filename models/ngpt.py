"""nGPT (arXiv 2410.01131): embeddings, the vectors in every matrix, and hidden states all have Euclidean norm 1.

A block moves the hidden state h on the sphere by a learned step size alpha: h <- Norm(h + |alpha| (Norm(f(h)) - h)).
There are no other norms, no biases and no weight decay. After each optimiser step the matrices are normalised again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Hidden, LanguageModel, Split, register
from models.config import check_ranges, setting
from models.layers import fill_
from models.layers.linear_cross_entropy import linear_cross_entropy, linear_nll
from models.layers.positions import Rotary, number_documents, positions_in_documents
from models.state import DecodingState


@dataclass(frozen=True)
class NgptConfig:
    vocab_size: int = setting(50304, "rows of the embedding and of the output projection", low=1, high=10**9)
    d_model: int = setting(768, "dimensions of the sphere that hidden states are on", low=1, high=10**6)
    n_layers: int = setting(12, "blocks", low=1, high=1000)
    n_heads: int = setting(12, "attention heads; must divide d_model into heads of even width", low=1)
    alpha_init: float = setting(
        0.05, "initial step size of attention and MLP: the part of the way to their output", above=0, high=10**6
    )
    dropout: float = setting(
        0.0,
        "part of the outputs of attention and MLP that is zero in training, before they are normalised",
        low=0,
        high=0.99,
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.d_model % (2 * self.n_heads):
            raise ValueError(
                f"n_heads must divide d_model ({self.d_model}) into even widths, but {self.n_heads} does not"
            )


class Scale(nn.Module):
    """A learned vector [size] with the value stored * init / scale, where stored = scale at the start.

    So the value starts at `init` for every `scale`. A step of Adam changes `stored` by about the learning rate, and the value
    init / scale times as much.
    """

    def __init__(self, size: int, init: float, scale: float) -> None:
        super().__init__()
        self.init, self.scale = init, scale
        self.stored = nn.Parameter(torch.empty(size))

    def forward(self) -> Tensor:
        """The value, fp32 (fp64 for fp64) [size]."""
        return self.stored.to(torch.promote_types(self.stored.dtype, torch.float32)) * (self.init / self.scale)

    @torch.no_grad()
    def reset(self) -> None:
        self.stored.fill_(self.scale)


class Block(nn.Module):
    """Attention, then the MLP. Both move h [B, T, D] on the sphere."""

    def __init__(self, config: NgptConfig, layer: int) -> None:
        super().__init__()
        d, scale = config.d_model, config.d_model**-0.5
        self.layer = layer
        self.n_heads = config.n_heads
        self.rotary = Rotary(d // config.n_heads)
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.qk_scale = Scale(d, 1.0, scale)  # s_qk: a separate vector for every head
        self.attention_out = nn.Linear(d, d, bias=False)
        self.attention_alpha = Scale(d, config.alpha_init, scale)
        self.mlp_in = nn.Linear(d, 8 * d, bias=False)  # u and v
        self.mlp_scale = Scale(8 * d, 1.0, 1.0)  # s_u and s_v
        self.mlp_out = nn.Linear(4 * d, d, bias=False)
        self.mlp_alpha = Scale(d, config.alpha_init, scale)
        self.dropout = nn.Dropout(config.dropout)  # not for the embeddings, which would leave the sphere

    def forward(
        self, h: Tensor, positions: Tensor, visible: Tensor | None, cache: DecodingState | None = None
    ) -> Tensor:
        """positions: [T] or [B, T]; visible: mask for scaled_dot_product_attention, None for causal attention within h."""
        h = step_on_sphere(h, self.dropout(self.attention(h, positions, visible, cache)), self.attention_alpha())
        return step_on_sphere(h, self.dropout(self.mlp(h)), self.mlp_alpha())

    def attention(self, h: Tensor, positions: Tensor, visible: Tensor | None, cache: DecodingState | None) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        qkv = self.qkv(h).unflatten(-1, (3, self.n_heads, -1))  # [B, T, 3, H, head_dim]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # [B, H, T, head_dim]
        qk_scale = self.qk_scale().view(self.n_heads, 1, -1)  # [H, 1, head_dim]
        q, k = ((unit(self.rotary.rotate_query(x, positions)) * qk_scale).to(v.dtype) for x in (q, k))
        if cache is not None:
            k, v = cache.extend(self.layer, k, v, dim=2)
        # Products of unit vectors are at most 1, so they are scaled up, not down.
        scale = math.sqrt(q.shape[-1])
        attended = F.scaled_dot_product_attention(q, k, v, visible, is_causal=visible is None, scale=scale)
        return self.attention_out(attended.transpose(1, 2).flatten(2))

    def mlp(self, h: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        uv = self.mlp_in(h)  # [B, T, 8 D]; products of unit vectors have size 1 / sqrt(D), where SiLU is nearly linear
        u, v = (uv * (self.mlp_scale() * math.sqrt(h.shape[-1])).to(uv.dtype)).chunk(2, dim=-1)
        return self.mlp_out(u * F.silu(v))


def unit(x: Tensor) -> Tensor:
    """x / |x| over the last dimension, in fp32 (fp64 for fp64)."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def step_on_sphere(h: Tensor, target: Tensor, alpha: Tensor) -> Tensor:
    """Norm(h + |alpha| (Norm(target) - h)); h, target [B, T, D], alpha [D] -> [B, T, D] in the dtype of h."""
    wide = torch.promote_types(h.dtype, torch.float32)
    return unit(h.to(wide).lerp(unit(target).to(wide), alpha.abs().to(wide))).to(h.dtype)


@torch.no_grad()
def normalise_(weight: Tensor, dim: int) -> None:
    """Divide a matrix by its norms along `dim`, in place; any dtype, plain or sharded."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    weight.div_(torch.linalg.vector_norm(weight, dim=dim, keepdim=True, dtype=wide))


@register("ngpt")
class Ngpt(LanguageModel):
    """Embedding, blocks, untied output projection with a learned scale for each entry of the vocabulary."""

    Config = NgptConfig
    masks_documents = True
    optim_defaults: ClassVar[dict[str, float]] = {"lr": 15e-4, "weight_decay": 0.0, "warmup_steps": 0}
    optim_source: ClassVar[str] = "arXiv 2410.01131, whose lr is 15e-4 to 30e-4"
    mup_refusal = "its vectors have norm 1 at every width, and learned scales instead of multipliers"

    def __init__(self, config: NgptConfig) -> None:
        super().__init__(config)
        d = config.d_model
        self.embedding = nn.Embedding(config.vocab_size, d)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.head = nn.Linear(d, config.vocab_size, bias=False)
        self.logit_scale = Scale(config.vocab_size, 1.0, d**-0.5)  # s_z

    def hidden(self, tokens: Tensor, *, documents: Tensor | None = None, state: DecodingState | None = None) -> Hidden:
        count, device = tokens.shape[1], tokens.device
        j = torch.arange(count if state is None else state.n_keys(count), device=device)
        positions, visible = j if state is None else state.positions(count, device), None
        if documents is not None:
            documents = number_documents(documents)
            positions = positions_in_documents(documents)  # [B, T]
            visible = ((j <= j[:, None]) & (documents[:, :, None] == documents[:, None, :]))[:, None]  # [B, 1, T, T]
        elif len(j) > count:  # there are earlier keys, or space for later ones
            visible = j <= positions[:, None]  # [T, n_keys]

        h = self.embedding(tokens)  # [B, T, D]; unit vectors, as are all later hidden states
        for block in self.layers:
            h = block(h, positions, visible, state)
        if state is not None:
            state.length += count
        return Hidden(h)

    def logits(self, hidden: Hidden) -> Tensor:
        return self.head(hidden.states) * self.logit_scale()

    def nll(self, hidden: Hidden, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        return linear_nll(hidden.states, self.scaled_head(), targets, weights)

    def loss(
        self, hidden: Hidden, targets: Tensor, reduction: str = "mean", weights: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return linear_cross_entropy(hidden.states, self.scaled_head(), targets, reduction, weights=weights), {}

    def scaled_head(self) -> Tensor:
        """The output projection [V, D] times its scales: cheaper than scaling the logits [B, T, V]."""
        weight = self.head.weight
        return weight * self.logit_scale().to(weight.dtype)[:, None]

    def projections(self) -> dict[str, Callable[[Tensor], None]]:
        """Normalise all vectors of length D: the rows of a matrix, or the columns if its output is added to h."""
        # Decided by name, because parameters under ZeRO-3 have no shape between uses.
        matrices = (name for name, _ in self.named_parameters() if name.endswith(".weight"))
        return {name: partial(normalise_, dim=0 if "_out." in name else 1) for name in matrices}

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Matrices are N(0, 1/D). They are normalised before they are split into shards, so that no communication is needed."""
        for name, project in self.projections().items():
            parameter = self.get_parameter(name)
            values = torch.randn(parameter.shape, generator=generator, device="cpu") * self.config.d_model**-0.5
            project(values)
            fill_(parameter, values)
        for module in self.modules():
            if isinstance(module, Scale | Rotary):
                module.reset()

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def fused_matrices(self) -> dict[str, Split]:
        d, layers = self.config.d_model, range(self.config.n_layers)
        qkv, gated = Split(0, dict.fromkeys(("query", "key", "value"), d)), Split(0, {"u": 4 * d, "v": 4 * d})
        return {f"layers.{i}.qkv.weight": qkv for i in layers} | {f"layers.{i}.mlp_in.weight": gated for i in layers}

    def parameter_groups(self) -> dict[str, list[str]]:
        role = {"embedding.weight": "embedding", "head.weight": "head"}
        groups: dict[str, list[str]] = {}
        for name, _ in self.named_parameters():
            groups.setdefault(role.get(name, "matrix" if name.endswith(".weight") else "norm"), []).append(name)
        return groups
