"""What rules of scope matrix are given: matrices, also those that a parameter fuses, and all that a rank owns at once."""

from dataclasses import dataclass

import pytest
import torch
from conftest import tiny_values
from test_rules import registry  # noqa: F401
from tiny_runs import make, same, weights

from models.base import Split, get_model, load_models
from trainer.commands.train import run
from trainer.core.config import OptimConfig, RunConfig
from trainer.core.settings import build
from trainer.engine.matrices import deal, update_cost
from trainer.optim import OptimizerRule, names_by_role, register_optimizer, state_bytes_per_parameter
from trainer.optim.groups import matrices_of
from trainer.planning.plan import resolve
from trainer.recipes import RECIPES
from trainer.recipes.plain import HIGHEST_RATE
from trainer.training.step import optimiser_step

load_models()
SIZE = {"n_layers": 2, "d_model": 32, "vocab_size": 323}


@dataclass
class NoConfig:
    pass


class Watcher(OptimizerRule):
    """Moves each matrix by lr along gradient / |gradient|, and remembers the shapes that each call is given."""

    Config = NoConfig
    scope = "matrix"
    calls: list = []

    def state(self, shape, dtype):
        return {"step": (torch.Size(), torch.float32), "norm": (torch.Size([1]), torch.float32)}

    def update(self, group, parameters, gradients, states, finite):
        self.calls.append([tuple(parameter.shape) for parameter in parameters])
        for parameter, gradient, state in zip(parameters, gradients, states, strict=True):
            state["norm"].copy_(gradient.norm())
            parameter.sub_(group.lr * finite * gradient / gradient.norm())


@pytest.fixture
def watcher(registry):  # noqa: F811
    register_optimizer("watcher")(Watcher)
    Watcher.calls = []
    return Watcher


@pytest.mark.parametrize("split", [Split(0, {"a": 2, "b": 3}), Split(1, {"a": 1, "b": 6})])
def test_parts_are_views_of_the_parameter(split):
    whole = torch.arange(35.0).view(5, 7)
    parts = split.parts(whole)
    assert list(parts) == ["a", "b"] and torch.equal(torch.cat(list(parts.values()), split.dim), whole)
    parts["b"].zero_()
    assert (whole == 0).sum() == parts["b"].numel() + (split.dim == 0 or split.sizes["a"] == 1)


@pytest.mark.parametrize("model", ["hlb", "gpt2", "llama"])
def test_fused_matrices_are_updated_each_for_itself(watcher, tiny_dataset, tmp_path, model):
    """As many matrices and numbers as declared, in one call; each moves by lr, so the parameter by lr sqrt(its matrices)."""
    one = make(tiny_dataset, tmp_path / "r", model={"name": model, **SIZE}, optim__name="watcher", optim__clip_norm=0)
    engine, splits = one.engine, matrices_of(one.model, one.engine.shapes)
    before = {name: parameter.detach().clone() for name, parameter in one.model.named_parameters()}
    optimiser_step(one)
    fused = one.model.fused_matrices()
    assert fused and {name: split for name, split in splits.items() if split} == fused
    expected = [
        tuple(part.shape)
        for name, split in splits.items()
        for part in (split.parts(before[name]).values() if split else [before[name]])
    ]
    calls = [sorted(call) for call in watcher.calls]
    assert calls == [sorted(expected)] and all(min(shape) > 1 for shape in expected)
    lr = engine.optimizer.matrix_lr
    for name, split in splits.items():
        moved = engine.local[name].detach() - before[name]
        for part in split.parts(moved).values() if split else [moved]:
            assert part.norm().item() == pytest.approx(lr, rel=1e-3), name  # a difference of fp32 weights


def test_state_of_a_fused_matrix_has_its_name(watcher, tiny_dataset, tmp_path):
    """In checkpoints, and it comes back bit for bit."""
    values = {"model": {"name": "gpt2", **SIZE}, "optim__name": "watcher", "checkpoint__every": 2}
    for folder, steps in (("straight", 4), ("cut", 2)):
        run(tiny_values(tiny_dataset, tmp_path / folder, max_steps=steps, **values))
    run({"run_dir": str(tmp_path / "cut"), "max_steps": 4})
    found = weights(tmp_path / "cut", 4)
    assert same(found, weights(tmp_path / "straight", 4))
    state = {key.split("attention.")[1] for key in found if key.startswith("optimizer.") and "0.attention.qkv" in key}
    assert {f"qkv.weight.{part}.{key}" for part in ("query", "key", "value") for key in ("step", "norm")} <= state
    assert "qkv.weight.norm" not in state


def test_rows_are_no_matrices():
    """A gate with one row is AdamW's, and so is what has another role."""

    class Gated(torch.nn.Module):
        roles, further_roles = ("matrix", "head"), {}

        def __init__(self):
            super().__init__()
            for name, shape in {"square": (4, 4), "row": (1, 4), "column": (4, 1), "head": (9, 4)}.items():
                self.register_parameter(name, torch.nn.Parameter(torch.zeros(shape)))

        def names_by_role(self):
            return {"matrix": ["square", "row", "column"], "head": ["head"]}

        def fused_matrices(self):
            return {}

    model = Gated()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert matrices_of(model, shapes) == {"square": None}


