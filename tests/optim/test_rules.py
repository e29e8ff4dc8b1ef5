"""Optimizers as plug-ins: the contract of trainer/optim/rule.py, its errors, and `check`."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, error_line, tiny_values
from processes import forked_trainer
from safetensors.torch import load_file
from tiny_runs import losses, make, same, weights

from models.base import cross_entropy, get_model, load_models
from trainer.commands import check, export
from trainer.commands.check import CheckConfig
from trainer.commands.export import ExportConfig
from trainer.commands.plugins import import_plugin
from trainer.commands.train import run
from trainer.core.config import OptimConfig, RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import build
from trainer.engine import refuse_scope
from trainer.inference.evaluation import validate
from trainer.optim import OptimizerRule, Used, get_rule, register_optimizer, rule
from trainer.planning.plan import resolve
from trainer.runs.metrics import read_rows
from trainer.runs.opening import open_run
from trainer.runtime.distributed import World
from trainer.testing import optimizers, strategies
from trainer.testing.subject import Failed, Subject
from trainer.training.step import optimiser_step

load_models()
PLUGINS = ROOT / "tests" / "plugins"
for name in ("lion", "gram", "averaged"):
    import_plugin(str(PLUGINS / f"{name}.py"))


@pytest.fixture
def registry(monkeypatch):
    """What a test registers is forgotten."""
    monkeypatch.setattr(rule, "_REGISTRY", dict(rule._REGISTRY))


@dataclass
class NoConfig:
    pass


class Descent(OptimizerRule):
    """Plain gradient descent, to be spoiled."""

    Config = NoConfig

    def state(self, shape, dtype):
        return {"momentum": (shape, dtype)}

    def update(self, group, parameters, gradients, states, finite):
        for p, g, state in zip(parameters, gradients, states, strict=True):
            state["momentum"].copy_(torch.where(finite > 0, g, state["momentum"]))
            p.sub_(group.lr * finite * state["momentum"])


class Forgetful(Descent):
    def update(self, group, parameters, gradients, states, finite):
        for p, g in zip(parameters, gradients, strict=True):
            p.sub_(group.lr * finite * torch.where(finite > 0, g, 0))


class Hoarder(Descent):
    def update(self, *arguments):
        super().update(*arguments)
        self.steps = getattr(self, "steps", 0) + 1


class Careless(Descent):
    def update(self, group, parameters, gradients, states, finite):
        for p, g, state in zip(parameters, gradients, states, strict=True):
            state["momentum"].copy_(g)
            p.sub_(group.lr * finite * g)


class Climber(Descent):
    def update(self, group, parameters, gradients, states, finite):
        super().update(group, parameters, [-g for g in gradients], states, finite)


class Global(Descent):
    """Says element, and divides by a norm."""

    def update(self, group, parameters, gradients, states, finite):
        super().update(group, parameters, [g / g.norm() for g in gradients], states, finite)


class Waiting(Descent):
    def update(self, group, parameters, gradients, states, finite):
        if finite.item() > 0:
            super().update(group, parameters, gradients, states, finite)


class Wide(Descent):
    def state(self, shape, dtype):
        return {"momentum": (shape, torch.float32)}


@pytest.mark.parametrize(
    "spoiled, failing",
    [
        (Descent, None),
        (Forgetful, "state"),
        (Hoarder, "state"),
        (Careless, "finite"),
        (Climber, "quadratic"),
        (Global, "shards"),
        (Waiting, "wait"),
        (Wide, "narrow"),
    ],
)
def test_check_finds_what_is_broken(registry, spoiled, failing):
    register_optimizer("spoiled")(spoiled)
    failed = []
    for one in optimizers.CHECKS:
        try:
            one.run(optimizers.RuleSubject("spoiled", spoiled))
        except Failed:
            failed.append(one.name)
    assert failed == ([failing] if failing else [])


def test_a_state_that_load_does_not_bring_back_is_found(registry):
    class Elsewhere(Descent):
        momenta: dict = {}

        def update(self, group, parameters, gradients, states, finite):
            for p, g, state in zip(parameters, gradients, states, strict=True):
                state["momentum"].copy_(torch.where(finite > 0, g, state["momentum"]))
                last = self.momenta.setdefault(p.data_ptr(), torch.zeros_like(p))
                last.copy_(torch.where(finite > 0, 0.5 * last + g, last))
                p.sub_(group.lr * finite * last)

    register_optimizer("elsewhere")(Elsewhere)
    with pytest.raises(Failed, match="the step after loading differs from the original"):
        optimizers.state_carries_a_run(optimizers.RuleSubject("elsewhere", Elsewhere))


@pytest.mark.parametrize(
    "plugin, names", [("lion", ["my-lion"]), ("gram", ["gram", "unit"]), ("averaged", ["averaged"])]
)
def test_check_recognises_an_optimizer_file(capsys, plugin, names):
    check.run(CheckConfig(module=str(PLUGINS / f"{plugin}.py")))
    said = capsys.readouterr().out
    assert all(f"{name}: " in said and "0 FAILED" in said for name in names) and "in training" not in said


def test_what_is_no_rule_is_refused(registry):
    class Empty(OptimizerRule):
        pass

    with pytest.raises(TypeError, match="Empty must define state, update, Config"):
        register_optimizer("empty")(Empty)
    with pytest.raises(ValueError, match="'adamw' is taken by trainer.optim.adamw"):
        register_optimizer("adamw")(Descent)
    with pytest.raises(ValueError, match="'lion' is taken by trainer.optim.rules.lion"):
        register_optimizer("lion")(type("Lion", (Descent,), {}))
    with pytest.raises(TypeError, match="scope is 'row'; use element, tensor or matrix"):
        register_optimizer("row")(type("Row", (Descent,), {"scope": "row"}))


def test_element_rules_keep_state_of_the_parameters_shape():
    class Rows(Descent):
        def state(self, shape, dtype):
            return {"rows": (shape[:1], dtype)}

    with pytest.raises(
        UserError, match="optimizer Rows: state 'rows' .* has shape .3,.; a rule of scope element must keep"
    ):
        rule.state_bytes(Rows(), torch.Size((3, 4)), torch.float32)


@pytest.mark.parametrize(
    "optim, line",
    [
        (
            {"name": "lyon"},
            "^optim.name: 'lyon' is not known .allowed: .*adamw, .*--plugin FILE.py for one of your own",
        ),
        (
            {"name": "lion", "settings": {"beta3": 1}},
            "^unknown key optim.settings.beta3; did you mean optim.settings.beta",
        ),
        ({"settings": {"beta1": 2}}, "^optim.settings.beta1: 2.* is too large; at most 0.99999"),
    ],
)
def test_wrong_settings_are_named(optim, line):
    with pytest.raises(UserError, match=line):
        resolve(build(RunConfig, {"device": "cpu", "model_scale": 0.02, "optim": optim}))


def test_settings_reach_the_groups(tiny_dataset, tmp_path):
    one = make(tiny_dataset, tmp_path / "r", model={"name": "hlb"}, optim__recipe="hlb", optim__settings={"beta2": 0.9})
    configs = [group["config"] for group in one.engine.optimizer.param_groups]
    assert [config.beta1 for config in configs] == [0.9, 0.9, 0.9, 0.6] and {config.beta2 for config in configs} == {
        0.9
    }


@pytest.mark.parametrize("strategy", ["fsdp", "zero2"])
def test_offloaded_matrices_are_refused(strategy):
    engine = SimpleNamespace(strategy=strategy, offload=True)
    gram, lion = (Used("optim", name, get_rule(name)) for name in ("gram", "lion"))
    line = "optim.name: gram needs whole matrices, which ranks cannot exchange with engine.offload"
    with pytest.raises(UserError, match=f"^{line}"):
        refuse_scope(engine, [gram])
    refuse_scope(engine, [lion])
    engine.offload = False
    refuse_scope(engine, [gram])


def test_flat_vectors_take_one_rule_of_scope_element():
    engine = SimpleNamespace(strategy="zero3", offload=False)
    gram, adamw, lion = (Used("optim", name, get_rule(name)) for name in ("gram", "adamw", "lion"))
    refuse_scope(engine, [gram, adamw])
    with pytest.raises(UserError, match="zero3 needs one optimizer.*adamw, lion"):
        refuse_scope(engine, [gram, adamw, lion])


def test_flat_vectors_are_not_evaluated_with_other_weights():
    engine = SimpleNamespace(strategy="zero1", offload=False)
    with pytest.raises(
        UserError, match="^optim.name: averaged evaluates with other weights than it trains, but engine.st"
    ):
        refuse_scope(engine, [Used("optim", "averaged", get_rule("averaged"))])


@pytest.mark.parametrize("name, kind", [("my-lion", "fp32"), ("my-lion", "bf16"), ("gram", "bf16_stochastic")])
def test_a_run_goes_on_bit_for_bit(tiny_dataset, tmp_path, name, kind):
    """The rule's name and settings are part of the run; its state comes back as it was."""
    changes = {"optim__name": name, "optim__recipe": "hlb", "optim__state_precision": kind, "optim__lr": 1e-3}
    for folder, steps in (("straight", 6), ("cut", 4)):
        run(tiny_values(tiny_dataset, tmp_path / folder, max_steps=steps, checkpoint__every=2, **changes))
    run({"run_dir": str(tmp_path / "cut"), "max_steps": 6})
    assert losses(tmp_path / "cut") == losses(tmp_path / "straight")
    found, expected = weights(tmp_path / "cut", 6), weights(tmp_path / "straight", 6)
    assert same(found, expected)
    if name == "gram":  # AdamW updates what is no matrix
        assert any(key.endswith("momentum") for key in found) and any(key.endswith("exp_avg") for key in found)
    else:
        kinds = {tensor.dtype for key, tensor in found.items() if key.endswith("momentum")}
        assert kinds == {torch.bfloat16 if kind == "bf16" else torch.float32}
    with pytest.raises(UserError, match="^optim.name: .* was started with '.*', now it is 'adamw'"):
        run({"run_dir": str(tmp_path / "cut"), "max_steps": 8, "optim": {"name": "adamw"}})


