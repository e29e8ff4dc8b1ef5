"""Tasks and metrics of plug-ins in the loop: when, where their figures go, and that a run survives them."""

import json
import os
import signal

import pytest
import torch
from conftest import ROOT, tiny_values
from task_files import write_tasks
from tiny_runs import same, weights

from trainer.commands import evaluate
from trainer.commands.plugins import import_plugin
from trainer.core.errors import UserError
from trainer.inference import metrics, register_metric
from trainer.inference.tasks import scoring
from trainer.inference.tasks.suite import Suite
from trainer.runs.metrics import read_rows
from trainer.runs.opening import open_run
from trainer.runtime.distributed import World
from trainer.training.start import start

needs_lm_eval = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("lm_eval") is None, reason="needs the extra lm-eval"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(metrics, "METRICS", {})


def values(dataset, run_dir, folder, **changes) -> dict:
    more = {"tasks": ["piqa", "copa"], "tasks_dir": str(folder), "tasks_every": 3, "every": 4, "tasks_limit": 2}
    evaluation = {"max_tokens": 512, "sequence_length": 64, **more, **changes}
    return tiny_values(dataset, run_dir, max_steps=7, evaluation=evaluation, checkpoint__every=7)


@needs_lm_eval
def test_tasks_are_answered_as_often_as_asked_and_training_is_as_without(tiny_dataset, folder, tmp_path, capfd):
    start(values(tiny_dataset, tmp_path / "with", folder))
    rows = read_rows(tmp_path / "with" / "metrics.jsonl")
    column = "task_piqa_acc_norm"
    assert [row["step"] for row in rows if column in row] == [3, 6, 7]
    assert [row["step"] for row in rows if row["val_loss"] is not None] == [3, 4, 6, 7]
    names = {name for name in rows[-1] if name.startswith("task_")}
    assert names == {column, "task_piqa_acc", "task_copa_acc", "task_centred_mean"}
    said = capfd.readouterr().err
    assert f"step 3: piqa acc {rows[2]['task_piqa_acc']:.4f} ± " in said and "; centred mean " in said
    records = [json.loads(file.read_text()) for file in sorted((tmp_path / "with" / "evaluation").glob("*.json"))]
    assert [record["step"] for record in records] == [3, 6, 7]
    assert records[-1]["tasks"]["piqa"]["acc_norm"] == rows[-1][column]
    # The figures are those of the checkpoint.
    opened = open_run(str(tmp_path / "with"), None, "cpu", "fp32")
    again = Suite(["piqa"], str(folder), 2, None).evaluate(opened, opened.tokenizer, 64, World())
    assert again["tasks"]["piqa"]["acc_norm"] == rows[-1][column]
    start(values(tiny_dataset, tmp_path / "without", folder, tasks=[]))
    assert same(weights(tmp_path / "with", 7), weights(tmp_path / "without", 7))
    assert not (tmp_path / "without" / "evaluation").exists()


