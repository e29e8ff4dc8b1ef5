"""Objectives with a frozen model, and one with a layer of its own (cosine_embedding, as the teacher is narrower), where ranks hold
parts of the weights: each strategy trains as one process does."""

from pathlib import Path

import pytest
from cases import matrix_values, train_cases
from conftest import WHOLE, tiny_values

from trainer.commands.train import run

pytestmark = pytest.mark.slow

SAME = 3e-5  # as in test_matrix.py
STRATEGIES = ("ddp", "fsdp", "hsdp:1", "zero0", "zero2", "zero3")
GPT2 = {"name": "gpt2", "n_layers": 2, "d_model": 32, "n_heads": 2, "vocab_size": 384}
OBJECTIVES = {
    "distill": {"temperature": 2.0, "top_k": 50},
    "cosine_embedding": {},
}


@pytest.fixture(scope="module")
def teacher(tiny_dataset, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "run"
    run(tiny_values(tiny_dataset, folder, model=GPT2, max_steps=3, optim={"lr": 1e-2}))
    return folder


def case(dataset, folder: Path, teacher: Path, strategy: str, objective: str) -> dict:
    changes = {"objective": {"name": objective, "teacher": str(teacher), **OBJECTIVES[objective]}}
    checkpointing = "full" if strategy in ("fsdp", "zero3") else "none"
    values = matrix_values(dataset, folder / strategy, "gpt2", strategy, evaluation__max_tokens=128, **changes)
    values["model"] |= {"d_model": 48, "n_heads": 2}
    values["engine"]["activation_checkpointing"] = checkpointing
    return {"name": f"{objective} {strategy}", "values": values, "steps": 3}


ALL = [(name, strategy) for name in OBJECTIVES for strategy in STRATEGIES]
SAMPLE = [("distill", "fsdp"), ("distill", "zero3"), ("cosine_embedding", "fsdp"), ("cosine_embedding", "zero2")]


@pytest.mark.parametrize("whole", WHOLE)
def test_every_strategy_trains_as_one_process(tiny_dataset, tmp_path, teacher, whole):
    def cases(pairs):
        return [case(tiny_dataset, tmp_path, teacher, strategy, name) for name, strategy in pairs]

    one = [(name, strategy) for name in OBJECTIVES for strategy in ("single", *(["fsdp", "zero3"] if whole else []))]
    alone = train_cases(cases(one), 1, tmp_path)
    several = train_cases(cases(ALL if whole else SAMPLE), 2, tmp_path)
    for name, result in (*alone.items(), *several.items()):
        expected = alone[f"{name.split()[0]} single"]
        for key in ("loss", "grad_norm"):
            assert result[key] == pytest.approx(expected[key], rel=SAME), (name, key)
