"""checkpoint.keep_best, `--step best`, RUN@best and evaluation.patience."""

import json
import math

import pytest
from conftest import tiny_values
from tiny_runs import losses, same, weights

from trainer.checkpoint import format as checkpoint
from trainer.checkpoint.manifest import amend, best_steps, ranked
from trainer.commands.train import resolved
from trainer.commands.train import run as train
from trainer.core.config import RunConfig
from trainer.core.errors import Damaged, UserError
from trainer.core.settings import build
from trainer.planning.plan import render, resolve
from trainer.planning.run_config import branch_point
from trainer.runs.metrics import last_row, read_rows
from trainer.runs.opening import open_run
from trainer.training.run import Run, State

# By step. Lowest at 3; improvements by more than 0.5 at 1, 2 only.
COURSE = {1: 5.0, 2: 4.0, 3: 3.9, 4: 3.95, 5: 3.92, 6: math.nan, 7: 3.91, 8: 3.94}


@pytest.fixture
def course(monkeypatch):
    """Validation losses as in COURSE, whatever the weights are."""
    monkeypatch.setattr(
        Run,
        "validate",
        lambda self: {"evaluation": {"full": {"loss": COURSE[self.state.step], "bits_per_byte": 1.0}}},
    )


def values(dataset, folder, **changes):
    given = tiny_values(dataset, folder, max_steps=8, evaluation__every=1, checkpoint__every=4)
    given["checkpoint"] |= {"keep": 1, "keep_best": changes.pop("keep_best", 1)}
    given["evaluation"] |= changes
    return given


def steps(folder):
    return [step for step, _ in checkpoint.found(folder / "checkpoints")]


def say(line):
    pass


def test_the_best_checkpoints_are_kept_beside_the_newest(tiny_dataset, tmp_path, course, capsys):
    train(values(tiny_dataset, tmp_path / "one"))
    assert steps(tmp_path / "one") == [3, 8]
    assert "best: step 3, val_loss 3.9000" in capsys.readouterr().err
    train(values(tiny_dataset, tmp_path / "two", keep_best=2))
    assert steps(tmp_path / "two") == [3, 7, 8]
    assert [found[:2] for found in ranked(tmp_path / "two" / "checkpoints", say)] == [(3.9, 3), (3.91, 7), (3.94, 8)]
    train(values(tiny_dataset, tmp_path / "none", keep_best=0))
    assert steps(tmp_path / "none") == [8]
    assert same(weights(tmp_path / "one", 8), weights(tmp_path / "none", 8))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [3, 6])
def test_it_survives_a_kill(tiny_dataset, tmp_path, course, monkeypatch, at):
    """Killed when the weights of a step have been saved, before anything else, and when an evaluation was not yet written."""
    train(values(tiny_dataset, tmp_path / "calm", patience=4))
    save = Run.save

    def killed(self, *arguments):
        if self.state.step >= at and len(list(tmp_path.glob("killed"))) == 0:
            if at == 3:
                save(self, *arguments)
            (tmp_path / "killed").touch()
            raise Killed
        save(self, *arguments)

    monkeypatch.setattr(Run, "save", killed)
    with pytest.raises(Killed):
        train(values(tiny_dataset, tmp_path / "r", patience=4))
    train({"run_dir": str(tmp_path / "r")})
    assert steps(tmp_path / "r") == steps(tmp_path / "calm") == [3, 7]
    assert losses(tmp_path / "r") == losses(tmp_path / "calm")
    ends = [last_row(tmp_path / name / "metrics.jsonl")["ended_early"] for name in ("r", "calm")]
    assert ends[0] == ends[1]
    assert same(weights(tmp_path / "r", 7), weights(tmp_path / "calm", 7))


