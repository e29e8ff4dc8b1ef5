"""optim.roles: each role its optimizer, settings, learning rate, decay and schedule."""

from typing import ClassVar

import pytest
from conftest import tiny_values
from tiny_runs import losses, make, same, weights

from models import base
from models.base import get_model, load_models
from trainer.commands.compare.spec import Arm
from trainer.commands.train import run
from trainer.core.config import RoleConfig, RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import build, parse_flags
from trainer.core.sweep import check_key, with_changes
from trainer.optim import names_by_role
from trainer.planning.plan import recipe_entries, resolve
from trainer.recipes import RECIPES
from trainer.training.step import optimiser_step

load_models()
GPT2 = {"name": "gpt2", "n_layers": 2, "d_model": 32, "vocab_size": 323}
UNTIED = {**GPT2, "tied": False}
MIXED = {
    "embedding": {"lr": 3e-3, "weight_decay": 0},
    "head": {"name": "lion", "settings": {"beta2": 0.5}, "lr": 1e-4, "schedule": "constant"},
    "norm": {"weight_decay": 0.2, "settings": {"beta1": 0.8}},
}


def groups_by_name(one) -> dict:
    optimizer = one.engine.optimizer
    return {
        group.name: (group, settings) for group, settings in zip(optimizer.groups, optimizer.param_groups, strict=True)
    }


def planned(optim, **more):
    data = {"tokenizer": "bytes"}
    return resolve(build(RunConfig, {"device": "cpu", "model_scale": 0.02, "data": data, "optim": optim, **more}))


def test_each_role_has_what_its_entry_says(tiny_dataset, tmp_path):
    """And what the entry leaves out is as in the rest; the matrices' group, whose learning rate is logged, stays the first."""
    one = make(
        tiny_dataset,
        tmp_path,
        model=UNTIED,
        optim={"name": "muon", "lr": 1e-2, "rest_lr": 1e-3, "roles": MIXED, "warmup_steps": 1},
    )
    found = groups_by_name(one)
    assert sorted(name for group, _ in found.values() for name in group.parameters) == sorted(one.engine.shapes)
    roles = names_by_role(one.model)
    for role in MIXED:
        assert found[role][0].parameters == roles[role]
    rules = {name: group.rule for name, (group, _) in found.items()}
    assert rules == {
        "decayed": "muon",
        "embedding": "adamw",
        "head": "lion",
        "norm": "adamw",
        "not decayed, rest": "adamw",
    }
    lr = {name: group.lr for name, (group, _) in found.items()}
    rest = pytest.approx(1e-3, rel=1e-12)
    assert lr == {"decayed": 1e-2, "embedding": 3e-3, "head": 1e-4, "norm": rest, "not decayed, rest": rest}
    decay = {name: settings["weight_decay"] for name, (_, settings) in found.items()}
    assert decay == {"decayed": 0.1, "embedding": 0, "head": 0.1, "norm": 0.2, "not decayed, rest": 0}
    assert (found["head"][1]["config"].beta2, found["norm"][1]["config"].beta1) == (0.5, 0.8)
    assert found["embedding"][1]["config"].beta1 == 0.9
    last = one.config.max_steps - 1
    shapes = {name: group.schedule(last) for name, (group, _) in found.items()}
    assert shapes["head"] == 1 and all(value < 0.2 for name, value in shapes.items() if name != "head")
    assert one.engine.optimizer.groups[0].name == "decayed" and optimiser_step(one).lr == 1e-2


def test_a_step_moves_each_role_by_its_own_rate(tiny_dataset, tmp_path):
    """Lion and the first step of AdamW move a number by lr, or not at all."""
    roles = {"head": {"name": "lion", "lr": 2**-13}, "embedding": {"lr": 2**-11}}
    one = make(
        tiny_dataset, tmp_path, model=UNTIED,
        optim={"lr": 2**-9, "warmup_steps": 0, "weight_decay": 0, "clip_norm": 0, "schedule": "constant", "roles": roles},
    )  # fmt: skip
    before = {name: parameter.detach().clone() for name, parameter in one.model.named_parameters()}
    optimiser_step(one)
    for role, names in names_by_role(one.model).items():
        rate = roles.get(role, {}).get("lr", 2**-9)
        for name in names:
            moved = (one.model.get_parameter(name).detach() - before[name]).abs().max().item()
            # A difference of two fp32 numbers below 2: within 2^-23 on either side.
            assert moved == pytest.approx(rate, abs=2**-22), name


