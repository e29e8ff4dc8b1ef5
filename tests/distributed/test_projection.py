"""Weights projected after each step (nGPT's), where a rank holds a part of them."""

import itertools
from pathlib import Path

import pytest
import torch
from cases import matrix_values, train_cases
from conftest import WHOLE

from trainer.checkpoint import format as checkpoint
from trainer.runtime.distributed import World

pytestmark = pytest.mark.slow

SAMPLE: dict[int, tuple[str, ...]] = {2: ("fsdp", "zero2", "zero3")}
STRATEGIES: dict[int, tuple[str, ...]] = {2: ("ddp", "fsdp", "zero0", "zero1", "zero2", "zero3"), 4: ("hsdp:2",)}


@pytest.mark.parametrize("whole", WHOLE)
def test_every_strategy_projects_what_one_process_does(tiny_dataset, tmp_path, whole):
    """Same losses, and saved vectors of norm 1: under FSDP columns are split, under ZeRO rows too, and there are masters."""
    spread, cases = STRATEGIES if whole else SAMPLE, {}
    for strategy in ("single", *itertools.chain(*spread.values())):
        folder = tmp_path / strategy.replace(":", "-")
        values = matrix_values(tiny_dataset, folder, "ngpt", strategy, optim__lr=1e-2)
        cases[strategy] = {"name": strategy, "values": values, "steps": 4, "save": str(folder)}
    reference = train_cases([cases["single"]], 1, tmp_path)["single"]
    for ranks, strategies in spread.items():
        for strategy, result in train_cases([cases[s] for s in strategies], ranks, tmp_path).items():
            for key in ("loss", "grad_norm"):  # a projection left out is off by 1e-3 and more
                assert result[key] == pytest.approx(reference[key], rel=3e-5), (strategy, key)
            assert_on_sphere(cases[strategy]["save"])


@pytest.mark.parametrize("whole", WHOLE)
def test_bf16_working_copies_and_their_masters(tiny_dataset, tmp_path, whole):
    cases = []
    for strategy in ("ddp", "fsdp", "zero1", "zero3") if whole else ("ddp", "zero3"):
        folder = tmp_path / strategy
        values = matrix_values(tiny_dataset, folder, "ngpt", strategy, optim__lr=1e-2, precision="bf16")
        cases.append({"name": strategy, "values": values, "steps": 4, "save": str(folder)})
    results = train_cases(cases, 2, tmp_path)
    for case in cases:
        # Products keep 8 bits.
        assert results[case["name"]]["loss"] == pytest.approx(results["ddp"]["loss"], rel=2**-8)
        assert_on_sphere(case["save"])


def assert_on_sphere(folder):
    tensors = checkpoint.load(Path(folder) / "checkpoints" / "step-00000004", "model.", World())
    matrices = {name: tensor for name, tensor in tensors.items() if tensor.ndim == 2}
    assert len(matrices) == 2 + 4 * 3
    for name, matrix in matrices.items():
        norms = matrix.norm(dim=0 if "_out" in name else 1)
        assert torch.allclose(norms, torch.ones_like(norms), atol=1e-5), name
