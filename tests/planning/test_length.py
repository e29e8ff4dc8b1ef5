"""A size in parameters, a length in tokens, tokens per parameter or epochs."""

import math
import random

import pytest
from conftest import tiny_values
from test_zoo import ZOO

from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import build, to_yaml
from trainer.data.stream import find_dataset
from trainer.planning.dial import scale_for, target_parameters
from trainer.planning.plan import minimum_tokens, resolve
from trainer.planning.run_config import default_run_dir, merge_run, read_run

FIXED = {"batch": {"dynamic": False}}


def resolved(dataset=None, **values):
    return resolve(build(RunConfig, {"device": "cpu", **values}), dataset)


@pytest.mark.parametrize("vocab_size", [320, 50_304])
def test_the_scale_of_a_size_has_that_size(vocab_size):
    draw = random.Random(0)
    for _ in range(50):
        wanted = target_parameters(10 ** draw.uniform(-2, 3.9), vocab_size)
        assert target_parameters(scale_for(wanted, vocab_size), vocab_size) == wanted
    for _ in range(50):  # between two sizes: no scale nearby is nearer
        wanted = round(10 ** draw.uniform(7, 10))
        scale = scale_for(wanted, vocab_size)
        off = abs(target_parameters(scale, vocab_size) - wanted)
        others = (target_parameters(scale * (1 + i / 500), vocab_size) for i in range(-100, 101))
        assert off <= min(abs(other - wanted) for other in others)


@pytest.mark.parametrize("name", sorted(set(ZOO) - {"hlb"}))
def test_every_architecture_meets_the_size(name):
    plan = resolved(model={"name": name}, parameters=124_000_000)
    assert abs(plan.parameters / 124e6 - 1) < 0.03
    assert plan.config.run_dir == default_run_dir(build(RunConfig, {"model": {"name": name}, "parameters": "124e6"}))


@pytest.mark.parametrize(
    "given, wanted",
    [
        ({"tokens": "26e7"}, 26e7),
        ({"tokens_per_parameter": "20"}, 20 * 46_009_736),
        ({"tokens": "3e7", "batch": {"dynamic": False, "ramp_steps": 100}}, 3e7),
    ],
)
def test_a_length_is_met_within_half_a_step(given, wanted):
    plan = resolved(**(FIXED | given))
    assert abs(minimum_tokens(plan) - wanted) <= plan.config.batch.tokens_per_step / 2
    assert {entry.key: entry.value for entry in plan.entries}["max_steps"] == plan.config.max_steps


def test_a_run_has_a_step():
    assert resolved(**FIXED, tokens="1").config.max_steps == 1


def test_epochs_are_of_the_data(tiny_dataset, tmp_path):
    values = {**tiny_values(tiny_dataset, tmp_path, data__tokenizer="bytes"), "max_steps": None, "epochs": 3}
    dataset = find_dataset(build(RunConfig, values).data)
    plan = resolve(build(RunConfig, values), dataset)
    assert abs(minimum_tokens(plan) - 3 * dataset.splits["train"].tokens) <= plan.config.batch.tokens_per_step / 2
    again = resolve(plan.config, None)  # as `report` does, where the data are not at hand
    assert again.config.max_steps == plan.config.max_steps


@pytest.mark.parametrize(
    "values, line",
    [
        ({"tokens": 10**9, "max_steps": 5}, "max_steps: 5, but 1,000,000,000 tokens take 17,"),
        ({"tokens": 10**9, "epochs": 1}, "epochs: tokens already gives"),
        ({"epochs": 1}, "epochs: the data are not there yet"),
        ({"parameters": 10**9, "model_scale": 2}, "model_scale: 2 is a size of 97,678,093 parameters"),
        ({"parameters": 1000}, "the nearest size of hlb to 1,000 is"),
        ({"parameters": 10**12}, "the nearest size of hlb to"),
        ({"parameters": 10**9, "model": {"name": "llama", "d_model": 64, "n_layers": 2}}, "the nearest size of llama"),
    ],
)
def test_two_sizes_or_lengths_are_refused_and_so_is_one_that_cannot_be_met(values, line):
    with pytest.raises(UserError, match=line):
        resolved(**values)


def test_a_resolved_config_says_the_same_again():
    once = resolved(parameters=60_000_000, tokens=10**8, model={"name": "llama"}).config
    assert resolve(once).config == once


def test_a_flag_replaces_what_the_file_says_in_another_way(tmp_path, capsys):
    from trainer.__main__ import dispatch

    (tmp_path / "run.yaml").write_text("max_steps: 300\nmodel_scale: 0.5\ndevice: cpu\n")
    words = ["plan", str(tmp_path / "run.yaml"), "--tokens", "1e7", "--parameters", "46e6", "--print_config"]
    dispatch(words)
    printed = capsys.readouterr().out
    assert "tokens: 10000000\n" in printed and "parameters: 46000000\n" in printed
    assert "max_steps: 300" not in printed and "model_scale: 0.5\n" not in printed


def test_a_run_goes_on_to_another_length(tmp_path):
    config = resolved(run_dir=str(tmp_path), parameters=46_000_000, tokens=10**7, **FIXED).config
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    (tmp_path / "environment.jsonl").write_text('{"processes": 1}\n')

    def going_on(**given):
        given = {"run_dir": str(tmp_path), "device": "cpu", **given}
        return resolve(build(RunConfig, merge_run(given, read_run(given, lambda line: None), 1))).config

    assert going_on() == going_on(parameters="46e6", tokens="1e7") == config
    longer = going_on(tokens="2e7")
    assert longer.max_steps == pytest.approx(2 * config.max_steps, abs=1)
    assert (going_on(max_steps="900").max_steps, going_on(max_steps="900").tokens) == (900, None)
    assert math.isclose(longer.model_scale, config.model_scale)
