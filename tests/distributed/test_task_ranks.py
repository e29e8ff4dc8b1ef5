"""Answers to tasks do not depend on the number of processes, nor on who holds which part of the model."""

import json

import pytest
from cases import matrix_values, run
from processes import forked_trainer
from task_files import write_tasks

from trainer.runs.metrics import read_rows

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"), 5)


def test_two_processes_find_what_one_finds(finished, folder):
    words = ["evaluate", finished, "--device", "cpu", "--tasks", "hellaswag,lambada,wsc273", "--tasks_dir", folder]
    words += ["--sequence_length", "200", "--json"]
    found = []
    for ranks in (None, 2):
        ended = forked_trainer(*words, ranks=ranks)
        assert ended.returncode == 0, ended.said
        [line] = ended.stdout.splitlines()
        report = json.loads(line)
        found.append({name: report[name] for name in ("tasks", "members", "centred_mean", "step")})
    assert found[0] == found[1] and found[0]["tasks"]["lambada_openai"]["documents"] == 5
    ended = forked_trainer(*words[:-1], "--tasks_limit", "1", "--tasks", "hellaswga", ranks=2)
    assert ended.returncode == 2 and len(ended.lines("error: ")) == 1, ended.said


def answered(dataset, folder, run_dir, strategy, ranks) -> dict:
    """The columns of the tasks after two steps of a run."""
    evaluation = {"tasks": ["piqa", "lambada", "copa"], "tasks_dir": str(folder), "max_tokens": 512}
    values = matrix_values(dataset, run_dir, "gpt2", strategy, max_steps=2, evaluation=evaluation)
    ended = run(values, ranks)
    assert ended.returncode == 0, ended.said
    row = read_rows(run_dir / "metrics.jsonl")[-1]
    return {name: value for name, value in row.items() if name.startswith("task_")}


def test_sharded_models_answer_as_whole_ones(tiny_dataset, folder, tmp_path):
    expected = answered(tiny_dataset, folder, tmp_path / "single", "single", 1)
    assert len(expected) == 2 + 2 + 1 + 1
    for strategy in ("ddp", "fsdp", "zero3"):
        found = answered(tiny_dataset, folder, tmp_path / strategy, strategy, 2)
        # Perplexities of some hundred; the weights differ by the roundings of two steps. Accuracies are equal.
        assert found == pytest.approx(expected, rel=1e-4), strategy
