"""`merge`: the merged run holds the weights that the rule gives, and is used like any run; what does not fit is one line."""

import json

import pytest
import torch
from conftest import tiny_values
from test_export import make_run

from trainer.checkpoint import format as checkpoint
from trainer.checkpoint.reader import Reader
from trainer.checkpoint.weights import read
from trainer.commands import evaluate, merge, train
from trainer.commands.evaluate import EvaluateConfig
from trainer.commands.merge import MergeConfig
from trainer.core.errors import UserError
from trainer.runs.opening import open_run


@pytest.fixture(scope="module")
def folder(tiny_dataset, tmp_path_factory):
    return make_run(tiny_dataset, tmp_path_factory.mktemp("merge") / "run", "ngpt")


def weights_of(run, step):
    path = run / "checkpoints" / checkpoint.step_name(step)
    stored = Reader(path).stored()
    return {name: read(Reader(path), name, *entry) for name, entry in stored.items() if name.startswith("model.")}


def test_a_mean_is_projected_and_used_like_a_run(folder, tmp_path, capsys):
    """nGPT's matrices have rows of length 1; a mean of unit vectors is shorter."""
    out = tmp_path / "merged"
    merge.run(MergeConfig(runs=[f"{folder}@3", f"{folder}@5"], out=str(out), proportions=[1.0, 3.0]))
    assert "2 runs, merged (linear)" in capsys.readouterr().err
    merged, a, b = weights_of(out, 3), weights_of(folder, 3), weights_of(folder, 5)
    name = "model.embedding.weight"
    mean = (a[name] + 3 * b[name]) / 4
    torch.testing.assert_close(merged[name], mean / mean.norm(dim=-1, keepdim=True))
    opened = open_run(str(out), None, "cpu", "auto")
    torch.testing.assert_close(opened.model.state_dict()["embedding.weight"], merged[name], rtol=0, atol=0)
    evaluate.run(EvaluateConfig(run_dir=str(out), protocol="full"), True)
    assert json.loads(capsys.readouterr().out)["full"]["loss"] > 0


def test_training_begins_with_it_but_does_not_go_on(folder, tiny_dataset, tmp_path):
    out = tmp_path / "merged"
    merge.run(MergeConfig(runs=[f"{folder}@3", f"{folder}@5"], out=str(out), method="slerp"))
    with pytest.raises(UserError, match="holds merged weights, without an optimizer's state.*--init_from"):
        train.run({"run_dir": str(out), "max_steps": 9})
    child = tmp_path / "child"
    values = tiny_values(tiny_dataset, child, model={"name": "ngpt"}, max_steps=1, log__demo_tokens=0)
    values.pop("model_scale")
    train.run({**values, "init_from": str(out)})
    assert (child / "metrics.jsonl").read_text()


def test_a_task_taken_from_its_base_is_that_run(folder, tmp_path):
    """base + (B - base) = B, to the rounding of two sums; ties with density 1 of one run likewise."""
    b = weights_of(folder, 5)
    for method, more in (("task", {}), ("ties", {"density": 1.0})):
        out = tmp_path / method
        merge.run(MergeConfig(runs=[f"{folder}@5"], base=f"{folder}@3", method=method, out=str(out), **more))
        for name, tensor in weights_of(out, 5).items():
            torch.testing.assert_close(tensor, b[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"out": None}, "out: name the folder"),
        ({"runs": ["RUN"]}, "linear takes at least 2; 1 given"),
        ({"runs": ["RUN"] * 3, "method": "slerp"}, "slerp takes exactly two; 3 given"),
        ({"method": "ties"}, "ties adds changes to a base; give the run that all began with"),
        ({"base": "RUN"}, "linear has no base; leave it out"),
        ({"proportions": [1.0]}, "1 given for 2 runs"),
        ({"proportions": [1.0, -1.0]}, "not negative"),
        ({"method": "slerp", "proportions": [1.0, 1.0]}, "slerp has slerp_t instead"),
        ({"runs": ["RUN@4", "RUN"]}, "has no checkpoint of step 4"),
        ({"out": "RUN"}, "exists already"),
        ({"runs": ["RUN", "OTHER"]}, "are of different models"),
    ],
)
def test_what_does_not_fit_is_one_line(folder, tiny_dataset, tmp_path, changes, line):
    other = tmp_path / "other"
    if "OTHER" in str(changes):
        make_run(tiny_dataset, other, "gpt2")

    def named(value):
        if isinstance(value, list):
            return [named(part) for part in value]
        return value.replace("RUN", str(folder)).replace("OTHER", str(other)) if isinstance(value, str) else value

    values = {"runs": ["RUN@3", "RUN@5"], "out": str(tmp_path / "out")} | changes
    with pytest.raises(UserError, match=line):
        merge.run(MergeConfig(**{key: named(value) for key, value in values.items()}))
    assert not (tmp_path / "out").exists()
