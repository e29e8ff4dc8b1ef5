"""`train --init_from RUN@STEP`: a new run that begins with the weights of another one, and with nothing else of it."""

import shutil

import pytest
import torch
import yaml
from conftest import tiny_values
from tiny_runs import WORLD, make, same, weights

from trainer.commands import bench, lr_range
from trainer.commands import plan as plan_verb
from trainer.commands.train import resolved, run
from trainer.core.config import PrepareConfig
from trainer.core.errors import UserError
from trainer.data.prepare import prepare
from trainer.planning.parent import with_origin
from trainer.runs.metrics import read_rows
from trainer.runs.opening import open_run

GPT2 = {"name": "gpt2", "n_layers": 2, "d_model": 32, "n_heads": 2}


@pytest.fixture(scope="module")
def parent(tiny_dataset, tmp_path_factory):
    """Six steps of schedule-free, which evaluates with other weights than it trains, and of a moving average."""
    folder = tmp_path_factory.mktemp("parent") / "run"
    optim = {"name": "schedule-free", "ema": 0.5, "lr": 1e-2}
    run(tiny_values(tiny_dataset, folder, model=GPT2, max_steps=6, checkpoint={"every": 3, "keep": 5}, optim=optim))
    return folder


def child(dataset, folder, parent, **changes) -> dict:
    """The values of a run of four steps; its model and size are the parent's."""
    values = tiny_values(dataset, folder, **{"init_from": str(parent), "max_steps": 4, **changes})
    return {key: value for key, value in values.items() if key not in ("model", "model_scale") or key in changes}


def begun(values: dict) -> dict[str, torch.Tensor]:
    """The weights of a run at step 0."""
    whole = with_origin(values, None, 1, WORLD.say)
    one = make(whole["data"]["path"], whole["run_dir"], **{k: whole[k] for k in ("init_from", "init_weights", "model")})
    one.begin()
    one.stream.close()
    return {name: tensor.clone() for name, tensor in one.model.state_dict().items()}


@pytest.mark.parametrize("which", ["evaluation", "ema", "last-2"])
def test_a_run_begins_with_the_weights_that_init_weights_names(tiny_dataset, tmp_path, parent, which):
    found = begun(child(tiny_dataset, tmp_path / "r", parent, init_weights=which))
    assert same(found, open_run(str(parent), None, "cpu", "auto", weights=which).model.state_dict())
    trained = weights(parent, 6)
    assert not same(found, {name: trained[f"model.{name}"] for name in found}), "the choice shows nothing"


def test_nothing_else_is_the_parents(tiny_dataset, tmp_path, parent):
    values = child(tiny_dataset, tmp_path / "r", f"{parent}@3", seed=5, optim={"ema": 0.9}, model_scale=0.05)
    run(values)
    rows, config = (
        read_rows(tmp_path / "r" / "metrics.jsonl"),
        yaml.safe_load((tmp_path / "r" / "config.yaml").read_text()),
    )
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[0]["tokens"] == 512
    assert (config["init_from"], config["seed"], config["optim"]["name"]) == (f"{parent}@3", 5, "adamw")
    assert config["model"] == yaml.safe_load((parent / "config.yaml").read_text())["model"]
    assert config["data"]["tokenizer"] == str(parent / "tokenizer.json")
    assert f"{parent}@3  its evaluation weights" in (tmp_path / "r" / "plan.txt").read_text()
    # The first loss is that of the parent's weights, and Adam has made no more steps than this run.
    assert rows[0]["loss"] < 0.9 * read_rows(parent / "metrics.jsonl")[0]["loss"]
    assert {t.item() for name, t in weights(tmp_path / "r", 4).items() if name.endswith(".step")} == {4.0}


def test_a_run_that_goes_on_does_not_read_its_parent(tiny_dataset, tmp_path, parent, capsys, monkeypatch):
    """The command is given again as it was, with a relative path and without a step, though the parent has trained on meanwhile."""
    shutil.copytree(parent, tmp_path / "p")
    monkeypatch.chdir(tmp_path)
    values = child(tiny_dataset, tmp_path / "r", "p")
    run(values)
    shutil.rmtree(tmp_path / "p")
    run({**values, "max_steps": 6})
    said = capsys.readouterr().err
    assert said.count("beginning with the weights of") == 1 and "going on from" in said
    assert yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())["init_from"] == f"{tmp_path / 'p'}@6"
    run({"run_dir": str(tmp_path / "r"), "max_steps": 7})
    for other in (f"{parent}@3", "p@3"):
        with pytest.raises(UserError, match=r"^init_from: .* was started with .*p@6', now it is"):
            run({"run_dir": str(tmp_path / "r"), "init_from": other})
    with pytest.raises(UserError, match=r"^init_weights: .* was started with 'evaluation', now it is 'ema'"):
        run({"run_dir": str(tmp_path / "r"), "init_weights": "ema"})