def test_state_is_counted_matrix_by_matrix(watcher):
    class Gram(Watcher):
        def state(self, shape, dtype):
            return {"gram": (torch.Size([shape[0], shape[0]]), torch.float32)}

    register_optimizer("rows")(Gram)
    cls = get_model("gpt2")
    with torch.device("meta"):
        model = cls(cls.Config(vocab_size=64, d_model=32, n_layers=1, n_heads=2, max_context=16))
    numbers = {name: parameter.numel() for name, parameter in model.named_parameters()}
    splits = matrices_of(model, {name: parameter.shape for name, parameter in model.named_parameters()})
    gram = sum(
        part.shape[0] ** 2
        for name, split in splits.items()
        for part in (split.parts(model.get_parameter(name)).values() if split else [model.get_parameter(name)])
    )
    rest = sum(number for name, number in numbers.items() if name not in splits)
    expected = (4 * gram + 8 * rest) / sum(numbers.values())
    assert state_bytes_per_parameter(model, OptimConfig(name="rows"), narrow=False) == pytest.approx(expected)


def test_owners_are_dealt_by_the_cost_of_the_parts():
    """A fused [3 d, d] costs three times as much as a [d, d], not more as one [3 d, d] would."""
    square, wide = torch.Size((8, 8)), torch.Size((8, 32))
    assert update_cost([square] * 3) == 3 * update_cost([square]) == 3 * 8**3
    assert update_cost([wide]) == 8 * 32 * 8 and update_cost([torch.Size([5])]) == 5
    assert deal({"a": 3.0, "b": 2.0, "c": 1.0}, 2) == {"a": 0, "b": 1, "c": 1}


@pytest.mark.parametrize("settings, rates, why", [
    ({}, (1e-3, 1e-3), "have the size of AdamW's"),
    ({"scale": "spectral"}, (0.02, None), "0.3118 C^-0.125"),
])  # fmt: skip
def test_learning_rates_of_matrices_and_of_the_rest(tiny_dataset, tmp_path, settings, rates, why):
    """Of a scale that is AdamW's, one rate is for both; of another, each has its own, and both reach the groups."""
    given = {"optim__lr": 1e-3} if rates[1] else {}
    one = make(
        tiny_dataset,
        tmp_path / "r",
        model={"name": "gpt2", **SIZE},
        optim__name="muon",
        optim__settings=settings,
        **given,
    )
    optim, rules = one.config.optim, {entry.key: entry.rule for entry in one.plan.entries}
    assert optim.lr == rates[0] and why in rules["optim.rest_lr"]
    assert optim.rest_lr == rates[1] or optim.rest_lr <= HIGHEST_RATE < optim.lr
    groups = {group.rule: group.lr for group in one.engine.optimizer.groups}
    assert groups == {"muon": optim.lr, "adamw": pytest.approx(optim.rest_lr, rel=1e-12)}


def test_rest_lr_without_a_rest_is_told():
    plan = resolve(build(RunConfig, {"device": "cpu", "model_scale": 0.02, "optim": {"rest_lr": 0.1}}))
    assert plan.config.optim.rest_lr is None
    assert ("none", "0.1 has no effect: adamw updates every parameter, at optim.lr") in [
        entry[1:] for entry in plan.entries if entry.key == "optim.rest_lr"
    ]


def test_hlbs_groups_keep_their_proportions(tiny_dataset, tmp_path):
    one = make(tiny_dataset, tmp_path / "r", optim__name="muon", optim__lr=0.1, optim__rest_lr=1e-3)
    found = {group.name: group.lr for group in one.engine.optimizer.groups}
    assert found == {
        "matrix": 0.1,
        **{
            name: pytest.approx(factor * 1e-3)
            for name, factor in {"position": 100, "norm, bias, embedding": 32, "head": 2}.items()
        },
    }
    assert dict(entry[:2] for entry in RECIPES["hlb"].rows(one.config, False))["lr of the head"] == 2e-3


def test_the_start_of_a_run_says_which_rule_updates_what(tiny_dataset, tmp_path):
    """And of the state how much there really is: what is said is what the checkpoint holds."""
    one = make(tiny_dataset, tmp_path / "r", model={"name": "gpt2", **SIZE}, optim__name="soap", optim__lr=1e-3)
    matrices, rest, vectors = one.engine.optimizer.table(names_by_role(one.model)).splitlines()
    assert "8 tensors (12 matrices)" in matrices and "(matrix)  soap  state" in matrices
    assert "(embedding" in rest and "adamw" in rest and "matrix" not in rest and "adamw" in vectors
    assert "(norm, bias)" in vectors or "(norm" in vectors
    optimiser_step(one)
    tensors = one.engine.tensors()
    held = {name: sum(v.nbytes for k, v in tensors.items() if k.startswith(f"optimizer.{name}.") and not k.endswith(".step"))
            for name in one.engine.shapes}  # fmt: skip
    for line, group in zip((matrices, rest, vectors), one.engine.optimizer.groups, strict=True):
        assert f"state {sum(held[name] for name in group.parameters) / 2**20:,.2f} MiB" in line
