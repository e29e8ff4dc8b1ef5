"""One decoder whose parts are chosen by config (`transformer_config.py`); each part is a file of `layers/`.

    embedding [+ positions] -> blocks -> norm -> output projection

A block has two branches, attention and MLP, which read the residual stream and add to it. `__init__` creates the modules that the
switches select; the forward pass does not look at names. `presets.py` defines well-known sets of switches, by name.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import mup
from models.base import Hidden, LanguageModel, Split, register
from models.counting import estimate_parameters, training_flops_of
from models.layers import autocast_dtype, compute_dtype, liger, normal_, truncated_normal_, untraced
from models.layers.attend import choose_kernel
from models.layers.attention import (
    Attention,
    Context,
    DifferentialHeads,
    KeyValueShift,
    LatentAttention,
    context_of,
    latent_widths,
)
from models.layers.block import BLOCKS, FurtherHead, Mlp, ParallelBlock, narrowed, norm_of
from models.layers.linear_cross_entropy import describe_kernel, linear_nll
from models.layers.multi_token import multi_token_loss
from models.layers.norms import set_gain
from models.layers.pattention import Pattention
from models.layers.positions import number_documents
from models.layers.residual import START_SCALES, HyperConnection, widen
from models.layers.shapes import shape_for
from models.state import DecodingState, StaticState
from models.transformer_config import TransformerConfig


class ForFurtherHeads(NamedTuple):
    """Input of the heads that predict later tokens. output: of the trunk, [B, T, D]; before: input of the last block, [B, T, D] or
    [B, T, n, D]; documents: [B, T]."""

    output: Tensor
    before: Tensor
    values: Tensor | None
    context: Context
    documents: Tensor | None


@register("transformer")
class Transformer(LanguageModel):
    """Embedding, blocks, norm, output projection; the switches are fields of `Config`."""

    Config = TransformerConfig
    narrow_init = True
    kernel_fields, device_kernels = ("attention_kernel", "kernels"), ("cudnn", "flex", "flash", "flash3", "liger")
    masks_documents = True

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        c, d = config, config.d_model
        block = BLOCKS[c.block]
        self.embedding = nn.Embedding(c.vocab_size, d)
        self.positions = nn.Embedding(c.max_context, d) if c.positions == "learned" else None
        self.dropout = nn.Dropout(c.dropout)
        width = c.kv_heads * c.head_width
        self.value_tables = nn.ModuleList(nn.Embedding(c.vocab_size, width) for _ in range(c.value_embeddings))
        self.layers: Any = nn.ModuleList(block(c, layer) for layer in range(c.n_layers))
        self.keep_weights = nn.Parameter(torch.empty(c.n_layers)) if c.x0_skip else None
        self.x0_weights = nn.Parameter(torch.empty(c.n_layers)) if c.x0_skip else None
        self.skip_weights = nn.Parameter(torch.empty(c.n_layers // 2)) if c.unet_skips and c.n_layers > 1 else None
        self.norm = norm_of(c, c.norm_placement != "post")  # with "post" the last block already ends with a norm
        self.head = None if c.tied else nn.Linear(d, c.vocab_size, bias=False)
        self.further: Any = nn.ModuleList(FurtherHead(c, i) for i in range(1, c.n_predict))
        self.base_width, self.head_scale = mup.base_of(c)[0], c.multipliers.output
        self.max_context = c.max_context or None
        self.by_liger = liger.take_over(self, c) if c.kernels == "liger" else []
        self.single_loss = untraced(liger.linear_cross_entropy) if "loss" in self.by_liger else None
        self.windows = sorted({c.window_of(layer) for layer in range(len(self.blocks()))})

    def hidden(self, tokens: Tensor, *, documents: Tensor | None = None, state: DecodingState | None = None) -> Hidden:
        documents = None if documents is None else number_documents(documents)
        context = self.context(tokens, documents, state)
        x = self.embed(tokens, context)
        dtype, x = x.dtype, self.for_stream(x)
        tables = [self.for_stream(table(tokens)) for table in self.value_tables]  # [B, T, G * head_dim] each
        x, before, values = self.trunk(x, tables, context, state)
        x = narrowed(x).to(dtype)  # the final norm is as exact for every residual_dtype
        if state is not None:
            state.length += tokens.shape[1]
        further = ForFurtherHeads(x, before, values, context, documents) if self.further else None
        return Hidden(self.for_head(self.norm(x)), further)

    def for_head(self, x: Tensor) -> Tensor:
        """The input of an output projection, from the normalised output of the blocks, [B, T, D]."""
        return x if self.head_scale == 1 else x * self.head_scale

    def context(self, tokens: Tensor, documents: Tensor | None, cache: DecodingState | None) -> Context:
        """Positions, and for every window size what each query sees."""
        length = tokens.shape[1]
        if self.max_context is not None and not isinstance(cache, StaticState):
            whole = length if cache is None else cache.length + length
            if whole > self.max_context:
                raise ValueError(f"a sequence of {whole} tokens exceeds max_context ({self.max_context})")
        return context_of(self.choose_kernel, self.windows, length, tokens.device, documents, cache)

    def choose_kernel(self, device: torch.device, start: int, length: int, documents: bool) -> tuple[str, str]:
        """(name of the kernel that computes attention on `device`, why); start: number of cached tokens."""
        c = self.config
        return choose_kernel(
            c.attention_kernel,
            head_dim=c.head_width + (latent_widths(c)[0] if c.attention == "latent" else 0),
            value_dim=2 * c.head_width if c.attention == "differential" else c.head_width,
            softcap=c.attention_softcap > 0,
            attention_bias=c.positions == "alibi" or c.forget_gate,
            window=any(0 < window < start + length for window in self.windows),
            documents=documents,
            cached=start > 0,
            length=length,
            dtype=compute_dtype(self.embedding.weight, device),
            device=device,
        )

    def embed(self, tokens: Tensor, context: Context) -> Tensor:
        """[B, T] -> [B, T, D], or [B, T, n, D] with hyper-connections."""
        c = self.config
        x = self.embedding(tokens)
        if c.embedding_scale:
            x = x * math.sqrt(self.base_width)
        if self.positions is not None:
            x = x + self.positions(context.positions)
        if self.training and c.neftune_alpha:
            reach = c.neftune_alpha / math.sqrt(x.shape[1] * self.base_width)
            x = x + torch.empty_like(x).uniform_(-reach, reach)
        x = self.dropout(x)
        return widen(x, c.streams) if c.streams else x

    def for_stream(self, x: Tensor) -> Tensor:
        """x in the dtype of the residual stream."""
        rounds = self.config.residual_dtype == "bf16" and autocast_dtype(x.device.type) == torch.bfloat16
        return x.bfloat16() if rounds else x

    def trunk(
        self, x: Tensor, tables: list[Tensor], context: Context, cache: DecodingState | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """All blocks with the skips around them: (output, input of the last block, values for a further block)."""
        x0, before, values = x, x, None
        outputs: list[Tensor] = []
        half = self.config.n_layers // 2
        for layer, block in enumerate(self.layers):
            if self.keep_weights is not None and self.x0_weights is not None:
                x = self.keep_weights[layer].to(x.dtype) * x + self.x0_weights[layer].to(x.dtype) * x0
            if self.skip_weights is not None and layer >= self.config.n_layers - half:
                x = x + self.skip_weights[self.config.n_layers - 1 - layer].to(x.dtype) * outputs.pop()
            table = self.config.value_table_of(layer)
            before = x
            x, values = block(x, values if table is None else tables[table], context, cache)
            if self.skip_weights is not None and layer < half:
                outputs.append(x)
        return x, before, values

    def states_of_heads(self, hidden: Hidden, state: DecodingState | None = None) -> list[Tensor]:
        count = hidden.states.shape[1]
        if state is not None:
            state.length -= count  # the blocks of the heads read the same tokens as the trunk did
        states = [
            hidden.states,
            *(self.for_head(head(*hidden.heads[:4], self.norm, state)) for head in self.further),
        ]
        if state is not None:
            state.length += count
        return states

    def unembedding(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    def logits(self, hidden: Hidden) -> Tensor:
        """[B, T, V]; -inf for padding rows of the vocabulary."""
        return self.logits_of_head(0, hidden.states)

    def logits_of_head(self, index: int, states: Tensor) -> Tensor:
        c = self.config
        own = self.further[index - 1].unembedding if index > 0 else None
        logits = F.linear(states, self.unembedding() if own is None else own.weight)
        if c.final_softcap:
            logits = c.final_softcap * (logits / c.final_softcap).tanh()
        if c.unpadded_vocab:
            logits = logits.masked_fill(torch.arange(c.vocab_size, device=logits.device) >= c.unpadded_vocab, -math.inf)
        return logits

    def nll(self, hidden: Hidden, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        c = self.config
        softcap, vocab_size = c.final_softcap or None, c.unpadded_vocab or None
        return linear_nll(hidden.states, self.unembedding(), targets, weights, softcap=softcap, vocab_size=vocab_size)

    def loss(
        self, hidden: Hidden, targets: Tensor, reduction: str = "mean", weights: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, parts) over all prediction heads."""
        c = self.config
        if self.single_loss is not None and weights is None:
            softcap = c.final_softcap or None
            return self.single_loss(hidden.states, self.unembedding(), targets, reduction, softcap=softcap), {}
        own = [head.unembedding.weight for head in self.further if head.unembedding is not None]
        return multi_token_loss(
            self.states_of_heads(hidden),
            [self.unembedding(), *own] if own else self.unembedding(),
            targets,
            reduction,
            target_weights=weights,
            documents=None if hidden.heads is None else hidden.heads.documents,
            head_weights=c.head_weights,
            softcap=c.final_softcap or None,
            z_loss=c.z_loss,
            vocab_size=c.unpadded_vocab or None,
        )

    def describe_kernels(self, device: torch.device | None = None, documents: bool = False) -> str:
        device = device or self.embedding.weight.device
        name, why = self.choose_kernel(device, 0, self.max_context or 1024, documents)
        others = liger.describe(self.by_liger, self.config, device)
        loss = "" if "loss" in self.by_liger else describe_kernel(device)
        return "; ".join(filter(None, (f"attention: {name} ({why})", others, loss)))

    # -- weights ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        c = self.config
        blocks: list[Any] = self.blocks()
        draw = truncated_normal_ if c.init == "mitchell" else normal_
        residual = {id(module): layer for layer, b in enumerate(blocks) for module in b.residual_projections()}
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                set_gain(module, 1.0)
            reset: Any = getattr(module, "reset", None)
            if callable(reset):
                reset()
            if isinstance(module, DifferentialHeads | KeyValueShift):
                module.draw(generator)
            for name, weight in module.named_parameters(recurse=False):
                if name == "bias" and isinstance(module, nn.Linear):
                    nn.init.zeros_(weight)
                elif isinstance(module, nn.Embedding):
                    draw(weight, _embedding_std(c, weight.shape[1]), generator)
                elif weight.ndim == 2 and not isinstance(module, HyperConnection):
                    draw(weight, self._std(module, name, residual.get(id(module))), generator)
        for block in blocks if c.zero_init else ():
            for end in block.branch_ends():
                set_gain(end, 0.0)
            for module in () if block.branch_ends() else block.residual_projections():
                nn.init.zeros_(module.weight)
        for weights, start in ((self.keep_weights, 1.0), (self.x0_weights, 0.0), (self.skip_weights, 1.0)):
            if weights is not None:
                weights.fill_(start)

    def _std(self, module: nn.Module, name: str, layer: int | None) -> float:
        """Standard deviation of a matrix. layer: index of the block if the matrix ends a branch, otherwise None."""
        c = self.config
        depth = mup.base_of(c)[1]  # with mup the branches are divided by what the model is deeper
        if module is self.head or module in [head.unembedding for head in self.further]:
            return HEAD_STDS.get(c.init, STDS[c.init])(c.init_std, c.d_model, None, depth)
        weight = module.get_parameter(name)
        d_in = weight.shape[0 if name == "values" else 1]  # the values of a Pattention are [slots, d_out]
        ends = name != "keys"  # in a Pattention the values end the branch, not the keys
        std = STDS[c.init](c.init_std, d_in, layer if ends else None, depth) * c.multipliers.hidden_std
        return std * c.n_streams ** START_SCALES[c.hyper_start] if layer is not None and ends else std

    def blocks(self) -> list[nn.Module]:
        return [*self.layers, *(head.block for head in self.further if head.block is not None)]

    def fused_matrices(self) -> dict[str, Split]:
        found: dict[str, Split] = {}
        for path, module in self.named_modules():
            if isinstance(module, Attention | LatentAttention | Mlp | ParallelBlock):
                found |= {f"{path}.{name}.weight": Split(0, rows) for name, rows in module.fused_rows().items()}
        return found

    def parameter_groups(self) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {}
        for name, _ in self.named_parameters():
            owner, _, kind = name.rpartition(".")
            groups.setdefault(_role(self.get_submodule(owner), owner, kind), []).append(name)
        return groups

    def multipliers(self) -> mup.Multipliers | None:
        return self.config.multipliers if self.config.mup else None

    def transfers(self) -> dict[str, mup.Transfer]:
        return mup.transfers(self)

    def tied_embedding(self) -> bool:
        return self.config.tied

    @classmethod
    def recording_refusal(cls, config: TransformerConfig) -> str | None:
        if config.kernels == "liger":
            return "Liger's loss waits for the device"
        if config.neftune_alpha:
            return "NEFTune's random numbers were never tried in a recording"
        return super().recording_refusal(config)

    @classmethod
    def check_sizes(cls, config: TransformerConfig, tokens: int | None = None, longest: int | None = None) -> None:
        if tokens is not None and 0 < config.unpadded_vocab < tokens:
            raise ValueError(f"unpadded_vocab: {config.unpadded_vocab} is smaller than the tokenizer's {tokens}")
        if longest is not None and config.window > longest:
            raise ValueError(
                f"window: {config.window} is more than the longest sequence ({longest}), so it has no effect; lower it "
                "or leave it out"
            )

    @classmethod
    def inferred(cls, config: TransformerConfig) -> dict[str, int]:
        return config.inferred()

    def caps_logits(self) -> bool:
        return self.config.final_softcap > 0

    # -- sizes -----------------------------------------------------------------------------------------------------

    def flops_per_token(self, sequence_length: int) -> int:
        """The counted FLOPs without windows, because the convention counts the whole [T, T] square."""
        config = self.with_kernels(self.config, "torch")  # fused kernels pad their inputs
        if config.window:
            config = replace(config, window=max(config.window, sequence_length))
        return training_flops_of(type(self), config, sequence_length) // sequence_length  # type: ignore[arg-type]

    @classmethod
    def config_for_scale(
        cls, scale: float, vocab_size: int, target_parameters: int, **choices: Any
    ) -> TransformerConfig:
        """A shape near GPT-2's aspect ratio with heads of about 64 channels, under the switches of `choices` and the preset."""
        default = cls.Config()
        group = default.n_heads // default.kv_heads
        together = 2 if choices.get("attention", default.attention) == "differential" else 1  # heads per attention map
        tables = choices.get("value_embeddings", default.value_embeddings)

        def of_shape(width: int, n_heads: int) -> TransformerConfig:
            shape = {"d_model": width, "n_heads": n_heads, "n_layers": max(1, 2 * tables)}
            if default.n_kv_heads:
                shape["n_kv_heads"] = n_heads // math.gcd(n_heads // together, group)
            return replace(default, **{"vocab_size": vocab_size, **shape, **choices})

        return shape_for(partial(estimate_parameters, cls), target_parameters, of_shape, choices)


