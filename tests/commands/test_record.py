"""`record`: the page of a folder of comparisons, and what stays when their runs are gone. Nothing is trained here."""

import shutil
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT, tiny_values
from synthetic_runs import simple_comparison

from trainer.__main__ import dispatch
from trainer.commands.compare import command
from trainer.commands.compare.estimate import Estimate
from trainer.commands.compare.experiment import facts_of
from trainer.commands.compare.spec import arms
from trainer.commands.record import RecordConfig, read_specs
from trainer.core.errors import UserError
from trainer.core.files import read_json, sealed

SPEC = """
# A comparison.
common: {max_steps: 40}
variants: {gpt2: {model: {name: gpt2}}, llama: {model: {name: llama}}}
claims:
  "llama is better": {source: a paper, order: [llama, gpt2]}
"""


@pytest.fixture
def record(tmp_path, monkeypatch):
    """Call `record` on two specs: one comparison has a report, the other has no run."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "record"
    folder.mkdir()
    for name in ("first", "second"):
        (folder / f"{name}.yaml").write_text(SPEC)
    experiment = simple_comparison(tmp_path / "runs" / "first")
    claim = {"words": "llama is | better", "source": "a paper", "pairs": [["llama", "gpt2"]]}
    experiment.content["claims"] = [claim]
    dispatch(["report", str(experiment.write())])

    def call(*flags):
        dispatch(["record", str(folder), "--runs", str(tmp_path / "runs"), *flags])
        return (folder / "RECORD.md").read_text()

    return call


def test_the_page_has_claims_and_results_and_names_what_is_missing(record):
    page = record("--train", "false")
    assert "| llama is \\| better | a paper | llama - gpt2 -0.0997 nats" in page and "|   shown |" in page
    assert "## first" in page and "Not measured yet: [second](second.yaml)." in page
    rows = [line for line in page.splitlines() if line.startswith(("| gpt2 ", "| llama |"))]
    assert "- Data: fingerprint " in page and "; validation tokens " in page
    assert "baseline" in rows[0] and "better" in rows[1] and "sd, nats" in page
    assert "- Not judged yet: llama is better." in page, "the claim of the spec has other words"


def test_results_stay_when_the_runs_are_gone(record, tmp_path):
    page = record("--train", "false")
    assert "(first.svg)" in page and "<svg" in (tmp_path / "record" / "first.svg").read_text()
    shutil.rmtree(tmp_path / "runs")
    assert record("--train", "false") == page


def test_results_of_another_spec_are_told(record, tmp_path):
    """The digest of what the comparison asked for, against that of the spec beside the page."""
    path = tmp_path / "record" / "first.yaml"
    [(_, spec)] = [one for one in read_specs(path.parent, RecordConfig()) if one[0] == "first"]
    experiment = tmp_path / "runs" / "first" / "experiment.json"
    digest = facts_of(spec, "", [], arms(spec))["spec"]
    experiment.write_text(sealed(read_json(experiment) | {"spec": digest}))
    dispatch(["report", str(experiment.parent)])
    assert "The spec was changed since" not in record("--train", "false")
    assert "The spec was changed since" not in record("--train", "false", "--common.data.path", str(tmp_path))
    for before, after in (
        ("max_steps: 40", "max_steps: 41"),
        ("[llama, gpt2]", "[gpt2, llama]"),
        ("common:", "seeds: [1]\ncommon:"),
    ):
        path.write_text(SPEC.replace(before, after))
        assert "**The spec was changed since:**" in record("--train", "false")


def test_results_that_were_changed_are_refused(record, tmp_path):
    record("--train", "false")
    kept = tmp_path / "record" / "first.json"
    kept.write_text(kept.read_text().replace('"mean": 2.9', '"mean": 1.9'))
    shutil.rmtree(tmp_path / "runs")
    with pytest.raises(UserError, match=r"first\.json: .*was changed after it was written"):
        record("--train", "false")


def test_all_hours_are_said_before_anything_trains(record, tmp_path, monkeypatch, capsys):
    import contextlib

    said = []

    @contextlib.contextmanager
    def opened(config, known=None):
        said.append(("open", config.compare_dir, config.common["max_steps"], config.jobs, known))
        yield SimpleNamespace(
            slots=[{}, {}],
            experiment=SimpleNamespace(lengths={"lengths of": config.compare_dir}),
            estimate=lambda price: Estimate("| arm |", 12, 1.5),
            train=lambda: said.append("train"),
            left_out=list,
        )

    monkeypatch.setattr(command, "opened", opened)
    record("--price", "2", "--jobs", "2", "--common.max_steps", "7")
    shown = capsys.readouterr().out
    assert (
        "| in all     |           24 |  3.00 |" in shown and "1.50 hours with 2 at a time; 6.00 at 2 an hour" in shown
    )
    runs = str(tmp_path / "runs")
    first, second = (("open", f"{runs}/{name}", "7", 2, None) for name in ("first", "second"))
    sized = [(*one[:-1], {"lengths of": one[1]}) for one in (first, second)]
    assert said == [first, second, *sized, sized[0], "train", sized[1], "train"], "each is sized once"
    said.clear()
    record("--estimate")
    assert "train" not in said


@pytest.fixture
def mixed(tmp_path, tiny_dataset, monkeypatch):
    """Call `record` on a comparison with data between two without; what is not measured has a speed of 1,000 tokens a second."""
    monkeypatch.chdir(tmp_path)
    measured = []

    def speed(values, *_):
        measured.append(values["model"]["name"])
        return {"tokens_per_second": {"median": 1000}, "peak_memory_bytes": 0}

    monkeypatch.setattr("trainer.commands.compare.estimate.measure_speed", speed)
    folder = tmp_path / "record"
    folder.mkdir()
    common = tiny_values(tiny_dataset, "", batch__sequence_start=64, batch__sequence_double_every=0)
    del common["run_dir"], common["model"]
    for name, data in {"a": {"path": "gone"}, "b": {}, "c": {"path": "new", "source": "no-text"}}.items():
        values = yaml.safe_load(SPEC) | {"common": {**common, "data": common["data"] | data}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))

    def call(*flags):
        dispatch(["record", str(folder), "--runs", str(tmp_path / "runs"), *flags])

    return SimpleNamespace(call=call, folder=folder, measured=measured)


def test_comparisons_without_data_wait_and_the_others_go_on(mixed, tmp_path, monkeypatch, capsys):
    trained = []
    monkeypatch.setattr(
        "trainer.commands.compare.command.Work.train", lambda work: trained.append(work.experiment.folder.name)
    )
    for flags, trains in (["--estimate"], []), ([], ["b"]):
        with pytest.raises(UserError, match="^left out for want of data: a, c; the reasons are above"):
            mixed.call(*flags)
        assert trained == trains
        shown = capsys.readouterr().out
        assert "| a          |      no data |       |" in shown and "| in all     |           18 |" in shown
        assert "a waits for its data: baseline gpt2: no dataset at gone in " in shown
        assert "c waits for its data: baseline gpt2: no-text: no such file or folder" in shown
    assert set(mixed.measured) == {"gpt2", "llama"}
    assert (mixed.folder / "RECORD.md").exists()


def test_a_variant_that_is_left_out_is_told_at_the_end(mixed, monkeypatch):
    monkeypatch.setattr("trainer.commands.compare.command.Work.train", lambda work: None)
    for name in "ac":
        (mixed.folder / f"{name}.yaml").unlink()
    (mixed.folder / "d.yaml").write_text("base: b.yaml\nvariants: {llama: {model: {d_model: 512}}}\nbudget: parameters")
    for flags in ["--estimate"], []:
        with pytest.raises(UserError, match="^left out llama of d; the reasons are above"):
            mixed.call(*flags)
    spec = ["compare", str(mixed.folder / "d.yaml")]
    with pytest.raises(UserError, match="^left out: llama; .*report.md says why; the other variants are done"):
        dispatch(spec)


def test_a_wrong_key_in_the_last_spec_stops_before_any_speed_is_measured(mixed):
    for wrong, message in ("{d_modle: 3}", "d_modle"), ("{n_layers: two}", "n_layers"):
        (mixed.folder / "d.yaml").write_text(f"base: b.yaml\nvariants: {{gpt2: {{model: {wrong}}}}}")
        with pytest.raises(UserError, match=message):
            mixed.call("--estimate")
    assert not mixed.measured


def test_another_text_is_for_the_specs_that_name_one():
    """Data of the others are made in another way: from that text they would be something else."""
    config = RecordConfig(common={"data": {"source": "my-text"}})
    sources = {
        name: spec.common["data"].get("source") for name, spec in read_specs(ROOT / "configs" / "record", config)
    }
    without = {"patches", "patches-flops"}
    assert {name: None if name in without else "my-text" for name in sources} == sources
    folders = {}
    for _, spec in read_specs(ROOT / "configs" / "record", config):
        for data in (arm.values["data"] for arm in arms(spec) if "source" in arm.values["data"]):
            assert folders.setdefault(data["path"], data["tokenizer"]) == data["tokenizer"]


def test_a_folder_without_specs_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no spec of a comparison"):
        dispatch(["record", str(tmp_path)])


def test_the_record_of_this_project_is_what_its_results_say(tmp_path):
    """RECORD.md is the page of the results beside it."""
    folder = tmp_path / "record"
    shutil.copytree(ROOT / "configs" / "record", folder)
    dispatch(["record", str(folder), "--train", "false", "--runs", str(tmp_path)])
    assert (folder / "RECORD.md").read_text() == (ROOT / "configs" / "record" / "RECORD.md").read_text()
