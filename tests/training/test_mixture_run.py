"""Runs on mixed datasets: resuming, the epochs of each, what the plan says, and what is refused."""

import json
import math
import shutil

import pytest
from conftest import tiny_values
from tiny_runs import losses, same, weights

from trainer.checkpoint.format import step_name
from trainer.core.config import PrepareConfig, RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import build
from trainer.data.prepare import prepare
from trainer.data.stream import find_dataset
from trainer.planning.plan import render, resolve
from trainer.runs.metrics import read_rows
from trainer.training.start import start

LENGTH = 32
STORED = 96  # tokens of a sample of the further dataset; the main one has 64


@pytest.fixture(scope="module")
def other(tiny_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    (folder / "text.txt").write_text("0123456789 " * 2000)
    values = {"source": str(folder / "text.txt"), "tokenizer": str(tiny_dataset / "tokenizer.json"), "workers": 1}
    prepare(
        PrepareConfig(**values, sample_length=STORED, validation_fraction=0.1, out=str(folder / "data")),
        lambda line: None,
    )
    return folder / "data"


def mixed(dataset, folder, other, **more):
    entry = {"path": str(other), "weight": 1.0, "until": 2048}
    batch = {"tokens_per_step": 512, "tokens_per_microbatch": 256, "sequence_length": LENGTH, "dynamic": False}
    data = {"path": str(dataset), "mix": {"digits": entry}}
    return tiny_values(dataset, folder, **{"data": data, "batch": batch, "max_steps": 6, **more})


def without_growth(values):
    for key in ("sequence_start", "sequence_double_every"):
        values["batch"].pop(key, None)
    return values


def test_a_run_that_goes_on_is_the_uninterrupted_one(tiny_dataset, other, tmp_path):
    """In the middle of the ramp, which ends with step 4; and the main dataset alone is other data."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    start(without_growth(mixed(tiny_dataset, whole, other, checkpoint={"every": 2, "keep": 9})))
    rows = read_rows(whole / "metrics.jsonl")
    # Row i of 64 on the ramp has weight i / 64: the integral of w / (1 + w) over 64 rows, then half of the 16 before the last step.
    asked = 64 * (1 - math.log(2)) + 8
    tokens = json.loads((other / "dataset.json").read_text())["splits"]["train"]["tokens"]
    epoch = (tokens - 1) // STORED * STORED
    assert abs(rows[-1]["epoch_digits"] * epoch / LENGTH - asked) < 1
    shutil.copytree(whole, parts)
    for step in (4, 6):
        shutil.rmtree(parts / "checkpoints" / step_name(step))
    start({"run_dir": str(parts)})
    assert losses(parts) == losses(whole) and same(weights(parts, 6), weights(whole, 6))
    with pytest.raises(UserError, match="data.mix.digits.weight"):
        start({"run_dir": str(parts), "max_steps": 8, "data": {"mix": {"digits": {"weight": 0.25}}}})


def test_the_plan_says_the_shares(tiny_dataset, other, tmp_path):
    config = build(RunConfig, without_growth(mixed(tiny_dataset, tmp_path / "run", other)))
    text = render(resolve(config, find_dataset(config.data)))
    assert "share of data.mix.digits" in text and "0.00% to 50.00%" in text
    assert "rows of data.mix do not grow" in text


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"batch": {"sequence_start": 16, "sequence_length": 32}}, "rows of data.mix do not grow"),
        ({"epochs": 2.0, "max_steps": None}, "each dataset of data.mix has epochs of its own"),
        (
            {"batch": {"sequence_length": 64, "sequence_start": 64}},
            "64 does not divide the samples of .*, which have 96",
        ),
    ],
)
def test_what_cannot_be_mixed_is_one_line(tiny_dataset, other, tmp_path, changes, line):
    values = mixed(tiny_dataset, tmp_path / "run", other)
    values = without_growth(values)
    values["batch"] |= changes.pop("batch", {})
    config = build(RunConfig, {**values, **changes})
    with pytest.raises(UserError, match=line):
        resolve(config, find_dataset(config.data))
