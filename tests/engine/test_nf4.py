"""Frozen models in NF4: what stays whole, what the plan counts. Levels: tests/models/test_quantized_linear.py."""

import dataclasses

import pytest
import torch
from conftest import tiny_values
from tiny_runs import make
from torch import nn

from models.layers.quantized import QuantizedLinear, packed_bytes
from trainer.commands.train import run
from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import build
from trainer.data.stream import find_dataset
from trainer.planning.plan import resolve

GPT2 = {"name": "gpt2", "n_layers": 2, "d_model": 32, "n_heads": 2}
OBJECTIVE = {"name": "distill", "teacher_precision": "nf4"}


@pytest.fixture(scope="module")
def teacher(tiny_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "run"
    run(tiny_values(tiny_dataset, folder, model=GPT2, max_steps=2))
    return folder


def needs_bitsandbytes():
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (the extra quantize)")


def test_the_blocks_are_packed_and_the_rest_stays_whole(tiny_dataset, tmp_path, teacher):
    needs_bitsandbytes()
    apart = []
    for precision in ("compute", "nf4"):
        objective = {**OBJECTIVE, "teacher": str(teacher), "teacher_precision": precision}
        one = make(tiny_dataset, tmp_path / "r", model=GPT2, objective=objective)
        frozen = one.engine.objective.frozen["teacher"]
        apart.append(frozen.logits(frozen.hidden(torch.arange(32).view(2, 16))))
        one.stream.close()
    linears = [
        type(module) for block in frozen.blocks() for module in block.modules() if hasattr(module, "in_features")
    ]
    assert set(linears) == {QuantizedLinear} and len(linears) == 8
    assert type(frozen.model.embedding) is nn.Embedding
    error = (apart[0] - apart[1]).norm() / apart[0].norm()
    assert 0 < error < 0.2, "half the widest step between levels is 0.15 of the largest weight of a block"


def test_the_plan_counts_packed_weights(tiny_dataset, tmp_path, teacher, monkeypatch):
    monkeypatch.setattr("trainer.checkpoint.quantized.is_installed", lambda: True)
    config = build(
        RunConfig, tiny_values(tiny_dataset, tmp_path / "r", objective={**OBJECTIVE, "teacher": str(teacher)})
    )
    frozen = resolve(config, find_dataset(config.data)).frozen["teacher"]
    packed = 2 * 12 * 32**2  # of each block: 4 d^2 in attention, 8 d^2 in the MLP
    shapes = [(96, 32), (32, 32), (128, 32), (32, 128)]
    held = 2 * sum(packed_bytes("nf4", *shape, [shape[0]]) for shape in shapes)
    assert frozen.bytes("bf16", 4) == held + 2 * (frozen.parameters - packed)
    # 4 bits and 8 for each block of 64; of each matrix here an fp32 scale of scales and an offset.
    assert held == packed * (32 + 1) // 64 + 8 * 8
    plain = dataclasses.replace(frozen, spec=dataclasses.replace(frozen.spec, precision="compute"))
    assert plain.bytes("bf16", 1) == 2 * frozen.parameters


def test_without_the_package_it_is_one_line(tiny_dataset, tmp_path, teacher, monkeypatch):
    monkeypatch.setattr("trainer.checkpoint.quantized.is_installed", lambda: False)
    with pytest.raises(UserError, match=r"^objective.teacher_precision: nf4 needs bitsandbytes; run pip install"):
        make(tiny_dataset, tmp_path / "r", objective={**OBJECTIVE, "teacher": str(teacher)})