# Standard deviation of a matrix, from (init_std, input width, index of the layer if it ends a branch else None, number of layers).
STDS = {
    "gpt2": lambda std, d_in, layer, n: std if layer is None else std / math.sqrt(2 * n),
    "normal": lambda std, d_in, layer, n: std,
    # By fan-in, smaller with depth, cut off at three standard deviations (OLMo's, arXiv 2402.00838).
    "mitchell": lambda std, d_in, layer, n: (d_in * (1 if layer is None else 2 * (layer + 1))) ** -0.5,
    # By fan-in (the widths of muP, arXiv 2203.03466, without its learning rates).
    "width_scaled": lambda std, d_in, layer, n: (d_in * (1 if layer is None else 2 * n)) ** -0.5,
}

# The same for an untied output projection, if it differs.
HEAD_STDS = {"width_scaled": lambda std, d_in, layer, n: 1 / d_in}


def _embedding_std(config: TransformerConfig, width: int) -> float:
    return width**-0.5 if config.init == "mitchell" else config.init_std


def _role(module: nn.Module, owner: str, kind: str) -> str:
    """The role of parameter `kind` of `module`. It uses names, not shapes: between uses, parameters under ZeRO-3 have no shape."""
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Linear) and kind == "weight":
        return "head" if owner.endswith(("head", "unembedding")) else "matrix"
    if isinstance(module, Pattention) or kind == "dynamic_weight":
        return "matrix"
    return "bias" if kind == "bias" else "norm"
