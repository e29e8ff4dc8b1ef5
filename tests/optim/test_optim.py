"""Schedules, groups and guards of the optimiser."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_values
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.base import get_model, load_models
from trainer import optim
from trainer.core.config import OptimConfig, RunConfig
from trainer.core.settings import build
from trainer.optim import schedules
from trainer.recipes import hlb, plain
from trainer.recipes.hlb import weight_decay, weight_decay_base

load_models()


def test_power_decay_values():
    printed = {0: 0.02, 50: 0.51, 99: 0.9902, 100: 1.0, 101: 0.94606, 200: 0.69128, 999: 0.58031}
    assert {step: round(hlb.power_decay(step), 5) for step in printed} == printed


def test_output_decay_values():
    printed = {0: 1, 1: 0.87055, 99: 0.39811, 999: 0.25119}
    assert {step: round(hlb.output_decay(step), 5) for step in printed} == printed


def test_position_decay_values():
    printed = {100: 0.60577, 500: 0.08157, 999: 0.00669}
    assert {step: round(hlb.exponential_decay(step), 5) for step in printed} == printed


@pytest.mark.parametrize(
    "name, begins, middle, end",
    [
        ("cosine", 1, 0.55, 0.1),
        ("linear", 1, 0.55, 0.1),
        ("wsd", 1, 1, 0.1),
        ("exponential", 1, 0.1**0.5, 0.1),
        ("power", (31 / 30) ** -0.3, (516 / 30) ** -0.3, (1001 / 30) ** -0.3),
        ("inverse_sqrt", (31 / 30) ** -0.5, (516 / 30) ** -0.5, (1001 / 30) ** -0.5),
        ("constant", 1, 1, 1),
    ],
)
def test_schedules(name, begins, middle, end):
    """At the first step after the warm-up, half way, and at the end; the warm-up is the same for all."""
    decay = schedules.Decay(30, 1000, final=0.1, decay_steps=200, power=0.3)
    assert [schedules.multiplier(name, step, decay) for step in (0, 29)] == [pytest.approx(1 / 30), 1]
    values = [schedules.multiplier(name, step, decay) for step in (30, 515, 1000)]
    assert values == [pytest.approx(value) for value in (begins, middle, end)]


def test_a_trapezoid_as_in_blagpt():
    """Warm-up 250, constant until 3,100, then straight to 0 at 5,100."""
    decay = schedules.Decay(250, 5100, final=0, decay_steps=2000)
    at = [schedules.multiplier("wsd", step, decay) for step in (249, 250, 3100, 4100, 5099, 5100)]
    assert at == [1, 1, 1, 0.5, pytest.approx(1 / 2000), 0]


def test_a_schedule_that_a_recipe_cannot_follow_is_refused(tiny_dataset):
    from trainer.core.errors import UserError
    from trainer.planning.plan import resolve

    def planned(**optim):
        values = tiny_values(tiny_dataset, "runs/x")
        return resolve(build(RunConfig, {**values, "optim": optim})).config.optim

    assert planned().schedule == "hlb" and planned(recipe="plain").schedule == "cosine"
    assert planned(recipe="plain", schedule="wsd").decay_steps == round(0.2 * 12)
    with pytest.raises(UserError, match="the recipe hlb cannot follow wsd"):
        planned(schedule="wsd")
    with pytest.raises(UserError, match="the recipe plain cannot follow hlb"):
        planned(recipe="plain", schedule="hlb")
    with pytest.raises(UserError, match="never reaches 0"):
        planned(recipe="plain", schedule="exponential", final_lr_fraction="0")


def hlb_model():
    cls = get_model("hlb")
    model = cls(cls.Config(vocab_size=64, d_model=64, n_layers=2))
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def test_hlb_groups_at_scale_one():
    """Membership, learning rates, betas and decay of hlb-gpt with lr of scale 1."""
    config = OptimConfig(recipe="hlb", lr=2.52587e-3, warmup_steps=100, weight_decay=0.0, loss_driven_decay=True)
    model = hlb_model()
    groups = {group.name: group for group in hlb.Hlb().groups(model, {}, SimpleNamespace(optim=config))}
    printed = {"position": 0.252587, "norm, bias, embedding": 0.0808278, "head": 5.05174e-3, "matrix": 2.52587e-3}
    assert {name: pytest.approx(group.lr, rel=1e-6) for name, group in groups.items()} == printed
    assert {name: group.settings["adamw"] for name, group in groups.items()} == {
        name: {"beta1": 0.6 if name == "head" else 0.9, "beta2": 0.95, "eps": 1e-9} for name in printed
    }
    assert [name for name, group in groups.items() if group.loss_driven_decay] == ["matrix"]
    assert [len(groups[name].parameters) for name in printed] == [2, 2 + 1 + 1, 1, 4]


def test_a_tied_matrix_learns_as_the_head_does():
    """At the embedding's 32 lr a head diverges. The other tables, here of positions, stay where they were."""
    cls = get_model("gpt2")
    config = OptimConfig(recipe="hlb", lr=0.01, warmup_steps=100, weight_decay=0.0, loss_driven_decay=True)
    held = {}
    for tied in (True, False):
        model = cls(cls.Config(vocab_size=64, d_model=64, n_layers=1, n_heads=2, max_context=16, tied=tied))
        groups = {group.name: group.parameters for group in hlb.Hlb().groups(model, {}, SimpleNamespace(optim=config))}
        assert sorted(sum(groups.values(), [])) == sorted(name for name, _ in model.named_parameters())
        held[tied] = groups["head"], "embedding.weight" in groups["norm, bias, embedding"]
        assert "positions.weight" in groups["norm, bias, embedding"]
    assert held == {True: (["embedding.weight"], False), False: (["head.weight"], True)}


