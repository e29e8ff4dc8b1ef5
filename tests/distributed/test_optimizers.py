"""Optimizers beside AdamW train the same on every strategy that can give them what they must see, and go on from any of them."""

import pytest
from cases import matrix_values, train_cases

pytestmark = pytest.mark.slow

# Sums in another order, and my-lion's sign turns where a momentum is near zero.
SAME = 1e-3


def case(dataset, folder, rule, strategy, **more):
    values = matrix_values(dataset, folder, "gpt2", strategy, optim__name=rule, optim__lr=1e-3, optim__clip_norm=0)
    return {"name": f"{rule} {strategy}", "values": values, "steps": 4, **more}


@pytest.fixture(scope="module")
def alone(tiny_dataset, tmp_path_factory):
    """Six steps on one process, by rule."""
    folder = tmp_path_factory.mktemp("alone")
    cases = [case(tiny_dataset, folder, rule, "single", steps=6) for rule in ("my-lion", "gram", "unit")]
    return {name.split()[0]: result["loss"] for name, result in train_cases(cases, 1, folder).items()}


def test_every_strategy_trains_the_same(alone, tiny_dataset, tmp_path):
    """And what one saves another goes on from: state of a matrix is whole in a checkpoint, on whichever rank it was."""
    pairs = [("my-lion", s) for s in ("ddp", "fsdp", "zero0", "zero2")]
    pairs += [(rule, s) for rule in ("gram", "unit") for s in ("ddp", "fsdp", "zero0")]
    saved = {pair: str(tmp_path / "-".join(pair)) for pair in pairs}
    first = [case(tiny_dataset, tmp_path / "r", *pair, save=saved[pair]) for pair in pairs]
    then = [
        {**case(tiny_dataset, tmp_path / "r", rule, after, steps=2, load=saved[rule, before]), "name": f"{rule} {before} {after}"}
        for rule in ("my-lion", "gram", "unit")
        for before, after in (("ddp", "fsdp"), ("fsdp", "ddp"))
    ]  # fmt: skip
    for name, result in train_cases([*first, *then], 2, tmp_path).items():
        rule, *path = name.split()
        expected = alone[rule][:4] if len(path) == 1 else alone[rule][4:]
        assert result["loss"] == pytest.approx(expected, rel=SAME), name
    assert alone["my-lion"][-1] < alone["my-lion"][0]


def test_a_sharded_copy_trains_the_same(alone, tiny_dataset, tmp_path):
    cases = [case(tiny_dataset, tmp_path / "r", rule, "hsdp:2") for rule in ("my-lion", "gram")]
    for name, result in train_cases(cases, 4, tmp_path).items():
        assert result["loss"] == pytest.approx(alone[name.split()[0]][:4], rel=SAME), name
