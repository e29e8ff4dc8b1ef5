"""Models that are less simple than the zoo's train, save, go on, and give the same losses when read again."""

import json
from dataclasses import replace

import odd_model
import pytest
import torch
from conftest import tiny_values
from safetensors.torch import load_file
from test_zoo import build as zoo_model

from models.base import get_model
from models.materialise import ties, with_storage
from trainer.checkpoint import format as checkpoint
from trainer.commands.evaluate import EvaluateConfig
from trainer.commands.evaluate import run as evaluate
from trainer.commands.export import ExportConfig
from trainer.commands.export import run as export
from trainer.commands.train import run
from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import build
from trainer.engine.gradients import refuse_unreached, unreached
from trainer.engine.meta import build_meta
from trainer.planning.plan import resolve
from trainer.runs.metrics import read_rows
from trainer.runtime.distributed import World


def values(dataset, folder, model, **changes):
    shape = {"name": model, "d_model": 64, "n_layers": 2, "n_heads": 2}
    return tiny_values(dataset, folder, model=shape, optim__recipe="hlb", **changes)  # whose schedules have no end


def test_resumption_is_exact(tiny_dataset, tmp_path):
    run(values(tiny_dataset, tmp_path / "whole", "odd", max_steps=8))
    run(values(tiny_dataset, tmp_path / "parts", "odd", max_steps=4))
    run({**values(tiny_dataset, tmp_path / "parts", "odd"), "max_steps": 8})
    whole, parts = (
        checkpoint.load(tmp_path / name / "checkpoints" / "step-00000008", "", World()) for name in ("whole", "parts")
    )
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_training_refuses_a_parameter_without_gradient_before_it_begins(tiny_dataset, tmp_path):
    with pytest.raises(UserError, match="^model idle: a backward pass gives no gradient to idle; "):
        run(values(tiny_dataset, tmp_path / "r", "idle"))
    assert not (tmp_path / "r" / "config.yaml").exists()


def plan_of(model):
    return resolve(build(RunConfig, values("nowhere", "r", model)))


def test_a_frozen_parameter_needs_no_gradient(monkeypatch):
    """The model says that it is not trained, as LoRA does; `idle` is refused, as it should be trained and is not reached."""
    original = odd_model.Steady.__init__

    def freeze(self, config):
        original(self, config)
        self.idle.requires_grad_(False)

    refuse_unreached(plan_of("steady"), print)  # nothing to refuse
    monkeypatch.setattr("trainer.planning.memory._measured", {})
    monkeypatch.setattr(odd_model.Steady, "__init__", freeze)
    refuse_unreached(plan_of("steady"), print)
    with pytest.raises(UserError, match="gives no gradient to idle; "):
        refuse_unreached(plan_of("idle"), print)


def test_where_that_cannot_be_found_out_it_is_said(monkeypatch):
    def nowhere(self, *args, **kwargs):
        raise RuntimeError("needs a GPU")

    plan, said = replace(plan_of("steady"), unreached=None), []
    monkeypatch.setattr(odd_model.Steady, "forward", nowhere)
    refuse_unreached(plan, said.append)
    assert len(said) == 1 and "RuntimeError: needs a GPU" in said[0]


def test_a_gradient_that_a_function_keeps_back_is_missed(monkeypatch):
    """The graph leads to the parameter, and yet no gradient comes: only a backward pass shows it."""

    class Forgetful(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            return x + weight.sum()

        @staticmethod
        def backward(ctx, gradient):
            return gradient, None

    original = odd_model.Idle.forward

    def forward(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        return output._replace(loss=Forgetful.apply(output.loss, self.idle))

    monkeypatch.setattr("trainer.planning.memory._measured", {})
    monkeypatch.setattr(odd_model.Idle, "forward", forward)
    plan = plan_of("idle")
    assert plan.unreached is None
    with pytest.raises(UserError, match="gives no gradient to idle; "):
        refuse_unreached(plan, print)


def test_a_tie_by_assignment_stays(tiny_dataset, tmp_path):
    config = odd_model.Odd.Config(vocab_size=64, d_model=32, n_layers=1, n_heads=2)
    meta = build_meta(odd_model.Odd, config)
    assert ties(meta) == {"head.weight": "embedding.weight"}
    model = with_storage(meta, torch.device("cpu"))
    assert model.head.weight is model.embedding.weight


def test_what_no_checkpoint_holds_is_made_anew(tiny_dataset, tmp_path, capsys):
    run(values(tiny_dataset, tmp_path / "r", "odd", max_steps=4))
    trained = read_rows(tmp_path / "r" / "metrics.jsonl")[-1]["val_loss"]
    evaluate(EvaluateConfig(run_dir=str(tmp_path / "r"), protocol="full", device="cpu"), as_json=True)
    assert json.loads(capsys.readouterr().out)["full"]["loss"] == pytest.approx(trained, rel=1e-6)

    export(ExportConfig(run_dir=str(tmp_path / "r"), out=str(tmp_path / "out")))
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    model_class = get_model(about["model"])
    model = model_class(model_class.Config(**about["config"]))
    model.init_weights()
    model.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    assert torch.equal(model.table, torch.linspace(1, 2, 64)) and (model.scale == 0.5).all()


@pytest.mark.parametrize("name", ["hlb", "gpt2", "modded", "ngpt"])
def test_the_graph_tells_what_a_backward_pass_does(name):
    model = zoo_model(name, scale=0.2)
    model.idle = torch.nn.Parameter(torch.zeros(2))
    tokens = torch.zeros(1, 16, dtype=torch.long)
    loss = model(tokens, targets=tokens).loss
    told = unreached(model, loss)
    loss.backward()
    assert told == [key for key, parameter in model.named_parameters() if parameter.grad is None] == ["idle"]
