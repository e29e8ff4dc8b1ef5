"""A run with `dial`: it ends with how far it is from the expected loss, and goes on without the file."""

import json

import numpy as np
import pytest
from law_files import laws, laws_file, values

from trainer.commands.report.run_tables import expected_row
from trainer.commands.report.series import read_columns
from trainer.core.errors import UserError
from trainer.planning.laws import LAWS
from trainer.runs.metrics import last_row, read_rows
from trainer.training.start import start


def test_a_run_says_how_far_it_is_from_the_expected_loss(tiny_dataset, tmp_path, capsys):
    path, run = laws_file(tiny_dataset, tmp_path), tmp_path / "run"
    given = values(tiny_dataset, run, dial=str(path))
    start(given, as_json=True)
    out = capsys.readouterr()
    *before, row = read_rows(run / "metrics.jsonl")
    expected, low, high = (row[key] for key in ("expected_val_loss", "expected_low", "expected_high"))
    assert low < expected < high and not any("expected_val_loss" in one for one in before)
    told = json.loads(out.out.splitlines()[-1])
    assert told["off_expected"] == pytest.approx(row["val_loss"] - expected)
    assert told["inside_interval"] == (low <= row["val_loss"] <= high)
    place = "inside" if told["inside_interval"] else "outside"
    text = out.out + out.err
    assert f"measured {row['val_loss']:.4f}, {told['off_expected']:+.4f} nats, {place} the interval" in text
    assert f"expected loss {expected:.4f}, 90% between" in text

    (shown,) = expected_row(read_columns(run / "metrics.jsonl"))
    assert shown[:3] == ["validation loss", f"{expected:.4f}", f"{row['val_loss']:.4f}"] and shown[3].endswith(place)
    assert expected_row({"val_loss": np.array([3.0])}) == []

    assert (run / LAWS).read_text() == path.read_text()
    path.unlink()
    start({"run_dir": str(run), "max_steps": 6})  # with another length, another loss is expected
    further = last_row(run / "metrics.jsonl")
    assert (further["step"], further["lr"] > 0) == (6, True) and further["expected_val_loss"] < expected
    start({**given, "max_steps": 7})  # the command of the beginning, whose file is gone
    assert last_row(run / "metrics.jsonl")["expected_val_loss"] < further["expected_val_loss"]

    path.write_text(laws(tiny_dataset, run, data="elsewhere").text())
    with pytest.raises(UserError, match="^dial: .* was started with .*, now it is"):
        start({**given, "max_steps": 8})
    (run / LAWS).write_text("nothing")
    capsys.readouterr()
    start({"run_dir": str(run), "max_steps": 8})  # a copy that is lost takes no run with it
    assert "expected loss  unknown" in "".join(capsys.readouterr()) and last_row(run / "metrics.jsonl")["step"] == 8
    assert "expected_val_loss" not in last_row(run / "metrics.jsonl")


def test_a_branch_has_no_expected_loss(tiny_dataset, tmp_path):
    path, run = laws_file(tiny_dataset, tmp_path), tmp_path / "run"
    start(values(tiny_dataset, run, dial=str(path)))
    branch = {"run_dir": str(tmp_path / "branch"), "branch_from": str(run), "max_steps": 5}
    with pytest.raises(UserError, match="^dial: a branch goes on with"):
        start({**branch, "dial": str(path)})
    start(branch)
    assert "expected_val_loss" not in last_row(tmp_path / "branch" / "metrics.jsonl")
    assert not (tmp_path / "branch" / LAWS).exists()