def test_an_entry_that_says_what_is_so_anyway_changes_nothing(tiny_dataset, tmp_path):
    """To cut a group is no change: the losses are the same bit for bit."""
    so_anyway = {"norm": {"lr": 1e-3, "weight_decay": 0}, "embedding": {"name": "adamw", "schedule": "cosine"}}
    found = {}
    for name, roles in (("cut", so_anyway), ("whole", {}), ("other", {"norm": {"lr": 2e-3}})):
        one = make(tiny_dataset, tmp_path / name, model=GPT2, optim={"lr": 1e-3, "clip_norm": 0, "roles": roles})
        found[name] = [optimiser_step(one).loss for _ in range(3)]
        assert len(one.engine.optimizer.groups) == 2 + len(roles)
    assert found["cut"] == found["whole"] != found["other"]


def test_one_rule_with_settings_of_two_kinds(tiny_dataset, tmp_path):
    """Settings and state hang on the group: without momentum, SGD of the role norm keeps nothing."""
    roles = {"norm": {"settings": {"momentum": 0.0}}, "bias": {"name": "torch:SGD"}}
    one = make(tiny_dataset, tmp_path, model=GPT2,
               optim={"name": "torch:SGD", "settings": {"momentum": 0.9}, "lr": 1e-2, "roles": roles})  # fmt: skip
    optimiser_step(one)
    kept = {name.removeprefix("optimizer.") for name in one.engine.tensors() if name.endswith("momentum_buffer")}
    roles = names_by_role(one.model)
    # An entry that names the rule of the rest again keeps the settings of the rest.
    expected = [f"{name}.momentum_buffer" for role in ("matrix", "embedding", "bias") for name in roles[role]]
    assert kept == set(expected) and roles["norm"] and roles["bias"]


def test_a_run_with_roles_goes_on_bit_for_bit(tiny_dataset, tmp_path):
    optim = {"name": "muon", "lr": 1e-2, "schedule": "constant", "warmup_steps": 0, "roles": MIXED}
    for folder, steps in (("straight", 4), ("cut", 2)):
        run(
            tiny_values(
                tiny_dataset, tmp_path / folder, model=UNTIED, max_steps=steps, checkpoint__every=2, optim=optim
            )
        )
    run({"run_dir": str(tmp_path / "cut"), "max_steps": 4})
    assert losses(tmp_path / "cut") == losses(tmp_path / "straight")
    assert same(weights(tmp_path / "cut", 4), weights(tmp_path / "straight", 4))
    for changed, line in (
        ({"head": {"lr": 1e-3}}, "^optim.roles.head.lr: .* was started with 0.0001, now it is 0.001"),
        ({"bias": {"lr": 1e-3}}, "^optim.roles.bias.lr: .* was started with None, now it is 0.001"),
    ):
        with pytest.raises(UserError, match=line):
            run({"run_dir": str(tmp_path / "cut"), "max_steps": 6, "optim": {"roles": changed}})


def test_a_branch_may_change_rates_but_no_rule(tiny_dataset, tmp_path):
    first, branch = tmp_path / "first", tmp_path / "branch"
    run(
        tiny_values(tiny_dataset, first, model=UNTIED, max_steps=2, optim={"lr": 1e-3, "roles": {"head": {"lr": 1e-4}}})
    )
    begin = {"branch_from": f"{first}@2", "run_dir": str(branch), "max_steps": 3}
    with pytest.raises(UserError, match="^branch_from: optim.roles.norm.name is 'lion', .* was made with None"):
        run({**begin, "optim": {"roles": {"norm": {"name": "lion"}}}})
    run({**begin, "run_dir": str(tmp_path / "other"), "optim": {"roles": {"head": {"lr": 1e-3}, "norm": {"lr": 1e-3}}}})
    assert len(losses(tmp_path / "other")) == 1


