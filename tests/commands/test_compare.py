"""`compare`: which runs there are, how long they train, which learning rate they take, and a queue that survives kills.

Most tests train nothing: a stub stands for `train` and writes what a run leaves behind.
"""

import copy
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
from compare_stub import STUB, TWO, experiment, spec
from conftest import COMPARISONS, WITH_ENTROPIES, tiny_values
from hypothesis import given
from hypothesis import strategies as st
from test_export import make_run

from trainer.commands.compare import queue as compare_queue
from trainer.commands.compare import read
from trainer.commands.compare.budget import Length, lengths
from trainer.commands.compare.command import write_elements
from trainer.commands.compare.estimate import Speeds, estimate
from trainer.commands.compare.experiment import Experiment, State, facts_of, state_of, stored_experiment
from trainer.commands.compare.learning_rates import DIVERGED, start, sweep
from trainer.commands.compare.queue import Queue, device_slots, tail
from trainer.commands.compare.spec import Arm, arms, claims_of
from trainer.commands.report.study import read_comparison
from trainer.core.errors import UserError
from trainer.core.settings import load_yaml
from trainer.data.stream import find_dataset
from trainer.planning.length import nearest_steps
from trainer.planning.plan import minimum_tokens, training_flops
from trainer.runs.folder import locked

# -- learning rates --------------------------------------------------------------------------------------------------------


def whole_sweep(first, loss, most):
    """The sweep with every loss known: loss(rate) for each that it asks for."""
    losses = {}
    while True:
        result = sweep(first, losses, most)
        missing = [rate for rate in result.tried if rate not in losses]
        if not missing:
            return result
        losses[missing[0]] = loss(missing[0])


def valley(best):
    """A loss that is lowest at `best`, on a logarithmic axis."""
    import math

    return lambda rate: abs(math.log(rate / best))


@pytest.mark.parametrize(
    "best, tried, chosen",
    [
        (1e-3, 3, 1e-3),  # bracketed at once
        (4e-3, 5, 4e-3),  # two more above
        (0.25e-3, 5, 0.25e-3),  # two more below
    ],
)
def test_a_sweep_goes_on_until_both_neighbours_are_worse(best, tried, chosen):
    result = whole_sweep((0.5e-3, 1e-3, 2e-3), valley(best), 8)
    assert (len(result.tried), result.chosen, result.bracketed) == (tried, chosen, True)


def test_a_sweep_that_reaches_its_limit_says_that_it_has_not_bracketed():
    result = whole_sweep((0.5e-3, 1e-3, 2e-3), valley(1.0), 5)
    assert (result.chosen, result.bracketed) == (8e-3, False)


def test_a_diverged_run_is_worse_than_any_other():
    result = whole_sweep((1e-3, 2e-3, 4e-3), lambda rate: DIVERGED if rate > 2e-3 else 1 / rate, 8)
    assert (result.chosen, result.bracketed) == (2e-3, True)


def test_if_all_runs_diverged_the_sweep_goes_down_and_chooses_nothing_at_its_limit():
    result = whole_sweep((1e-3, 2e-3, 4e-3), lambda rate: DIVERGED, 5)
    assert result.tried[0] == pytest.approx(0.25e-3) and (result.chosen, result.bracketed) == (None, False)


def test_one_learning_rate_is_not_tuned():
    assert start(None, 3e-4, 1) == (3e-4,)
    assert sweep((3e-4,), {}, 1).chosen == 3e-4 and sweep((3e-4,), {}, 1).bracketed is None


@given(
    st.lists(st.floats(-7, 0), min_size=2, max_size=4, unique_by=lambda x: round(x, 3)),
    st.integers(4, 9),
    st.integers(0, 2**32),
)
def test_a_sweep_is_bounded_and_chooses_the_best_it_tried(exponents, most, seed):
    draw = random.Random(seed)
    curve = {}
    loss = lambda rate: curve.setdefault(rate, DIVERGED if draw.random() < 0.2 else draw.random())  # noqa: E731
    result = whole_sweep(tuple(sorted(round(10**x, 9) for x in exponents)), loss, most)
    assert len(result.tried) <= max(most, len(exponents)) and list(result.tried) == sorted(set(result.tried))
    best = min(curve.values())
    assert result.chosen is None if best == DIVERGED else curve[result.chosen] == best
    if result.bracketed:
        at = result.tried.index(result.chosen)
        assert 0 < at < len(result.tried) - 1


