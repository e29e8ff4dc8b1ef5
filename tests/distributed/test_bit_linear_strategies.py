"""Linear layers of three values where ranks hold parts of the weights: the scale is of the whole matrix, so every strategy trains as
one process does, with AdamW and with Muon."""

from pathlib import Path

import pytest
from cases import matrix_values, train_cases
from conftest import WHOLE

pytestmark = pytest.mark.slow

# As in test_matrix.py. A weight or an input at the edge between two values may fall to either side by a rounding of fp32; one step of
# 8 bits in one of 100,000 inputs moves the loss by far less than this.
SAME = 3e-5
STRATEGIES = ("ddp", "fsdp", "hsdp:1", "zero0", "zero1", "zero2", "zero3")
SAMPLE = (("adamw", "fsdp"), ("adamw", "zero1"), ("adamw", "zero3"), ("muon", "fsdp"))


def case(dataset, folder: Path, rule: str, strategy: str) -> dict:
    values = matrix_values(dataset, folder, "gpt2", strategy, optim__name=rule, optim__lr=3e-3)
    values["model"]["linear"] = "bitnet"
    return {"name": f"{rule} {strategy}", "values": values, "steps": 3}


@pytest.mark.parametrize("whole", WHOLE)
def test_every_strategy_trains_as_one_process(tiny_dataset, tmp_path, whole):
    pairs = [(rule, strategy) for rule in ("adamw", "muon") for strategy in STRATEGIES] if whole else SAMPLE
    alone = train_cases([case(tiny_dataset, tmp_path / "r", rule, "single") for rule in ("adamw", "muon")], 1, tmp_path)
    found = train_cases([case(tiny_dataset, tmp_path / "r", *pair) for pair in pairs], 2, tmp_path)
    for name, result in found.items():
        expected = alone[f"{name.split()[0]} single"]
        for key in ("loss", "grad_norm"):
            assert result[key] == pytest.approx(expected[key], rel=SAME), (name, key)
