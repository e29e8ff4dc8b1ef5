"""The moving average of the weights (optim.ema): its arithmetic, its place in a run, and what reads it."""

import json

import pytest
import torch
from conftest import beyond, tiny_values
from safetensors.torch import load_file
from tiny_runs import losses, make, same, weights

from models.base import cross_entropy, get_model, load_models
from trainer.checkpoint import format as checkpoint
from trainer.commands import evaluate, export, generate
from trainer.commands.train import run
from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import build
from trainer.optim import narrow_state
from trainer.optim.ema import WeightAverage
from trainer.planning.plan import render, resolve
from trainer.runs.metrics import read_rows
from trainer.runs.opening import open_run
from trainer.runtime.distributed import World
from trainer.testing.strategies import engine_of, group_of_one, losses_of
from trainer.testing.subject import Subject
from trainer.training.step import optimiser_step

load_models()
ONE, ZERO = torch.tensor(1.0), torch.tensor(0.0)
AVERAGED = {"optim__ema": 0.3, "optim__lr": 1e-2, "optim__recipe": "hlb", "checkpoint__every": 2, "checkpoint__keep": 9}
# Each step rounds three numbers, none larger than the weights by much, to fp32: three steps are off by 9 * 2^-24 of them.
SAME = {"rtol": 2**-20, "atol": 2**-20}


def by_hand(decay: float, start: torch.Tensor, later: list[torch.Tensor]) -> torch.Tensor:
    average = start.double()
    for t, weight in enumerate(later):
        d = min(decay, (1 + t) / (10 + t))
        average = d * average + (1 - d) * weight.double()
    return average


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.05, 0.15, 0.9999])  # reached at once, after two steps, and not at all
def test_three_updates_by_hand(monkeypatch, kind, decay):
    monkeypatch.setitem(
        narrow_state.PIECE, "cpu", 64
    )  # a matrix in several pieces, one by columns, a shard without numbers
    draw = torch.Generator().manual_seed(0)
    shapes = {"matrix": (13, 17), "none": (0, 3), "scalar": ()}
    steps = [{n: torch.randn(s, generator=draw).to(kind) for n, s in shapes.items()} for _ in range(4)]
    for step in steps:
        step["columns"] = torch.randn(5, 11, generator=draw).to(kind).t()
    average = WeightAverage(steps[0], decay, torch.device("cpu"))
    for step in steps[1:]:
        average.update(step, ONE)
    assert average.updates == 3
    for name, found in average.averages.items():
        assert found.dtype == torch.float32
        expected = by_hand(decay, steps[0][name], [step[name] for step in steps[1:]])
        torch.testing.assert_close(found.double(), expected, **SAME)


def test_an_average_of_bf16_weights_moves_by_less_than_they_can():
    """From 1 towards 1 + 2^-7, the next number of bf16, by a thousandth of the way after each of 20 updates beyond the warm-up."""
    average = WeightAverage({"w": torch.ones(3, dtype=torch.bfloat16)}, 0.999, torch.device("cpu"))
    average.updates.fill_(1e6)
    for _ in range(20):
        average.update({"w": torch.full((3,), 1 + 2**-7, dtype=torch.bfloat16)}, ONE)
    torch.testing.assert_close(
        average.averages["w"], torch.full((3,), 1 + 2**-7 * (1 - 0.999**20)), rtol=20 * 2**-24, atol=0
    )


def test_the_average_in_an_engine_is_that_of_its_weights():
    with engine_of(Subject("gpt2", get_model("gpt2")), "single", optim={"ema": 0.15, "lr": 1e-2}) as engine:
        subject, seen = Subject("gpt2", get_model("gpt2")), []
        for step in range(4):
            seen.append({name: parameter.detach().clone() for name, parameter in engine.local.items()})
            if step < 3:
                losses_of(engine, subject, step, 1)
        stored = engine.tensors()
    for name, start in seen[0].items():
        expected = by_hand(0.15, start, [step[name] for step in seen[1:]])
        torch.testing.assert_close(stored[f"ema.{name}"].double(), expected, **SAME)
        assert not torch.equal(stored[f"ema.{name}"], seen[-1][name])


