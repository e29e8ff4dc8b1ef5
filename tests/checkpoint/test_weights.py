"""--weights: the mean of the last K checkpoints, the rule's own weights for evaluation, and their projection."""

import json
from pathlib import Path

import odd_model  # noqa: F401  # registers it
import pytest
import torch
from conftest import tiny_values
from safetensors.torch import load_file
from tiny_runs import weights

from trainer.checkpoint.weights import how_many
from trainer.commands import evaluate, export
from trainer.commands.train import run
from trainer.core.errors import UserError
from trainer.core.settings import build
from trainer.runs.opening import open_run

KEPT = {"max_steps": 5, "checkpoint__every": 1, "checkpoint__keep": 4, "optim__recipe": "hlb", "optim__lr": 1e-2}
SMALL = {"n_layers": 2, "d_model": 64, "n_heads": 2}


@pytest.fixture(scope="module")
def trained(tiny_dataset, tmp_path_factory) -> Path:
    """nGPT, whose weights are projected, with checkpoints of steps 2 to 5."""
    folder = tmp_path_factory.mktemp("weights") / "run"
    run(tiny_values(tiny_dataset, folder, model={"name": "ngpt", **SMALL}, **KEPT))
    return folder


def projected(name: str, matrix: torch.Tensor) -> torch.Tensor:
    """nGPT's projection."""
    if matrix.ndim < 2:
        return matrix
    return matrix / matrix.norm(dim=0 if "_out." in name else 1, keepdim=True)


@pytest.mark.parametrize("step, steps", [(None, (3, 4, 5)), (4, (2, 3, 4))])
def test_the_mean_of_the_last_checkpoints_is_projected(trained, tmp_path, capsys, step, steps):
    opened = open_run(str(trained), step, "cpu", "auto", weights="last-3")
    assert f"weights: the mean of the checkpoints of steps {', '.join(map(str, steps))}" in capsys.readouterr().err
    export.run(export.ExportConfig(run_dir=str(trained), step=step, out=str(tmp_path / "out"), weights="last-3"))
    exported, stored = load_file(tmp_path / "out" / "model.safetensors"), [weights(trained, at) for at in steps]
    for name, parameter in opened.model.named_parameters():
        mean = torch.stack([tensors[f"model.{name}"].double() for tensors in stored]).mean(0)
        # Two additions and a division in fp32, then the projection's sum of squares.
        torch.testing.assert_close(parameter.detach().double(), projected(name, mean), rtol=1e-6, atol=1e-7)
        assert torch.equal(exported[name], parameter.detach())
        if parameter.ndim == 2:
            assert not torch.allclose(projected(name, mean), mean, rtol=1e-6, atol=1e-7), "nothing was to be projected"
    assert opened.step == steps[-1]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["weights"] == "last-3"


def test_evaluate_says_what_it_evaluates(trained, capsys):
    values = {"run_dir": str(trained), "weights": "last-2", "protocol": "full"}
    evaluate.run(build(evaluate.EvaluateConfig, values))
    assert f"{trained}, step 5, weights last-2, validation split" in capsys.readouterr().out


def test_trained_weights_are_left_as_they_are(trained):
    opened, stored = open_run(str(trained), None, "cpu", "auto"), weights(trained, 5)
    assert all(torch.equal(p.detach(), stored[f"model.{name}"]) for name, p in opened.model.named_parameters())


def test_too_few_checkpoints(trained):
    with pytest.raises(
        UserError,
        match=r"^weights: last-5 needs 5 checkpoints, but .* keeps 4 up to step 5 \(2, 3, 4, 5\); .*checkpoint.keep,.*keep_every$",
    ):
        open_run(str(trained), None, "cpu", "auto", weights="last-5")
    with pytest.raises(UserError, match=r"keeps 1 up to step 2 \(2\)"):
        export.run(export.ExportConfig(run_dir=str(trained), step=2, weights="last-2"))


@pytest.mark.parametrize("wanted", ["last-0", "last", "last-", "5", "last-2x", ""])
def test_other_values_are_refused(wanted):
    with pytest.raises(UserError, match=r"^weights: '.*' is not known \(allowed: evaluation, ema, last-K"):
        how_many(wanted)


def test_a_damaged_checkpoint_is_not_averaged(tiny_dataset, tmp_path):
    run(tiny_values(tiny_dataset, tmp_path / "r", **KEPT | {"max_steps": 2}))
    file = next((tmp_path / "r" / "checkpoints" / "step-00000001").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="step-00000001.* bytes, .* expected"):
        open_run(str(tmp_path / "r"), None, "cpu", "auto", weights="last-2")


def test_a_rule_of_other_weights_is_projected_too_in_training_and_after(tiny_dataset, tmp_path):
    """schedule-free's averages of nGPT's unit vectors: they were evaluated, and exported, shorter than 1."""
    changes = KEPT | {"optim__name": "schedule-free", "optim__recipe": "plain", "max_steps": 3}
    run(tiny_values(tiny_dataset, tmp_path / "r", model={"name": "ngpt", **SMALL}, **changes))
    stored, opened = weights(tmp_path / "r", 3), open_run(str(tmp_path / "r"), None, "cpu", "auto")
    for name, parameter in opened.model.named_parameters():
        average = stored[f"evaluation.{name}"]
        torch.testing.assert_close(parameter.detach(), projected(name, average), rtol=1e-6, atol=1e-7)
    assert not torch.allclose(stored["evaluation.head.weight"].norm(dim=1), torch.tensor(1.0), atol=1e-5)
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    from trainer.inference.evaluation import validate
    from trainer.runtime.distributed import World

    found = validate(opened, opened.split(opened.config.data, "validation"), opened.config, World(), 3)
    assert rows[-1]["val_loss"] == pytest.approx(found["full"]["loss"], rel=1e-5)


def test_a_parameter_with_two_names_has_other_weights_under_both(tiny_dataset, tmp_path):
    """A checkpoint's second name had the trained weights."""
    changes = KEPT | {"optim__ema": 0.5, "optim__name": "schedule-free", "optim__recipe": "plain", "max_steps": 2}
    run(tiny_values(tiny_dataset, tmp_path / "r", model={"name": "odd", **SMALL}, **changes))
    for which in ("evaluation", "ema", "last-2"):
        model = open_run(str(tmp_path / "r"), None, "cpu", "auto", weights=which).model
        assert torch.equal(model.head.weight, model.embedding.weight), which
    stored = weights(tmp_path / "r", 2)
    assert torch.equal(stored["ema.head.weight"], stored["ema.embedding.weight"])
    assert torch.equal(stored["evaluation.head.weight"], stored["evaluation.embedding.weight"])


def test_a_projection_of_all_weights_at_once_is_refused(trained, monkeypatch):
    from models.ngpt import Ngpt

    monkeypatch.setattr(Ngpt, "post_step", lambda self: None)
    with pytest.raises(
        UserError, match="^weights: averages of this model need its post_step.*define projections in Ngpt"
    ):
        open_run(str(trained), None, "cpu", "auto", weights="last-2")
    open_run(str(trained), None, "cpu", "auto")
