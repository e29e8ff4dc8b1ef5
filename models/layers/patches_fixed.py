"""Models of patches of P tokens: patch k is tokens kP ... kP + P - 1. A part for whole patches sees the patches before, a part for
tokens those of its own patch, and what the other says of the patches before it.

Texts need not be whole patches: the last one is filled up, which no token sees. Where documents are kept apart, the patches stay
where they are in the row, so a patch can hold several documents. The document of a patch is that of its first token. Only its tokens
see patches before; the patches show them only tokens of their own document. A document that begins inside a patch sees none
until the next patch, as at the start of a text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models import counting
from models.base import Hidden, Split
from models.layers import normal_
from models.layers.causal import Context
from models.layers.chunks import documents_in_chunks, split
from models.layers.plain_attention import visible
from models.layers.plain_block import fused_matrices_in
from models.layers.positions import number_documents
from models.layers.stack import HybridStack
from models.state import DecodingState, StaticState

TINY = 32  # tokens: attention over so few is plain products, since fused kernels work on tiles of 64 or 128 of them


class Learned(nn.Module):
    """Learned vectors [*shape], which a call returns."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(shape))

    def forward(self) -> Tensor:
        return self.vectors

    def reset(self, std: float, generator: torch.Generator | None) -> None:
        normal_(self.vectors, std, generator)


class Level:
    """A decoding state as one level of a model sees it, which has read `length` of its own units."""

    def __init__(self, state: DecodingState, length: int) -> None:
        self.state, self.length = state, length

    def append(self, key: Hashable, new: Tensor, dim: int, window: int = 0) -> Tensor:
        return self.state.grow(key, new, dim, window)

    def recall(self, key: Hashable, like: Tensor) -> Tensor:
        return self.state.recall(key, like)

    def remember(self, key: Hashable, value: Tensor) -> None:
        self.state.remember(key, value)


class WithinPatch(Level):
    """The level of the tokens of the patch that has begun, `length` of its `size` tokens. With 0 of them the memory of the patch
    before is forgotten. Keys and values have a fixed size in the state, like recurrent state."""

    def __init__(self, state: DecodingState, length: int, size: int) -> None:
        super().__init__(state, length)
        self.size = size

    def append(self, key: Hashable, new: Tensor, dim: int, window: int = 0) -> Tensor:
        shape = list(new.shape)
        shape[dim] = self.size
        held = self.state.recall(key, new.new_empty(shape)).narrow(dim, 0, self.length)
        seen = torch.cat((held, new), dim)
        self.state.remember(key, filled(seen, dim, self.size))
        return seen

    def recall(self, key: Hashable, like: Tensor) -> Tensor:
        return self.state.recall(key, like) if self.length else torch.zeros_like(like)


def filled(x: Tensor, dim: int, size: int) -> Tensor:
    """x with zeros at the end along `dim`, up to `size`."""
    shape = list(x.shape)
    shape[dim] = size - x.shape[dim]
    return torch.cat((x, x.new_zeros(shape)), dim) if shape[dim] else x


class HierarchicalStack(HybridStack):
    """A stack of plain_block.py's parts, with blocks of several kinds."""

    @classmethod
    def shallowest(cls, config: Any) -> Any:
        """The config with one block of each kind."""
        raise NotImplementedError

    @classmethod
    def count_by_kind(cls, config: Any) -> int:
        """The number of parameters, from that of the shallowest model and of further blocks of each kind."""
        known: Any = cls
        least = cls.shallowest(config)
        more = Counter(cls.kinds(config)) - Counter(cls.kinds(least))
        return counting.parameters_of(known, least) + sum(
            count * counting.parameters_of_kind(known, least, kind) for kind, count in more.items()
        )

    def fused_matrices(self) -> dict[str, Split]:
        return fused_matrices_in(self)


