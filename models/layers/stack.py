"""The frame of the recurrent models: embedding, layers, norm, output projection. A model adds its layers and their initial values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models import counting
from models.base import Hidden, LanguageModel
from models.layers import compute_dtype, normal_
from models.layers.causal import Context, ShortConvolution
from models.layers.linear_cross_entropy import linear_cross_entropy, linear_nll
from models.layers.norms import RMSNorm, set_gain
from models.layers.plain_attention import kernel_for, visible
from models.layers.positions import number_documents
from models.layers.recurrent_kernels import CONVOLUTION, SSD, Case, Fused, choose
from models.state import DecodingState

USUAL_LENGTH = 1024  # tokens of a sequence for which a run says its kernels


class Stack(LanguageModel):
    """layers: each is called as layer(x, context) -> x, and has reset(generator), which sets all of its parameters and buffers.

    The Config has vocab_size, d_model and tied.
    """

    masks_documents = True
    # Parameters that AdamW updates without weight decay, as it does the gains of norms.
    further_roles: ClassVar[dict[str, str]] = {"convolution": "norm"}
    embedding_std = 0.02
    device_kernels: ClassVar[tuple[str, ...]] = ("cudnn", "flex", "flash", "flash3", *SSD, *CONVOLUTION)
    scans: ClassVar[Mapping[str, Fused]] = {}  # fused kernels that can replace torch's in the recurrence
    widths: tuple[int, ...] = ()  # channels of a head's keys and values in the recurrence

    def __init__(self, config: Any, layers: Iterable[nn.Module], norm: nn.Module, width: int = 0) -> None:
        """width: of the embedding and the output projection; 0: d_model."""
        super().__init__(config)
        width = width or config.d_model
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.layers: Any = nn.ModuleList(layers)
        self.convolutions = [(m.channels, m.size) for m in self.layers.modules() if isinstance(m, ShortConvolution)]
        self.norm = norm
        self.head = None if config.tied else nn.Linear(width, config.vocab_size, bias=False)

    def hidden(self, tokens: Tensor, *, documents: Tensor | None = None, state: DecodingState | None = None) -> Hidden:
        x = self.run_layers(self.embed(tokens), self.context(tokens, documents, state))  # [B, T, D]
        if state is not None:
            state.length += tokens.shape[1]
        return Hidden(self.norm(x))

    def context(self, tokens: Tensor, documents: Tensor | None, state: DecodingState | None) -> Context:
        """What layers need besides x. documents: [B, T] as in Batch."""
        chosen = self.fused_kernels(tokens.device, tokens.shape[1], documents is not None)
        calls: dict[str, Any] = {name: call for name, (_, _, call) in chosen.items()}
        return Context(None if documents is None else number_documents(documents), state, **calls)

    def fused_kernels(
        self, device: torch.device, length: int, documents: bool
    ) -> dict[str, tuple[str, str, Callable[..., Any] | None]]:
        """Field of Context -> what `choose` says of it; of those that the model has."""
        dtype = compute_dtype(self.embedding.weight, device)
        case = Case(device, dtype, length, documents, self.widths, self.convolutions)
        tables = {"scan": ("scan_kernel", self.scans), "convolution": ("conv_kernel", CONVOLUTION)}
        return {
            name: choose(field, getattr(self.config, field), table, case)
            for name, (field, table) in tables.items()
            if field in self.kernel_fields
        }

    def describe_kernels(self, device: torch.device | None = None, documents: bool = False) -> str:
        device = device or self.embedding.weight.device
        chosen = self.fused_kernels(device, USUAL_LENGTH, documents)
        return "; ".join(f"{part}: {name} ({why})" for part, (name, why, _) in chosen.items())

    def embed(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens)

    def run_layers(self, x: Tensor, context: Context) -> Tensor:
        for layer in self.layers:
            x = layer(x, context)
        return x

    def unembedding(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    def logits(self, hidden: Hidden) -> Tensor:
        return nn.functional.linear(hidden.states, self.unembedding())

    def nll(self, hidden: Hidden, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        return linear_nll(hidden.states, self.unembedding(), targets, weights)

    def loss(
        self, hidden: Hidden, targets: Tensor, reduction: str = "mean", weights: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return linear_cross_entropy(hidden.states, self.unembedding(), targets, reduction, weights=weights), {}

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        for table in (self.embedding, self.head):
            if table is not None:
                normal_(table.weight, self.embedding_std, generator)
        for layer in self.layers:
            layer.reset(generator)
        set_gain(self.norm, 1.0)

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def parameter_groups(self) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {}
        for name, _ in self.named_parameters():
            owner, _, kind = name.rpartition(".")
            groups.setdefault(self.role_of(self.get_submodule(owner), kind), []).append(name)
        return groups

    def role_of(self, module: nn.Module, kind: str) -> str:
        """The role of parameter `kind` of `module`. By name: between uses, parameters under ZeRO-3 have no shape."""
        if kind == "bias":
            return "bias"
        if isinstance(module, nn.Embedding):
            return "embedding"
        if isinstance(module, nn.Linear):
            return "head" if module is self.head else "matrix"
        return "convolution" if isinstance(module, ShortConvolution) else "norm"

    def tied_embedding(self) -> bool:
        return self.head is None


class HybridStack(Stack):
    """A Stack in which some layers are attention. Its Config has attention_kernel; windows: of its attention layers, 0 for none."""

    kernel_fields: ClassVar[tuple[str, ...]] = ("attention_kernel",)
    windows: tuple[int, ...] = (0,)
    attention_head_dim: int

    def context(self, tokens: Tensor, documents: Tensor | None, state: DecodingState | None) -> Context:
        context, wanted = super().context(tokens, documents, state), self.config.attention_kernel
        weight = self.embedding.weight
        return context._replace(visible=visible(wanted, self.windows, self.attention_head_dim, weight, tokens, context))

    def describe_kernels(self, device: torch.device | None = None, documents: bool = False) -> str:
        weight, wanted, size = self.embedding.weight, self.config.attention_kernel, self.attention_head_dim
        device = device or weight.device
        name, why = kernel_for(wanted, self.windows, size, weight, device, 0, USUAL_LENGTH, documents)
        return "; ".join(filter(None, (f"attention: {name} ({why})", super().describe_kernels(device, documents))))

    @classmethod
    def kinds(cls, config: Any) -> list[str]:
        """The kind of each layer."""
        raise NotImplementedError

    @classmethod
    def parts(cls, config: Any, kind: str) -> list[nn.Module]:
        """What a layer of this kind adds to the model, or for "frame" what every model has besides its layers."""
        raise NotImplementedError

    @classmethod
    def config_for_scale(cls, scale: float, vocab_size: int, target_parameters: int, **choices: Any) -> Any:
        return counting.find_shape(cls, vocab_size, target_parameters, choices, cls.count_by_kind)

    @classmethod
    def count_by_kind(cls, config: Any) -> int:
        """The number of parameters. Layers differ, so that the difference of two shallow models does not tell it."""
        known: Any = cls
        shallow, kinds = replace(config, n_layers=1), Counter(cls.kinds(config))
        counted = {kind: counting.parameters_of_kind(known, shallow, kind) for kind in ("frame", *kinds)}
        return counted["frame"] + sum(counted[kind] * n for kind, n in kinds.items())


def frame_parts(config: Any) -> list[nn.Module]:
    """The parts of a HybridStack besides its layers: its tables and the last norm."""
    tables = [nn.Embedding(config.vocab_size, config.d_model) for _ in range(1 if config.tied else 2)]
    return [RMSNorm(config.d_model, config.norm_eps), *tables]
