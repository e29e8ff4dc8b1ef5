"""Models that an objective needs and does not train: which ones are opened, how they are held, and what is refused."""

import contextlib
from dataclasses import dataclass

import pytest
import torch
from conftest import tiny_values
from tiny_runs import make, same

from trainer.commands.train import resolved, run
from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import build
from trainer.data.stream import find_dataset
from trainer.objectives import FrozenSpec, Loss, Objective, register_objective
from trainer.objectives.base import REGISTRY
from trainer.planning.memory import expected_memory
from trainer.planning.plan import render, resolve, summary
from trainer.runs.metrics import read_rows
from trainer.runs.opening import open_run
from trainer.testing.strategies import group_of_one

GPT2 = {"name": "gpt2", "n_layers": 2, "d_model": 32, "n_heads": 2, "dropout": 0.1}
LONG = {"model": {"name": "hlb"}, "data": {"tokenizer": "bytes", "sample_length": 2048}, "batch__sequence_length": 2048}
SMALL = {"name": "gpt2", "n_layers": 1, "d_model": 16, "n_heads": 2}


@dataclass(frozen=True)
class NearConfig:
    model: str | None = None
    model_weights: str = "evaluation"


@pytest.fixture(autouse=True)
def near():
    """An objective that trains the logits towards those of another model."""
    before = dict(REGISTRY)

    @register_objective("near")
    class Near(Objective):
        Config = NearConfig

        def frozen_models(self):
            return {"model": FrozenSpec(self.config.model, self.config.model_weights)}

        def forward(self, model, batch):
            other = self.frozen["model"]
            wanted = other.logits(other.hidden(batch["tokens"]))
            apart = (model.logits(model.hidden(batch["tokens"])) - wanted).float().square().mean(-1).sum()
            return Loss(apart, self.count(batch), measures={"size": wanted.float().abs().sum()})

    yield
    REGISTRY.clear()
    REGISTRY.update(before)


