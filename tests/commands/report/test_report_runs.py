"""What `report` reads: run folders of any release and in any state, experiment.json, and how loose runs become arms."""

import json
import math
import random
import shutil

import numpy as np
import pytest
from conftest import ROOT
from synthetic_runs import Experiment, nested, simple_comparison, sweep, write_run

from trainer.commands.report import markdown
from trainer.commands.report.caveats import metric_of
from trainer.commands.report.evidence import find_caveats
from trainer.commands.report.load import POINTS, load_run
from trainer.commands.report.page import Page
from trainer.commands.report.publish import body, section
from trainer.commands.report.results import results
from trainer.commands.report.study import read_comparison, read_studies
from trainer.core.errors import UserError
from trainer.planning.run_config import seal


def loose(*folders, baseline=None):
    (study,) = read_studies([str(folder) for folder in folders], baseline)
    return study


def edit(path, change) -> None:
    path.write_text(change(path.read_text()))


# -- a run's folder --------------------------------------------------------------------------------------------------------


def test_a_run_is_read(tmp_path):
    run = load_run(write_run(tmp_path / "one", 3.25, seed=7, sample="the end"), "one")
    assert (run.state, run.loss, run.seed, run.learning_rate, run.notes) == ("finished", 3.25, 7, 0.002, [])
    assert (run.tokens, run.seconds, run.peak_memory_bytes, run.step) == (40 * 512, 20.0, 1 << 20, 40)
    assert run.bits == pytest.approx(3.25 / math.log(2)) and run.sample == "the end"
    assert run.inferred == {"optim.lr"} and run.starts[0]["host"] == "machine"
    assert run.validation["tokens"].tolist() == [5120, 10240, 15360, 20480]
    assert len(run.training["loss"]) == 40


def test_a_run_names_the_frozen_models_of_its_objective(tmp_path):
    """Their passes are not in its FLOPs."""
    taught = write_run(tmp_path / "taught", objective={"name": "distill", "teacher": "runs/teacher"})
    assert (
        load_run(taught, "taught").frozen == ("objective.teacher",)
        and not load_run(write_run(tmp_path / "r"), "r").frozen
    )


def test_a_run_names_what_it_computed_on(tmp_path):
    named = load_run(write_run(tmp_path / "one", start={"device": "NVIDIA A100"}, device="auto"), "one")
    older = load_run(write_run(tmp_path / "two", device="auto"), "two")
    assert (named.device, older.device) == ("NVIDIA A100", "auto")


def test_flops_are_summed_at_the_length_of_each_step(tmp_path):
    """Half of the steps at 16 tokens, half at 32; what the model counts for one token, times the tokens of a step."""
    from models.base import get_model

    folder = write_run(tmp_path / "one", batch__sequence_start=16, batch__sequence_double_every=20)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in lines[:20]:
        row["sequence_length"] = 16
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    model = get_model("gpt2")(
        get_model("gpt2").Config(vocab_size=64, d_model=16, n_layers=1, n_heads=2, max_context=32)
    )
    run = load_run(folder, "one")
    assert run.flops == 20 * 512 * (model.flops_per_token(16) + model.flops_per_token(32))
    assert run.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_a_run_that_did_not_reach_its_end_has_no_final_loss(tmp_path):
    unfinished = load_run(write_run(tmp_path / "a", steps=30), "a")
    assert (unfinished.state, unfinished.loss, unfinished.message) == ("unfinished", None, "30 of 40 steps")
    assert unfinished.last_loss is not None
    diverged = load_run(write_run(tmp_path / "b", row={"loss": None}), "b")
    assert (diverged.state, diverged.loss) == ("diverged", None)
    unvalidated = load_run(write_run(tmp_path / "c", row={"val_loss": None}), "c")
    assert (unvalidated.state, unvalidated.message) == ("unfinished", "no validation loss at the last step")
    nan = load_run(write_run(tmp_path / "d", row={"val_loss": math.nan}), "d")
    assert (nan.state, nan.loss) == ("unfinished", None)
    empty = write_run(tmp_path / "e")
    (empty / "metrics.jsonl").unlink()
    assert load_run(empty, "e").state == "unfinished"


