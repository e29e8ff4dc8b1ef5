"""Sweeps, as `bench --sweep` and launch/array.sh read them."""

import pytest

from trainer.core.errors import UserError
from trainer.core.sweep import changed, combinations, parse_sweep


def test_a_sweep_is_keys_and_values():
    sweep = parse_sweep(["engine.compile=false,true", "model.n_layers=2", "batch.tokens_per_microbatch=auto,64"])
    assert sweep == {
        "engine.compile": ["false", "true"],
        "model.n_layers": ["2"],
        "batch.tokens_per_microbatch": ["auto", "64"],
    }


def test_keys_that_a_plug_in_decides_are_swept_too():
    sweep = parse_sweep(["optim.settings.beta1=0.8,0.9", "objective.smoothing=0,0.1"])
    assert [changed({}, one).optim.settings["beta1"] for one in combinations(sweep)] == ["0.8", "0.8", "0.9", "0.9"]
    assert [changed({}, one).objective["smoothing"] for one in combinations(sweep)] == ["0", "0.1"] * 2


@pytest.mark.parametrize(
    "texts, expected",
    [
        (["engine.compile"], "'engine.compile' is not KEY=V1,V2"),
        (["seed=1,,2"], "'seed=1,,2' is not KEY=V1,V2"),
        (["engine.complie=true"], "did you mean engine.compile?"),
        (["rounds=1,2"], "unknown key rounds"),
        (["seed=1", "seed=2"], "seed occurs twice"),
    ],
)
def test_a_bad_sweep_is_one_line(texts, expected):
    with pytest.raises(UserError) as caught:
        parse_sweep(texts)
    assert str(caught.value).startswith("sweep: ") and expected in str(caught.value)


def test_the_last_key_changes_fastest():
    pairs = [tuple(changes.values()) for changes in combinations({"seed": ["0", "1"], "optim.lr": ["1", "2"]})]
    assert pairs == [("0", "1"), ("0", "2"), ("1", "1"), ("1", "2")]
    assert list(combinations({})) == [{}]


def test_a_combination_lies_on_top():
    values = {"seed": 3, "optim": {"lr": 1.0, "clip_norm": 0.5}, "model": {"name": "gpt2"}}
    run = changed(values, {"optim.lr": "2e-3", "model.n_layers": "2"})
    assert (run.seed, run.optim.lr, run.optim.clip_norm) == (3, 2e-3, 0.5)
    assert run.model == {"name": "gpt2", "n_layers": "2"} and values["optim"] == {"lr": 1.0, "clip_norm": 0.5}
    with pytest.raises(UserError, match="^optim.lr: expected number"):
        changed(values, {"optim.lr": "fast"})