def test_killed_before_its_first_checkpoint_it_begins_again_with_the_same_weights(
    tiny_dataset, tmp_path, parent, capsys
):
    values = child(tiny_dataset, tmp_path / "r", f"{parent}@3")
    run(values)
    first = weights(tmp_path / "r", 4)
    shutil.rmtree(tmp_path / "r" / "checkpoints")
    run(values)
    assert capsys.readouterr().err.count(f"beginning with the weights of {parent}@3 (evaluation)") == 2
    assert same(weights(tmp_path / "r", 4), first)


def test_fields_that_leave_the_weights_their_shape_may_be_set(tiny_dataset, tmp_path, parent, capsys):
    model = {"residual_dtype": "bf16", "norm_eps": 1e-3, "n_layers": 2}
    config = resolved(child(tiny_dataset, tmp_path / "r", parent, model=model))
    assert (config.model["norm_eps"], config.model["d_model"]) == (1e-3, 32)
    run(child(tiny_dataset, tmp_path / "r", parent, model=model))
    assert "init_from: model.norm_eps is 0.001 (was 1e-05)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"model": {"n_layers": 3}},
            "init_from: model.n_layers is 3 (was 2), which the weights of {parent}@6 do not fit",
        ),
        ({"model": {"name": "llama"}}, "init_from: model.name is 'llama', but {parent}@6 is of gpt2"),
        ({"model_scale": 2}, "init_from: model_scale is 2, but the size of the model is that of {parent}@6"),
        ({"parameters": 10**6}, "init_from: parameters is 1e+06"),
        ({"branch_from": "{parent}@3"}, "init_from: branch_from already says how the run begins"),
        ({"init_from": None, "init_weights": "ema"}, "init_weights: says which weights of init_from"),
        ({"init_weights": "last-9"}, "weights: last-9 needs 9 checkpoints"),
        ({"init_weights": "best"}, "weights: 'best' is not known"),
        ({"init_from": "{parent}@5"}, "init_from: {parent} has no checkpoint of step 5 (available: 3, 6)"),
        ({"init_from": "{parent}/checkpoints"}, "init_from: {parent}/checkpoints is not a run's folder"),
    ],
)
def test_what_contradicts_the_parent_is_refused(tiny_dataset, tmp_path, parent, changes, words):
    changes = {k: v.format(parent=parent) if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises(UserError) as error:
        run({**child(tiny_dataset, tmp_path / "r", parent), **changes})
    assert words.format(parent=parent) in str(error.value)


def test_data_with_another_tokenizer_are_refused(tmp_path, parent):
    (tmp_path / "text.txt").write_text("the cat sat on the mat.\n" * 500)
    corpus = {"source": str(tmp_path / "text.txt"), "validation_fraction": 0.2, "sample_length": 64}
    prepare(PrepareConfig(**corpus, tokenizer="chars", workers=1, out=str(tmp_path / "chars")), lambda line: None)
    with pytest.raises(UserError) as error:
        run(child(tmp_path / "chars", tmp_path / "r", parent))
    assert "prepared with tokenizer chars" in str(error.value)
    assert str(error.value).endswith(f"prepare it with --tokenizer {parent / 'tokenizer.json'}")
    values = child(tmp_path / "own", tmp_path / "r", parent, max_steps=1)
    values["data"] |= corpus  # prepared on first use: with the parent's tokenizer
    run(values)
    assert (tmp_path / "r" / "tokenizer.json").read_bytes() == (parent / "tokenizer.json").read_bytes()


def test_other_verbs_know_the_parent(tiny_dataset, tmp_path, parent, capsys):
    values = child(tiny_dataset, tmp_path / "r", parent)
    plan_verb.run(plan_verb.VERB.argument(values))
    printed = capsys.readouterr().out
    assert f"{parent}@6  its evaluation weights" in printed and "model.d_model" in printed
    assert bench.STEP.argument(values).model["d_model"] == 32
    copy = lr_range.open_copy(lr_range.VERB.argument(values).values)
    copy.stream.close()
    copy.engine.close()
    copy.world.stop()
    assert same(copy.model.state_dict(), open_run(str(parent), None, "cpu", "auto").model.state_dict())