def test_a_step_that_is_not_finite_changes_nothing(tiny_dataset, tmp_path):
    one = make(tiny_dataset, tmp_path / "r", **AVERAGED)
    optimiser_step(one)
    before = {name: tensor.clone() for name, tensor in one.engine.tensors().items()}
    handle = next(iter(one.model.parameters())).register_hook(lambda gradient: gradient * float("nan"))
    assert not optimiser_step(one).finite
    assert same(one.engine.tensors(), before)
    handle.remove()
    assert optimiser_step(one).finite
    assert one.engine.average.updates == 2
    assert not torch.equal(one.engine.tensors()["ema.embedding.weight"], before["ema.embedding.weight"])


@pytest.mark.parametrize(
    "model, strategy, offload",
    beyond(
        [("ngpt", "fsdp", False)],
        [(m, s, o) for m in ("gpt2", "ngpt") for s, o in (("ddp", False), ("fsdp", False), ("fsdp", True))],
        several=True,
    ),
)
def test_other_strategies_average_evaluate_and_go_on(tmp_path, model, strategy, offload):
    """The average and its loss are those of one device. Training goes on after an evaluation as without, and from a checkpoint of
    one device; what is saved then is what was loaded. (tests/distributed/test_ema_strategies.py: of several processes, and ZeRO.)"""
    subject, found, keep = Subject(model, get_model(model)), {}, checkpoint.retention(1, 0)
    changes = {"optim": {"ema": 0.5, "lr": 1e-2}}
    with group_of_one():
        for kind in ("single", strategy):
            engine = {"engine": {"strategy": kind, "offload": offload and kind != "single"}}
            with engine_of(subject, kind, **changes, **engine) as one:
                losses_of(one, subject, 0, 2)
                saved = whole(one.tensors())
                path = checkpoint.save(tmp_path / kind, 2, one.tensors(), {}, World(), keep)
                with torch.no_grad(), one.evaluating("ema"):
                    mean = cross_entropy(one.predict(subject.tokens), subject.targets).item()
                    held = {name: parameter.detach().clone() for name, parameter in one.local.items()}
                after = whole(one.tensors())
                found[kind] = {"saved": saved, "path": path, "loss": mean, "held": held}
                assert same(after, saved)
                found[kind]["went on"] = losses_of(one, subject, 2, 2)
        with engine_of(subject, strategy, seed=1, **changes, **engine) as one:
            one.load(found["single"]["path"])
            assert same(whole(one.tensors()), found["single"]["saved"])
        with engine_of(subject, strategy, seed=1, **changes, **engine) as one:
            one.load(found[strategy]["path"])
            assert losses_of(one, subject, 2, 2) == found[strategy]["went on"]
    ours, alone = found[strategy], found["single"]
    assert ours["saved"].keys() == alone["saved"].keys()
    for name, tensor in alone["saved"].items():
        if name.startswith("ema"):
            torch.testing.assert_close(ours["saved"][name], tensor, rtol=1e-5, atol=1e-5)  # sums in another order
    assert ours["loss"] == pytest.approx(alone["loss"], rel=1e-5) and ours["loss"] != alone["went on"][0]
    if model == "ngpt":
        assert_on_sphere(ours["held"])
        assert not torch.allclose(alone["saved"]["ema.head.weight"].norm(dim=1), torch.tensor(1.0), atol=1e-5)


def whole(tensors: dict) -> dict:
    return {k: (v.full_tensor() if hasattr(v, "full_tensor") else v).detach().clone() for k, v in tensors.items()}


def assert_on_sphere(tensors: dict) -> None:
    matrices = {name: tensor for name, tensor in tensors.items() if tensor.ndim == 2}
    assert matrices
    for name, matrix in matrices.items():
        norms = matrix.norm(dim=0 if "_out" in name else 1)
        assert torch.allclose(norms, torch.ones_like(norms), atol=1e-5), name


