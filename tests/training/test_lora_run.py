"""Runs with LoRA: `--init_from PARENT --model.lora_rank R`."""

import json
import shutil

import pytest
import torch
import yaml
from conftest import tiny_values
from safetensors.torch import load_file
from tiny_runs import WORLD, losses, make, same, weights

from models.base import get_model
from models.lora import FIELDS, factors_of, is_factor
from trainer.checkpoint import format as checkpoint
from trainer.commands import export
from trainer.commands import plan as plan_verb
from trainer.commands.evaluate import EvaluateConfig
from trainer.commands.evaluate import run as evaluate
from trainer.commands.export import ExportConfig
from trainer.commands.generate import GenerateConfig
from trainer.commands.generate import run as generate
from trainer.commands.train import resolved, run
from trainer.core.config import DataConfig, RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import build
from trainer.data.stream import find_dataset
from trainer.planning.lora import recipe_of
from trainer.planning.memory import MemoryEstimate, ParallelLayout
from trainer.planning.parent import with_origin
from trainer.planning.plan import resolve
from trainer.recipes.plain import learning_rate
from trainer.runs.metrics import read_rows
from trainer.runs.opening import open_run

GPT2 = {"name": "gpt2", "n_layers": 2, "d_model": 32, "n_heads": 2}
LORA = {"lora_rank": 4, "lora_alpha": 16}
# Of each block: three matrices of qkv and one of out, 32 to 32; up and out of the MLP, 32 to 128 and back.
ADAPTERS = 2 * 4 * (4 * (32 + 32) + 2 * (32 + 128))


@pytest.fixture(scope="module")
def parent(tiny_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parent") / "run"
    run(tiny_values(tiny_dataset, folder, model=GPT2, max_steps=6, optim={"lr": 1e-2}))
    return folder


def child(dataset, folder, parent, **changes) -> dict:
    """The values of a run of six steps of LoRA; model and size are the parent's."""
    values = {"init_from": str(parent), "max_steps": 6, "model": LORA, "checkpoint": {"every": 3, "keep": 5}, **changes}
    values = tiny_values(dataset, folder, **values)
    del values["model_scale"]
    return values


@pytest.fixture(scope="module")
def tuned(tiny_dataset, tmp_path_factory, parent):
    folder = tmp_path_factory.mktemp("tuned") / "run"
    run(child(tiny_dataset, folder, parent, optim={"ema": 0.5}, evaluation={"every": 0}))
    return folder


def merged(tensors: dict[str, torch.Tensor], prefix: str = "model.") -> dict[str, torch.Tensor]:
    """The plain model's weights, by hand. prefix: of the factors."""
    found = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    for name in [name for name in found if factors_of(name, 0)[0] in found]:
        pairs = []
        while (names := factors_of(name, len(pairs)))[0] in found:
            a, b = (tensors[prefix + factor] for factor in names)
            pairs.append(b @ a)
        found[name] = found[name] + 16 / 4 * torch.cat(pairs)
    return {name: tensor for name, tensor in found.items() if not is_factor(name)}


def close(a: dict, b: dict) -> bool:
    """Within a rounding of a sum of five fp32 products and the weight."""
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], rtol=1e-6, atol=1e-7) for name in a)


def test_it_begins_with_the_parents_weights_and_only_adapters_change(tiny_dataset, tmp_path, parent, tuned):
    run(child(tiny_dataset, tmp_path / "full", parent, model={}, max_steps=1, optim={"recipe": "plain"}))
    begin, full = read_rows(tuned / "metrics.jsonl")[0], read_rows(tmp_path / "full" / "metrics.jsonl")[0]
    # Frozen weights may be multiplied in another order than those that want a gradient: matmul asks.
    assert begin["loss"] == pytest.approx(full["loss"], rel=1e-6) and begin["grad_norm"] < full["grad_norm"]
    before, after = weights(parent, 6), weights(tuned, 6)
    base = {name: tensor for name, tensor in before.items() if name.startswith("model.")}
    assert same({name: after[name] for name in base}, base)
    factors = {name for name in after if name.startswith("model.") and is_factor(name)}
    assert factors | base.keys() == {name for name in after if name.startswith("model.")}
    assert all(after[name].any() for name in factors)
    for prefix, ending in (("ema.", ""), ("optimizer.", ".exp_avg")):  # nothing of this kind for frozen weights
        held = {name for name in after if name.startswith(prefix) and name.endswith(ending)}
        assert held == {prefix + name.removeprefix("model.") + ending for name in factors}


