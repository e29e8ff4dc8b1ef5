"""Moments in bf16 under every strategy: the same training, and checkpoints that hold them so and go on anywhere."""

import pytest
import torch
from cases import matrix_values, train_cases
from test_matrix import SAME, assert_same

from trainer.checkpoint import format as checkpoint

pytestmark = pytest.mark.slow

STRATEGIES = ("ddp", "fsdp", "hsdp:2", "zero0", "zero1", "zero2", "zero3")
OFFLOADED = ("fsdp", "zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def case(tiny_dataset, tmp_path_factory):
    """(name, strategy, what else differs) -> a case of matrix.py; state: state_precision."""
    folder = tmp_path_factory.mktemp("runs")

    def make(name, strategy, state="bf16", offload=False, **more):
        values = matrix_values(tiny_dataset, folder, "hlb", strategy, optim__state_precision=state)
        values["engine"]["offload"] = offload
        return {"name": name, "values": values, **more}

    return make


@pytest.fixture(scope="module")
def straight(case, tmp_path_factory):
    """Ten steps in one go by strategy, also offloaded; and with fp32 moments."""
    cases = [case(strategy, strategy) for strategy in STRATEGIES]
    cases += [case(f"{strategy} offloaded", strategy, offload=True) for strategy in OFFLOADED]
    return train_cases([*cases, case("fp32", "ddp", state="fp32")], 2, tmp_path_factory.mktemp("straight"))


@pytest.fixture(scope="module")
def saved(case, tmp_path_factory):
    """Strategy -> folder of what it saved after five steps; "fp32": the same with fp32 moments."""
    folder = tmp_path_factory.mktemp("saved")
    states = {**dict.fromkeys(STRATEGIES, "bf16"), "fp32": "fp32"}
    cases = [
        case(name, "ddp" if name == "fp32" else name, state=state, steps=5, save=str(folder / name))
        for name, state in states.items()
    ]
    train_cases(cases, 2, folder)
    return {name: folder / name for name in states}


def test_strategies_agree(straight):
    """SAME is for sums in another order. Rounding keeps it in the mean: two numbers that differ by a share d are
    rounded apart with a probability of d / 2^-8, and are then 2^-8 apart."""
    for name in straight.keys() - {"fp32"}:
        assert_same(straight[name], straight["ddp"])
        assert straight[name]["loss"] != pytest.approx(straight["fp32"]["loss"], rel=SAME), "moments are fp32"


def test_they_are_stored_as_they_are(saved):
    for strategy, folder in saved.items():
        [(_, path)] = checkpoint.found(folder / "checkpoints")
        kinds = {dtype for name, (_, dtype) in checkpoint.stored(path).items() if "exp_avg" in name}
        assert kinds == {torch.float32 if strategy == "fp32" else torch.bfloat16}, strategy


def test_it_goes_on_bit_for_bit_and_under_another_strategy(straight, saved, case, tmp_path):
    """Each from its own checkpoint, and from that of the strategy before it in the list."""
    before = dict(zip(STRATEGIES, STRATEGIES[-1:] + STRATEGIES[:-1], strict=True))
    cases = [
        case(f"{origin} {strategy}", strategy, steps=5, load=str(saved[origin]))
        for strategy in STRATEGIES
        for origin in (strategy, before[strategy])
    ]
    results = train_cases(cases, 2, tmp_path)
    for strategy in STRATEGIES:
        for key in ("loss", "grad_norm"):
            assert results[f"{strategy} {strategy}"][key] == straight[strategy][key][5:], strategy
        assert_same(results[f"{before[strategy]} {strategy}"], straight["ddp"], since=5)


def test_one_process_goes_on(straight, saved, case, tmp_path):
    cases = [case(origin, "single", steps=5, load=str(saved[origin])) for origin in ("fsdp", "zero3")]
    for result in train_cases(cases, 1, tmp_path).values():
        assert_same(result, straight["ddp"], since=5)


def test_moments_of_either_kind_can_be_loaded(saved, case, tmp_path):
    """Converted, under every way to hold them: whole, in shards, in DeepSpeed's flat vectors."""
    cases = [
        case(f"{origin} {strategy}", strategy, state=state, steps=3, load=str(saved[origin]))
        for origin, state in (("fp32", "bf16"), ("zero1", "fp32"))
        for strategy in ("ddp", "fsdp", "zero1", "zero3")
    ]
    results = train_cases(cases, 2, tmp_path)
    for name, result in results.items():
        assert_same(result, results[f"{name.split()[0]} ddp"])
