"""GPT-2 (Radford et al. 2019), after OpenAI's code: learned positions, pre-norm blocks, tied output projection."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Cache, LanguageModel, Output, register, require_positive
from models.layers import normal_
from models.layers.linear_cross_entropy import linear_cross_entropy

OPENAI_NAMES = {
    "attention_norm": "ln_1",
    "qkv": "attn.c_attn",
    "attention_out": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp_in": "mlp.c_fc",
    "mlp_out": "mlp.c_proj",
}


@dataclass(frozen=True)
class Gpt2Config:
    vocab_size: int = field(
        default=50304, metadata={"help": "rows of the embedding, which is the output projection too"}
    )
    d_model: int = field(default=768, metadata={"help": "width of the residual stream"})
    n_layers: int = field(default=12, metadata={"help": "blocks"})
    n_heads: int = field(default=12, metadata={"help": "attention heads; divides d_model"})
    max_context: int = field(default=1024, metadata={"help": "rows of the position table: the longest sequence"})
    gelu: str = field(
        default="exact", metadata={"help": "exact (erf) or tanh (the approximation OpenAI's weights need)"}
    )
    norm_eps: float = field(default=1e-5, metadata={"help": "added to the variance in LayerNorm"})

    def __post_init__(self) -> None:
        require_positive(self, "vocab_size", "d_model", "n_layers", "n_heads", "max_context")
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads must divide d_model ({self.d_model}), {self.n_heads} does not")
        if self.gelu not in ("exact", "tanh"):
            raise ValueError(f"gelu must be exact or tanh, not {self.gelu!r}")
        if self.norm_eps <= 0:
            raise ValueError(f"norm_eps must be above 0, not {self.norm_eps}")


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); x [B, T, D]."""

    def __init__(self, config: Gpt2Config, layer: int) -> None:
        super().__init__()
        d = config.d_model
        self.layer = layer
        self.n_heads = config.n_heads
        self.gelu = "none" if config.gelu == "exact" else "tanh"
        self.attention_norm = nn.LayerNorm(d, eps=config.norm_eps)
        self.qkv = nn.Linear(d, 3 * d)
        self.attention_out = nn.Linear(d, d)
        self.mlp_norm = nn.LayerNorm(d, eps=config.norm_eps)
        self.mlp_in = nn.Linear(d, 4 * d)
        self.mlp_out = nn.Linear(4 * d, d)

    def forward(self, x: Tensor, visible: Tensor | None, cache: Cache | None = None) -> Tensor:
        """visible: [T, T_k] or [B, 1, T, T_k] bool; None means causal attention among the tokens of x."""
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.n_heads, -1))  # [B, T, 3, H, head_dim]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # [B, H, T, head_dim]
        if cache is not None:
            k, v = cache.extend(self.layer, k, v, dim=2)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None)
        x = x + self.attention_out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))

    def mlp(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        return self.mlp_out(F.gelu(self.mlp_in(x), approximate=self.gelu))


@register("gpt2")
class Gpt2(LanguageModel):
    """Token and position embedding, blocks, LayerNorm, the token embedding again as output projection."""

    Config = Gpt2Config
    Block = Block  # a variant of GPT-2 names its own
    masks_documents = True

    def __init__(self, config: Gpt2Config) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.max_context, config.d_model)
        self.layers = nn.ModuleList(self.Block(config, layer) for layer in range(config.n_layers))
        self.norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.max_context = config.max_context

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        documents: Tensor | None = None,
        cache: Cache | None = None,
        reduction: str = "mean",
    ) -> Output:
        start = cache.length if cache is not None else 0
        stop = start + tokens.shape[1]
        if stop > self.config.max_context:
            raise ValueError(f"a sequence of {stop} tokens exceeds max_context ({self.config.max_context})")
        if documents is not None and cache is not None:
            raise ValueError("documents must be None with a cache: one document is decoded per row")
        j = torch.arange(stop, device=tokens.device)
        positions, visible = j[start:], None
        if documents is not None:
            positions = positions_in_documents(documents)  # [B, T]
            visible = ((j <= j[:, None]) & (documents[:, :, None] == documents[:, None, :]))[:, None]  # [B, 1, T, T]
        elif start > 0:
            visible = j <= j[start:, None]  # [T, start + T]

        x = self.embedding(tokens) + self.positions(positions)  # [B, T, D]
        for block in self.layers:
            x = block(x, visible, cache)
        if cache is not None:
            cache.length = stop
        x = self.norm(x)
        if targets is None:
            return Output(logits=F.linear(x, self.embedding.weight))  # [B, T, V]
        return Output(loss=linear_cross_entropy(x, self.embedding.weight, targets, reduction))

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layers)  # two branches per block add to the residual stream
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 1:  # LayerNorm
                nn.init.ones_(parameter)
            else:
                normal_(parameter, residual_std if "_out." in name else 0.02, generator)

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def parameter_groups(self) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {"embedding": [], "matrix": [], "norm": [], "bias": []}
        for name, parameter in self.named_parameters():
            if name in ("embedding.weight", "positions.weight"):
                groups["embedding"].append(name)
            elif name.endswith(".bias"):
                groups["bias"].append(name)
            else:
                groups["norm" if parameter.ndim == 1 else "matrix"].append(name)
        return groups

    def tied_embedding(self) -> bool:
        return True

    @classmethod
    def config_for_scale(cls, scale: float, vocab_size: int, target_parameters: int) -> Gpt2Config:
        """The shape nearest GPT-2's aspect (width = 64 depth, heads of 64) whose count is within 3 % of the target.

        Where none is (models under a few million parameters), any width that is a multiple of 8, with narrower heads.
        """

        def miss(config: Gpt2Config) -> float:
            return abs(cls.count_parameters(config) / target_parameters - 1)

        def aspect(config: Gpt2Config) -> float:
            return abs(math.log(config.d_model / (64 * config.n_layers)))

        for step in (64, 8):
            shapes = [_shape_of_width(width, vocab_size, target_parameters) for width in range(step, 128 * step, step)]
            met = [config for config in shapes if miss(config) < 0.03]
            if met:
                return min(met, key=aspect)
        return min(shapes, key=miss)

    @classmethod
    def count_parameters(cls, config: Gpt2Config) -> int:
        d = config.d_model
        return (config.vocab_size + config.max_context) * d + config.n_layers * (12 * d**2 + 13 * d) + 2 * d

    def flops_per_token(self, sequence_length: int) -> int:
        """6 per weight of a product (the tied head counts, the lookups do not), and attention over the whole [T, T]."""
        config, d = self.config, self.config.d_model
        weights = config.vocab_size * d + config.n_layers * 12 * d**2
        return 6 * weights + 12 * config.n_layers * sequence_length * d