def test_the_start_says_what_is_trained(tiny_dataset, tmp_path, parent, capsys):
    run(child(tiny_dataset, tmp_path / "r", parent, max_steps=1))
    said = capsys.readouterr().err
    assert f"parameters, {ADAPTERS:,} of them trained (" in said
    assert f"  decayed                  24 tensors         {ADAPTERS:,} parameters (matrix)  adamw" in said
    rate = next(line for line in said.splitlines() if line.startswith("optim.lr "))
    assert "10 times 0.3118 C^-0.125" in rate and "LoRA Without Regret" in rate
    assert next(line for line in said.splitlines() if line.startswith("model.lora_targets")).endswith(
        "the default of LoRA"
    )
    config = yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())
    assert [config["model"][key] for key in FIELDS] == [4, 16.0, "matrix", "compute"]


def test_a_run_that_was_interrupted_goes_on_bit_for_bit(tmp_path, tuned):
    shutil.copytree(tuned, tmp_path / "r")
    shutil.rmtree(tmp_path / "r" / "checkpoints" / checkpoint.step_name(6))
    run({"run_dir": str(tmp_path / "r")})
    assert losses(tmp_path / "r") == losses(tuned)
    assert same(weights(tmp_path / "r", 6), weights(tuned, 6))


@pytest.mark.parametrize("which", ["evaluation", "ema", "last-2"])
def test_every_reader_gets_merged_weights(tmp_path, tuned, which):
    """`generate`, `evaluate`, `export` and init_from read them in one place. The mean of two checkpoints is that of merged weights."""
    states = [weights(tuned, step) for step in (3, 6)]
    expected = merged(states[1], "ema." if which == "ema" else "model.")
    if which == "last-2":
        expected = {name: (tensor + merged(states[0])[name]) / 2 for name, tensor in expected.items()}
    opened = open_run(str(tuned), None, "cpu", "auto", weights=which)
    assert type(opened.model) is get_model("gpt2") and "lora_rank" not in opened.config.model
    assert close(opened.model.state_dict(), expected)
    assert not close(expected, merged(states[0])), "the choice shows nothing"


def test_the_loss_merged_and_unmerged_is_the_same(parent, tuned, capsys):
    """Within the fp32 rounding of logits below 8, of which each token's loss is a difference: 8 * 2^-23 = 1e-6."""
    evaluate(EvaluateConfig(run_dir=str(tuned), protocol="full"), as_json=True)
    found = json.loads(capsys.readouterr().out)["full"]["loss"]
    unmerged = read_rows(tuned / "metrics.jsonl")[-1]["val_loss"]
    assert found == pytest.approx(unmerged, abs=1e-6)
    assert abs(found - read_rows(parent / "metrics.jsonl")[-1]["val_loss"]) > 1e-3, "the update shows nothing"
    generate(GenerateConfig(run_dir=str(tuned), prompt=["the cat"], max_new_tokens=4, temperature=0))
    assert capsys.readouterr().out.startswith("the cat")


def test_an_export_is_of_the_plain_model(tmp_path, tuned, capsys):
    export.run(ExportConfig(run_dir=str(tuned), out=str(tmp_path / "out")))
    assert "; the updates of LoRA are merged into them" in capsys.readouterr().err
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not about["config"].keys() & set(FIELDS)
    model_class = get_model(about["model"])
    model = model_class(model_class.Config(**about["config"]))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    model.load_state_dict(tensors)
    assert close(tensors, merged(weights(tuned, 6)))


@pytest.mark.parametrize("model", [{}, LORA | {"lora_rank": 2}])
def test_a_further_run_begins_with_the_merged_weights(tiny_dataset, tmp_path, tuned, model):
    values = child(tiny_dataset, tmp_path / "r", tuned, model=model, optim={"recipe": "plain"})
    whole = with_origin(values, None, 1, WORLD.say)
    keys = ("init_from", "model", "model_scale")
    one = make(whole["data"]["path"], whole["run_dir"], **{key: whole[key] for key in keys})
    one.begin()
    one.stream.close()
    state = one.model.state_dict()
    assert close({name: value for name, value in state.items() if not is_factor(name)}, merged(weights(tuned, 6)))
    factors = {name: value for name, value in state.items() if is_factor(name)}
    assert len(factors) == (24 if model else 0) and not any(v.any() for n, v in factors.items() if n.endswith(".b"))
    assert all(value.shape[0] == 2 for name, value in factors.items() if name.endswith(".a"))