@needs_lm_eval
def test_a_run_that_is_stopped_among_the_tasks_answers_them_when_it_goes_on(
    tiny_dataset, folder, tmp_path, monkeypatch
):
    """The row of that step is written once, with all figures, as in a run that was not stopped."""
    monkeypatch.setitem(scoring.BATCH_TOKENS, "cpu", 1)
    score, count = scoring.score, iter(range(1000))

    def striking(*words):
        if next(count) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return score(*words)

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "score", striking)
        with pytest.raises(SystemExit):
            start(values(tiny_dataset, tmp_path / "stopped", folder))
    assert next(count) < 8, "the tasks go on"
    assert [row["step"] for row in read_rows(tmp_path / "stopped" / "metrics.jsonl")] == [1, 2]
    start({"run_dir": str(tmp_path / "stopped")})
    start(values(tiny_dataset, tmp_path / "calm", folder))
    one, two = (
        [
            {key: value for key, value in row.items() if key.startswith(("step", "loss", "val", "task"))}
            for row in read_rows(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("stopped", "calm")
    )
    assert one == two and [row["step"] for row in one if "task_piqa_acc" in row] == [3, 6, 7]


@needs_lm_eval
@pytest.mark.parametrize(
    "changes, line",
    [
        ({"tasks": ["piqua"]}, "^tasks: there is no task 'piqua'; did you mean piqa\\?"),
        ({"tasks_dir": "/nowhere"}, "^tasks_dir: /nowhere is not a folder"),
        ({"sequence_length": 2}, "^evaluation.sequence_length: 2 tokens are too few for the tasks"),
        ({"metrics": ["median"]}, "^evaluation.metrics: no metric 'median' is registered \\(there are: none\\)"),
    ],
)
def test_a_wrong_name_is_told_before_training(tiny_dataset, folder, tmp_path, registry, changes, line):
    with pytest.raises(UserError, match=line):
        start(values(tiny_dataset, tmp_path / "r", folder, **changes))
    assert not (tmp_path / "r" / "config.yaml").exists()


# -- metrics of plug-ins -------------------------------------------------------------------------------------------------


def guide_example() -> str:
    """The metric in trainer/inference/README.md."""
    text = (ROOT / "trainer" / "inference" / "README.md").read_text(encoding="utf-8")
    return text.split("### Metrics of your own")[1].split("```python\n", 1)[1].split("```", 1)[0]


def test_the_guides_metric_is_measured_at_each_evaluation(tiny_dataset, folder, tmp_path, registry, capfd):
    (tmp_path / "repetition.py").write_text(guide_example())
    import_plugin(str(tmp_path / "repetition.py"))
    start(values(tiny_dataset, tmp_path / "r", folder, tasks=[], metrics=["repetition"]))
    rows = read_rows(tmp_path / "r" / "metrics.jsonl")
    measured = [row["step"] for row in rows if "metric_repetition" in row]
    assert measured == [4, 7] and 0 <= rows[-1]["metric_repetition"] <= 1
    assert f"step 7: metric_repetition {rows[-1]['metric_repetition']:.4f}" in capfd.readouterr().err
    config = evaluate.EvaluateConfig(run_dir=str(tmp_path / "r"), device="cpu", metrics=["repetition"])
    evaluate.run(config, True)
    report = json.loads(capfd.readouterr().out)
    assert report["metrics"] == {"metric_repetition": pytest.approx(rows[-1]["metric_repetition"], rel=1e-5)}


RESULTS = {
    "nan": (float("nan"), "metric_m is nan, and a metric must be a finite number"),
    "key": ({"a": 1.0, "b": float("inf")}, "metric_m_b is inf"),
    "text": ("0.5", "metric_m is str, and a metric is a number or a dict of numbers"),
    "tensor": (torch.zeros(1), "metric_m is Tensor, .*; a tensor's number is its item\\(\\)"),
    "none": (None, "metric_m is NoneType"),
    "bool": (True, "metric_m is bool"),
}


@pytest.mark.parametrize("kind", RESULTS)
def test_a_metric_that_gives_no_number_is_named(finished, registry, kind):
    result, line = RESULTS[kind]
    register_metric("m")(lambda measured: result)
    opened = open_run(str(finished), None, "cpu", "auto")
    with pytest.raises(UserError, match=f"^metric m: {line}"):
        metrics.measure("m", metrics.Measured(opened, opened.tokenizer, 3, World(), print))


def test_a_metric_that_fails_does_not_end_the_run(tiny_dataset, folder, tmp_path, registry, capfd):
    @register_metric("broken")
    def broken(measured):
        raise ValueError("no such layer")

    @register_metric("several")
    def several(measured):
        assert not (measured.runner.model.training or torch.is_grad_enabled())
        return {"step": measured.step, "half": 0.5}

    start(values(tiny_dataset, tmp_path / "r", folder, tasks=[], metrics=["broken,several"]))
    row = read_rows(tmp_path / "r" / "metrics.jsonl")[-1]
    assert (row["metric_several_step"], row["metric_several_half"]) == (7.0, 0.5) and "metric_broken" not in row
    said = capfd.readouterr().err
    assert said.count("metric broken: ValueError: no such layer; it is left out") == 2
    with pytest.raises(ValueError, match="metric name 'several' is taken by "):
        register_metric("several")(lambda measured: 0)