@pytest.mark.parametrize("optim, line", [
    ({"roles": {"hed": {"lr": 1}}}, "optim.roles.hed: is not a role of gpt2 .allowed: matrix, embedding, head"),
    ({"roles": {"head": {"lr": 1}}}, "optim.roles.head: gpt2 has no parameters .* its head is the embedding's matrix; leave"),
    ({"roles": {"position": {"lr": 1}}}, "optim.roles.position: gpt2 has no parameters of this role .it has: matrix, embed"),
    ({"roles": {"norm": {"name": "muon"}}}, "optim.roles.norm.name: muon updates matrices only; name it at optim.roles.matrix"),
    ({"roles": {"norm": {"name": "schedule-free", "schedule": "linear"}}}, "optim.roles.norm.schedule: schedule-free needs no"),
    ({"name": "schedule-free", "roles": {"norm": {"schedule": "linear"}}}, "optim.roles.norm.schedule: schedule-free needs no"),
    ({"roles": {"norm": {"schedule": "hlb"}}}, "optim.roles.norm.schedule: the recipe plain cannot follow hlb"),
    ({"recipe": "hlb", "roles": {"norm": {"schedule": "linear"}}}, "optim.roles.norm.schedule: the recipe hlb cannot follow"),
    ({"final_lr_fraction": 0, "roles": {"norm": {"schedule": "exponential"}}}, "optim.final_lr_fraction: an exponential"),
    ({"roles": {"norm": {"rate": 1}}}, "unknown key optim.roles.norm.rate; did you mean optim.roles.norm."),
    ({"roles": {"norm": 3}}, "optim.roles.norm: is a section with keys name, settings, lr, weight_decay, schedule; got 3"),
    ({"roles": {"norm": {"name": "lio"}}}, "optim.roles.norm.name: 'lio' is not known"),
    ({"roles": {"norm": {"name": "torch:lio"}}}, "optim.roles.norm.name: torch.optim has no optimizer 'lio'"),
    ({"roles": {"norm": {"settings": {"beta9": 1}}}}, "unknown key optim.roles.norm.settings.beta9"),
    ({"roles": {"norm": {"lr": 0}}}, "optim.roles.norm.lr: 0.0 is too small; it must be above 0"),
    ({"state_precision": "bf16", "roles": {"norm": {"name": "radam"}}}, "optim.state_precision: radam cannot keep its state"),
])  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(optim, line):
    with pytest.raises(UserError, match=f"^{line}") as caught:
        planned(optim, model=GPT2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("strategy, roles, line", [
    ("zero2", {"norm": {"name": "lion"}}, "optim.roles: engine.strategy zero2 needs one optimizer, .* adamw, lion; use single"),
    ("zero1", {"norm": {"name": "schedule-free"}}, "optim.roles.norm.name: schedule-free evaluates with other weights"),
])  # fmt: skip
def test_flat_vectors_need_one_rule(strategy, roles, line):
    pytest.importorskip("deepspeed")
    with pytest.raises(UserError, match=f"^{line}"):
        planned({"roles": roles}, model=GPT2, engine={"strategy": strategy})
    planned({"roles": {"norm": {"lr": 1e-3}, "matrix": {"name": "muon"}}}, model=GPT2, engine={"strategy": strategy})


def test_a_role_with_its_own_rule_follows_the_rate_of_the_rest(tiny_dataset, tmp_path):
    """hlb's head has twice optim.lr. SGD states no rate, so it has that too; Muon by spectral norm has 0.02 where AdamW has its rate."""
    roles = {"head": {"name": "torch:SGD"}, "matrix": {"name": "muon", "settings": {"scale": "spectral"}}}
    plan = planned({"roles": roles})
    assert plan.config.optim.roles["head"].lr == pytest.approx(2 * plan.config.optim.lr, rel=1e-12)
    assert plan.config.optim.roles["matrix"].lr == pytest.approx(0.02, rel=1e-12)
    halved = planned({"lr": plan.config.optim.lr / 2, "roles": roles})
    assert halved.config.optim.roles["matrix"].lr == pytest.approx(0.01, rel=1e-12)
    assert resolve(plan.config).config == plan.config
    # Named again, the rule of the rest keeps the settings of the rest, and so its rate.
    spectral = {"name": "muon", "settings": {"scale": "spectral"}, "roles": {"matrix": {"name": "muon"}}}
    assert planned(spectral).config.optim.roles["matrix"].lr == pytest.approx(0.02, rel=1e-12)


def test_roles_are_set_by_flags_and_swept():
    _, values = parse_flags(["--optim.roles.head.lr", "1e-4", "--optim.roles.head.settings.beta1=0.8"])
    assert build(RunConfig, values).optim.roles == {"head": RoleConfig(lr=1e-4, settings={"beta1": "0.8"})}
    swept = with_changes(values, {"optim.roles.head.lr": "2e-4"})
    check_key("optim.roles.head.lr", "sweep")
    assert build(RunConfig, swept).optim.roles["head"].lr == 2e-4


def test_the_plan_prints_one_row_for_each_role():
    plan = planned({"name": "muon", "roles": MIXED}, model=UNTIED)
    rows = {row.key: (row.value, row.rule) for row in recipe_entries(plan)}
    assert rows["lr of role head"] == (1e-4, "lion, schedule constant, weight decay 0.1")
    assert rows["lr of role embedding"] == (3e-3, "adamw, schedule cosine, weight decay 0")
    assert [key for key in rows if key.startswith("lr of role")] == [f"lr of role {role}" for role in MIXED]
    own = {"head": {"lr": 1e-3}, "norm": {"lr": 1e-3}}
    rows = {row.key: row.value for row in recipe_entries(planned({"roles": own}))}
    assert "lr of the head" not in rows and "lr of norms, biases, embedding" not in rows
    assert rows["lr of role head"] == rows["lr of role norm"] == 1e-3
    assert RECIPES["hlb"].rows(planned({}).config, False)[-1].key == "lr of the head"


def test_the_memory_plan_counts_each_role(tiny_dataset, tmp_path):
    """What the plan says is what a checkpoint holds."""
    from trainer.planning.memory import MemoryEstimate, ParallelLayout

    one = make(tiny_dataset, tmp_path, model=UNTIED, optim={"name": "muon", "lr": 1e-2, "roles": MIXED})
    optimiser_step(one)
    held = sum(
        value.nbytes
        for name, value in one.engine.tensors().items()
        if name.startswith("optimizer.") and not name.endswith(".step")
    )
    estimate = MemoryEstimate(one.plan.model_class, one.plan.model_config, 64)
    layout = ParallelLayout("single", "fp32", optim=one.config.optim)
    # It is a mean for each parameter, rounded down to whole bytes.
    assert estimate.state(layout)["moments"] == pytest.approx(held, abs=1)


class Hashed(get_model("gpt2")):  # type: ignore[misc]
    """GPT-2 whose positions have a role of their own, treated as an embedding. It fakes no more than the registry."""

    further_roles: ClassVar = {"table": "embedding"}

    def parameter_groups(self):
        groups = super().parameter_groups()
        positions = [name for name in groups["embedding"] if "position" in name]
        groups["embedding"] = [name for name in groups["embedding"] if name not in positions]
        return {**groups, "table": positions}


def test_a_further_role_follows_the_one_that_it_is_treated_as(tiny_dataset, tmp_path, monkeypatch):
    """Unless it has an entry itself."""
    monkeypatch.setitem(base._REGISTRY, "hashed", Hashed)
    model, rates = {**GPT2, "name": "hashed"}, {}
    for roles in (
        {"embedding": {"lr": 1e-2}},
        {"embedding": {"lr": 1e-2}, "table": {"lr": 1e-4}},
        {"table": {"lr": 1e-4}},
    ):
        one = make(tiny_dataset, tmp_path / str(len(rates)), model=model, optim={"lr": 1e-3, "roles": roles})
        lr = {name: group.lr for group in one.engine.optimizer.groups for name in group.parameters}
        groups = one.model.parameter_groups()
        rates[len(rates)] = [lr[groups[role][0]] for role in ("embedding", "table")]
    assert list(rates.values()) == [[1e-2, 1e-2], [1e-2, 1e-4], [1e-3, 1e-4]]


def test_a_comparison_scales_the_rates_of_roles_along():
    """A sweep of optim.lr that left them alone would tune an arm less than the others."""
    values = {
        "optim": {"name": "muon", "rest_lr": "2e-3", "roles": {"head": {"lr": "1e-3"}, "norm": {"weight_decay": "0"}}}
    }
    rates = Arm("a", 1.0, values, {}, None).rates(4e-3, planned=2e-3)
    assert rates == {"lr": 4e-3, "rest_lr": 4e-3, "roles": {"head": {"lr": 2e-3}}}
    assert Arm("a", 1.0, {}, {}, None).rates(4e-3, planned=2e-3) == {"lr": 4e-3}
