"""Optimizers beside AdamW train the same on every strategy that can give them what they must see, and go on from any of them."""

import json
from pathlib import Path

import pytest
import torch
from cases import matrix_values, train_cases
from test_matrix import STRATEGIES
from tiny_runs import weights

from trainer.optim.rule import registered_rules

pytestmark = pytest.mark.slow

# Sums in another order, and my-lion's sign turns where a momentum is near zero.
SAME = 1e-3


def case(dataset, folder, rule, strategy, **more):
    values = matrix_values(dataset, folder, "gpt2", strategy, optim__name=rule, optim__lr=1e-3, optim__clip_norm=0)
    if strategy == "zero3":  # updates some of a group's parameters at a time
        settings = {"stage3_param_persistence_threshold": 0, "sub_group_size": 5_000}
        Path(values["engine"]["deepspeed_config"]).write_text(json.dumps({"zero_optimization": settings}))
    return {"name": f"{rule} {strategy}", "values": values, "steps": 4, "newton_schulz": rule == "muon", **more}


MATRICES = 3 * 6  # queries, keys, values, their output, and two of the MLP, in each of 3 blocks


def assert_each_matrix_once_a_step(name: str, result: dict, steps: int) -> None:
    """Newton-Schulz runs on one rank for each matrix, and no rank is idle."""
    if name.startswith("muon"):
        assert sum(result["newton_schulz"]) == MATRICES * steps, name
        assert all(result["newton_schulz"]), name


# What our own rules keep that AdamW does not: state of rows, the last gradient, a slow mean, other weights to evaluate, and state of
# each of the matrices that a parameter fuses.
OURS = {
    "adam-mini": "fsdp",
    "mars": "fsdp",
    "ademamix": "zero2",
    "schedule-free": "fsdp",
    "muon": "fsdp",
    "palm-soap": "fsdp",
}


@pytest.fixture(scope="module")
def alone(tiny_dataset, tmp_path_factory):
    """Six steps on one process, by rule."""
    folder = tmp_path_factory.mktemp("alone")
    cases = [case(tiny_dataset, folder, rule, "single", steps=6) for rule in ("my-lion", "gram", "unit", *OURS)]
    return {name.split()[0]: result["loss"] for name, result in train_cases(cases, 1, folder).items()}


def test_every_strategy_trains_the_same(alone, tiny_dataset, tmp_path):
    """And what one saves another goes on from: state of a matrix is whole in a checkpoint, on whichever rank it was."""
    pairs = [("my-lion", s) for s in ("ddp", "fsdp", "zero0", "zero2")]
    pairs += [(rule, s) for rule in ("gram", "unit") for s in ("ddp", "fsdp", "zero0")]
    pairs += [("unit", "zero2"), *(("muon", s) for s in ("zero1", "zero2", "zero3")), *OURS.items()]
    saved = {pair: str(tmp_path / "-".join(pair)) for pair in pairs}
    first = [case(tiny_dataset, tmp_path / "r", *pair, save=saved[pair]) for pair in pairs]
    then = [
        {**case(tiny_dataset, tmp_path / "r", rule, after, steps=2, load=saved[rule, before]), "name": f"{rule} {before} {after}"}
        for rule in ("my-lion", "gram", "unit")
        for before, after in (("ddp", "fsdp"), ("fsdp", "ddp"))
    ]  # fmt: skip
    then += [
        {
            **case(tiny_dataset, tmp_path / "r", rule, after, steps=2, load=saved[rule, before]),
            "name": f"{rule} {before} {after}",
        }
        for rule, before, after in (
            ("adam-mini", "fsdp", "ddp"),
            ("ademamix", "zero2", "ddp"),
            ("muon", "fsdp", "ddp"),
            ("muon", "fsdp", "zero3"),
            ("muon", "zero3", "zero1"),
            ("muon", "zero1", "fsdp"),
            ("unit", "zero2", "fsdp"),
        )
    ]
    for name, result in train_cases([*first, *then], 2, tmp_path).items():
        rule, *path = name.split()
        expected = alone[rule][:4] if len(path) == 1 else alone[rule][4:]
        assert result["loss"] == pytest.approx(expected, rel=SAME), name
        assert_each_matrix_once_a_step(name, result, len(expected))
    assert alone["my-lion"][-1] < alone["my-lion"][0]


def test_a_sharded_copy_trains_the_same(alone, tiny_dataset, tmp_path):
    cases = [case(tiny_dataset, tmp_path / "r", rule, "hsdp:2") for rule in ("my-lion", "gram", "muon")]
    for name, result in train_cases(cases, 4, tmp_path).items():
        assert result["loss"] == pytest.approx(alone[name.split()[0]][:4], rel=SAME), name
        assert_each_matrix_once_a_step(name, result, 4)