def test_what_is_evaluated_and_exported_may_differ_from_what_is_trained(tiny_dataset, tmp_path):
    """Validation in training, evaluation of the folder and export see the mean; training and resuming see the weights."""
    changes = {"optim__name": "averaged", "optim__recipe": "hlb", "optim__lr": 0.1}
    for folder, steps in (("straight", 6), ("cut", 4)):
        run(tiny_values(tiny_dataset, tmp_path / folder, max_steps=steps, checkpoint__every=2, **changes))
    run({"run_dir": str(tmp_path / "cut"), "max_steps": 6})
    assert losses(tmp_path / "cut") == losses(tmp_path / "straight")
    stored = weights(tmp_path / "cut", 6)
    assert same(stored, weights(tmp_path / "straight", 6))
    opened = open_run(str(tmp_path / "cut"), None, "cpu", "auto")
    export.run(ExportConfig(run_dir=str(tmp_path / "cut"), out=str(tmp_path / "out")))
    exported = load_file(tmp_path / "out" / "model.safetensors")
    for name, parameter in opened.model.named_parameters():
        assert torch.equal(parameter, stored[f"optimizer.{name}.mean"]), name
        assert torch.equal(exported[name], parameter)
        assert not torch.equal(parameter, stored[f"model.{name}"])
    row = read_rows(tmp_path / "cut" / "metrics.jsonl")[-1]
    found = validate(opened, opened.split(opened.config.data, "validation"), opened.config, World(), 6)
    assert row["val_loss"] == pytest.approx(found["full"]["loss"], rel=1e-5)


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp"])
def test_training_goes_on_after_an_evaluation_as_without(strategy):
    """Also where blocks are gathered: what was gathered to evaluate is not trained on."""
    subject = Subject("gpt2", get_model("gpt2"))
    found = []
    with strategies.group_of_one():
        for evaluates in (False, True):
            with strategies.engine_of(subject, strategy, optim={"name": "averaged", "lr": 0.1}) as engine:
                first = strategies.losses_of(engine, subject, 0, 2)
                if evaluates:
                    with torch.no_grad():
                        with engine.evaluating():
                            mean = cross_entropy(engine.predict(subject.tokens), subject.targets).item()
                        own = cross_entropy(engine.predict(subject.tokens), subject.targets).item()
                    assert mean != own
                found.append(first + strategies.losses_of(engine, subject, 2, 2))
    assert found[0] == found[1]


