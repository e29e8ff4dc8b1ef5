"""Runs that earlier releases made go on as they did there: no change of a format may strand a run."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT

from trainer.commands import export
from trainer.commands.train import run
from trainer.core.config import DataConfig
from trainer.inference import decoding as generate
from trainer.inference.evaluation import validate
from trainer.runs.metrics import read_rows
from trainer.runs.opening import open_run
from trainer.runtime.distributed import World

FROZEN = sorted(path for path in (ROOT / "tests" / "frozen").iterdir() if (path / "expected.json").is_file())
# Sums in another order on other processors: fp32, a step after the other.
SAME = {"rel": 1e-4}


@pytest.fixture(params=FROZEN, ids=lambda path: path.name)
def frozen(request, tmp_path, monkeypatch) -> tuple[Path, dict]:
    """A copy of the folder, which is the current one as it was when the run was made, and what that release made of it."""
    shutil.copytree(request.param, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run", json.loads((tmp_path / "expected.json").read_text())


def test_there_are_frozen_runs():
    assert FROZEN


def test_it_is_evaluated_and_written_from_as_then(frozen, capsys):
    folder, expected = frozen
    opened = open_run(str(folder), None, "cpu", "auto")
    opened.config.evaluation.protocol = "both"
    found = validate(opened, opened.split(DataConfig(path="data"), "validation"), opened.config, World(), opened.step)
    for protocol in ("full", "hlb"):
        for key, value in expected["evaluate"][protocol].items():
            assert found[protocol][key] == pytest.approx(value, **SAME), (protocol, key)
    text = generate.complete(opened, opened.tokenizer, ["the"], 12, [], temperature=0.0)
    assert "the" + text[0] + "\n" == expected["text"]


def test_it_goes_on_as_then(frozen, capsys, monkeypatch):
    folder, expected = frozen
    # Absolute in later releases, and moved here.
    run({"run_dir": str(folder), "max_steps": 16, "data": {"path": "data"}})
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["step"] > 8]
    timed = {"tokens_per_second", "seconds", "mfu"}
    for row, then in zip(rows, expected["rows"], strict=True):
        if "microbatch_steps" in then:  # its name up to 0.2.0
            then["batch_multiplier"] = then.pop("microbatch_steps")
        for key in then.keys() - timed:
            assert row[key] == (then[key] if then[key] is None else pytest.approx(then[key], **SAME)), (
                then["step"],
                key,
            )
    # What this release wrote on top is read like any run of its own. (Its validation needs no 153,600 tokens once more.)
    monkeypatch.setattr("trainer.recipes.hlb.EVALUATION_TOKENS", 4 * 1024)
    run({"run_dir": str(folder), "max_steps": 17})
    assert "step 16 of 17" in capsys.readouterr().err


def test_it_is_exported(frozen):
    from safetensors import safe_open

    folder, _ = frozen
    export.run(export.ExportConfig(run_dir=str(folder), out=str(folder / "out")))
    with safe_open(folder / "out" / "model.safetensors", "pt") as file:
        assert len(list(file.keys())) > 5
