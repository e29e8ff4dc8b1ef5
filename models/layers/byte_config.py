"""What the Configs of the models have in common that read bytes and cut them into patches as they read."""

from __future__ import annotations

from dataclasses import dataclass

from models.config import check_choice, check_ranges, setting
from models.layers.attend import KERNELS
from models.layers.plain_block import Shape, hidden_of


@dataclass(frozen=True)
class ByteConfig:
    """d_model, n_layers, n_heads: of the part that runs least often, over patches, words or chunks."""

    vocab_size: int = setting(
        320, "rows of the embedding and of the output projection; bytes and specials", low=1, high=10**9
    )
    d_model: int = setting(768, "width of the layers over patches, words or chunks", low=1, high=10**6)
    n_layers: int = setting(12, "layers over patches, words or chunks", low=1, high=1000)
    n_heads: int = setting(12, "heads of their attention; those of other layers have the same width", low=1, high=10**4)
    rope_theta: float = setting(500_000.0, "base of the rotary wavelengths", above=1, high=1e12)
    hidden_ratio: float = setting(8 / 3, "width of MLPs, relative to their input", above=0, high=100)
    norm_eps: float = setting(1e-5, "added to the mean square in RMSNorm", above=0, high=1)
    init_std: float = setting(0.02, "standard deviation of the initial matrices", above=0, high=1)
    tied: bool = setting(False, "the output projection is the embedding")
    dropout: float = setting(0.0, "part of what each branch adds that is zero in training", low=0, high=0.99)
    attention_kernel: str = setting("auto", "auto, torch, sdpa, cudnn, flex, flash or flash3")

    def __post_init__(self) -> None:
        check_ranges(self)
        check_choice(self, "attention_kernel", ("auto", *KERNELS))
        if self.d_model % self.n_heads or self.head_dim % 2:
            raise ValueError(
                f"n_heads must divide d_model ({self.d_model}) into heads of an even width, but {self.n_heads} does not"
            )

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    def shape_of(self, width: int, depth: int, window: int = 0) -> Shape:
        """Of blocks of this width, in a model of `depth` blocks."""
        numbers = self.rope_theta, self.norm_eps, self.init_std, depth, self.dropout
        shape = Shape(self.d_model, self.n_heads, "swiglu", 0, *numbers)
        return shape.of_width(width, hidden_of(width, self.hidden_ratio), window)
