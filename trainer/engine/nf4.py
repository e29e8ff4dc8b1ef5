"""4-bit weights of frozen models: NF4 (QLoRA, arXiv 2305.14314) through bitsandbytes.

64 neighbouring weights share a scale, their largest magnitude; each is one of 16 quantiles of a normal distribution times that scale.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 64  # weights that share a scale
BYTES = 0.5 + 4 / BLOCK  # of a weight, with its share of the fp32 scale


class Nf4Linear(nn.Module):
    """A frozen nn.Linear. `weight` is made anew for each product, in the number type that it had."""

    def __init__(self, linear: nn.Linear, device: torch.device) -> None:
        from bitsandbytes import functional

        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        whole = linear.weight.detach().to(device)
        # No buffers: a change of the model's type must not change them.
        self._packed, self._state = functional.quantize_4bit(
            whole, blocksize=BLOCK, quant_type="nf4", compress_statistics=False
        )

    @property
    def weight(self) -> Tensor:
        """[out, in]"""
        from bitsandbytes import functional

        return functional.dequantize_4bit(self._packed, self._state)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def quantise(model: Any, device: torch.device) -> Any:
    """The model in CPU memory, moved to `device`, with the linear layers of its blocks in NF4. Embedding and head stay as they are: an
    error there reaches every logit."""
    for block in model.blocks():
        for module in list(block.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear:
                    setattr(module, name, Nf4Linear(child, device))
    return model.to(device)


def quantised_weights(meta: Any) -> int:
    """How many weights `quantise` would hold in NF4."""
    modules = (module for block in meta.blocks() for module in block.modules())
    return sum(module.weight.numel() for module in modules if type(module) is nn.Linear)


def is_installed() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None
