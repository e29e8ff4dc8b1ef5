"""The table of models/README.md: errors of the recurrences in chunks, against the recurrence token by token in fp64.

    python tests/models/recurrence_errors.py

512 tokens, two heads of 64 channels; each error is relative to the largest output. Inputs in bf16 are rounded before both: what is
left is the output's own rounding, 2^-9. Decays are in fp32, as in the models.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from models.layers.delta_rule import delta_rule, delta_rule_recurrent
from models.layers.ssd import ssd, ssd_recurrent

STRONGEST = -math.exp(-0.5)  # RWKV-7's strongest log decay
CHUNKS = 16, 64, 128, 256
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
ROWS, HEADS, WIDTH = 1, 2, 64


def delta_inputs(worst: bool, length: int, strongest: float = STRONGEST) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    r, k, v, removal = (torch.randn(ROWS, length, HEADS, WIDTH, generator=draw, dtype=torch.float64) for _ in range(4))
    removal = F.normalize(removal, dim=-1)
    rate = torch.rand(ROWS, length, HEADS, 1, generator=draw, dtype=torch.float64)
    part = torch.ones(v.shape) if worst else torch.rand(v.shape, generator=draw)
    return {"r": r, "log_w": strongest * part.double(), "k": k, "v": v, "a": -removal, "b": removal * rate}


def ssd_inputs(worst: bool, length: int) -> dict[str, Tensor]:
    """Decays of a step: of Mamba-2's start, time steps up to 0.1 and rates of 1 to 16; the worst: both at their largest."""
    draw = torch.Generator().manual_seed(0)
    x, B, C = (torch.randn(ROWS, length, HEADS, WIDTH, generator=draw, dtype=torch.float64) for _ in range(3))
    dt = 0.1 * torch.rand(ROWS, length, HEADS, generator=draw, dtype=torch.float64)
    rates = 1 + 15 * torch.rand(HEADS, generator=draw, dtype=torch.float64)
    if worst:
        dt, rates = torch.full_like(dt, 0.1), torch.full_like(rates, 16.0)
    return {"x": x, "dt": dt, "A": -rates, "B": B, "C": C}


FORMS = {
    "SSD, decays of Mamba-2's start": (ssd, ssd_recurrent, lambda n: ssd_inputs(False, n), {}),
    "SSD, every decay the strongest, 0.202": (ssd, ssd_recurrent, lambda n: ssd_inputs(True, n), {}),
    "delta rule, random decays of RWKV-7": (
        delta_rule, delta_rule_recurrent, lambda n: delta_inputs(False, n), {"least_log_w": STRONGEST},
    ),
    "delta rule, every decay the strongest, 0.545": (
        delta_rule, delta_rule_recurrent, lambda n: delta_inputs(True, n), {"least_log_w": STRONGEST},
    ),
    "the same, its bound not known": (delta_rule, delta_rule_recurrent, lambda n: delta_inputs(True, n), {}),
    "delta rule, decays down to e^-60": (
        delta_rule, delta_rule_recurrent, lambda n: delta_inputs(False, n, -60.0), {},
    ),
}  # fmt: skip
DECAYS = {"dt", "A", "log_w"}


def inputs_in(dtype: torch.dtype, inputs: dict[str, Tensor]) -> list[Tensor]:
    """bf16 of all but decays, which are fp32."""
    return [x.to(torch.float32 if name in DECAYS and dtype == torch.bfloat16 else dtype) for name, x in inputs.items()]


def errors(form: str, dtype: torch.dtype, length: int = 512, chunks: tuple[int, ...] = CHUNKS) -> list[float]:
    """The error at each chunk size."""
    chunked, recurrent, make, options = FORMS[form]
    given = inputs_in(dtype, make(length))
    expected, _ = recurrent(*(x.double() for x in given))
    found = (chunked(*given, chunk=chunk, **options)[0] for chunk in chunks)
    return [((y.double() - expected).abs().max() / expected.abs().max()).item() for y in found]


def main() -> None:
    print(f"| | inputs | {' | '.join(f'chunk {c}' for c in CHUNKS)} |")
    print("|---|---|" + "---|" * len(CHUNKS))
    for form in FORMS:
        for name, dtype in DTYPES.items():
            print(f"| {form} | {name} | {' | '.join(f'{e:.1e}' for e in errors(form, dtype))} |")


if __name__ == "__main__":
    main()
