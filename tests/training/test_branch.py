"""`train --branch_from RUN@STEP`: a new run that begins where another one was."""

import pytest
import yaml
from conftest import tiny_values
from tiny_runs import losses, same, weights

from trainer.commands.train import resolved, run
from trainer.core.errors import UserError
from trainer.runs.metrics import read_rows


@pytest.fixture(scope="module")
def trunk(tiny_dataset, tmp_path_factory):
    """A run of 12 steps under the plain recipe at a constant learning rate, with its checkpoints of steps 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("trunk") / "run"
    optim = {"recipe": "plain", "schedule": "constant", "warmup_steps": 2}
    run(tiny_values(tiny_dataset, folder, optim=optim, checkpoint={"every": 4, "keep": 5}))
    return folder


def test_a_branch_without_changes_repeats_the_run_bit_for_bit(trunk, tmp_path):
    run({"branch_from": f"{trunk}@8", "run_dir": str(tmp_path / "r")})
    assert [row[:2] for row in losses(tmp_path / "r")] == [row[:2] for row in losses(trunk)][8:]
    assert same(weights(tmp_path / "r", 12), weights(trunk, 12))
    assert yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())["branch_from"] == f"{trunk}@8"


def test_a_run_cools_down_from_any_checkpoint(trunk, tmp_path):
    """The learning rate of a trapezoid: constant as before, then straight to the end, six steps after the branch."""
    wsd = {"schedule": "wsd", "decay_steps": 4, "final_lr_fraction": 0}
    run({"branch_from": f"{trunk}@4", "run_dir": str(tmp_path / "r"), "max_steps": 10, "optim": wsd})
    peak = read_rows(trunk / "metrics.jsonl")[-1]["lr"]
    rows = read_rows(tmp_path / "r" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [5, 6, 7, 8, 9, 10]
    assert [row["lr"] / peak for row in rows] == [pytest.approx(x) for x in (1, 1, 1, 0.75, 0.5, 0.25)]
    assert rows[0]["tokens"] == 5 * 512 and rows[-1]["val_loss"] is not None


def test_a_branch_that_was_killed_before_its_first_checkpoint_branches_again(trunk, tmp_path, capsys):
    values = {"branch_from": f"{trunk}@8", "run_dir": str(tmp_path / "r")}
    run(values)
    for path in sorted((tmp_path / "r" / "checkpoints").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    capsys.readouterr()
    run(values)
    assert "branching from" in capsys.readouterr().err
    assert same(weights(tmp_path / "r", 12), weights(trunk, 12))


def test_a_branch_goes_on_from_its_own_checkpoint(trunk, tmp_path, capsys):
    run({"branch_from": f"{trunk}@4", "run_dir": str(tmp_path / "r"), "max_steps": 8})
    capsys.readouterr()
    run({"run_dir": str(tmp_path / "r"), "max_steps": 12})
    said = capsys.readouterr().err
    assert f"going on from {tmp_path / 'r'}" in said and "branching" not in said
    assert same(weights(tmp_path / "r", 12), weights(trunk, 12))


def test_without_a_step_it_is_the_newest_one(trunk, tmp_path):
    config = resolved({"branch_from": str(trunk), "run_dir": str(tmp_path / "r"), "max_steps": 20})
    assert config.branch_from == f"{trunk}@12" and config.max_steps == 20 and config.optim.schedule == "constant"


@pytest.mark.parametrize(
    "values, words",
    [
        ({"run_dir": None}, "name its folder with --run_dir"),
        ({"branch_from": "{trunk}@5"}, "no checkpoint of step 5 (available: 4, 8, 12)"),
        ({"branch_from": "{trunk}/checkpoints@4"}, "is not a run's folder"),
        ({"max_steps": 8}, "max_steps: 8 is not beyond step 8"),
        ({"model": {"n_layers": 3}}, "branch_from: model.n_layers is 3"),
    ],
)
def test_a_branch_that_cannot_be_is_refused(trunk, tmp_path, values, words):
    given = {"branch_from": "{trunk}@8", "run_dir": str(tmp_path / "r"), "max_steps": 16, **values}
    given["branch_from"] = given["branch_from"].format(trunk=trunk)
    with pytest.raises(UserError) as error:
        run(given)
    assert words in str(error.value)
