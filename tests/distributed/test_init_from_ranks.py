"""init_from where ranks hold parts of the weights: on every strategy, from a run on another one."""

from pathlib import Path

import cases
import pytest
import torch
from cases import matrix_values, train_cases
from conftest import WHOLE
from safetensors.torch import load_file, save_file
from test_init_from_hugging_face import saved, transformers  # noqa: F401
from tiny_runs import same

from models.hugging_face import family_of, load_openai_weights
from models.presets import Gpt2
from trainer.checkpoint import format as checkpoint
from trainer.checkpoint.hugging_face import read_config
from trainer.planning.parent import with_origin
from trainer.runs.opening import open_run
from trainer.runtime.distributed import World

pytestmark = pytest.mark.slow

SAME = 3e-5  # as in test_matrix.py
STRATEGIES = ("ddp", "fsdp", "hsdp:1", "zero0", "zero1", "zero2", "zero3")
SAMPLE = ("fsdp", "zero1", "zero3")
WORLD = World()


@pytest.fixture(scope="module")
def parent(tiny_dataset, tmp_path_factory) -> Path:
    """Two steps of fsdp on two ranks, with a rule that evaluates other weights than it trains."""
    folder = tmp_path_factory.mktemp("parent") / "run"
    optim = {"name": "schedule-free", "lr": 1e-2}
    values = matrix_values(tiny_dataset, folder, "gpt2", "fsdp", max_steps=2, optim=optim)
    ended = cases.run(values, ranks=2)
    assert ended.returncode == 0, ended.said
    return folder


def case(dataset, folder: Path, parent: Path, strategy: str, **more) -> dict:
    changes = {"init_from": str(parent), "optim__ema": 0.5, "optim__lr": 3e-3, "evaluation__max_tokens": 512}
    values = matrix_values(dataset, folder, "gpt2", strategy, **changes)
    del values["model_scale"], values["model"]
    return {"name": strategy, "values": with_origin(values, None, 2, WORLD.say), **more}


@pytest.mark.parametrize("whole", WHOLE)
def test_every_strategy_begins_with_the_same_bits_and_trains_as_one_process(tiny_dataset, tmp_path, parent, whole):
    """Of the weights and of the moving average, which begins with them. The loss of the second step sees an update from there."""
    strategies = STRATEGIES if whole else SAMPLE
    at_once = [case(tiny_dataset, tmp_path / s, parent, s, steps=0, save=str(tmp_path / s)) for s in strategies]
    train_cases(at_once, 2, tmp_path)
    expected = open_run(str(parent), None, "cpu", "auto").model.state_dict()
    trained = checkpoint.load(parent / "checkpoints" / checkpoint.step_name(2), "model.", WORLD)
    assert not torch.equal(expected["embedding.weight"], trained["embedding.weight"]), "the choice shows nothing"
    for strategy in strategies:
        found = checkpoint.load(tmp_path / strategy / "checkpoints" / checkpoint.step_name(0), "", WORLD)
        for name, tensor in expected.items():
            assert torch.equal(found[f"model.{name}"], tensor), (strategy, name)
            assert torch.equal(found[f"ema.{name}"], tensor), (strategy, name)
    steps = {"steps": 2, "averages": True}
    alone = train_cases([case(tiny_dataset, tmp_path / "r", parent, "single", **steps)], 1, tmp_path)["single"]
    several = train_cases([case(tiny_dataset, tmp_path / "r", parent, s, **steps) for s in strategies], 2, tmp_path)
    for strategy, result in several.items():
        for key in ("loss", "average"):
            assert result[key] == pytest.approx(alone[key], rel=SAME), (strategy, key)


def test_a_hugging_face_model_in_bf16(transformers, tiny_dataset, tmp_path):  # noqa: F811
    """Its weights have another type than the run's, and GPT-2's matrices are views that are not contiguous."""
    saved(transformers, tmp_path / "m", "gpt2")
    file = tmp_path / "m" / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    at_once = [case(tiny_dataset, tmp_path / s, tmp_path / "m", s, steps=0, save=str(tmp_path / s)) for s in SAMPLE]
    train_cases(at_once, 2, tmp_path)
    model = Gpt2(family_of(read_config(tmp_path / "m"))[1])
    load_openai_weights(model, load_file(file))
    for strategy in SAMPLE:
        found = checkpoint.load(tmp_path / strategy / "checkpoints" / checkpoint.step_name(0), "model.", WORLD)
        assert same(found, model.state_dict()), strategy