def test_every_parameter_in_exactly_one_role():
    model = hlb_model()
    roles = model.parameter_groups()
    for broken in ({**roles, "norm": []}, {**roles, "bias": roles["norm"]}, {**roles, "odd": []}):
        model.parameter_groups = lambda broken=broken: broken
        with pytest.raises(ValueError, match="role"):
            optim.names_by_role(model)


SCALE_ONE = 46_009_736  # parameters: hlb's decay law depends on their number


def one_parameter(weight_decay=0.0, loss_driven=False, lr=0.1):
    parameter = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    settings = {"adamw": {"beta1": 0.9, "beta2": 0.95, "eps": 1e-9}}
    group = optim.Group("g", ["p"], lr, lambda step: 1.0, weight_decay, loss_driven, settings)
    shapes, cpu = {"p": torch.Size([SCALE_ONE])}, torch.device("cpu")
    return parameter, optim.Optimizer(
        [group],
        shapes,
        {"p": parameter},
        first_loss=6.0,
        decay_of=partial(hlb.weight_decay, base=weight_decay_base(SCALE_ONE)),
        device=cpu,
    )


def update(optimizer, step, loss, finite):
    optimizer.prepare(step, finite)
    optimizer.step()
    optimizer.follow(torch.tensor(loss), finite)


ONE, ZERO = torch.tensor(1.0), torch.tensor(0.0)


def test_one_adamw_step_by_hand():
    parameter, optimizer = one_parameter(weight_decay=0.5)
    parameter.grad = torch.tensor([[0.3, -0.01]])
    update(optimizer, 0, 4.0, ONE)
    # After one step Adam's bias-corrected update is the sign of the gradient (up to eps).
    expected = torch.tensor([[1.0, -2.0]]) * (1 - 0.1 * 0.5) - 0.1 * torch.tensor([[1.0, -1.0]])
    torch.testing.assert_close(parameter.data, expected, rtol=1e-6, atol=1e-6)


def test_decay_follows_the_loss_of_the_step_before():
    parameter, optimizer = one_parameter(loss_driven=True)
    base = weight_decay_base(SCALE_ONE)
    value = torch.tensor([[1.0, -2.0]])
    before = 6.0  # the first step decays as at the loss of a uniform guess, not by the original's 16
    for loss in (3.0, 2.0, 5.0):
        parameter.grad = torch.zeros_like(parameter)
        update(optimizer, 0, loss, ONE)
        value = value * (1 - 0.1 * weight_decay(torch.tensor(before), base))
        torch.testing.assert_close(parameter.data, value, rtol=1e-6, atol=0)
        before = loss


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(bad):
    parameter, optimizer = one_parameter(weight_decay=0.5, loss_driven=True)
    parameter.grad = torch.tensor([[0.3, -0.01]])
    update(optimizer, 0, 4.0, ONE)
    state = optimizer.state[parameter]
    before = {name: tensor.clone() for name, tensor in state.items()}
    weights, decay = parameter.data.clone(), optimizer.decay.clone()
    parameter.grad = torch.tensor([[bad, 1.0]])
    update(optimizer, 1, bad, ZERO)
    assert torch.equal(parameter.data, weights)
    assert torch.equal(optimizer.decay, decay)
    assert all(torch.equal(before[name], tensor) for name, tensor in state.items())
    parameter.grad = torch.tensor([[0.3, -0.01]])
    update(optimizer, 2, 4.0, ONE)
    assert not torch.equal(parameter.data, weights)


class Calls(TorchDispatchMode):
    """Names of the operators that change their arguments. On a GPU each is one launch, or one for each 320 chunks of 65,536
    numbers and 30 to 110 tensors."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function._schema.is_mutable:
            self.names.append(function._schema.name)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("layers", [1, 3])
def test_the_calls_of_a_step_do_not_grow_with_the_number_of_tensors(layers):
    cls = get_model("gpt2")
    model = cls(cls.Config(vocab_size=64, d_model=64, n_layers=layers, n_heads=2, max_context=16))
    model.init_weights(torch.Generator().manual_seed(0))
    local = dict(model.named_parameters())
    shapes = {name: parameter.shape for name, parameter in local.items()}
    config = OptimConfig(recipe="plain", lr=1e-3, warmup_steps=3, weight_decay=0.1, loss_driven_decay=False)
    groups = plain.Plain().groups(model, shapes, SimpleNamespace(optim=config, max_steps=100))
    optimizer = optim.Optimizer(groups, shapes, local, 1.0, torch.zeros_like, torch.device("cpu"))
    for parameter in local.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.prepare(0, ONE)
    with Calls() as calls:
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # as for ddp and CUDA graphs
    assert calls.names == 2 * ["aten::_foreach_add_", "aten::_fused_adamw_"] + ["aten::_foreach_zero_"]
    assert not any(parameter.grad.any() for parameter in local.values())