def test_damaged_rows_are_left_out_and_named(tmp_path):
    folder = write_run(tmp_path / "one")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[4] = "\x00\x00\x00"
    lines[9] = lines[9].replace('"tokens": 5120', f'"tokens": {10**400}')
    lines[20] = lines[3]  # a row of the past
    lines[39] = lines[39].replace('"epoch": 0.4', f'"epoch": {10**400}')  # nothing needs this number
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    run = load_run(folder, "one")
    assert (run.state, run.loss) == ("finished", 3.0)
    assert run.notes == [
        "one: metrics.jsonl: 3 lines are not rows or are out of order; they are left out",
        "one: metrics.jsonl: 3 of 40 steps have no row",
    ]


def test_long_runs_keep_a_bounded_curve_with_both_ends(tmp_path):
    run = load_run(write_run(tmp_path / "one", max_steps=5000, evaluation__every=1000), "one")
    assert len(run.training["tokens"]) == POINTS
    assert run.training["tokens"][[0, -1]].tolist() == [512, 5000 * 512] and np.isfinite(run.training["loss"]).all()


@pytest.mark.parametrize("release", ["0.1.0", "0.2.0", "0.3.0"])
def test_runs_of_every_release_are_read(release):
    run = load_run(ROOT / "tests" / "frozen" / release / "run", release)
    assert run.state == "finished" and 1 < run.loss < 8 and run.flops > 0 and run.notes == []
    assert run.values["optim.name"] == "adamw" and run.peak_memory_bytes is None


def test_a_config_with_keys_of_a_later_release_is_used_and_noted(tmp_path):
    folder = write_run(tmp_path / "one")
    text = (folder / "config.yaml").read_text().partition("\n")[2].replace("optim:\n", "optim:\n  magic: 3\n")
    (folder / "config.yaml").write_text(seal(text, "9.9.9", "2"))
    run = load_run(folder, "one")
    assert run.loss == 3.0 and run.learning_rate == 0.002
    assert run.notes == ["one: the report ignores keys of crescendo-lm 9.9.9: optim.magic"]


def test_a_run_whose_config_cannot_be_read_is_left_out_and_named(tmp_path):
    good, bad = write_run(tmp_path / "good"), write_run(tmp_path / "bad")
    edit(bad / "config.yaml", lambda text: text.replace("seed: 1", "seed: 2"))
    study = loose(good, bad)
    assert len(study.runs) == 1 and "bad/config.yaml: its digest" in study.notes[0] and "left out" in study.notes[0]
    with pytest.raises(UserError, match="bad/config.yaml: its digest"):
        loose(bad)


def test_a_model_that_is_not_here_has_no_flops_and_a_note(tmp_path):
    start = {"command": ["trainer/__main__.py", "train", "--plugin", "mine.py"]}
    run = load_run(write_run(tmp_path / "one", start=start, model__name="mine"), "one")
    assert (run.loss, run.flops, run.parameters) == (3.0, None, None)
    assert "one: its model cannot be built here" in run.notes[0] and "--plugin mine.py: add it" in run.notes[0]


def test_kernels_of_a_gpu_do_not_matter(tmp_path):
    run = load_run(write_run(tmp_path / "one", model__kernels="liger", model__attention_kernel="flash"), "one")
    assert run.notes == [] and run.flops is not None


def test_missing_files_are_noted(tmp_path):
    folder = write_run(tmp_path / "one")
    (folder / "dataset.json").unlink()
    edit(folder / "environment.jsonl", lambda text: "{broken\n" + text)
    run = load_run(folder, "one")
    assert len(run.starts) == 1 and any("environment.jsonl, line 1" in note for note in run.notes)
    assert any("dataset.json" in note and "not known" in note for note in run.notes)


ODD = (None, True, -1, 0, 1e308, math.nan, math.inf, 10**400, "x", "", "\u202e|", [], [1], {}, {"sha256": 3})