def positions_in_documents(documents: Tensor) -> Tensor:
    """Position of each token in its own document, 0 at every change of number; documents [B, T] -> [B, T]."""
    t = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    starts = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    return t - torch.where(starts, t, 0).cummax(dim=1).values


def _shape_of_width(width: int, vocab_size: int, target_parameters: int) -> Gpt2Config:
    """The config of this width whose depth brings it nearest the target."""
    one = Gpt2Config(vocab_size=vocab_size, d_model=width, n_layers=1, n_heads=width // math.gcd(width, 64))
    two = replace(one, n_layers=2)
    first = Gpt2.count_parameters(one)
    per_block = Gpt2.count_parameters(two) - first
    return replace(one, n_layers=max(1, 1 + round((target_parameters - first) / per_block)))


@torch.no_grad()
def load_openai_weights(model: Gpt2, weights: dict[str, Tensor]) -> None:
    """Copy OpenAI's weights out of the state dict of a Hugging Face `GPT2LMHeadModel`.

    The config must have its sizes and gelu="tanh". `KeyError` or `RuntimeError` where names or shapes do not match.
    """

    def copy(target: nn.Module, source: str, transposed: bool = False) -> None:
        for name, parameter in target.named_parameters():
            value = weights[f"transformer.{source}.{name}"]
            if value.shape[:: -1 if transposed else 1] != parameter.shape:
                raise RuntimeError(f"transformer.{source}.{name} is {tuple(value.shape)}, not {tuple(parameter.shape)}")
            parameter.copy_(value.t() if transposed else value)

    copy(model.embedding, "wte")
    copy(model.positions, "wpe")
    for layer, block in enumerate(model.layers):
        for ours, theirs in OPENAI_NAMES.items():
            # OpenAI's linear layers hold [in, out]; on a bias .t() does nothing.
            copy(getattr(block, ours), f"h.{layer}.{theirs}", transposed=not ours.endswith("norm"))
    copy(model.norm, "ln_f")
