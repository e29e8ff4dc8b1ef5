"""Future token prediction (arXiv 2410.18160): a causal encoder, and a small decoder that predicts several tokens from what it says.

`mode: paper`. The encoder's vector e_t becomes S vectors by one matrix. The decoder attends to these alone, and to the tokens
x_t ... x_t+i of its own, and predicts x_t+i+1, i < N. Its first step is the model's prediction of the next token: validation, bits
per byte and text are of it, and training learns it at every position. The further steps are parts of the training loss, at every
`decoder_every`-th position, weighted gamma^i times decoder_every (so that their sum is right on average). The first position
follows from the row's tokens, so that it varies and every engine and every resumed run has the same.

`mode: chunked`, BlaGPT's form: chunks of N tokens. The encoder sees whole chunks and all before them. The decoder of a chunk is
causal in it, and knows of the earlier ones the encoder's vectors of the chunk before: it attends to them, and adds their mean,
through a matrix for each place. The first chunk has a learned vector instead (BlaGPT gives it its own first encoder state, which
has seen the whole chunk). The loss of the token at place i is weighted gamma^i, normalised to a mean of 1; what this adds to the
cross-entropy is a part of the loss. Documents: see layers/patches_fixed.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import IGNORE, Hidden, register
from models.config import check_choice, check_ranges, setting
from models.layers import normal_
from models.layers.attend import KERNELS, AttentionMask
from models.layers.causal import Context
from models.layers.linear_cross_entropy import divisor, weighted_linear_cross_entropy
from models.layers.mlp import ACTIVATIONS, hidden_width
from models.layers.norms import RMSNorm
from models.layers.patches_fixed import Learned, Level, PatchStack, WithinPatch
from models.layers.plain_attention import Visible
from models.layers.plain_block import PlainBlock, Seen, Shape
from models.state import DecodingState


@dataclass(frozen=True)
class FtpConfig:
    vocab_size: int = setting(50304, "rows of the embedding and of the output projection", low=1, high=10**9)
    d_model: int = setting(768, "width of the residual streams", low=1, high=10**6)
    n_layers: int = setting(12, "blocks of the encoder", low=1, high=1000)
    n_heads: int = setting(12, "attention heads; must divide d_model into heads of even width", low=1, high=10**4)
    mode: str = setting("paper", "paper (the decoder starts at each token) or chunked (at each chunk, BlaGPT's form)")
    decoder_layers: int = setting(
        0, "blocks of the decoder; 0: a quarter of n_layers, in mode chunked as many as n_layers", low=0, high=1000
    )
    predict_tokens: int = setting(8, "tokens that the decoder predicts from one place (N)", low=1, high=10**4)
    pseudo_tokens: int = setting(12, "vectors that stand for e_t in mode paper (S)", low=1, high=10**4)
    gamma: float = setting(
        0.0, "weight of a step per step; 0: 0.8, in mode chunked 1, which weights all the same", low=0, high=1
    )
    decoder_every: int = setting(
        0, "mode paper: further tokens are predicted at every so many-th position; 0: predict_tokens", low=0, high=10**4
    )
    rope_theta: float = setting(1e4, "base of the rotary wavelengths", above=1, high=1e12)
    mlp: str = setting("swiglu", "activation of the MLPs, see layers/mlp.py; they are as wide as there")
    norm_eps: float = setting(1e-6, "added to the mean square in RMSNorm", above=0, high=1)
    init_std: float = setting(0.02, "standard deviation of the initial matrices", above=0, high=1)
    tied: bool = setting(True, "the output projection is the embedding")
    dropout: float = setting(0.0, "part of what each branch adds that is zero in training", low=0, high=0.99)
    attention_kernel: str = setting("auto", "of the encoder: auto, torch, sdpa, cudnn, flex, flash or flash3")

    def __post_init__(self) -> None:
        check_ranges(self)
        check_choice(self, "attention_kernel", ("auto", *KERNELS))
        if self.mode not in ("paper", "chunked"):
            raise ValueError(f"mode must be paper or chunked, not {self.mode!r}")
        if self.mlp not in ACTIVATIONS:
            raise ValueError(f"mlp must be one of {', '.join(ACTIVATIONS)}, not {self.mlp!r}")
        self.shape.check("n_heads")
        if self.mode == "chunked" and self.decoder_every:
            raise ValueError("decoder_every must be 0 in mode chunked, which predicts every token once")

    @property
    def chunked(self) -> bool:
        return self.mode == "chunked"

    @property
    def decoders(self) -> int:
        return self.decoder_layers or (self.n_layers if self.chunked else max(1, round(self.n_layers / 4)))

    @property
    def step_weight(self) -> float:
        return self.gamma or (1.0 if self.chunked else 0.8)

    @property
    def every(self) -> int:
        return self.decoder_every or self.predict_tokens

    @property
    def shape(self) -> Shape:
        hidden, depth = hidden_width(self.mlp, self.d_model, 8), self.n_layers
        numbers = self.rope_theta, self.norm_eps, self.init_std, depth, self.dropout
        return Shape(self.d_model, self.n_heads, self.mlp, hidden, *numbers)

    @property
    def decoder_shape(self) -> Shape:
        return self.shape._replace(depth=self.decoders)


@register("ftp")
class Ftp(PatchStack):
    """`layers` are the decoder's blocks. Both stacks end in an RMSNorm; the embedding is shared, and by default the output matrix."""

    Config = FtpConfig
    narrow_init = True
    n_contexts = 3

    def __init__(self, config: FtpConfig) -> None:
        c, d = config, config.d_model
        cross_theta = c.rope_theta if c.chunked else 0.0
        decoder = [PlainBlock(c.decoder_shape, ("decoder", i), True, cross_theta) for i in range(c.decoders)]
        super().__init__(c, decoder, RMSNorm(d, c.norm_eps))
        self.patch_size, self.attention_head_dim = c.predict_tokens, c.shape.head_dim
        self.document_grid = c.predict_tokens if c.chunked else 1
        self.embedding_std = c.init_std
        self.encoder: Any = nn.ModuleList(PlainBlock(c.shape, ("encoder", i)) for i in range(c.n_layers))
        self.encoder_norm = RMSNorm(d, c.norm_eps)
        # What the decoder gets: S vectors, or one for each place of a chunk.
        self.expand = nn.Linear(d, (c.predict_tokens if c.chunked else c.pseudo_tokens) * d, bias=False)
        self.start = Learned(d) if c.chunked else None
        self.places = Learned(c.predict_tokens, d) if c.chunked else None

    def hidden(self, tokens: Tensor, *, documents: Tensor | None = None, state: DecodingState | None = None) -> Hidden:
        if self.config.chunked:
            return super().hidden(tokens, documents=documents, state=state)
        x, context = self.embedding(tokens), self.context(tokens, documents, state)
        encoded = self.encode(x, context)  # [B, T, D]
        if state is not None:
            state.length += tokens.shape[1]
        states = self.decode_steps(encoded.flatten(0, 1), x.flatten(0, 1).unsqueeze(1)).view_as(x)
        return Hidden(
            self.norm(states), (encoded, tokens, context.documents) if self.config.predict_tokens > 1 else None
        )

    def encode(self, x: Tensor, context: Context) -> Tensor:
        for block in self.encoder:
            x = block(x, context)
        return self.encoder_norm(x)

    # -- mode paper ------------------------------------------------------------------------------------------------

    def decode_steps(self, encoded: Tensor, x: Tensor) -> Tensor:
        """encoded [M, D], embeddings x [M, n, D] of the tokens from there on -> [M, n, D], before the norm: step i sees x_0 ... x_i."""
        pseudo = self.expand(encoded).unflatten(-1, (self.config.pseudo_tokens, -1))  # [M, S, D]
        device, count = x.device, x.shape[1]
        everything = torch.ones(count, pseudo.shape[1], dtype=torch.bool, device=device)
        visible = Visible(torch.arange(count, device=device), {0: AttentionMask()}, "torch")
        for layer in self.layers:
            x = layer(x, Context(visible=visible), pseudo, Seen(everything, "torch"))
        return x

    def loss(
        self, hidden: Hidden, targets: Tensor, reduction: str = "mean", weights: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        c = self.config
        if c.chunked:
            return self.chunked_loss(hidden, targets, reduction, weights)
        if hidden.heads is None:
            return super().loss(hidden, targets, reduction, weights)
        encoded, tokens, documents = hidden.heads
        states, labels, factors = self.further(encoded, tokens, documents, targets, weights)
        ones = torch.ones_like(targets) if weights is None else weights
        divide_by = divisor(targets, reduction)
        loss, losses, _ = weighted_linear_cross_entropy(
            torch.cat((hidden.states.flatten(0, 1), states.flatten(0, 1))),
            self.unembedding(),
            torch.cat((targets.flatten(), labels.flatten())),
            torch.cat((ones.flatten().to(factors.dtype), factors.flatten())),
            divide_by,
        )
        sums = losses[targets.numel() :].view(labels.shape).sum(0)
        parts = sums if divide_by is None else sums / divide_by
        return loss, {f"step_{i}": part for i, part in enumerate(parts.unbind(), 2)}

    def further(
        self, encoded: Tensor, tokens: Tensor, documents: Tensor | None, targets: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(states [M, N - 1, D], targets [M, N - 1], factors of their losses, the same) of the steps after the first, at every
        `decoder_every`-th position of each row, M together."""
        c, length = self.config, tokens.shape[1]
        places = torch.arange(-(-length // c.every), device=tokens.device) * c.every
        at = places + self.first_place(tokens)  # [B, n]
        inside = at < length
        at = at.clamp(max=length - 1)
        steps = at.unsqueeze(-1) + torch.arange(c.predict_tokens, device=tokens.device)  # [B, n, N]

        def taken(x: Tensor, fill: int) -> Tensor:
            padded = F.pad(x, (0, c.predict_tokens), value=fill)
            return padded.gather(1, steps.flatten(1)).view_as(steps)

        labels = taken(targets, IGNORE).where(inside.unsqueeze(-1), IGNORE)
        if documents is not None:
            numbers = taken(documents, -1)
            labels = labels.where(numbers == numbers[..., :1], IGNORE)
        ahead = torch.arange(c.predict_tokens, device=tokens.device)
        factors = (c.every * c.step_weight ** ahead.float()).expand(labels.shape)
        if weights is not None:
            factors = factors * taken(weights, 0)
        chosen = encoded.gather(1, at.unsqueeze(-1).expand(-1, -1, encoded.shape[-1])).flatten(0, 1)  # [M, D]
        x = self.embedding(taken(tokens, 0).flatten(0, 1))  # [M, N, D]
        states = self.norm(self.decode_steps(chosen, x))[:, 1:]
        return states, labels.flatten(0, 1)[:, 1:], factors.flatten(0, 1)[:, 1:]

    def first_place(self, tokens: Tensor) -> Tensor:
        """[B, 1] in 0 ... decoder_every - 1: as good as random, but no generator has to be in step with that of another process."""
        return tokens.sum(1, keepdim=True) % self.config.every

    # -- mode chunked ----------------------------------------------------------------------------------------------

    def contexts(
        self,
        patches: Tensor,
        documents: Tensor | None = None,
        state: DecodingState | None = None,
        read: int | None = None,
    ) -> tuple[Tensor, ...]:
        """(what is added at each place [B, K, N, D], what is attended to [B, K, N + 1, D], which of it, [B, K, N, N + 1] bool): the
        encoder's vectors of the chunk before, and the start vector, for tokens without a chunk before."""
        assert self.start is not None
        batch, size = len(patches), self.patch_size
        encoded = self.encode_chunks(patches, documents, state, read)  # [B, m, N, D]
        if read is None:
            encoded = F.pad(encoded, (0, 0, 0, 0, 1, 0))
        chunks = encoded.shape[1]
        start = self.start().to(encoded.dtype)
        known = torch.ones(batch, chunks, size, dtype=torch.bool, device=patches.device)  # vectors that may be seen
        if read is None:
            known[:, 0] = False
        own = known  # tokens that see them
        if documents is not None:
            owner = documents[:, :, :1]
            known = F.pad(documents[:, :-1] == owner[:, 1:], (0, 0, 1, 0))
            own = (documents == owner) & known[..., -1:]
        counts = known.sum(-1, keepdim=True)
        mean = (encoded * known.unsqueeze(-1).to(encoded.dtype)).sum(2) / counts.clamp(min=1).to(encoded.dtype)
        added = self.expand(torch.cat((mean, start.expand(batch, 1, -1)), dim=1)).unflatten(-1, (size, -1))
        added = added[:, :-1].where(own.unsqueeze(-1), added[:, -1:])  # [B, K, N, D]
        memory = torch.cat((encoded, start.expand(batch, chunks, 1, -1)), dim=2)
        mask = torch.cat((own.unsqueeze(-1) & known.unsqueeze(-2), ~own.unsqueeze(-1)), dim=-1)
        return added, memory, mask

    def encode_chunks(
        self, chunks: Tensor, documents: Tensor | None, state: DecodingState | None, read: int | None
    ) -> Tensor:
        """[B, m, N] -> [B, m, N, D]: all of a chunk, and of those before it, sees all of the chunk."""
        size, before = self.patch_size, (read or 0) * self.patch_size
        tokens = chunks.flatten(1)
        x = self.embedding(tokens)
        if not chunks.shape[1]:  # attention over nothing
            return x.unflatten(1, (0, size))
        positions = torch.arange(before + tokens.shape[1], device=tokens.device)
        queries = positions[before:]
        mask = positions // size <= queries[:, None] // size
        if documents is not None:
            numbers = documents[:, :-1].flatten(1)
            mask = (mask & (numbers[:, :, None] == numbers[:, None, :])).unsqueeze(1)
        kernel = "torch" if self.config.attention_kernel == "torch" else "sdpa"
        seen = Visible(queries, {0: AttentionMask(mask=mask)}, kernel)
        level: Any = None if state is None else Level(state, before)
        return self.encode(x, Context(None, level, seen)).unflatten(1, (-1, size))

    def decode(
        self,
        tokens: Tensor,
        contexts: tuple[Tensor, ...],
        documents: Tensor | None = None,
        memory: WithinPatch | None = None,
    ) -> Tensor:
        assert self.places is not None
        added, encoded, mask = contexts
        size, shape = self.patch_size, tokens.shape
        start = 0 if memory is None else memory.length
        part = slice(start, start + shape[2])
        x = self.embedding(tokens) + self.places()[part] + added[:, :, part]  # [B, K, p, D]
        flat = None if documents is None else documents.flatten(0, 1)
        context = self.seen_within(tokens.flatten(0, 1), flat, memory, self.attention_head_dim)
        places = torch.arange(2 * size, device=tokens.device)
        rows = mask[:, :, part].flatten(0, 1).unsqueeze(1)  # [B K, 1, p, N + 1]
        seen = Seen(rows, "torch", queries=places[size:][part], keys=places[: size + 1])
        x = x.flatten(0, 1)
        for layer in self.layers:
            x = layer(x, context, encoded.flatten(0, 1), seen)
        return x.unflatten(0, shape[:2])

    def chunked_loss(
        self, hidden: Hidden, targets: Tensor, reduction: str, weights: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        gamma, size = self.config.step_weight, self.patch_size
        if gamma == 1:
            return super().loss(hidden, targets, reduction, weights)
        powers = [gamma**i for i in range(size)]
        mean = sum(powers) / size
        place = torch.arange(targets.shape[1], device=targets.device) % size
        factors = (gamma ** place.float() / mean).expand(targets.shape)
        given = factors if weights is None else factors * weights
        divide_by = divisor(targets, reduction)
        loss, losses, _ = weighted_linear_cross_entropy(hidden.states, self.unembedding(), targets, given, divide_by)
        more = (losses - losses / factors).sum()
        return loss, {"chunk_weights": more if divide_by is None else more / divide_by}

    # -- weights ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        super().init_weights(generator)
        for block in self.encoder:
            block.reset(generator)
        self.encoder_norm.reset()
        normal_(self.expand.weight, self.config.init_std, generator)
        if self.start is not None and self.places is not None:
            self.start.reset(1.0, generator)  # of the size of the encoder's vectors, after its norm
            self.places.reset(self.config.init_std, generator)

    def blocks(self) -> list[nn.Module]:
        return [*self.encoder, *self.layers]

    def role_of(self, module: nn.Module, kind: str) -> str:
        return "position" if module is self.places else super().role_of(module, kind)

    @classmethod
    def check_sizes(cls, config: FtpConfig, tokens: int | None = None, longest: int | None = None) -> None:
        if longest is not None and config.predict_tokens >= longest:
            raise ValueError(
                f"predict_tokens: {config.predict_tokens} are not fewer than the longest sequence has ({longest}); lower it"
            )

    @classmethod
    def inferred(cls, config: FtpConfig) -> dict[str, int]:
        return {"decoder_layers": config.decoders} | ({} if config.chunked else {"decoder_every": config.every})

    @classmethod
    def kinds(cls, config: FtpConfig) -> list[str]:
        return ["encoder"] * config.n_layers + ["decoder"] * config.decoders

    @classmethod
    def parts(cls, config: FtpConfig, kind: str) -> list[nn.Module]:
        return [PlainBlock(config.shape, (kind, 0), cross=kind == "decoder")]

    @classmethod
    def shallowest(cls, config: FtpConfig) -> FtpConfig:
        return replace(config, n_layers=1, decoder_layers=1)
