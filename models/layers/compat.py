"""Private names of torch that the models use. Checked in torch 2.11.0 and 2.13.0; tests/runtime/test_compat.py tests each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def raise_recompile_limit(versions: int) -> None:
    """Let torch.compile make at least `versions` versions of one function, in the whole process, before it gives up.

    If torch has no such option (an older torch calls it cache_size_limit), the limit does not change.
    """
    options: Any = torch._dynamo.config
    for name in ("recompile_limit", "cache_size_limit"):
        if hasattr(options, name):
            setattr(options, name, max(getattr(options, name), versions))
            return


def scaled_product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    """(a a_scale) (b b_scale) of fp8 matrices, in `dtype`; a must be row-major and b column-major in memory.

    fast: partial sums keep only about 14 bits. RuntimeError on a device without fp8 units.
    """
    return torch._scaled_mm(a, b, a_scale, b_scale, out_dtype=dtype, use_fast_accum=fast)