def test_the_best_is_read_from_what_is_stored_and_checked(tiny_dataset, tmp_path, course, capsys):
    folder = tmp_path / "r"
    train(values(tiny_dataset, folder, keep_best=2))
    assert open_run(str(folder), "best", "cpu", "auto").step == 3
    assert branch_point(f"{folder}@best", "x", say) == (folder, 3)
    (shard,) = (folder / "checkpoints" / "step-00000003").glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    capsys.readouterr()
    assert open_run(str(folder), "best", "cpu", "auto").step == 7
    said = capsys.readouterr().err
    assert "trying the next best" in said and "step best:" in said and "val_loss 3.9100" in said
    manifest = folder / "checkpoints" / "step-00000007" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("3.91", "1.91"))
    assert branch_point(f"{folder}@best", "x", say) == (folder, 3)
    told = []
    ranked(folder / "checkpoints", told.append)
    assert len(told) == 1 and "step-00000007" in told[0] and "left out" in told[0]
    assert best_steps(folder / "checkpoints", 1, "val_loss", [3, 7, 8]) == [
        7,
        3,
    ]  # nothing that cannot be read is removed
    amend(folder / "checkpoints" / "step-00000008", {"validation": {"metric": "val_loss", "value": "low"}})
    told.clear()
    ranked(folder / "checkpoints", told.append)
    assert any("has no finite value" in line for line in told)


def test_where_no_checkpoint_was_evaluated_there_is_no_best(tiny_dataset, tmp_path):
    folder = tmp_path / "r"
    given = tiny_values(tiny_dataset, folder, max_steps=2)
    train(given)
    amend(folder / "checkpoints" / "step-00000002", {"validation": None})
    with pytest.raises(UserError, match=r"no checkpoint with a validation loss in .* \(available: 2\)"):
        open_run(str(folder), "best", "cpu", "auto")
    with pytest.raises(UserError, match=r"init_from: no checkpoint of .* has a validation loss \(available: 2\)"):
        branch_point(f"{folder}@best", "init_from", say)


def test_a_run_begins_from_the_best_and_the_command_may_be_given_again(tiny_dataset, tmp_path, course):
    parent, child = tmp_path / "parent", tmp_path / "child"
    train(values(tiny_dataset, parent))
    command = {
        "init_from": f"{parent}@best",
        "run_dir": str(child),
        "data": {"path": str(tiny_dataset)},
        "device": "cpu",
    }
    assert resolved(command | {"max_steps": 2}).init_from == f"{parent}@3"
    branch = {"branch_from": f"{parent}@best", "run_dir": str(child), "max_steps": 4}
    train(branch)
    state = json.loads((child / "checkpoints" / "step-00000004" / "manifest.json").read_text())["state"]
    assert state["reference"] == [4, 3.95]  # patience begins anew: that run's 3.9 does not count
    assert resolved(branch).branch_from == f"{parent}@3"


def test_patience_ends_a_run(tiny_dataset, tmp_path, course, capsys):
    folder = tmp_path / "r"
    train(values(tiny_dataset, folder, patience=3, keep_best=0))
    reason = "val_loss has not improved in 3 evaluations (best: 3.9000 at step 3)"
    rows = read_rows(folder / "metrics.jsonl")
    assert [row.get("ended_early") for row in rows] == [None] * 5 + [reason]
    assert steps(folder) == [6]
    assert f"ended early at step 6 of 8: {reason}" in capsys.readouterr().err
    before = (folder / "metrics.jsonl").read_bytes()
    train({"run_dir": str(folder)})
    assert f"ended early at step 6: {reason}" in capsys.readouterr().err
    assert (folder / "metrics.jsonl").read_bytes() == before
    train({"run_dir": str(folder), "evaluation": {"patience": 5}})
    train(values(tiny_dataset, tmp_path / "whole", keep_best=0))
    assert losses(folder) == losses(tmp_path / "whole")  # the schedules are those of all 8 steps
    assert same(weights(folder, 8), weights(tmp_path / "whole", 8))


def test_an_improvement_is_more_than_min_delta(tiny_dataset, tmp_path, course):
    train(values(tiny_dataset, tmp_path / "r", patience=3, min_delta=0.5))
    row = last_row(tmp_path / "r" / "metrics.jsonl")
    assert row["step"] == 5
    assert row["ended_early"] == "val_loss has not improved by more than 0.5 in 3 evaluations (best: 4.0000 at step 2)"
    assert steps(tmp_path / "r") == [3, 5]  # the lowest is kept nevertheless