def test_zero_keeps_fp32_state_of_matrices_beside_bf16_weights(tiny_dataset, tmp_path):
    """As of its flat vectors, whose masters are fp32."""
    bf16 = case(tiny_dataset, tmp_path / "r", "muon", "zero2", steps=2, save=str(tmp_path / "saved"))
    bf16["values"]["precision"] = "bf16"
    train_cases([bf16], 2, tmp_path)
    state = {name: value for name, value in weights(tmp_path / "saved", 2).items() if name.startswith("optimizer.")}
    assert any("query.momentum" in name for name in state), sorted(state)
    assert {value.dtype for value in state.values()} == {torch.float32}


# By name: the keys of `optim`, and the strategies that train them. Those that keep flat vectors need one rule for all roles.
ROLES = {
    "rules": (
        {
            "name": "muon",
            "roles": {"embedding": {"name": "adam-mini", "lr": 1e-3}, "norm": {"name": "lion", "lr": 1e-4}},
        },
        ("ddp", "fsdp", "zero0"),
    ),
    "rates": (
        {
            "name": "adamw",
            "roles": {"embedding": {"lr": 3e-3, "weight_decay": 0}, "norm": {"settings": {"beta1": 0.8}}},
        },
        ("fsdp", "zero2", "zero3"),
    ),
}


def test_roles_train_the_same_on_every_strategy(tiny_dataset, tmp_path):
    def of(name, strategy, **more):
        values = matrix_values(tiny_dataset, tmp_path / "r", "gpt2", strategy)
        values["optim"] = {"lr": 1e-3, "clip_norm": 0, **ROLES[name][0]}
        return {"name": f"{name} {strategy}", "values": values, "steps": 3, **more}

    alone = train_cases([of(name, "single", steps=5) for name in ROLES], 1, tmp_path)
    cases = [of(name, s, save=str(tmp_path / f"{name}-{s}")) for name, (_, among) in ROLES.items() for s in among]
    then = [
        {**of(name, after, steps=2, load=str(tmp_path / f"{name}-{before}")), "name": f"{name} {before} {after}"}
        for name, before, after in (("rules", "fsdp", "ddp"), ("rates", "zero2", "fsdp"), ("rates", "fsdp", "zero3"))
    ]
    for case, result in train_cases([*cases, *then], 2, tmp_path).items():
        expected = alone[f"{case.split()[0]} single"]["loss"]
        expected = expected[:3] if len(case.split()) == 2 else expected[3:]
        assert result["loss"] == pytest.approx(expected, rel=SAME), case
    [hsdp] = train_cases([of("rules", "hsdp:2")], 4, tmp_path).values()
    assert hsdp["loss"] == pytest.approx(alone["rules single"]["loss"][:3], rel=SAME)


def strategies_for(rule, ranks):
    """Those that do not refuse the rule: see refuse_scope."""
    flat = not registered_rules()[rule]().evaluates_other_weights
    return [strategy for strategy in STRATEGIES[ranks] if flat or strategy not in ("zero1", "zero2", "zero3")]


@pytest.mark.nightly
def test_every_rule_on_every_strategy_and_from_any_to_any(tiny_dataset, tmp_path):
    """Three steps as on one process; then three more on each strategy, after each kind of save."""
    rules = sorted(name for name, rule in registered_rules().items() if rule.__module__.startswith("trainer."))
    cases = [case(tiny_dataset, tmp_path / "r", rule, "single", steps=6) for rule in rules]
    alone = {name.split()[0]: result["loss"] for name, result in train_cases(cases, 1, tmp_path).items()}
    saved = {}
    for ranks in STRATEGIES:
        cases = []
        for rule in rules:
            for strategy in strategies_for(rule, ranks):
                folder = str(tmp_path / f"{rule}-{strategy}-{ranks}".replace(":", "-"))
                cases.append(case(tiny_dataset, tmp_path / "r", rule, strategy, steps=3, save=folder))
                if (ranks, strategy) in ((2, "ddp"), (4, "fsdp"), (4, "hsdp:2"), (2, "zero3")):
                    saved.setdefault(rule, {})[f"{strategy} on {ranks}"] = folder
        for name, result in train_cases(cases, ranks, tmp_path).items():
            assert result["loss"] == pytest.approx(alone[name.split()[0]][:3], rel=SAME), (name, ranks)
            assert_each_matrix_once_a_step(name, result, 3)
    for ranks in STRATEGIES:
        cases = [
            {**case(tiny_dataset, tmp_path / "r", rule, strategy, steps=3, load=folder), "name": f"{rule} {strategy}, {origin}"}
            for rule in rules
            for strategy in strategies_for(rule, ranks)
            for origin, folder in saved[rule].items()
        ]  # fmt: skip
        for name, result in train_cases(cases, ranks, tmp_path).items():
            assert result["loss"] == pytest.approx(alone[name.split()[0]][3:], rel=SAME), (name, ranks)