# -- the spec --------------------------------------------------------------------------------------------------------------


def test_the_baseline_comes_first_at_every_scale():
    found = arms(spec(scales=["0.1", "0.2"], baseline="other"))
    assert [arm.key for arm in found] == [("other", 0.1), ("small", 0.1), ("other", 0.2), ("small", 0.2)]
    assert found[0].changes == {"model.name": "llama"} and found[0].config().model_scale == 0.1


def test_a_grid_multiplies_the_variants():
    found = arms(spec(grid={"optim.weight_decay": ["0", "0.1"], "model.n_layers": ["2"]}))
    assert [arm.name for arm in found] == [
        f"{name} weight_decay={decay} n_layers=2" for name in TWO for decay in ("0", "0.1")
    ]
    assert found[1].config().optim.weight_decay == 0.1
    alone = arms(read({"grid": {"optim": {"weight_decay": ["0", "0.1"]}}}))
    assert [arm.name for arm in alone] == ["weight_decay=0", "weight_decay=0.1"]


def test_a_variant_has_learning_rates_of_its_own():
    found = arms(spec(variants={"a": {"learning_rates": ["2e-3", "1e-3"]}, "b": {}}, learning_rates=["1e-4", "2e-4"]))
    assert [arm.learning_rates for arm in found] == [(1e-3, 2e-3), (1e-4, 2e-4)]
    assert "learning_rates" not in found[0].changes