def damage(path, draw) -> None:
    """Remove a file, cut it off, change bytes, or replace a value somewhere in its JSON."""
    data, how = bytearray(path.read_bytes()), draw.random()
    if how < 0.1:
        path.unlink()
    elif how < 0.2:
        path.write_bytes(bytes(data[: draw.randrange(len(data))]))
    elif how < 0.3 or path.suffix not in (".json", ".jsonl"):
        for _ in range(5):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(bytes(data))
    else:
        lines = data.decode().splitlines() if path.suffix == ".jsonl" else [data.decode()]
        which = draw.choice([0, len(lines) // 2, len(lines) - 1])
        values = json.loads(lines[which])
        values.pop("digest", None)
        places, open_ones = [], [values]
        while open_ones:
            inner = open_ones.pop()
            for key in inner if isinstance(inner, dict) else range(len(inner)):
                places.append((inner, key))
                open_ones += [inner[key]] if isinstance(inner[key], (dict, list)) else []
        inner, key = draw.choice(places)
        inner[key] = draw.choice(ODD)
        lines[which] = json.dumps(values)
        path.write_text("\n".join(lines) + "\n")


@pytest.mark.slow
def test_no_damage_ends_in_a_traceback(tmp_path, monkeypatch):
    """40 damaged comparisons, each as a comparison and as loose runs: a report, or a UserError of one line."""
    monkeypatch.setattr(
        "trainer.commands.report.publish.curve_figures", lambda *_: []
    )  # most of the time, and not of the files
    experiment, draw = Experiment(tmp_path / "sound"), random.Random(3)
    for name in ("gpt2", "llama"):
        experiment.arm(name)
        for seed in (1, 2):
            experiment.run(name, 3 - 0.01 * seed, seed, sample="x", model__name=name)
    experiment.write()
    reported = 0
    for i in range(40):
        folder = shutil.copytree(experiment.folder, tmp_path / str(i))
        names = (
            "experiment.json",
            "dataset.json",
            "metrics.jsonl",
            "environment.jsonl",
            "config.yaml",
            "plan.txt",
            "samples.txt",
        )
        damage(draw.choice(sorted(folder.rglob(draw.choice(names)))), draw)
        for given in (folder, folder / "runs"):
            try:
                study = loose(given)
                found = results(study, metric_of(study), find_caveats(study), 2.9)
                markdown.render(Page("title", "now", [section(study, "s0", found, [], 2.9)]))
                json.dumps(body(study, found, []), allow_nan=False)
                reported += 1
            except UserError as error:
                assert "\n" not in str(error)
        shutil.rmtree(folder)
    assert 60 <= reported <= 80


# -- loose runs ------------------------------------------------------------------------------------------------------------


def test_seeds_of_one_config_are_one_arm_whatever_changes_nothing(tmp_path):
    for seed in (1, 2):
        write_run(
            tmp_path / f"a{seed}",
            3.0,
            seed=seed,
            data__threads=seed,
            log__every=seed,
            batch__tokens_per_microbatch=128 * seed,
        )
        write_run(tmp_path / f"b{seed}", 2.9, seed=seed, model__name="llama", model__max_context=0)
    study = loose(tmp_path)
    assert [(arm.name, sorted(arm.by_seed)) for arm in study.arms] == [("gpt2", [1, 2]), ("llama", [1, 2])]
    assert study.baseline == "gpt2" and loose(tmp_path, baseline="llama").baseline == "llama"
    with pytest.raises(UserError, match=r"baseline: x is not an arm \(arms: gpt2, llama\)"):
        loose(tmp_path, baseline="x")


def test_arms_have_the_values_in_which_they_differ_as_names(tmp_path):
    for i, (norm, width) in enumerate((("layer", 16), ("layer", 32), ("rms", 16))):
        write_run(tmp_path / f"{i}", model__norm=norm, model__d_model=width)
    assert [arm.name for arm in loose(tmp_path).arms] == [
        "d_model=16, norm=layer",
        "d_model=32, norm=layer",
        "d_model=16, norm=rms",
    ]


def test_other_data_are_another_arm(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", data={"fingerprint": "0" * 64})
    study = loose(tmp_path)
    assert [arm.name for arm in study.arms] == ["data=ffffffff", "data=00000000"]
    assert "data_differs" in {caveat.rule for caveat in find_caveats(study)}


def test_scales_are_compared_each_with_its_own_baseline(tmp_path):
    for scale, width in ((0.05, 16), (0.1, 32)):
        for seed in (1, 2):
            for name, loss in (("gpt2", 3.0), ("llama", 2.9)):
                write_run(
                    tmp_path / f"{name}-{scale}-{seed}", loss - scale, seed=seed,
                    model_scale=scale, model__name=name, model__d_model=width,
                )  # fmt: skip
    study = loose(tmp_path)
    assert {(arm.name, arm.scale) for arm in study.arms} == {(n, s) for n in ("gpt2", "llama") for s in (0.05, 0.1)}
    assert [one.test.mean for one in results(study, "loss", [], None) if one.test] == pytest.approx([-0.1, -0.1])


def test_learning_rates_of_loose_runs_make_a_curve_and_the_best_the_table(tmp_path):
    """0.002 has three seeds; the mean of 0.004 is lower only because its one seed is a good one."""
    for rate, loss in ((0.001, 3.1), (0.002, 3.0), (0.004, 3.005)):
        for seed in (1, 2, 3) if rate == 0.002 else (1,):
            write_run(tmp_path / f"{rate}-{seed}", loss + 0.01 * seed, seed=seed, optim__lr=rate)
    study = loose(tmp_path)
    (arm,) = study.arms
    assert (arm.learning_rate, arm.bracketed, sorted(arm.by_seed)) == (0.002, True, [1, 2, 3])
    assert {rate: len(runs) for rate, runs in arm.curve().items()} == {0.001: 1, 0.002: 3, 0.004: 1}
    rules = {caveat.rule for caveat in find_caveats(study)}
    assert "tuned_on_test_runs" in rules and not rules & {"not_swept", "not_bracketed"}
    shutil.rmtree(tmp_path / "0.004-1")
    assert "not_bracketed" in {caveat.rule for caveat in find_caveats(loose(tmp_path))}


def test_a_learning_rate_brackets_only_with_a_result(tmp_path):
    """One that diverged has one; one that is not at its end has none."""
    runs = {
        rate: write_run(tmp_path / f"{rate}-1", loss, optim__lr=rate)
        for rate, loss in ((0.001, 3.1), (0.002, 3.0), (0.004, 3.05))
    }
    assert loose(tmp_path).arms[0].bracketed
    rows = (runs[0.004] / "metrics.jsonl").read_text().splitlines()
    (runs[0.004] / "metrics.jsonl").write_text("\n".join(rows[:-1]) + "\n")
    study = loose(tmp_path)
    assert study.arms[0].bracketed is False and "not_bracketed" in {caveat.rule for caveat in find_caveats(study)}


def test_names_of_variants_are_read_whole(tmp_path):
    """Two that are equal in their first 60 characters, and claims of them."""
    experiment, long = Experiment(tmp_path / "e"), "weight_decay=0.1 warmup_fraction=0.05 n_layers=4 d_model=128 head"
    names = [f"{long}=1", f"{long}=2"]
    for name in names:
        experiment.arm(name)
    experiment.content |= {"baseline": names[0], "claims": [{"words": "so", "source": "x", "pairs": [names]}]}
    study = read_comparison(experiment.write())
    assert [arm.name for arm in study.arms] == names and study.claims[0].pairs == (tuple(names),)


def test_another_baseline_than_the_declared_one_is_told(tmp_path):
    folder = simple_comparison(tmp_path / "demo").write()
    (study,) = read_studies([str(folder)], "llama")
    assert (study.baseline, study.first_baseline) == ("llama", "gpt2")
    assert "baseline_changed" in {caveat.rule for caveat in find_caveats(study)}
    assert not read_studies([str(folder)], "gpt2")[0].first_baseline


def test_the_same_run_twice_counts_once(tmp_path):
    one = write_run(tmp_path / "one")
    shutil.copytree(one, tmp_path / "copy")
    study = loose(tmp_path / "one", tmp_path / "copy", tmp_path / "one")
    assert len(study.runs) == 1 and study.notes == [
        "copy: is the same run as one (arm, learning rate and seed); only one counts"
    ]


@pytest.mark.parametrize("make, words", [
    (lambda path: None, "is not a folder"), (lambda path: path.mkdir(), "holds no run and no comparison"),
    (lambda path: path.write_text(""), "is not a folder"),
])  # fmt: skip
def test_what_is_no_run_is_refused(tmp_path, make, words):
    make(tmp_path / "x")
    with pytest.raises(UserError, match=words):
        read_studies([str(tmp_path / "x")], None)
    with pytest.raises(UserError, match="name run folders or comparisons"):
        read_studies([], None)


# -- a comparison ----------------------------------------------------------------------------------------------------------


def test_a_comparison_is_read(tmp_path):
    study = loose(simple_comparison(tmp_path / "demo").write())
    assert (study.name, study.baseline, study.budget, study.tuning_seed) == ("demo", "gpt2", "tokens", 0)
    assert [sorted(arm.by_seed) for arm in study.arms] == [[1, 2, 3]] * 2
    assert [len(arm.curve()) for arm in study.arms] == [3, 3] and study.notes == []
    rules = {caveat.rule for caveat in find_caveats(study)}
    assert rules == {"one_scale", "compute_differs"} and metric_of(study) == "loss"
    assert results(study, "loss", find_caveats(study), None)[1].claim == "better"


def test_the_folders_of_a_comparison_decide_what_is_finished(tmp_path):
    experiment = Experiment(tmp_path / "demo")
    experiment.arm("gpt2")
    experiment.arm("huge", refused="needs 900 GiB", learning_rate=None, bracketed=None)
    experiment.run("gpt2", 3.0, 1)
    experiment.run("gpt2", 3.0, 2, steps=30)
    experiment.run("gpt2", 3.0, 3, state="diverged", message="a NaN at step 9")
    experiment.run("gpt2", None, 4, state="waiting")
    experiment.run("gpt2", 3.0, 5, state="running")
    experiment.run("gpt2", 3.0, 6, steps=30, state="running")
    experiment.run("gpt2", None, 7)
    study = loose(experiment.write())
    assert {run.seed: (run.state, run.loss) for run in study.runs} == {
        **{1: ("finished", 3.0), 2: ("unfinished", None), 3: ("diverged", None), 4: ("waiting", None)},
        **{5: ("finished", 3.0), 6: ("running", None), 7: ("unfinished", None)},
    }
    assert [note for note in study.notes if "says that it is finished" in note] == study.notes and len(study.notes) == 2
    assert study.arms[1].refused == "needs 900 GiB" and study.runs[2].message == "a NaN at step 9"


def test_two_comparisons_and_loose_runs_are_three_studies(tmp_path):
    for name in ("a", "b"):
        experiment = Experiment(tmp_path / "all" / name)
        experiment.content["name"] = name
        experiment.arm("gpt2")
        sweep(experiment, "gpt2", 3.0)
        experiment.write()
    write_run(tmp_path / "all" / "loose")
    assert [study.name for study in read_studies([str(tmp_path / "all")], None)] == ["a", "b", "runs"]


@pytest.mark.parametrize("changes, words", [
    ({"format": 2}, "has format 2; this release reads 1"),
    ({"budget": "money"}, "budget is 'money'; it is one of tokens, parameters, flops, seconds"),
    ({"seeds": ["1"]}, "seeds is '1', which no comparison writes"),
    ({"seeds": [True]}, "seeds is True"),
    ({"arms": []}, "there must be one"),
    ({"arms": [1]}, "name is None"),
    ({"baseline": "nobody"}, "nobody is not an arm"),
    ({"runs": {}}, "runs is {}"),
    ({"name": None}, "name is None"),
    ({"command": "x"}, "command is 'x'"),
    ({"runs.0.folder": "/etc"}, "'/etc' is not inside the comparison"),
    ({"runs.0.folder": "a/../../b"}, "is not inside the comparison"),
    ({"runs.0.arm": "x"}, "which is not among the arms"),
    ({"runs.0.state": "lost"}, "state is 'lost'; it is one of waiting"),
    ({"runs.0.purpose": "fun"}, "purpose is 'fun'"),
    ({"runs.0.seed": 1.5}, "seed is 1.5"),
    ({"arms.0.scale": math.inf}, "scale is inf"),
    ({"arms.1.name": "gpt2"}, "different names or scales"),
])  # fmt: skip
def test_an_experiment_that_compare_did_not_write_is_refused_in_one_line(tmp_path, changes, words):
    experiment = Experiment(tmp_path / "demo")
    experiment.arm("gpt2")
    experiment.arm("llama")
    experiment.run("gpt2", None)
    for key, value in changes.items():
        place = experiment.content
        *path, last = key.split(".")
        for part in path:
            place = place[int(part) if part.isdigit() else part]
        place[last] = value
    with pytest.raises(UserError) as caught:
        loose(experiment.write())
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert nested({"a.b": 1}) == {"a": {"b": 1}}


def test_an_experiment_that_is_not_json_is_refused(tmp_path):
    folder = Experiment(tmp_path / "demo").write()
    (folder / "experiment.json").write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        loose(folder)