@pytest.fixture(scope="module")
def teacher(tiny_dataset, tmp_path_factory):
    """Six steps of a rule that evaluates with other weights than it trains."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    optim = {"name": "schedule-free", "lr": 1e-2}
    run(tiny_values(tiny_dataset, folder, model=GPT2, max_steps=6, checkpoint={"every": 3, "keep": 5}, optim=optim))
    return folder


def near_to(source, **changes) -> dict:
    return {"model": SMALL, "objective": {"name": "near", "model": str(source)}, **changes}


def values(dataset, folder, source, **changes):
    return tiny_values(dataset, folder, **near_to(source, **changes))


def held(one):
    return one.engine.objective.frozen["model"].model


def test_the_model_is_the_one_that_is_named_and_nothing_of_it_is_trained_or_stored(tiny_dataset, tmp_path, teacher):
    one = make(tiny_dataset, tmp_path / "r", **near_to(teacher))
    model = held(one)
    assert same(dict(model.state_dict()), open_run(str(teacher), None, "cpu", "auto").model.state_dict())
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    trained = {id(parameter) for group in one.engine.optimizer.param_groups for parameter in group["params"]}
    assert trained.isdisjoint(map(id, model.parameters())) and len(trained) == len(one.engine.shapes)
    sizes = [tensor.numel() for name, tensor in one.engine.tensors().items() if name.startswith("model.")]
    assert sum(sizes) == sum(shape.numel() for shape in one.engine.shapes.values()), "nothing else is stored"
    one.stream.close()


def test_it_computes_in_the_number_type_of_the_run(tiny_dataset, tmp_path, teacher):
    """In bf16 the same on every strategy: weights are bf16, and autocast changes nothing."""
    one = make(tiny_dataset, tmp_path / "r", **near_to(teacher, precision="bf16"))
    tokens = torch.arange(32).view(2, 16)
    other = one.engine.objective.frozen["model"]
    assert {parameter.dtype for parameter in held(one).parameters()} == {torch.bfloat16}
    with one.engine.autocast():
        within = other.logits(other.hidden(tokens))
    assert within.dtype == torch.bfloat16 and torch.equal(within, other.logits(other.hidden(tokens)))
    one.stream.close()


def test_fsdp_shards_its_blocks(tiny_dataset, tmp_path, teacher):
    alone = make(tiny_dataset, tmp_path / "r", **near_to(teacher))
    tokens = torch.arange(32).view(2, 16)
    other = alone.engine.objective.frozen["model"]
    expected = other.logits(other.hidden(tokens))
    with group_of_one(), contextlib.ExitStack() as stack:
        sharded = make(tiny_dataset, tmp_path / "r", **near_to(teacher, engine={"strategy": "fsdp"}))
        stack.callback(sharded.stream.close)
        assert all(hasattr(p, "to_local") for block in held(sharded).blocks() for p in block.parameters())
        other = sharded.engine.objective.frozen["model"]
        torch.testing.assert_close(other.logits(other.hidden(tokens)), expected, rtol=1e-5, atol=1e-6)
    alone.stream.close()


def test_the_plan_counts_and_names_it(tiny_dataset, tmp_path, teacher):
    config = build(RunConfig, values(tiny_dataset, tmp_path / "r", f"{teacher}@3"))
    plan = resolve(config, find_dataset(config.data))
    assert summary(plan)["frozen"] == {"model": plan.frozen["model"].parameters}
    assert expected_memory(plan)["frozen models"] == 4 * plan.frozen["model"].parameters
    assert plan.frozen["model"].bytes("bf16", 1) == 2 * plan.frozen["model"].parameters
    assert f"parameters of gpt2 in {teacher}@3; not trained" in render(plan)


def test_a_run_goes_on_with_the_same_model_only(tiny_dataset, tmp_path, teacher, monkeypatch):
    monkeypatch.chdir(teacher.parent)
    optim = {"schedule": "constant", "warmup_steps": 1}  # does not depend on max_steps
    given = values(tiny_dataset, tmp_path / "r", teacher.name, max_steps=4, optim=optim)
    run(given)
    assert resolved(given).objective["model"] == f"{teacher}@6"
    assert read_rows(tmp_path / "r" / "metrics.jsonl")[-1]["loss_size"] > 0
    for key, other in (("model", f"{teacher}@3"), ("model_weights", "last-2")):
        changed = {**given, "objective": {**given["objective"], key: other}}
        with pytest.raises(UserError, match=rf"^objective.{key}: .* was started with "):
            run(changed)
    run(given | {"max_steps": 8})
    run(given | {"max_steps": 8, "run_dir": str(tmp_path / "whole")})
    losses = [[row["loss"] for row in read_rows(tmp_path / name / "metrics.jsonl")] for name in ("r", "whole")]
    assert losses[0][-4:] == losses[1][-4:]


def test_without_a_source_it_is_the_model_that_init_from_names(tiny_dataset, tmp_path, teacher):
    given = values(tiny_dataset, tmp_path / "r", teacher)
    del given["objective"]["model"], given["model"], given["model_scale"]
    with pytest.raises(UserError, match=r"^objective.model: name a model: RUN\[@STEP\]"):
        resolved(given)
    assert resolved(given | {"init_from": str(teacher)}).objective["model"] == f"{teacher}@6"


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"objective": {"name": "near", "model": "nowhere"}}, "objective.model: nowhere is not a run's folder"),
        ({"objective": {"name": "near", "model": "{teacher}@5"}}, "objective.model: .* has no checkpoint of step 5"),
        (LONG, "objective.model: .* reads 1024 tokens at most"),
    ],
)
def test_what_cannot_be_is_one_line(tiny_dataset, tmp_path, teacher, changes, why):
    if "objective" in changes:
        changes = {
            "objective": {**changes["objective"], "model": changes["objective"]["model"].format(teacher=teacher)}
        }
    given = tiny_values(
        tiny_dataset, tmp_path / "r", **{"objective": {"name": "near", "model": str(teacher)}, **changes}
    )
    with pytest.raises(UserError, match=f"^{why}"):
        resolve(build(RunConfig, given))


def test_another_tokenizer_is_refused(tiny_dataset, tmp_path, teacher):
    from trainer.core.config import PrepareConfig
    from trainer.data.prepare import prepare

    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat.\n" * 500)
    settings = {
        "source": str(text),
        "tokenizer": "chars",
        "validation_fraction": 0.2,
        "workers": 1,
        "sample_length": 64,
    }
    prepare(PrepareConfig(**settings, out=str(tmp_path / "data")), lambda line: None)
    with pytest.raises(UserError, match=r"^objective.model: .* was prepared with tokenizer chars"):
        make(tmp_path / "data", tmp_path / "r", **near_to(teacher))