class PatchStack(HierarchicalStack):
    """A model of patches. `layers`: the blocks of the tokens. A subclass gives `contexts` and `decode`, and sets document_grid to P."""

    patch_size: int
    n_contexts: ClassVar[int]  # tensors that `contexts` returns

    def contexts(
        self,
        patches: Tensor,
        documents: Tensor | None = None,
        state: DecodingState | None = None,
        read: int | None = None,
    ) -> tuple[Tensor, ...]:
        """What the tokens of a patch get from the patches before it: tensors [B, K, ...].

        patches [B, m, P]: whole ones. read: how many come before them in the text, which the state holds; then what follows each of
        them is returned, K = m. None: the text begins; then K = m + 1, with the first patch, which has none before it.
        documents: [B, K, P].
        """
        raise NotImplementedError

    def decode(
        self,
        tokens: Tensor,
        contexts: tuple[Tensor, ...],
        documents: Tensor | None = None,
        memory: WithinPatch | None = None,
    ) -> Tensor:
        """tokens [B, K, p] of K patches, documents the same -> [B, K, p, D]. memory: of the only patch, which has begun already."""
        raise NotImplementedError

    def hidden(self, tokens: Tensor, *, documents: Tensor | None = None, state: DecodingState | None = None) -> Hidden:
        if state is not None:
            check_state(state, tokens.shape[1])
            return Hidden(self.norm(self.go_on(tokens, state)))
        size, length = self.patch_size, tokens.shape[1]
        patches = split(tokens, size)  # [B, K, P]
        if documents is not None:
            documents = documents_in_chunks(number_documents(documents), size)
        x = self.decode(patches, self.contexts(patches[:, :-1], documents), documents)
        return Hidden(self.norm(x.flatten(1, 2)[:, :length]))

    def go_on(self, tokens: Tensor, state: DecodingState) -> Tensor:
        """[B, n, D] of the next n tokens. The state holds the tokens of the patch that was begun last, and its contexts.

        So what a whole patch says is computed when the first token after it is read.
        """
        size, before, count = self.patch_size, state.length, tokens.shape[1]
        begun, held = divmod(before - 1, size) if before else (0, -1)
        held += 1  # tokens of the patch `begun`: 1 ... P, 0 at the start
        text = tokens
        contexts: tuple[Tensor, ...] = ()
        if before:
            text = torch.cat((state.recall("patch", tokens)[:, :held], tokens), dim=1)
            contexts = tuple(state.recall(("context", i), tokens) for i in range(self.n_contexts))
        whole = (text.shape[1] - 1) // size
        if whole or not before:
            patches = text[:, : whole * size].unflatten(1, (whole, size))
            new = self.contexts(patches, state=state, read=begun if before else None)
            contexts = tuple(torch.cat(pair, dim=1) for pair in zip(contexts, new, strict=True)) if before else new
        state.remember("patch", filled(text[:, whole * size :], 1, size))
        for i, context in enumerate(contexts):
            state.remember(("context", i), context[:, -1:])
        x = self.decode_from(tokens, contexts, held, state)
        state.length += count
        return x

    def decode_from(self, tokens: Tensor, contexts: tuple[Tensor, ...], held: int, state: DecodingState) -> Tensor:
        """[B, n, D]: the rest of the patch of which `held` tokens are read, whole patches, and the beginning of the next one."""
        size, count = self.patch_size, tokens.shape[1]
        rest = min(count, size - held) if held else 0
        whole = (count - rest) // size
        parts: list[tuple[int, int, WithinPatch | None]] = [(1, rest, WithinPatch(state, held, size))] if held else []
        parts += [(whole, size, None), (1, count - rest - whole * size, WithinPatch(state, 0, size))]
        outputs, place, patch = [], 0, 0
        for patches, length, memory in parts:
            if patches * length:
                part = tokens[:, place : place + patches * length].unflatten(1, (patches, length))
                own = tuple(context[:, patch : patch + patches] for context in contexts)
                outputs.append(self.decode(part, own, None, memory).flatten(1, 2))
            place, patch = place + patches * length, patch + patches
        return torch.cat(outputs, dim=1)

    def seen_within(
        self, tokens: Tensor, documents: Tensor | None, memory: WithinPatch | None, head_dim: int
    ) -> Context:
        """The context of blocks for tokens [B K, p] of patches; documents [B K, p]."""
        wanted, weight = self.config.attention_kernel, self.embedding.weight
        if wanted == "auto" and self.patch_size <= TINY:
            wanted = "torch"
        context = Context(documents, memory)  # type: ignore[arg-type]
        return context._replace(visible=visible(wanted, (0,), head_dim, weight, tokens, context))


def check_state(state: DecodingState, count: int) -> None:
    """ValueError if hierarchical models cannot read `count` more tokens with this state."""
    state.check_room(count)
    if isinstance(state, StaticState):
        raise ValueError(
            "its steps have no fixed shapes: what stands for several tokens is computed only at the first of them"
        )
