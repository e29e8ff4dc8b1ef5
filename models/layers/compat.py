"""What the models use of torch's private names. Looked at in torch 2.11.0 and 2.13.0; tests/runtime/test_compat.py tries each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def raise_recompile_limit(versions: int) -> None:
    """Let torch.compile make at least so many versions of one function, in the whole process, before it gives up on it.

    Without the option (an older torch calls it cache_size_limit) the limit stays what it is.
    """
    options: Any = torch._dynamo.config
    for name in ("recompile_limit", "cache_size_limit"):
        if hasattr(options, name):
            setattr(options, name, max(getattr(options, name), versions))
            return


def scaled_product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    """(a a_scale) (b b_scale) of fp8 matrices, a row by row and b column by column in memory, in `dtype`.

    fast: keep some 14 bits of partial sums. RuntimeError on a device without units for fp8.
    """
    return torch._scaled_mm(a, b, a_scale, b_scale, out_dtype=dtype, use_fast_accum=fast)
