"""`lr-range`: the learning rate rises by equal factors on a copy, and the landmarks are those of the curve."""

import json

import pytest
from conftest import tiny_values

from trainer.commands.lr_range import VERB, landmarks, open_copy, read
from trainer.core.errors import UserError
from trainer.runs.metrics import read_rows


def test_landmarks_of_a_known_curve():
    """Flat, then down by one for each factor, steepest in the middle, then up."""
    rates = [10.0**-exponent for exponent in range(8, 0, -1)]
    assert landmarks(rates, [5, 5, 4.5, 3, 2, 1.8, 2.5, 9]) == (rates[3], rates[5])
    assert landmarks(rates, [5, 5, 4, 3, 9, 8, 6, 5]) == (rates[2], rates[3]), "not the fall after an explosion"
    assert landmarks(rates, [5, 5, 5.5, 6, 6, 7, 8, 9]) == (None, None), "it never falls"
    assert landmarks(rates[:4], [5, 4, 3, 2]) == (None, None), "too short"


@pytest.fixture
def ranged(tiny_dataset, tmp_path, capsys):
    def start(**more) -> dict:
        plain = {"optim": {"recipe": "plain"}, "batch__dynamic": False, "model": {"name": "gpt2"}, "model_scale": 0.01}
        values = tiny_values(tiny_dataset, tmp_path / "none", **plain) | more
        VERB.run(read(values | {"lr_range_dir": str(tmp_path / "out")}), True)
        return json.loads(capsys.readouterr().out)

    return start


def test_the_learning_rate_rises_until_the_loss_explodes(ranged, tmp_path):
    found = ranged(low=1e-4, high=100.0, steps=30)
    rates = found["learning_rates"]
    assert rates[0] == pytest.approx(1e-4)
    factors = {round(after / before, 9) for before, after in zip(rates, rates[1:], strict=False)}
    assert factors == {round(1e6 ** (1 / 29), 9)}
    assert 1e-4 < found["steepest"] <= found["lowest"] < 1, "a step of 0.1 or more breaks a network of width 16"
    assert not (tmp_path / "none").exists()
    assert (tmp_path / "out" / "lr-range.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_goes_on_from_its_checkpoint_and_stays_as_it_is(finished, tmp_path, capsys):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file() and path.name != ".lock"}
    copy = open_copy({"run_dir": str(finished)})
    assert copy.state.step == 12
    copy.stream.close()
    copy.engine.close()
    copy.world.stop()
    values = {"run_dir": str(finished), "steps": 5, "lr_range_dir": str(tmp_path / "out"), "low": 1e-9, "high": 1e-8}
    VERB.run(read(values), True)
    found = json.loads(capsys.readouterr().out)
    assert found["from_step"] == 12 and not found["exploded"]
    last = read_rows(finished / "metrics.jsonl")[-1]["loss"]
    assert found["losses"][0] == pytest.approx(last, abs=0.5), "of trained weights; 5.7 at the start"
    assert before == {
        path: path.read_bytes() for path in finished.rglob("*") if path.is_file() and path.name != ".lock"
    }


def test_an_empty_range_is_refused(tiny_dataset, tmp_path):
    with pytest.raises(UserError, match="low: 1 is not below high"):
        VERB.run(read(tiny_values(tiny_dataset, tmp_path / "r") | {"low": 1, "high": 0.1}), False)
