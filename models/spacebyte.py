"""SpaceByte (arXiv 2404.14408): a transformer of bytes, in whose middle wider blocks run only at bytes that end a word.

Local layers read bytes in a window. At the first space-like byte after others, the byte's state, padded with zeros to the width of the
global layers, passes these, which see all such bytes before it; its first channels go back into the stream. Then further local layers
predict the next byte of every byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import counting
from models.base import Hidden, Split, register
from models.config import setting
from models.layers.attend import AttentionMask
from models.layers.byte_config import ByteConfig
from models.layers.causal import Context
from models.layers.norms import RMSNorm
from models.layers.patching import Patches, PatchState, Rule, cut, of_patch, refuse_fixed_shapes
from models.layers.plain_attention import Visible, visible
from models.layers.plain_block import PlainBlock, Shape, fused_matrices_in
from models.layers.stack import HybridStack


@dataclass(frozen=True)
class SpaceByteConfig(ByteConfig):
    local_layers: int = setting(2, "local layers, half as wide, on each side", low=1, high=1000)
    local_window: int = setting(512, "bytes that attention in local layers sees", low=1, high=10**9)
    patching: str = setting("space", "at which bytes global layers run: space or static")
    patch_size: float = setting(
        6.0,
        "bytes from one of these to the next; of space the mean, for 1.25 times as many of which there is room",
        low=1,
        high=10**4,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patching not in ("space", "static"):
            raise ValueError(f"patching must be space or static, not {self.patching!r}")
        if self.n_heads % 2:
            raise ValueError(f"n_heads must be even, because local layers have half of the heads, not {self.n_heads}")

    @property
    def rule(self) -> Rule:
        return Rule(self.patching, self.patch_size)

    @property
    def depth(self) -> int:
        return self.n_layers + 2 * self.local_layers

    @property
    def shape(self) -> Shape:
        """Of the global layers."""
        return self.shape_of(self.d_model, self.depth)

    @property
    def local_shape(self) -> Shape:
        return self.shape_of(self.d_model // 2, self.depth, self.local_window)


@register("spacebyte")
class SpaceByte(HybridStack):
    """`layers` are the global ones, `early` and `late` the local ones before and after them."""

    Config = SpaceByteConfig
    narrow_init = True
    embedding: nn.Embedding

    def __init__(self, config: SpaceByteConfig) -> None:
        c, w = config, config.d_model // 2
        layers = [PlainBlock(c.shape, ("global", i)) for i in range(c.n_layers)]
        super().__init__(c, layers, RMSNorm(w, c.norm_eps), width=w)
        self.early, self.late = (
            nn.ModuleList(PlainBlock(c.local_shape, (part, i)) for i in range(c.local_layers))
            for part in ("early", "late")
        )
        self.windows, self.attention_head_dim = (c.local_window,), c.head_dim

    def hidden(
        self,
        tokens: Tensor,
        *,
        documents: Tensor | None = None,
        state: Any = None,  # a PatchState
    ) -> Hidden:
        refuse_fixed_shapes(state)
        texts = tokens if state is None else state.append("tokens", tokens, dim=1)  # [B, read before + T]
        context = self.context(tokens, documents, state)
        patches = cut(texts, self.config.rule, context.documents)
        x = self.embedding(tokens)
        for layer in self.early:
            x = layer(x, context)
        x = self.through_global(x, patches, state)
        for layer in self.late:
            x = layer(x, context)
        if state is not None:
            state.length += tokens.shape[1]
        return Hidden(self.norm(x))

    def through_global(self, x: Tensor, patches: Patches, state: PatchState | None) -> Tensor:
        """x [B, T, w] with what the global layers add at bytes that end a patch."""
        new, width = x.shape[1], self.config.d_model
        ids, last = patches.ids[:, -new:], patches.last[:, -new:]
        ended = ids == last if patches.inside is None else (ids == last) & patches.inside
        if state is None:
            slots = self.config.rule.slots(new, patches.of_document is not None)
        else:
            # The host waits for the device, so that steps in which no patch ends run no global layer.
            before = patches.last[:, -new - 1] + 1 if state.length else torch.zeros_like(last[:, 0])
            slots, held = (int(n) for n in torch.stack(((last[:, -1] + 1 - before).max(), before.max())).tolist())
            if slots == 0:
                return x
            ids = (ids - before[:, None]).clamp(0, slots - 1)
        padded = F.pad(x, (0, width - x.shape[2])) * ended[..., None]
        empty = padded.new_zeros(len(x), slots, width)
        entering = empty.scatter_add(1, ids[..., None].expand_as(padded), padded)  # [B, M, D]; one byte each
        if state is None:
            wanted, weight = self.config.attention_kernel, self.embedding.weight
            context = Context(patches.of_document)
            seen = visible(wanted, (0,), self.attention_head_dim, weight, ids[:, :1].expand(-1, slots), context)
            context = context._replace(visible=seen)
        else:
            at = before[:, None] + torch.arange(slots, device=x.device)
            mask = torch.arange(held + slots, device=x.device) <= at[:, None, :, None]
            seen = Visible(at, {0: AttentionMask(mask=mask)}, "sdpa")
            context = Context(None, state.latent(before, held + slots), seen)  # type: ignore[arg-type]
        added = (self.run_layers(entering, context) - entering)[..., : x.shape[2]]
        return x + of_patch(added, ids) * ended[..., None]

    def new_state(self, batch: int, max_length: int | None, device: torch.device, dtype: torch.dtype) -> PatchState:
        return PatchState(max_length)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        super().init_weights(generator)
        for layer in (*self.early, *self.late):
            layer.reset(generator)  # type: ignore[operator]

    def blocks(self) -> list[nn.Module]:
        return [*self.early, *self.layers, *self.late]

    def fused_matrices(self) -> dict[str, Split]:
        return fused_matrices_in(self)

    @classmethod
    def config_for_scale(cls, scale: float, vocab_size: int, target_parameters: int, **choices: Any) -> SpaceByteConfig:
        return counting.find_shape(cls, vocab_size, target_parameters, choices, cls.count_parameters)

    @classmethod
    def count_parameters(cls, config: SpaceByteConfig) -> int:
        c, w = config, config.d_model // 2
        layers = 2 * c.local_layers * c.local_shape.parameters + c.n_layers * c.shape.parameters
        return layers + (1 if c.tied else 2) * c.vocab_size * w + w
