"""max_seconds: as many steps as the measured speed makes in that time. And the JSON at the end of a run."""

import json

import pytest
import yaml
from conftest import tiny_values

from trainer.commands.train import run
from trainer.core.errors import UserError
from trainer.planning.run_config import read_run
from trainer.runs.metrics import last_row
from trainer.runtime.distributed import World
from trainer.training import time_limit
from trainer.training.time_limit import with_steps

pytestmark = pytest.mark.usefixtures("few_windows")


@pytest.fixture
def values(tiny_dataset, tmp_path, monkeypatch):
    """A run of 3 seconds, which `bench` says makes 2,048 tokens a second."""

    def measure(values, folder, plugins):
        assert values["max_steps"] == 1 and "max_seconds" not in values
        return {"tokens_per_second": {"median": 2048.0}}

    monkeypatch.setattr(time_limit, "measure_speed", measure)
    values = tiny_values(tiny_dataset, tmp_path / "run", batch__dynamic=False)
    return {**{key: value for key, value in values.items() if key != "max_steps"}, "max_seconds": 3}


def test_a_run_makes_the_steps_of_its_seconds_and_ends_with_one_line_of_json(values, capsys, tmp_path, monkeypatch):
    run(values, as_json=True)
    printed, row = json.loads(capsys.readouterr().out), last_row(tmp_path / "run" / "metrics.jsonl")
    assert printed["step"] == row["step"] == 3 * 2048 / 512
    assert printed["val_bits_per_byte"] == row["val_bits_per_byte"] > 0 and printed["run_dir"] == str(tmp_path / "run")
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (stored["max_seconds"], stored["max_steps"]) == (3, 12)

    monkeypatch.setattr(time_limit, "measure_speed", None)  # a run that goes on is not measured again
    folder = {"run_dir": str(tmp_path / "run")}
    before = read_run(folder, print)
    assert "max_steps" not in with_steps({**folder, "max_seconds": 3}, before, World())
    assert with_steps({**folder, **values, "max_steps": 12}, None, World())["max_steps"] == 12  # a config with both
    run({**values, "max_steps": 14} | {"max_seconds": None})
    assert last_row(tmp_path / "run" / "metrics.jsonl")["step"] == 14


@pytest.mark.parametrize(
    ("change", "size", "line"),
    [
        ({}, 2, "is for one process, here are 2"),
        ({"batch": {"dynamic": True}}, 1, "batch.dynamic makes steps longer"),
        ({"max_seconds": -1}, 1, "max_seconds: -1.0 is too small"),
    ],
)
def test_a_length_that_cannot_be_told_is_refused(values, change, size, line, monkeypatch):
    monkeypatch.setattr(time_limit, "measure_speed", None)  # refused before anything is measured
    with pytest.raises(UserError, match=line):
        with_steps({**values, **change}, None, World(0, size, 0, size))


def test_a_plan_cannot_measure(values):
    from trainer.core.config import RunConfig
    from trainer.core.settings import build
    from trainer.planning.plan import resolve

    with pytest.raises(UserError, match="max_seconds: only `train` measures the speed"):
        resolve(build(RunConfig, values))
