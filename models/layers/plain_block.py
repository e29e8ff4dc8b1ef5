"""The plain transformer block of the hierarchical models: self-attention, with `cross` attention to other vectors, and an MLP."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.base import Split
from models.layers import normal_
from models.layers.attend import KERNELS, AttentionMask
from models.layers.causal import Context, previous
from models.layers.mlp import ACTIVATIONS
from models.layers.norms import RMSNorm
from models.layers.plain_attention import PlainAttention
from models.layers.positions import Rotary
from models.layers.shapes import head_counts


class Shape(NamedTuple):
    """What the blocks of one width have in common. n_heads: 0 for heads of about 64 channels; mlp: a name of ACTIVATIONS; rope_theta:
    0 for no positions; init_std: standard deviation of matrices, 0 for PyTorch's, 1 / sqrt(3 inputs); depth: the matrices that end a
    branch have that divided by sqrt(2 depth)."""

    width: int
    n_heads: int
    mlp: str
    hidden: int
    rope_theta: float
    norm_eps: float
    init_std: float
    depth: int
    dropout: float = 0.0
    qk_norm: bool = False
    token_shift: bool = False
    window: int = 0  # of self-attention; 0: none

    @property
    def heads(self) -> int:
        return self.n_heads or head_counts(self.width)[0]

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    def std(self, inputs: int) -> float:
        return self.init_std or (3 * inputs) ** -0.5

    def out_std(self, inputs: int) -> float:
        """Of a matrix that ends a branch."""
        return self.std(inputs) / math.sqrt(2 * self.depth)

    @property
    def parameters(self) -> int:
        """Of a PlainBlock without cross-attention, and without norms of queries and keys."""
        d, inputs = self.width, ACTIVATIONS[self.mlp].inputs
        return 4 * d * d + (inputs + 1) * d * self.hidden + 2 * d

    def of_width(self, width: int, hidden: int, window: int) -> Shape:
        """The same at another width, with heads as wide as here."""
        return self._replace(width=width, n_heads=width // self.head_dim, hidden=hidden, window=window)

    def check(self, name: str) -> None:
        """ValueError, which begins with `name`, unless the heads divide the width, into an even number of channels for rotary positions."""
        if self.width % self.heads or (self.rope_theta and self.head_dim % 2):
            even = "even widths" if self.rope_theta else "widths"
            raise ValueError(f"{name} must divide {self.width} channels into {even}, but {self.heads} does not")


def hidden_of(width: int, ratio: float) -> int:
    """Width of an MLP, in multiples of 32."""
    return max(32, round(ratio * width / 32) * 32)


class Seen(NamedTuple):
    """What the queries of a CrossAttention see. mask: [Tq, Tk] or [B, 1, Tq, Tk] bool; some: [B, Tq, 1] bool, queries that see any
    key (None: all do; in the mask the others see some key too, because a softmax over nothing is no number); queries, keys:
    positions [T] or [B, T], only of rotary attention."""

    mask: Tensor
    kernel: str
    some: Tensor | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None


class CrossAttention(nn.Module):
    """out(attention of x [B, Tq, D] to source [B, Tk, D]); rope_theta: 0 for no positions."""

    def __init__(self, shape: Shape, rope_theta: float = 0.0) -> None:
        super().__init__()
        d = shape.width
        self.head_dim = shape.head_dim
        self.query, self.kv, self.out = (nn.Linear(d, n, bias=False) for n in (d, 2 * d, d))
        self.rotary = Rotary(self.head_dim, rope_theta) if rope_theta else None

    def forward(self, x: Tensor, source: Tensor, seen: Seen, state: Any = None, key: Hashable = None) -> Tensor:
        """state: of decoding; then `source` continues what it holds under `key`, and seen.keys are the positions of what is new."""
        k, v = self.keys_values(source, seen.keys, state, key)
        q = self.query(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H, Tq, head_dim]
        if self.rotary is not None:
            assert seen.queries is not None
            q = self.rotary.rotate_query(q, seen.queries)
        attended = KERNELS[seen.kernel](q, k, v, AttentionMask(mask=seen.mask), scale=self.head_dim**-0.5)
        attended = attended.transpose(1, 2).flatten(2)  # [B, Tq, D]
        return self.out(attended if seen.some is None else attended * seen.some.to(attended.dtype))

    def keys_values(
        self, source: Tensor, positions: Tensor | None, state: Any = None, key: Hashable = None
    ) -> tuple[Tensor, Tensor]:
        """[B, H, Tk, head_dim] each, with those that the state holds already; the state then holds all of them."""
        k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in self.kv(source).chunk(2, dim=-1))
        if self.rotary is not None:
            assert positions is not None
            k = self.rotary.rotate_key(k, positions)
        if state is None:
            return k, v
        return state.append((key, "keys"), k, dim=2), state.append((key, "values"), v, dim=2)

    def fused_rows(self) -> dict[str, dict[str, int]]:
        d = self.out.in_features
        return {"kv": {"key": d, "value": d}}


class Feedforward(nn.Module):
    """down(activation(up(x))), x [B, T, D]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        inputs, self.activation = ACTIVATIONS[shape.mlp]
        self.up = nn.Linear(shape.width, inputs * shape.hidden, bias=False)
        self.out = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.activation(self.up(x)))

    def fused_rows(self) -> dict[str, dict[str, int]]:
        hidden, inputs = self.out.in_features, self.up.out_features // self.out.in_features
        return {"up": {f"input {i}": hidden for i in range(inputs)}} if inputs > 1 else {}