def test_an_evaluation_that_a_signal_interrupted_counts_once(tiny_dataset, tmp_path, course, monkeypatch):
    """The next process makes it, and puts it into the manifest of the checkpoint that was saved without it."""
    from trainer.core.errors import Stopped

    folder, validate = tmp_path / "r", Run.validate

    def interrupted(self):
        if self.state.step == 3:
            raise Stopped(15, "")
        return validate(self)

    given = values(tiny_dataset, folder, patience=3)
    monkeypatch.setattr(Run, "validate", interrupted)
    with pytest.raises(SystemExit):
        train(given)
    assert steps(folder)[-1] == 3 and ranked(folder / "checkpoints", say)[0][1] != 3
    monkeypatch.setattr(Run, "validate", validate)
    train(given)
    assert [found[:2] for found in ranked(folder / "checkpoints", say)] == [(3.9, 3)]
    assert last_row(folder / "metrics.jsonl")["step"] == 6
    assert [row["val_loss"] for row in read_rows(folder / "metrics.jsonl")][:5] == [
        COURSE[step] for step in range(1, 6)
    ]


def test_another_metric_begins_to_count_anew(tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Run,
        "validate",
        lambda self: {
            name: {"full": {"loss": loss(self.state.step), "bits_per_byte": 1.0}}
            for name, loss in (("evaluation", lambda step: 3.0 + step), ("ema", lambda step: 3.0 - step))
        },
    )
    given = values(tiny_dataset, tmp_path / "r", patience=2) | {"optim": {"ema": 0.9}}
    train(given)
    assert last_row(tmp_path / "r" / "metrics.jsonl")["step"] == 3 and steps(tmp_path / "r") == [1, 3]
    train({"run_dir": str(tmp_path / "r"), "evaluation": {"metric": "ema_val_loss"}})
    assert last_row(tmp_path / "r" / "metrics.jsonl")["step"] == 8 and steps(tmp_path / "r") == [8]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"evaluation": {"patience": 2, "every": 0}}, "evaluation.patience: nothing is evaluated before the end"),
        ({"evaluation": {"metric": "ema_val_loss"}}, "set optim.ema"),
        ({"evaluation": {"metric": "loss"}}, "is not allowed"),
        ({"evaluation": {"min_delta": -1}}, "too small"),
    ],
)
def test_wrong_keys_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        resolve(build(RunConfig, {"device": "cpu", **changes}))


def test_the_objectives_loss_is_of_preference_data(tiny_dataset, tmp_path):
    with pytest.raises(UserError, match="only preference data have val_objective_loss, these are text"):
        resolved(tiny_values(tiny_dataset, tmp_path / "r", evaluation__metric="val_objective_loss"))


def test_the_plan_says_what_patience_does_to_the_schedules():
    plan = resolve(build(RunConfig, {"device": "cpu", "evaluation": {"patience": 3}}))
    assert "evaluations without a lower val_loss end the run; the schedules stay those of 1,000 steps" in render(plan)


def test_a_comparison_refuses_patience():
    from trainer.commands.compare.spec import CompareConfig, arms

    common = {"max_steps": 4, "evaluation": {"patience": 1}}
    with pytest.raises(UserError, match="not of equal compute"):
        arms(build(CompareConfig, {"common": common, "variants": {"a": {}, "b": {"optim": {"lr": 1e-3}}}}))


@pytest.mark.parametrize("wrong", [{"reference": [1]}, {"stale": -1}, {"metric": 3}, {"reference": [1, math.inf]}])
def test_a_state_that_no_run_can_have_is_damaged(tmp_path, wrong):
    state = {"step": 1, "position": 0, "tokens": 0, "seconds": 0.0, "n": 0.0, "k": 1, "norm": None}
    assert State.stored(state, tmp_path).stale == 0
    with pytest.raises(Damaged):
        State.stored(state | wrong, tmp_path)