@pytest.fixture(scope="module")
def trained(tiny_dataset, tmp_path_factory):
    """Six steps with an average, in one go, with checkpoints of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("ema") / "straight"
    run(tiny_values(tiny_dataset, folder, max_steps=6, evaluation__every=2, **AVERAGED))
    return folder


def test_a_run_goes_on_bit_for_bit(tiny_dataset, tmp_path, trained):
    run(tiny_values(tiny_dataset, tmp_path / "cut", max_steps=4, evaluation__every=2, **AVERAGED))
    run({"run_dir": str(tmp_path / "cut"), "max_steps": 6})
    assert losses(tmp_path / "cut") == losses(trained)
    found, expected = weights(tmp_path / "cut", 6), weights(trained, 6)
    assert same(found, expected) and found["ema_updates"] == 6
    rows, straight = (read_rows(folder / "metrics.jsonl") for folder in (tmp_path / "cut", trained))
    assert rows[-1]["ema_val_loss"] == straight[-1]["ema_val_loss"]
    run(
        {
            **tiny_values(tiny_dataset, tmp_path / "branch", max_steps=5, evaluation__every=2, **AVERAGED),
            "branch_from": f"{trained}@4",
        }
    )
    assert weights(tmp_path / "branch", 5)["ema_updates"] == 5


def test_rows_and_console_have_both_losses(tiny_dataset, tmp_path, capsys):
    values = tiny_values(tiny_dataset, tmp_path / "r", max_steps=3, evaluation__every=2, **AVERAGED)
    values["log"]["console"] = "table"
    run(values)
    rows = read_rows(tmp_path / "r" / "metrics.jsonl")
    assert [("ema_val_loss" in row, row["val_loss"] is not None) for row in rows] == [
        (False,) * 2,
        (True,) * 2,
        (True,) * 2,
    ]
    assert rows[-1]["ema_val_loss"] != rows[-1]["val_loss"]
    told = capsys.readouterr().err
    figures = (
        f"validation loss of the moving average {rows[-1]['ema_val_loss']:.4f}, {rows[-1]['ema_val_bits_per_byte']:.4f}"
    )
    assert f"step 3: {figures} bits/byte\n" in told and f"bits/byte; {figures} bits/byte\n" in told
    assert (tmp_path / "r" / "curves.png").stat().st_size > 0


def test_verbs_read_the_average(trained, tmp_path, capsys):
    stored = weights(trained, 6)
    row = read_rows(trained / "metrics.jsonl")[-1]
    evaluate.run(build(evaluate.EvaluateConfig, {"run_dir": str(trained), "weights": "ema", "protocol": "full"}), True)
    told = json.loads(capsys.readouterr().out)
    assert told["weights"] == "ema" and told["full"]["loss"] == pytest.approx(row["ema_val_loss"], rel=1e-5)
    assert told["full"]["loss"] != pytest.approx(row["val_loss"], rel=1e-5)
    export.run(export.ExportConfig(run_dir=str(trained), out=str(tmp_path / "out"), weights="ema"))
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, stored[f"ema.{name}"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["weights"] == "ema"
    generate.run(
        build(
            generate.GenerateConfig, {"run_dir": str(trained), "weights": "ema", "prompt": ["a"], "max_new_tokens": 4}
        )
    )
    assert capsys.readouterr().out.startswith("a")


def test_it_can_be_switched_on_and_off_and_the_run_says_so(tiny_dataset, tmp_path, capsys):
    folder = tmp_path / "r"
    run(tiny_values(tiny_dataset, folder, max_steps=2, **AVERAGED | {"optim__ema": 0.0}))
    run({"run_dir": str(folder), "max_steps": 4, "optim": {"ema": 0.9}})
    told = capsys.readouterr().err
    path = folder / "checkpoints" / "step-00000002"
    assert f"optim.ema: {path} holds no moving average; it begins at the weights of that checkpoint" in told
    assert weights(folder, 4)["ema_updates"] == 2 and "ema_updates" not in weights(folder, 2)
    with pytest.raises(UserError, match="^weights: .*step-00000002 holds no moving average; only runs with optim.ema"):
        open_run(str(folder), 2, "cpu", "auto", weights="ema")
    run({"run_dir": str(folder), "max_steps": 6, "optim": {"ema": 0.0}})
    assert "optim.ema: is 0; the moving average that " in capsys.readouterr().err
    assert not any(name.startswith("ema") for name in weights(folder, 6))


def test_the_plan_names_it_and_counts_it():
    plan = resolve(build(RunConfig, {"device": "cpu", "model_scale": 0.02, "optim": {"ema": 0.999}}))
    line = next(line for line in render(plan).splitlines() if line.startswith("optim.ema"))
    assert line.split()[1:3] == ["0.999", "set;"] and "min(ema, (1 + t) / (10 + t))" in line
    with pytest.raises(UserError, match=r"^optim.ema: 1.0 is too large; it must be below 1$"):
        build(RunConfig, {"optim": {"ema": 1.0}})
