"""LoRA where ranks hold parts of the weights: each strategy trains the adapters as one process does, and goes on from any other's
checkpoint, which holds the frozen weights as they were."""

import contextlib
from pathlib import Path

import pytest
import torch
from cases import matrix_values, train_cases
from conftest import WHOLE, tiny_values
from tiny_runs import WORLD

from models.lora import is_factor
from trainer.checkpoint import format as checkpoint
from trainer.commands.train import run
from trainer.core.config import RunConfig
from trainer.core.settings import build
from trainer.data.stream import find_dataset
from trainer.planning.parent import with_origin
from trainer.planning.plan import resolve
from trainer.runtime.signals import StopSignals
from trainer.runtime.watchdog import Watchdog
from trainer.training.run import Run
from trainer.training.step import optimiser_step

pytestmark = pytest.mark.slow

SAME = 3e-5  # as in test_matrix.py
STRATEGIES = ("ddp", "fsdp", "hsdp:1", "zero0", "zero1", "zero2", "zero3")
SAMPLE = ("fsdp", "zero1", "zero3")
GPT2 = {"name": "gpt2", "n_layers": 2, "d_model": 32, "n_heads": 2}


@pytest.fixture(scope="module")
def parent(tiny_dataset, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parent") / "run"
    run(tiny_values(tiny_dataset, folder, model=GPT2, max_steps=3, optim={"lr": 1e-2}))
    return folder


def case(dataset, folder: Path, parent: Path, strategy: str, name: str = "", **more) -> dict:
    changes = {"init_from": str(parent), "optim__ema": 0.5, "optim__lr": 1e-2, "evaluation__max_tokens": 128}
    values = matrix_values(dataset, folder, "gpt2", strategy, **changes) | {"model": {"lora_rank": 4}}
    del values["model_scale"]
    whole = with_origin(values, None, 2, WORLD.say)
    return {"name": name or strategy, "values": whole, "steps": 3, "averages": True, **more}


def six_steps(values: dict) -> dict[str, list[float]]:
    """Of one process, this one."""
    config = build(RunConfig, values)
    dataset = find_dataset(config.data)
    found: dict[str, list[float]] = {"loss": [], "grad_norm": [], "average": []}
    with contextlib.closing(Watchdog(WORLD, 300)) as watchdog:
        one = Run(resolve(config, dataset), WORLD, dataset, watchdog, StopSignals(WORLD))
        one.begin()
        for _ in range(6):
            measured = optimiser_step(one)
            found["loss"].append(measured.loss)
            found["grad_norm"].append(measured.grad_norm)
            found["average"].append(one.validate()["ema"]["full"]["loss"])
        one.stream.close()
    return found


@pytest.mark.parametrize("whole", WHOLE)
def test_every_strategy_trains_as_one_process(tiny_dataset, tmp_path, parent, whole):
    """Three steps, and three more from another strategy's checkpoint; on one process, six at once."""
    strategies = STRATEGIES if whole else SAMPLE
    alone = six_steps(case(tiny_dataset, tmp_path / "r", parent, "single")["values"])
    begun = [case(tiny_dataset, tmp_path / s, parent, s, save=str(tmp_path / s)) for s in strategies]
    sources = dict(zip(strategies, (*strategies[1:], strategies[0]), strict=True))
    then = [
        case(tiny_dataset, tmp_path / "r", parent, s, f"{s} on", load=str(tmp_path / source))
        for s, source in sources.items()
        if whole or s != "zero3"  # whose steps take most of the time here
    ]
    for name, result in train_cases([*begun, *then], 2, tmp_path).items():
        first = 3 if name.endswith(" on") else 0
        for key in ("loss", "grad_norm", "average"):
            assert result[key] == pytest.approx(alone[key][first : first + 3], rel=SAME), (name, key)
    assert all(a != b for a, b in zip(alone["average"], alone["loss"], strict=True))
    expected = checkpoint.load(parent / "checkpoints" / checkpoint.step_name(3), "model.", WORLD)
    for strategy in strategies:
        found = checkpoint.load(tmp_path / strategy / "checkpoints" / checkpoint.step_name(3), "", WORLD)
        for name, tensor in expected.items():
            assert torch.equal(found[f"model.{name}"], tensor), (strategy, name)
        assert all(is_factor(name.removesuffix(".exp_avg")) for name in found if name.endswith(".exp_avg")), strategy