def test_the_memory_plan_asks_the_rule():
    def moments(name, **layout):
        from trainer.planning.memory import MemoryEstimate, ParallelLayout

        plan = resolve(build(RunConfig, {"device": "cpu", "model_scale": 0.02, "model": {"name": "gpt2"}}))
        estimate = MemoryEstimate(plan.model_class, plan.model_config, 64)
        return (
            estimate.state(ParallelLayout("single", "fp32", optim=OptimConfig(name=name), **layout))["moments"]
            / estimate.parameters
        )

    assert (moments("adamw"), moments("lion"), moments("unit")) == (8, 4, 0)
    assert (moments("adamw", narrow=True), moments("lion", narrow=True)) == (4, 2)
    assert moments("gram") > 4, "AdamW's for what is no matrix, momentum and Gram matrices for the others"


def test_a_file_is_found_by_its_flag(tiny_dataset, tmp_path):
    values = tiny_values(tiny_dataset, tmp_path / "r", max_steps=1)
    words = ["plan", "--plugin", PLUGINS / "lion.py", "--optim.name", "my-lion", "--data.path", values["data"]["path"]]
    done = forked_trainer(*words, "--model_scale", "0.02", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    line = error_line(forked_trainer("plan", "--optim.name", "my-lion", "--model_scale", "0.02", "--device", "cpu"))
    assert "optim.name: 'my-lion' is not known" in line


def test_a_non_finite_step_of_a_plugin_changes_nothing(tiny_dataset, tmp_path):
    one = make(tiny_dataset, tmp_path / "r", optim__name="gram", optim__recipe="plain")
    optimiser_step(one)
    before = {name: tensor.clone() for name, tensor in one.engine.tensors().items()}
    parameter = next(iter(one.model.parameters()))
    parameter.register_hook(lambda gradient: gradient * float("nan"))
    assert not optimiser_step(one).finite
    assert same(one.engine.tensors(), before)