class PlainBlock(nn.Module):
    """x + attention(RMS(x)), with `cross` x + attention(RMS(x), memory), then x + MLP(RMS(x)); x [B, T, D].

    key: of what it holds in the decoding state. With token_shift the second half of the channels that a branch reads is that of the
    token before (zeros at the start).
    """

    def __init__(self, shape: Shape, key: Hashable, cross: bool = False, cross_theta: float = 0.0) -> None:
        super().__init__()
        self.shape, self.key = shape, key
        d, heads = shape.width, (shape.heads, shape.heads)
        eps = shape.norm_eps
        self.attention_norm = RMSNorm(d, eps)
        qk_norm_eps = eps if shape.qk_norm else 0.0
        self.attention = PlainAttention(
            d, d, heads, shape.head_dim, window=shape.window, rope_theta=shape.rope_theta, qk_norm_eps=qk_norm_eps
        )
        self.cross_norm = RMSNorm(d, eps) if cross else None
        self.cross = CrossAttention(shape, cross_theta) if cross else None
        self.mlp_norm, self.mlp = RMSNorm(d, eps), Feedforward(shape)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x: Tensor, context: Context, memory: Tensor | None = None, seen: Seen | None = None) -> Tensor:
        """memory [B, M, D], seen: what `cross` attends to."""
        read = self.shifted(self.attention_norm(x), context, "attention")
        x = x + self.dropout(self.attention(read, context, self.key))
        if self.cross is not None and self.cross_norm is not None:
            assert memory is not None and seen is not None
            x = x + self.dropout(self.cross(self.cross_norm(x), memory, seen))
        return x + self.dropout(self.mlp(self.shifted(self.mlp_norm(x), context, "mlp")))

    def shifted(self, x: Tensor, context: Context, branch: str) -> Tensor:
        if not self.shape.token_shift:
            return x
        own, other = x.chunk(2, dim=-1)
        return torch.cat((own, previous(other, context, (self.key, branch))), dim=-1)

    def reset(self, generator: torch.Generator | None) -> None:
        reset_parts(self, self.shape, generator)


def reset_parts(module: nn.Module, shape: Shape, generator: torch.Generator | None) -> None:
    """Initial values of all norms, rotary tables and matrices in `module`; a matrix by the name `out` ends a branch."""
    for name, part in module.named_modules():
        if isinstance(part, RMSNorm | Rotary):
            part.reset()
        elif isinstance(part, nn.Linear):
            ends = name.rpartition(".")[2] == "out"
            normal_(part.weight, (shape.out_std if ends else shape.std)(part.in_features), generator)


def fused_matrices_in(model: nn.Module) -> dict[str, Split]:
    """`LanguageModel.fused_matrices` of a model of these parts."""
    found: dict[str, Split] = {}
    for path, module in model.named_modules():
        if isinstance(module, PlainAttention):
            found[f"{path}.qkv.weight"] = Split(0, module.rows)
        elif isinstance(module, CrossAttention | Feedforward):
            found |= {f"{path}.{name}.weight": Split(0, rows) for name, rows in module.fused_rows().items()}
    return found