@pytest.mark.parametrize(
    "values, words",
    [
        ({"variants": {"one": {}}}, "two or more"),
        ({"baseline": "gtp2"}, "no variant 'gtp2'"),
        (
            {"common": {"init_from": "runs/a"}},
            "^variant .*: init_from: the runs of a comparison begin with initial weights",
        ),
        ({"seeds": ["0", "1"]}, "favours the variant that was lucky"),
        ({"seeds": ["1", "1"]}, "twice"),
        ({"seeds": ["-1"]}, "negative"),
        ({"seeds": ["1000001", "1000002"], "baseline": "no"}, "baseline"),  # not twice the same seed
        ({"common": {"seed": "3"}}, "leave seed out"),
        ({"common": {"run_dir": "runs/x"}}, "leave run_dir out"),
        ({"variants": {"a": {"max_steps": "3"}, "b": {}}}, "leave max_steps out"),
        ({"variants": {"a": {"optim": {"lrr": "3"}}, "b": {}}}, "variant a: unknown key optim.lrr"),
        ({"variants": {"a": "gpt2", "b": {}}}, "holds the keys of a run"),
        ({"grid": {"optim.weight_decai": ["1", "2"]}}, "did you mean optim.weight_decay"),
        ({"grid": {"optim.weight_decay": ["1", "1"]}}, "a value twice"),
        ({"learning_rates": ["0", "1"]}, "above 0"),
        ({"learning_rates": ["1e-3", "1.0000001e-3"]}, "names a value twice"),
        ({"variants": {"a": {"learning_rates": "x"}, "b": {}}}, "variants.a.learning_rates"),
        ({"variants": {"a" * 201: {}, "b": {}}}, "has 201 characters, at most 200 name a variant"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused_in_one_line(values, words):
    with pytest.raises(UserError, match=words) as error:
        arms(spec(**values))
    assert "\n" not in str(error.value)


# -- budgets ---------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 10**6), st.floats(1, 10**9))
def test_the_nearest_number_of_steps(each, wanted):
    steps = nearest_steps(lambda count: count * each, wanted)
    assert steps >= 1
    assert steps == 1 or abs(steps * each - wanted) <= each / 2


@pytest.fixture(scope="module")
def sized(tiny_dataset):
    """Three arms of one scale on the tiny dataset: gpt2, a wider llama, and one that cannot be sized."""
    shared = tiny_values(tiny_dataset, "", batch__sequence_start=64, batch__sequence_double_every=0, max_steps=30)
    del shared["run_dir"], shared["model"]
    small = {"n_layers": 2, "d_model": 32, "n_heads": 2}
    config = read(
        {
            "common": shared,
            "variants": {
                "gpt2": {"model": {"name": "gpt2", **small}},
                "llama": {"model": {"name": "llama", **small, "d_model": 64}},
                "hlb": {"model": {"name": "hlb"}, "batch": {"dynamic": True}},
            },
        }
    )
    found = arms(config)
    return config, found, find_dataset(found[0].config().data)


def test_equal_flops_are_equal_within_half_a_step(sized):
    _, found, dataset = sized
    result = lengths(found, "flops", lambda data: dataset, rate=None)
    gpt2, llama = result["gpt2", 0.05], result["llama", 0.05]
    assert gpt2.steps == 30 and 1 <= llama.steps < 30
    assert abs(llama.flops - gpt2.flops) <= 512 * llama.flops_per_token / 2
    assert "follows the gradient norm" in result["hlb", 0.05].refused
    with pytest.raises(UserError, match="baseline hlb: batch.dynamic"):
        lengths(found[::-1], "flops", lambda data: dataset, rate=None)


def test_equal_seconds_follow_the_measured_speed(sized):
    _, found, dataset = sized
    speeds = {"gpt2": 1000.0, "llama": 250.0}
    result = lengths(found[:2], "seconds", lambda data: dataset, lambda arm, plan: speeds[arm.name])
    assert result["llama", 0.05].steps == round(30 / 4)


def test_equal_parameters_refuse_another_size(sized):
    _, found, dataset = sized
    result = lengths(found[:2], "parameters", lambda data: dataset, rate=None)
    assert "parameters, the baseline" in result["llama", 0.05].refused


def test_an_arm_that_names_another_tokenizer_than_its_data_have_is_refused(sized):
    shared, _, dataset = sized
    config = copy.deepcopy(shared)
    config.variants["llama"]["data"] = {"tokenizer": "train-bpe:300"}
    result = lengths(arms(config), "tokens", lambda data: dataset, rate=None)
    assert "data.tokenizer: train-bpe:300, but " in result["llama", 0.05].refused
    assert " was prepared with bytes; give another data.path" in result["llama", 0.05].refused
    config.common["data"]["tokenizer"] = "gpt2"
    with pytest.raises(UserError, match="baseline gpt2: data.tokenizer: gpt2, but "):
        lengths(arms(config), "tokens", lambda data: dataset, rate=None)


@pytest.mark.parametrize(
    "claim, message",
    [
        ({"source": "x", "order": ["small", "huge"]}, "there is no variant 'huge' (variants: small, other)"),
        ({"source": "x", "order": ["small", ["other", "small"]]}, "names two variants or more, each once"),
        ({"source": "x", "order": [["small", "other"]]}, "names two variants or more"),
        ({"source": "x", "order": "small"}, "names two variants or more"),
        ({"order": ["small", "other"]}, "is {source: TEXT, order:"),
    ],
)
def test_a_claim_that_names_no_order_of_variants_is_refused(claim, message):
    with pytest.raises(UserError) as raised:
        claims_of(spec(claims={"it is so": claim}))
    assert message in str(raised.value) and "claims.it is so" in str(raised.value)


def test_a_claim_may_be_added_but_not_left_out(tmp_path, stub):
    claims = {"first": {"source": "x", "order": ["small", "other"]}}
    folder = tmp_path / "compare"
    experiment(folder)
    experiment(folder, claims=claims)
    with pytest.raises(UserError, match="was begun with the claim 'first', which the spec no longer has"):
        experiment(folder)


WITH_OTHER_BUDGET = [file for file in COMPARISONS if file.stem.endswith("-flops")]


@pytest.mark.parametrize("file", WITH_OTHER_BUDGET, ids=lambda file: file.stem)
def test_our_comparisons_with_equal_flops_have_the_arms_of_those_with_equal_parameters(file):
    """They may train for fewer steps, and judge further claims, which are made at equal FLOPs."""
    config, base = (read(load_yaml(path)) for path in (file, file.with_stem(file.stem.removesuffix("-flops"))))
    assert (config.budget, base.budget) == ("flops", "parameters")
    for one in (config, base):
        one.common.pop("max_steps")
    assert arms(config) == arms(base)
    assert all(claim in claims_of(config) for claim in claims_of(base))


@pytest.mark.parametrize(
    "file", sorted({*COMPARISONS} - {*WITH_OTHER_BUDGET, WITH_ENTROPIES}), ids=lambda file: file.stem
)
def test_our_comparisons_can_run(file, tiny_dataset, tmp_path, monkeypatch):
    """Every arm of our specs resolves, has the baseline's budget, and as many tokens per step."""
    make_run(tiny_dataset, tmp_path / "runs" / "shakespeare", "llama")  # the teacher of one
    monkeypatch.chdir(tmp_path)
    config = read(load_yaml(file))
    found = arms(config)
    result = lengths(found, config.budget, lambda data: None, rate=None)
    assert not [length.refused for length in result.values() if length.refused]
    assert len({length.tokens / length.steps for length in result.values()}) == 1


def test_flops_of_a_run_count_every_sequence_length(tiny_dataset):
    """The plan's own count at each length, times the tokens of the steps that have it."""
    from trainer.core.config import RunConfig
    from trainer.core.settings import build
    from trainer.engine.meta import flops_per_token
    from trainer.planning.plan import resolve

    plan = resolve(
        build(RunConfig, tiny_values(tiny_dataset, "runs/x")),
        find_dataset(build(RunConfig, tiny_values(tiny_dataset, "x")).data),
    )
    steps = [plan.sequence_length(step) for step in range(12)]
    assert set(steps) == {16, 32, 64}
    expected = sum(512 * flops_per_token(plan.model_class, plan.model_config, length) for length in steps)
    assert training_flops(plan, 12) == expected
    assert minimum_tokens(plan) == 12 * 512


# -- the folder ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stub(tmp_path, monkeypatch):
    script = tmp_path / "stub.py"
    script.write_text(STUB)
    monkeypatch.setattr(compare_queue, "TRAIN", [sys.executable, "-IS", str(script)])
    monkeypatch.setattr(compare_queue, "POLL_SECONDS", 0.02)
    return script


def entries(folder):
    content = json.loads((folder / "experiment.json").read_text())
    return content["arms"], content["runs"]


def run_queue(made, slots=1):
    said = []
    Queue(made, [{}] * slots, [], said.append).run()
    return said


def test_a_queue_tunes_every_arm_and_then_tests_it_on_every_seed(tmp_path, stub):
    folder = tmp_path / "compare"
    run_queue(experiment(folder), slots=3)
    found, runs = entries(folder)
    assert [(arm["name"], arm["learning_rate"], arm["bracketed"]) for arm in found] == [
        ("small", 2e-3, True),
        ("other", 2e-3, True),
    ]
    tuning = [run for run in runs if run["purpose"] == "tuning"]
    tests = [run for run in runs if run["purpose"] == "test"]
    assert sorted(run["learning_rate"] for run in tuning) == sorted(2 * [0.5e-3, 1e-3, 2e-3, 4e-3])
    assert {run["seed"] for run in tuning} == {0}
    assert sorted((run["arm"], run["seed"]) for run in tests) == sorted(itertools.product(TWO, (1, 2, 3)))
    assert {run["state"] for run in runs} == {"finished"} and {run["learning_rate"] for run in tests} == {2e-3}


def test_a_diverged_a_refused_and_a_failed_run_stand_in_the_experiment_as_such(tmp_path, stub, monkeypatch):
    folder = tmp_path / "compare"
    monkeypatch.setenv("STUB_LLAMA", "refuse")
    said = run_queue(experiment(folder, inferred=8e-3, variants={**TWO, "third": {"model": {"name": "ngpt"}}}))
    states = {
        (run["arm"], run["learning_rate"]): run["state"] for run in entries(folder)[1] if run["purpose"] == "tuning"
    }
    assert states["small", 16e-3] == "diverged" and states["small", 4e-3] == "finished"
    assert {state for (arm, _), state in states.items() if arm == "other"} == {"refused"}
    assert any("other-scale1-lr0.004-seed0 refused: model: cannot be" in line for line in said)
    tested = {run["arm"] for run in entries(folder)[1] if run["purpose"] == "test"}
    assert tested == {"small", "third"}, "an arm whose sweep is not complete has no test runs"
    monkeypatch.setenv("STUB_LLAMA", "crash")
    said = run_queue(experiment(folder, inferred=8e-3, variants={**TWO, "third": {"model": {"name": "ngpt"}}}))
    assert any("failed: exit code 1; error: lost the device; see " in line for line in said)
    assert not any("small" in line for line in said), "what is finished is not trained again"
    monkeypatch.delenv("STUB_LLAMA")
    run_queue(experiment(folder, inferred=8e-3, variants={**TWO, "third": {"model": {"name": "ngpt"}}}))
    assert {run["state"] for run in entries(folder)[1] if run["arm"] == "other"} == {"finished", "diverged"}


def test_seeds_and_variants_may_be_added_and_nothing_else_may_change(tmp_path, stub):
    folder = tmp_path / "compare"
    run_queue(experiment(folder, seeds=["1"]))
    more = {**TWO, "third": {"model": {"name": "ngpt"}}}
    said = run_queue(experiment(folder, seeds=["1", "2"], variants=more))
    assert sum("seed2 finished" in line for line in said) == 3
    assert not any("small" in line and "seed1" in line for line in said)
    assert read_comparison(folder).added_seeds == [2]
    for values, words in [
        ({"seeds": ["2"]}, "seed 1, which the spec no longer names"),
        ({"seeds": ["1", "2"], "variants": TWO}, "variant third at scale 1"),
        ({"seeds": ["1", "2"], "tuning_seed": "9"}, "tuning_seed 0, now it is 9"),
        ({"seeds": ["1", "2"], "budget": "flops"}, "budget tokens"),
        ({"seeds": ["1", "2"], "common": {"max_steps": "7"}}, "other settings of variant small"),
        ({"seeds": ["1", "2"], "learning_rates": ["1e-3", "2e-3"]}, "other settings of variant small"),
    ]:
        with pytest.raises(UserError, match=words):
            experiment(folder, **{"variants": more, **values})


def test_a_folder_that_holds_something_else_or_a_changed_experiment_is_refused(tmp_path, stub):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    with pytest.raises(UserError, match="holds something else"):
        stored_experiment(other)
    folder = tmp_path / "compare"
    experiment(folder)
    path = folder / "experiment.json"
    path.write_text(path.read_text().replace('"tuning_seed": 0', '"tuning_seed": 5'))
    with pytest.raises(UserError, match="was changed after it was written"):
        stored_experiment(folder)


def test_an_experiment_without_its_digest_is_refused(tmp_path, stub):
    folder = tmp_path / "compare"
    experiment(folder)
    content = json.loads((folder / "experiment.json").read_text())
    del content["digest"]
    (folder / "experiment.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="has no digest"):
        stored_experiment(folder)


def test_a_refused_arm_is_sized_again(tmp_path, stub):
    """What it lacked, such as a plug-in, may be there at the next command; the others keep their lengths."""
    folder = tmp_path / "compare"
    first = experiment(folder)
    refused, other = first.arms[1], first.arms[0]
    first.lengths[refused.key] = Length(refused="model.name: is not known")
    first.write()
    facts = {**first.facts}
    again = Experiment(folder, facts, first.arms, stored_experiment(folder))
    assert again.lengths == {other.key: first.lengths[other.key]}


def test_a_failure_is_told_by_the_lines_of_its_own_try(tmp_path):
    log = tmp_path / "run.log"
    log.write_text("error: of an earlier try\n")
    begins = log.stat().st_size
    with log.open("a") as file:
        file.write("killed\n")
    assert tail(log, begins) == ["killed"]


def test_two_variants_with_one_folder_name_are_refused(tmp_path):
    with pytest.raises(UserError, match="folder name a-b"):
        experiment(tmp_path / "compare", variants={"a/b": {}, "a b": {}})


def test_the_state_of_a_run_comes_from_its_folder(tmp_path, finished):
    assert state_of(tmp_path / "none", 12) == State("waiting")
    done = state_of(finished, 12)
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert (done.word, done.loss) == ("finished", rows[-1]["val_loss"])
    assert state_of(finished, 24).word == "waiting", "it has not reached step 24"
    with locked(finished):
        assert state_of(finished, 12).word == "running"


def test_elements_for_an_array_are_the_runs_that_can_start(tmp_path, stub, capsys):
    folder = tmp_path / "compare"

    def written(only_new=False):
        write_elements(experiment(folder), ["x.py"], only_new)
        return capsys.readouterr().out.strip()

    assert written() == str(folder / "elements" / "1")
    words = [(folder / "elements" / "1" / str(number)).read_text().splitlines() for number in range(6)]
    assert all(line[1:] == ["--plugin", "x.py"] and line[0].endswith("seed0.yaml") for line in words)
    assert written(only_new=True) == "", "what failed is not submitted again by itself"
    assert written() == str(folder / "elements" / "2")
    run_queue(experiment(folder))
    assert written() == "", "nothing is left"


def test_a_run_that_slurm_refused_says_why(tmp_path):
    tried = tmp_path / "logs" / "7_0" / "try-0"
    tried.mkdir(parents=True)
    (tried / "outcome").write_text("refused: model.name: 'x' is not known\n")
    assert state_of(tmp_path, 10) == State("refused", "model.name: 'x' is not known")


def test_devices(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert device_slots(None, "cpu") == [{"OMP_NUM_THREADS": "8"}]
    assert device_slots(3, "cpu") == 3 * [{"OMP_NUM_THREADS": "2"}]


# -- kills -----------------------------------------------------------------------------------------------------------------


def start_queue(folder, stub, seconds: float) -> Path:
    """The queue in a process of its own; its stubs take so many seconds."""
    return processes.start(Path(__file__).parent / "compare_stub.py", stub, folder, env={"STUB_SECONDS": str(seconds)})


def said(started: Path) -> str:
    return (started / "stdout").read_text()


@pytest.mark.slow
def test_a_queue_that_is_killed_ten_times_ends_with_the_same_experiment(tmp_path, stub):
    calm, killed = tmp_path / "calm" / "compare", tmp_path / "killed" / "compare"
    run_queue(experiment(calm))
    for attempt in range(10):
        started = start_queue(killed, stub, 0.6)
        processes.until(lambda started=started: said(started).count("\n") > 1)
        time.sleep(0.07 * attempt)  # before and after the runs end
        processes.send(started, signal.SIGKILL)
        assert processes.wait(started).codes == [-signal.SIGKILL]
    assert processes.wait(start_queue(killed, stub, 0)).codes == [0]
    assert entries(killed) == entries(calm)


def test_a_stopped_queue_asks_its_runs_once_and_goes_on(tmp_path, stub):
    folder = tmp_path / "compare"
    started = start_queue(folder, stub, 30)
    processes.until(lambda: said(started).count(" begins; ") == 2)
    processes.send(started, signal.SIGINT)
    ended = processes.wait(started)  # at once: the stubs end by SIGTERM
    assert "SIGINT: runs in progress (2) write a checkpoint and stop" in ended.said and ended.returncode != 0
    assert {run["state"] for run in entries(folder)[1]} == {"waiting"}


def test_a_bench_of_other_values_is_made_again(tmp_path, monkeypatch):
    """The spec was edited between two estimates: the variant has its name and another width."""
    speeds_of = {"64": 1000.0, "128": 500.0}

    def bench(command, **_):
        values = load_yaml(command[-1])
        row = {"tokens_per_second": {"median": speeds_of[values["model"]["d_model"]]}, "peak_memory_bytes": 0}
        (Path(values["bench_dir"]) / "bench.json").write_text(json.dumps({"rows": [row]}))
        made.append(row)
        return subprocess.CompletedProcess(command, 0, "", "")

    made: list = []
    monkeypatch.setattr("trainer.planning.speed.subprocess.run", bench)
    for width in ("64", "64", "128"):
        one = Arm("a", 1.0, {"model": {"name": "gpt2", "d_model": width}}, {}, None)
        assert Speeds(tmp_path, {}, [], print).tokens_per_second(one) == speeds_of[width]
    assert len(made) == 2


def test_an_estimate_counts_runs_hours_and_money(tmp_path, sized, monkeypatch):
    config, found, dataset = sized
    monkeypatch.setattr("trainer.commands.compare.estimate.find_dataset", lambda data: dataset)
    facts = facts_of(config, "test", ["compare"], found)
    made = Experiment(tmp_path, facts, found, None)
    made.lengths = lengths(found, "tokens", lambda data: dataset, rate=None)
    speeds = Speeds(tmp_path, {}, [], print)
    monkeypatch.setattr(
        speeds, "measured", lambda arm: {"tokens_per_second": {"median": 100.0}, "peak_memory_bytes": 2**29}
    )
    config.price = 2.0
    text = estimate(made, config.price, speeds, at_once=2).text
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    assert [row[0] for row in cells[2:]] == ["gpt2", "llama"] and "hlb at scale 0.05 left out: batch.dynamic" in text
    validation = dataset.splits["validation"].tokens / 300  # once, at the end: evaluation.every is 0
    seconds = 30 * 512 / 100 + validation
    assert cells[2][7] == f"{seconds / 60:.1f}" and cells[2][8] == "9", "six learning rates and three seeds at most"
    hours = 2 * 9 * seconds / 3600
    assert f"{hours:.2f} hours of one device, {2 * hours:,.2f} at 2 an hour" in text
    assert f"{hours / 2:.2f} hours with 2 at a time" in text
