"""Classes of torch.optim as rules: each makes the steps of the class itself, and those that cannot be rules are refused."""

import pytest
import torch
from rule_steps import SHAPES, Steps, against_torch, drawn

from trainer.core.errors import UserError
from trainer.optim.rule import get_rule, rule_class, state_bytes
from trainer.optim.torch_rules import ELEMENT, INITIAL, MATRIX
from trainer.testing import optimizers

CASES = [
    ("Adadelta", {}),
    ("Adam", {"amsgrad": True}),
    ("AdamW", {"betas": [0.8, 0.9]}),
    ("Adamax", {}),
    ("ASGD", {"t0": 2.0}),
    ("NAdam", {"decoupled_weight_decay": True}),
    ("RAdam", {}),
    ("RMSprop", {"centered": True, "momentum": 0.9}),
    ("Rprop", {}),
    ("SGD", {}),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("SGD", {"momentum": 0.9, "dampening": 0.5}),
]


@pytest.mark.parametrize("name, settings", CASES, ids=lambda value: str(value) if isinstance(value, str) else "")
def test_the_steps_are_those_of_the_class(name, settings):
    decay = {} if name == "Rprop" else {"weight_decay": 0.3}
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    reference = getattr(torch.optim, name)
    against_torch(f"torch:{name}", lambda p: reference(p, lr=0.01, **decay, **given), lr=0.01, **decay, **settings)


def test_muon_gets_matrices():
    assert rule_class("torch:Muon").scope == "matrix"
    start = drawn((4, 3))
    ours, theirs = Steps("torch:Muon", start, lr=0.01, weight_decay=0.3), start[0].clone().requires_grad_()
    optimizer = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.3)
    for step in range(3):
        [gradient] = drawn((4, 3), seed=step)
        [found] = ours.take([gradient])
        theirs.grad = gradient.clone()
        optimizer.step()
        torch.testing.assert_close(found, theirs.detach(), rtol=1e-12, atol=0)


def test_a_class_without_decay_gets_decoupled_decay():
    gradient = [torch.zeros(shape) for shape in SHAPES]
    decayed = Steps("torch:Rprop", drawn(*SHAPES), lr=0.1, weight_decay=0.5).take(gradient)
    for found, start in zip(decayed, drawn(*SHAPES), strict=True):
        torch.testing.assert_close(found, start * 0.95, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["Adam", "RMSprop"])  # told by found_inf, and undone
def test_a_first_step_that_is_not_finite_is_none(name):
    ours, plain = Steps(f"torch:{name}", drawn((3,))), Steps(f"torch:{name}", drawn((3,)))
    ours.take([torch.full((3,), float("inf"))], finite=0.0)
    for step in range(2):
        assert torch.equal(ours.take(drawn((3,), seed=step))[0], plain.take(drawn((3,), seed=step))[0])


# On a GPU these four take `capturable` instead; a CPU has no such form, and there is nothing to wait for.
COUNTS_IN_PYTHON = {"Adamax", "ASGD", "NAdam", "RAdam"}


@pytest.mark.parametrize("name", sorted(ELEMENT | MATRIX | {"ASGD", "NAdam"}))
def test_they_keep_the_contract(name):
    settings = {"momentum": 0.9} if name == "SGD" else {}
    for one in optimizers.CHECKS:
        if (one.name == "wait" and name in COUNTS_IN_PYTHON) or (one.name == "quadratic" and name == "Adadelta"):
            continue  # Adadelta's lr is near 1, and a hundred steps are its warm-up
        try:
            one.run(optimizers.RuleSubject(f"torch:{name}", rule_class(f"torch:{name}"), settings))
        except optimizers.Skipped:
            assert one.name in ("shards", "narrow"), name


def test_state_is_what_the_settings_ask_for():
    shape = torch.Size((3, 5))
    for settings, numbers in (({}, 0), ({"momentum": 0.9}, 1)):
        assert state_bytes(get_rule("torch:SGD", settings), shape, torch.float32) == 4 * 15 * numbers
    assert list(get_rule("torch:NAdam").state(shape, torch.float32)) == ["step", "mu_product", "exp_avg", "exp_avg_sq"]


@pytest.mark.parametrize(
    "name, settings, line",
    [
        ("LBFGS", {}, "^optim.name: torch:LBFGS needs a closure"),
        (
            "SparseAdam",
            {},
            "^optim.name: torch:SparseAdam does not take the gradients of the trainer: SparseAdam does not",
        ),
        ("Adafactor", {}, "^optim.name: torch:Adafactor reads values of tensors in Python"),
        ("Adagrad", {}, "^optim.name: torch:Adagrad reads values of tensors in Python"),
        ("Adm", {}, "^optim.name: torch.optim has no optimizer 'Adm' .it has: ASGD, Adadelta"),
        ("Optimizer", {}, "^optim.name: torch.optim has no optimizer 'Optimizer'"),
        ("SGD", {"momentun": 0.9}, "^unknown key optim.settings.momentun; did you mean optim.settings.momentum"),
        ("SGD", {"lr": 0.9}, "^unknown key optim.settings.lr"),
        ("SGD", {"nesterov": True}, "^optim.settings: torch.optim.SGD: Nesterov momentum requires a momentum"),
    ],
)
def test_what_cannot_be_a_rule_is_refused_in_one_line(name, settings, line):
    with pytest.raises(UserError, match=line) as error:
        get_rule(f"torch:{name}", settings).state(torch.Size((3, 5)), torch.float32)
    assert "\n" not in str(error.value)


def test_a_class_whose_first_state_is_not_known_is_refused(monkeypatch):
    monkeypatch.delitem(INITIAL, ("Rprop", "step_size"))
    with pytest.raises(UserError, match="torch:Rprop has state that does not begin as zeros"):
        get_rule("torch:Rprop", {"step_sizes": [1e-5, 50.0]}).state(torch.Size((3, 5)), torch.float32)
