"""Byte Latent Transformer (arXiv 2412.09871): most of the computing is done once for each patch of bytes, and not for each byte.

A local encoder reads bytes, with embeddings of hashed n-grams, and gives each patch `sub_vectors` vectors, which attend to the bytes of
that patch alone. The latent transformer reads patches. A local decoder predicts bytes: each attends to the vectors of the last patch that
has ended at or before it. layers/patching.py says how bytes are cut into patches.

What the official code does otherwise, this does as the paper: n-grams are hashed with a^0 on the newest byte, windows that reach before
the document are left out, there is one hash for each n, the sum of embeddings is divided by their number, and cross-attention has one
residual.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models import counting
from models.base import Hidden, Split, register
from models.config import setting
from models.layers import normal_
from models.layers.attend import AttentionMask
from models.layers.byte_config import ByteConfig
from models.layers.causal import Context
from models.layers.ngrams import HashedNgrams
from models.layers.norms import RMSNorm
from models.layers.patch_attention import ByteQueries, PatchQueries
from models.layers.patching import (
    ENTROPIES,
    ENTROPY_RULES,
    RULES,
    Patches,
    PatchState,
    Rule,
    cut,
    pooled,
    refuse_fixed_shapes,
)
from models.layers.plain_attention import Visible, visible
from models.layers.plain_block import PlainBlock, Shape, fused_matrices_in
from models.layers.stack import HybridStack
from models.state import DecodingState

PUBLISHED_THRESHOLD = 1.335442066192627  # of the released model, for patches of 4.5 bytes of its data
HASH_SHARE = 1 / 3  # of the hash tables, by default, relative to all other parameters


@dataclass(frozen=True)
class BltConfig(ByteConfig):
    sub_vectors: int = setting(2, "vectors of a patch (k); local layers are d_model / sub_vectors wide", low=1, high=64)
    encoder_layers: int = setting(1, "local layers before the latent transformer", low=1, high=1000)
    decoder_layers: int = setting(3, "local layers after it", low=1, high=1000)
    local_window: int = setting(512, "bytes that attention in local layers sees", low=1, high=10**9)
    patching: str = setting("static", "where patches end: entropy, monotonic, space or static")
    patch_size: float = setting(
        4.5,
        "bytes of a patch; of all but static the mean, for 1.25 times as many of which there is room",
        low=1,
        high=10**4,
    )
    threshold: float = setting(
        PUBLISHED_THRESHOLD, "entropy, monotonic: nats above which a patch ends", low=0, high=100
    )
    max_patch: int = setting(0, "most bytes of a patch; 0: no limit", low=0, high=10**6)
    smallest_ngram: int = setting(3, "bytes of the shortest hashed n-grams", low=1, high=64)
    largest_ngram: int = setting(8, "bytes of the longest hashed n-grams; 0: none", low=0, high=64)
    hash_size: int = setting(
        0,
        "rows of the table of each length of n-grams; 0: as many as make a quarter of the parameters",
        low=0,
        high=10**8,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patching not in RULES:
            raise ValueError(f"patching must be {', '.join(RULES)}, not {self.patching!r}")
        if self.n_heads % self.sub_vectors:
            raise ValueError(f"n_heads must be a multiple of sub_vectors ({self.sub_vectors}), not {self.n_heads}")
        if self.largest_ngram and self.largest_ngram < self.smallest_ngram:
            raise ValueError(f"largest_ngram must be 0 or at least smallest_ngram ({self.smallest_ngram})")

    @property
    def local_width(self) -> int:
        return self.d_model // self.sub_vectors

    @property
    def ngrams(self) -> range:
        return range(self.smallest_ngram, self.largest_ngram + 1)

    @property
    def rule(self) -> Rule:
        return Rule(self.patching, self.patch_size, self.threshold, self.max_patch)

    @property
    def depth(self) -> int:
        return self.encoder_layers + self.n_layers + self.decoder_layers

    @property
    def shape(self) -> Shape:
        """Of the layers of the latent transformer."""
        return self.shape_of(self.d_model, self.depth)

    @property
    def local_shape(self) -> Shape:
        return self.shape_of(self.local_width, self.depth, self.local_window)


class EncoderLayer(nn.Module):
    """A layer of bytes, then attention of patches to it; x [B, T, local width], vectors [B, M, K, local width]."""

    def __init__(self, config: BltConfig, layer: int) -> None:
        super().__init__()
        self.layer = PlainBlock(config.local_shape, ("encoder", layer))
        self.cross = PatchQueries(config.local_width, config.head_dim, config.norm_eps, ("encoder", layer, "bytes"))

    def forward(self, x: Tensor, vectors: Tensor, window: Window, context: Context) -> tuple[Tensor, Tensor]:
        x = self.layer(x, context)
        held = self.cross.keys_and_values(x, context, window.width)
        return x, vectors + self.cross(vectors, held, window.ids, window.inside) if window.slots else vectors

    def reset(self, generator: torch.Generator | None) -> None:
        self.layer.reset(generator)
        self.cross.reset(generator, self.layer.shape)


class DecoderLayer(nn.Module):
    """Attention of bytes to the vectors of their last patch, then a layer of bytes; x as in EncoderLayer."""

    def __init__(self, config: BltConfig, layer: int) -> None:
        super().__init__()
        self.cross = ByteQueries(config.local_width, config.head_dim, config.norm_eps)
        self.layer = PlainBlock(config.local_shape, ("decoder", layer))

    def forward(self, x: Tensor, vectors: Tensor, last: Tensor, known: Tensor | None, context: Context) -> Tensor:
        return self.layer(x + self.cross(x, vectors, last, known), context)

    def reset(self, generator: torch.Generator | None) -> None:
        self.layer.reset(generator)
        self.cross.reset(generator, self.layer.shape)


class Window(NamedTuple):
    """The last bytes of the rows, in which all patches begin that are new: `width` bytes, `slots` new patches at most.

    ids, inside: [B, width], the patch of each byte, counted from the row's first new one, and whether it is one of them. first: [B], of
    decoding, how many patches ended before; size: most patches of a row with the new ones.
    """

    width: int
    slots: int
    ids: Tensor
    inside: Tensor
    first: Tensor | None = None
    size: int = 0


@register("blt")
class Blt(HybridStack):
    """With `patching` entropy or monotonic, the entropies of a smaller model decide where patches end: those that come with the batch,
    else those that `patcher` (an EntropyModel) computes."""

    Config = BltConfig
    embedding: nn.Embedding

    def __init__(self, config: BltConfig) -> None:
        c, d, w = config, config.d_model, config.local_width
        layers = [PlainBlock(c.shape, ("latent", i)) for i in range(c.n_layers)]
        super().__init__(c, layers, RMSNorm(w, c.norm_eps), width=w)
        self.encoder: Any = nn.ModuleList(EncoderLayer(c, i) for i in range(c.encoder_layers))
        self.decoder: Any = nn.ModuleList(DecoderLayer(c, i) for i in range(c.decoder_layers))
        self.pool = nn.Linear(w, d, bias=False)
        self.unpool = nn.Linear(d, d, bias=False)
        self.windows, self.attention_head_dim = (c.local_window,), c.head_dim
        self.patcher: Any = None
        self.ngrams: HashedNgrams | None = None
        if c.ngrams:
            self.ngrams = HashedNgrams(c.ngrams, c.hash_size or self.inferred(c)["hash_size"], w)

    # -- the forward pass -------------------------------------------------------------------------------------------------

    def hidden(
        self,
        tokens: Tensor,
        *,
        documents: Tensor | None = None,
        state: Any = None,  # a PatchState
        entropies: Tensor | None = None,
    ) -> Hidden:
        """entropies: [B, T], of what the patcher predicts after each byte."""
        refuse_fixed_shapes(state)
        if entropies is None and self.entropy_rule(self.config) is not None:
            entropies = self.entropies_of(tokens, documents, state)
        texts = tokens if state is None else state.append("tokens", tokens, dim=1)  # [B, read before + T]
        if state is not None and entropies is not None:
            entropies = state.append("entropies", entropies, dim=1)
        context = self.context(tokens, documents, state)
        patches = cut(texts, self.config.rule, context.documents, entropies)
        x, patch_vectors, window = self.encode(texts, patches, context)
        last, known = patches.last[:, -tokens.shape[1] :], patches.known
        if state is None:
            outputs = self.latent(patch_vectors, Context(patches.of_document))
        else:
            outputs, last = self.latent_with(state, patch_vectors, window, last)
        vectors = self.unpool(outputs).unflatten(-1, (self.config.sub_vectors, -1))  # [B, M, K, w]
        for layer in self.decoder:
            x = layer(x, vectors, last.clamp(min=0), known, context)
        if state is not None:
            state.length += tokens.shape[1]
        return Hidden(self.norm(x))

    def encode(self, texts: Tensor, patches: Patches, context: Context) -> tuple[Tensor, Tensor, Window]:
        """(states of the new bytes [B, T, w], new patches [B, M, K, w], where these are)"""
        state = context.state
        new = texts.shape[1] - (0 if state is None else state.length)
        x = self.embed_bytes(texts, patches.places, new)
        window = new_window(patches, self.config.rule, state)
        embedded = x if state is None else state.append("embedded", x, dim=1)[:, -window.width :]
        vectors = self.pool(pooled(embedded, window.ids, window.inside, window.slots))  # [B, M, D]
        vectors = vectors.unflatten(-1, (self.config.sub_vectors, -1))
        for layer in self.encoder:
            x, vectors = layer(x, vectors, window, context)
        return x, vectors, window

    def embed_bytes(self, texts: Tensor, places: Tensor, new: int) -> Tensor:
        """[B, new, w]: of the last `new` bytes of texts, with the n-grams that end there."""
        x = self.embedding(texts[:, -new:])
        return x if self.ngrams is None else (x + self.ngrams(texts, places, new)) / (len(self.config.ngrams) + 1)

    def latent(self, vectors: Tensor, context: Context) -> Tensor:
        """[B, M, K, w] -> [B, M, D]"""
        x = vectors.flatten(2)
        if context.visible is None:
            wanted, weight = self.config.attention_kernel, self.embedding.weight
            seen = visible(wanted, (0,), self.attention_head_dim, weight, x[..., 0], context)
            context = context._replace(visible=seen)
        return self.run_layers(x, context)

    def latent_with(self, state: PatchState, vectors: Tensor, window: Window, last: Tensor) -> tuple[Tensor, Tensor]:
        """(outputs of the last patch before the new bytes, then of the new ones, [B, 1 + M, D]; `last`, counted from the former)"""
        first: Any = window.first
        before = state.recall("output", vectors.new_zeros(len(vectors), self.config.d_model))
        outputs = before[:, None]
        if window.slots:
            at = first[:, None] + torch.arange(window.slots, device=first.device)  # [B, M]
            mask = torch.arange(window.size, device=first.device) <= at[:, None, :, None]  # [B, 1, M, size]
            seen = Visible(at, {0: AttentionMask(mask=mask)}, "sdpa")
            new = self.latent(vectors, Context(None, state.latent(first, window.size), seen))  # type: ignore[arg-type]
            outputs = torch.cat((outputs, new.to(outputs.dtype)), dim=1)
        last = last - first[:, None] + 1
        state.remember("output", outputs[torch.arange(len(last), device=last.device), last[:, -1]])
        return outputs, last

    def entropies_of(self, tokens: Tensor, documents: Tensor | None, state: PatchState | None) -> Tensor:
        if self.patcher is None:
            raise ValueError(
                f"patching {self.config.patching} needs the entropies of another model: prepare the data with --patches RUN, which "
                "stores them"
            )
        if state is None or state.patcher is not None:
            return self.patcher.entropies(tokens, documents, None if state is None else state.patcher)
        texts = state.append("patched", tokens, dim=1)
        return self.patcher.entropies(texts)[:, -tokens.shape[1] :]

    def new_state(self, batch: int, max_length: int | None, device: torch.device, dtype: torch.dtype) -> PatchState:
        patcher = None if self.patcher is None else self.patcher.new_state(batch, max_length, device)
        return PatchState(max_length, patcher)

    # -- what it is made of -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        super().init_weights(generator)
        for layer in (*self.encoder, *self.decoder):
            layer.reset(generator)
        for module in (self.pool, self.unpool):
            normal_(module.weight, self.config.init_std, generator)
        if self.ngrams is not None:
            self.ngrams.reset(generator, self.embedding_std)

    def blocks(self) -> list[nn.Module]:
        tables = [] if self.ngrams is None else [self.ngrams]
        return [*tables, *self.encoder, *self.layers, *self.decoder]

    def fused_matrices(self) -> dict[str, Split]:
        found = fused_matrices_in(self)
        for part, layers in (("encoder", self.encoder), ("decoder", self.decoder)):
            for i, layer in enumerate(layers):
                found[f"{part}.{i}.cross.kv.weight"] = layer.cross.split
        return found

    def further_keys(self) -> tuple[str, ...]:
        return () if self.entropy_rule(self.config) is None else (ENTROPIES,)

    @classmethod
    def entropy_rule(cls, config: BltConfig) -> str | None:
        return config.patching if config.patching in ENTROPY_RULES else None

    @classmethod
    def config_for_scale(cls, scale: float, vocab_size: int, target_parameters: int, **choices: Any) -> BltConfig:
        """The hash tables are part of the target, and fill what the shape leaves of it, within a factor of two. Their size is written out,
        so that a stored config says the shape of its weights."""
        config = counting.find_shape(cls, vocab_size, target_parameters, choices, cls.count_parameters)
        if config.hash_size or not config.ngrams:
            return config
        usual = cls.inferred(config)["hash_size"]
        left = (target_parameters - without_tables(config)) // (len(config.ngrams) * config.local_width)
        return replace(config, hash_size=min(max(left, (usual + 1) // 2), 2 * usual))

    @classmethod
    def count_parameters(cls, config: BltConfig) -> int:
        rows = cls.inferred(config).get("hash_size", config.hash_size)
        return without_tables(config) + len(config.ngrams) * rows * config.local_width

    @classmethod
    def inferred(cls, config: BltConfig) -> dict[str, int]:
        if config.hash_size or not config.ngrams:
            return {}
        rows = int(without_tables(config) * HASH_SHARE) // (len(config.ngrams) * config.local_width)
        return {"hash_size": max(1, rows)}


def without_tables(config: BltConfig) -> int:
    """The number of parameters besides the hash tables."""
    c, d, w = config, config.d_model, config.local_width
    frame = (1 if c.tied else 2) * c.vocab_size * w + w + w * d + d * d
    local = c.local_shape.parameters + 4 * w * w + 2 * w
    return frame + (c.encoder_layers + c.decoder_layers) * local + c.n_layers * c.shape.parameters


def new_window(patches: Patches, rule: Rule, state: DecodingState | None) -> Window:
    """Where the patches lie that end in the new bytes. While decoding, the host waits for the device here, so that steps in which no
    patch ends compute nothing for patches."""
    total = patches.ids.shape[1]
    if state is None:
        inside = patches.inside if patches.inside is not None else torch.ones_like(patches.ids, dtype=torch.bool)
        return Window(total, rule.slots(total, patches.of_document is not None), patches.ids, inside)
    first = patches.last[:, state.length - 1] + 1 if state.length else torch.zeros_like(patches.last[:, 0])  # [B]
    ended = patches.last[:, -1] + 1
    begins = (patches.ids < first[:, None]).sum(1)  # byte at which each row's first new patch begins
    numbers = torch.stack((begins.min(), (ended - first).max(), first.max())).tolist()
    begin, slots, before = (int(number) for number in numbers)
    ids = patches.ids[:, begin:] - first[:, None]
    inside = (ids >= 0) & (ids < slots)
    return Window(total - begin, slots, ids.clamp(0, max(0, slots - 1)), inside, first, before + slots)