def test_the_recipe_of_hlb_is_left():
    assert recipe_of({"name": "hlb"})[0] == "hlb"
    assert recipe_of({"name": "hlb", **LORA}) == ("plain", "LoRA: hlb's laws are for the training of all weights")


def test_the_plan_knows_what_is_frozen(tiny_dataset, tmp_path, parent, capsys):
    values = child(tiny_dataset, tmp_path / "r", parent)
    plan_verb.run(plan_verb.VERB.argument(values))
    assert f"{ADAPTERS:,} are trained, the others frozen" in capsys.readouterr().out
    plan = resolve(
        build(RunConfig, with_origin(values, None, 1, WORLD.say)), find_dataset(DataConfig(path=str(tiny_dataset)))
    )
    assert plan.config.optim.lr == pytest.approx(
        10 * learning_rate(plan.non_embedding, plan.config.batch.tokens_per_step, 20 * plan.non_embedding)
    )
    estimate = MemoryEstimate(plan.model_class, plan.model_config, 64)
    everything = MemoryEstimate(*estimate_of_plain(plan), 64)
    adapters = plan.parameters - everything.parameters
    assert adapters == plan.trained == ADAPTERS
    for strategy, weights_per_number in (("single", 4), ("zero1", 2), ("fsdp", 4)):
        state = estimate.state(ParallelLayout(strategy, "bf16", shards=1), accumulates=True)
        assert state["weights"] == weights_per_number * plan.parameters
        assert (state["gradients"], state["moments"]) == ((6 if strategy == "zero1" else 4) * adapters, 8 * adapters)
        assert state.get("unsharded gradients", 0) == (4 * adapters if strategy == "fsdp" else 0)
        assert "head gradient" not in state and state.get("masters", 0) in (0, 4 * adapters)
    layout = ParallelLayout("single", "fp32")
    assert estimate.loss(layout, "none", 64) <= everything.loss(layout, "none", 64)


def estimate_of_plain(plan) -> tuple:
    names = [field for field in vars(plan.model_config) if field not in FIELDS]
    return plan.model_class.adapts, plan.model_class.adapts.Config(**{k: getattr(plan.model_config, k) for k in names})


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"init_from": None}, "model.lora_rank: LoRA trains a small update of weights that are trained already; name these with"),
        ({"model": {"lora_alpha": 8}}, "model.lora_alpha: has no effect without model.lora_rank"),
        ({"model": {"lora_rank": 0, "lora_targets": "matrix"}}, "model.lora_targets: has no effect without"),
        ({"model": {"lora_rank": -1}}, "model.lora_rank: -1 is too small"),
        ({"model": {"lora_rnak": 4}}, "unknown key model.lora_rnak; did you mean model.lora_rank?"),
        ({"model": {**LORA, "lora_targets": "head"}}, "model gpt2: lora_targets: no linear layer in the blocks has the role 'head'"),
        ({"model": LORA, "optim": {"recipe": "hlb"}}, "optim.recipe: hlb does not suit model.lora_rank"),
        ({"model": LORA, "optim": {"roles": {"norm": {"lr": 1e-3}}}}, "optim.roles.norm: gpt2 has no parameters of this role (it has: matrix)"),
        ({"model": LORA | {"n_layers": 3}}, "init_from: model.n_layers is 3 (was 2), which the weights of"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused(tiny_dataset, tmp_path, parent, changes, words):
    with pytest.raises(UserError) as error:
        run(child(tiny_dataset, tmp_path / "r", parent, **changes))
    assert words in str(error.value)


def test_rank_0_is_no_lora(tiny_dataset, tmp_path, parent):
    config = resolved(child(tiny_dataset, tmp_path / "r", parent, model={"lora_rank": "0"}, optim={"recipe": "plain"}))
    assert not config.model.keys() & set(FIELDS)


def test_a_run_that_goes_on_keeps_its_adapters(tmp_path, tuned):
    with pytest.raises(UserError, match=r"^model.lora_rank: .* was started with 4, now it is 8"):
        run({"run_dir": str(tuned), "model": {"lora_rank": 8}, "max_steps": 7})
