"""A run whose objective trains a layer of its own: what is planned, kept and left out."""

import json
import shutil

import pytest
import torch
from conftest import tiny_values
from safetensors.torch import load_file
from tiny_runs import WORLD, losses, make, same, weights

from models.base import get_model
from models.objective_layers import ATTRIBUTE
from trainer.checkpoint import format as checkpoint
from trainer.commands import export
from trainer.commands.evaluate import EvaluateConfig
from trainer.commands.evaluate import run as evaluate
from trainer.commands.export import ExportConfig
from trainer.commands.merge import MergeConfig
from trainer.commands.merge import run as merge
from trainer.commands.train import run
from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import build
from trainer.data.stream import find_dataset
from trainer.planning.memory import MemoryEstimate, ParallelLayout
from trainer.planning.parent import with_origin
from trainer.planning.plan import render, resolve, summary
from trainer.planning.resolver import ModelFacts
from trainer.runs.metrics import read_rows
from trainer.runs.opening import open_run

GPT2 = {"name": "gpt2", "n_layers": 1, "d_model": 16, "n_heads": 2}
LAYER = "objective_layers.16_32.weight"


@pytest.fixture(scope="module")
def teacher(tiny_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "run"
    run(tiny_values(tiny_dataset, folder, model=GPT2 | {"d_model": 32}, max_steps=2))
    return folder


def student(dataset, folder, teacher, **changes):
    objective = {"name": "cosine_embedding", "teacher": str(teacher)}
    settings = {"max_steps": 4, "checkpoint": {"every": 2, "keep": 5}, "optim": {"ema": 0.5}, "model": GPT2}
    return tiny_values(dataset, folder, objective=objective, **{**settings, **changes})


@pytest.fixture(scope="module")
def taught(tiny_dataset, tmp_path_factory, teacher):
    folder = tmp_path_factory.mktemp("taught") / "run"
    run(student(tiny_dataset, folder, teacher))
    return folder


def test_it_is_trained_and_a_run_that_was_interrupted_goes_on_bit_for_bit(tmp_path, taught):
    states = [weights(taught, step) for step in (2, 4)]
    for kind in ("model.", "ema.", "optimizer."):
        name = f"{kind}{LAYER}{'.exp_avg' if kind == 'optimizer.' else ''}"
        assert states[0][name].shape == (32, 16) and not torch.equal(states[0][name], states[1][name])
    shutil.copytree(taught, tmp_path / "r")
    shutil.rmtree(tmp_path / "r" / "checkpoints" / checkpoint.step_name(4))
    run({"run_dir": str(tmp_path / "r")})
    assert losses(tmp_path / "r") == losses(taught)
    assert same(weights(tmp_path / "r", 4), states[1])


@pytest.mark.parametrize("which", ["evaluation", "ema", "last-2"])
def test_who_reads_the_weights_gets_the_model_alone(taught, which):
    model = open_run(str(taught), None, "cpu", "auto", weights=which).model
    assert type(model) is get_model("gpt2") and not hasattr(model, ATTRIBUTE)


def test_evaluate_export_and_merge_leave_it_out(tmp_path, taught, capsys):
    evaluate(EvaluateConfig(run_dir=str(taught), protocol="full"), as_json=True)
    found = json.loads(capsys.readouterr().out)["full"]["loss"]
    assert found == pytest.approx(read_rows(taught / "metrics.jsonl")[-1]["val_loss"], abs=1e-6)  # logits below 8, fp32
    export.run(ExportConfig(run_dir=str(taught), out=str(tmp_path / "out")))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    plain = get_model("gpt2")(get_model("gpt2").Config(**about["config"]))
    assert tensors.keys() == plain.state_dict().keys()
    merge(MergeConfig(runs=[str(taught), f"{taught}@2"], out=str(tmp_path / "merged")))
    assert weights(tmp_path / "merged", 4).keys() == {f"model.{name}" for name in tensors}


def test_a_run_begins_with_the_model_alone(tiny_dataset, tmp_path, taught, teacher):
    """With an objective of its own or without: its layer begins anew."""
    stored = {name.removeprefix("model."): value for name, value in weights(taught, 4).items()}
    for name, changes in {
        "plain": {},
        "again": {"objective": {"name": "cosine_embedding", "teacher": str(teacher)}},
    }.items():
        values = tiny_values(tiny_dataset, tmp_path / name, init_from=str(taught), **changes)
        whole = with_origin(
            {key: values[key] for key in values if key not in ("model", "model_scale")}, None, 1, WORLD.say
        )
        one = make(
            whole["data"]["path"],
            whole["run_dir"],
            **{key: whole[key] for key in (*changes, "init_from", "model", "model_scale")},
        )
        one.begin()
        one.stream.close()
        state = one.model.state_dict()
        assert (LAYER in state) == bool(changes)
        if changes:
            assert not torch.equal(state.pop(LAYER), stored[LAYER])
        assert all(torch.equal(value, stored[key]) for key, value in state.items())


def test_the_plan_counts_it_beside_the_model(tiny_dataset, tmp_path, teacher):
    config = build(RunConfig, student(tiny_dataset, tmp_path / "r", teacher))
    plan = resolve(config, find_dataset(config.data))
    plain = ModelFacts.of("gpt2", get_model("gpt2"), plan.model_config)
    assert plan.objective_layers == {"16_32": (16, 32)} and plan.parameters == plan.trained == plain.parameters
    assert summary(plan)["params_objective_layers"] == 16 * 32
    line = next(line for line in render(plan).splitlines() if line.startswith("objective layer 16_32 "))
    assert line.split(maxsplit=3)[3] == "512  parameters of a layer 16 -> 32, trained with the model and no part of it"
    layout = ParallelLayout("single", "fp32")
    with_it, without = (MemoryEstimate(cls, plan.model_config, 64) for cls in (plan.model_class, plain.model_class))
    here, there = with_it.state(layout), without.state(layout)
    assert [here[part] - there[part] for part in ("weights", "gradients", "moments")] == [4 * 512, 4 * 512, 8 * 512]


def test_a_branch_has_the_same_layers(tmp_path, taught):
    """With a teacher as wide as the student there are none."""
    with pytest.raises(UserError, match=f"^branch_from: {LAYER}, a layer of an objective, is in one of"):
        run({"branch_from": f"{taught}@2", "run_dir": str(tmp_path / "r"), "objective": {"teacher": str(taught)}})


def test_a_model_with_an_attribute_of_that_name_is_refused(monkeypatch):
    monkeypatch.setattr(get_model("gpt2"), ATTRIBUTE, 1, raising=False)
    with pytest.raises(
        UserError, match=f"^model gpt2: has an attribute {ATTRIBUTE}, where the layers of an objective are"
    ):
        ModelFacts.of(
            "gpt2", get_model("gpt2"), get_model("gpt2").Config(vocab_size=64, n_layers=1, d_model=16, n_heads=2)
        )
