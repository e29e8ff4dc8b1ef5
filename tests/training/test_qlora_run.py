"""Runs with LoRA on a base in 4 bits (QLoRA): `--init_from PARENT --model.lora_rank R --model.lora_base nf4`."""

import dataclasses
import json
import shutil

import pytest
import torch
from conftest import tiny_values
from tiny_runs import WORLD, losses, same, weights

from models.layers.quantized import unpack
from models.lora import factors_of, is_factor
from models.quantization import packed_layers
from trainer.checkpoint import format as checkpoint
from trainer.checkpoint.weights import choose_weights
from trainer.commands import export
from trainer.commands.evaluate import EvaluateConfig
from trainer.commands.evaluate import run as evaluate
from trainer.commands.export import ExportConfig
from trainer.commands.train import run
from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import build
from trainer.data.stream import find_dataset
from trainer.planning.memory import MemoryEstimate, ParallelLayout
from trainer.planning.parent import with_origin
from trainer.planning.plan import resolve
from trainer.runs.opening import open_run
from trainer.runtime.signals import StopSignals
from trainer.runtime.watchdog import Watchdog
from trainer.training.run import Run
from trainer.training.step import optimiser_step

GPT2 = {"name": "gpt2", "n_layers": 2, "d_model": 32, "n_heads": 2}
LORA = {"lora_rank": 4, "lora_alpha": 16}
MATRICES = 2 * 12 * 32**2
PACKED = (".packed", ".scales", ".scales_of_scales", ".offset")


@pytest.fixture(autouse=True, scope="module")
def needs_bitsandbytes():
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (the extra quantize)")


@pytest.fixture(scope="module")
def parent(tiny_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parent") / "run"
    run(tiny_values(tiny_dataset, folder, model=GPT2, max_steps=4, optim={"lr": 1e-2}))
    return folder


def child(dataset, folder, parent, base="nf4", **changes) -> dict:
    model = {**LORA, "lora_base": base}
    values = {"init_from": str(parent), "max_steps": 4, "model": model, "checkpoint": {"every": 2, "keep": 5}}
    values = tiny_values(dataset, folder, **values, **changes)
    del values["model_scale"]
    return values


@pytest.fixture(scope="module")
def tuned(tiny_dataset, tmp_path_factory, parent):
    folder = tmp_path_factory.mktemp("tuned") / "run"
    run(child(tiny_dataset, folder, parent))
    return folder


def built(values) -> Run:
    config = build(RunConfig, with_origin(values, None, 1, WORLD.say))
    dataset = find_dataset(config.data)
    one = Run(resolve(config, dataset), WORLD, dataset, Watchdog(WORLD, 60), StopSignals(WORLD))
    one.begin()
    return one


def unpacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The matrices of a checkpoint in 4 bits, by name of the weight."""
    names = [name.removesuffix(".packed") for name in tensors if name.endswith(".packed")]
    found = {}
    for name in names:
        packed = {part[1:]: tensors[name + part] for part in PACKED}
        out, half = packed["packed"].shape
        found[name.removeprefix("model.")] = unpack("nf4", packed, 2 * half, [out])
    return found


def test_it_equals_lora_on_the_unpacked_base(tiny_dataset, tmp_path, parent):
    """Losses, norms and gradients of three steps. In the plain run the frozen weights are what 4 bits hold."""
    runs = [built(child(tiny_dataset, tmp_path / base, parent, base)) for base in ("nf4", "compute")]
    few, plain = (one.engine.model for one in runs)
    layers = packed_layers(few)
    assert sum(layer.weight.numel() for layer in layers.values()) == MATRICES and len(layers) == 8
    with torch.no_grad():
        for name, layer in layers.items():
            plain.get_parameter(name).copy_(layer.weight)
        for name, parameter in few.named_parameters():
            plain.get_parameter(name).copy_(parameter)
    assert {name for name, p in few.named_parameters() if p.requires_grad} == {
        name for name, _ in few.named_parameters() if is_factor(name)
    }
    for _ in range(3):
        a, b = (optimiser_step(one) for one in runs)
        assert a.loss == pytest.approx(b.loss, rel=1e-6) and a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5)
    for one in runs:
        one.stream.close()


def test_it_learns_and_the_base_stays(parent, tuned):
    begin, end = weights(tuned, 2), weights(tuned, 4)
    packed = [name for name in begin if name.endswith(PACKED) and name.startswith("model.")]
    assert len(packed) == 8 * len(PACKED)
    assert all(torch.equal(begin[name], end[name]) for name in packed)
    assert not any(torch.equal(begin[name], end[name]) for name in begin if is_factor(name))
    whole = weights(parent, 4)
    for name, values in unpacked(begin).items():
        error = (values - whole[f"model.{name}"]).norm() / whole[f"model.{name}"].norm()
        assert 0 < error < 0.15 and f"model.{name}" not in begin, "half the widest step between levels is 0.15"
    rows = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    assert all(row["grad_norm"] > 0 for row in rows)


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, tuned):
    shutil.copytree(tuned, tmp_path / "r")
    shutil.rmtree(tmp_path / "r" / "checkpoints" / checkpoint.step_name(4))
    run({"run_dir": str(tmp_path / "r")})
    assert losses(tmp_path / "r") == losses(tuned)
    assert same(weights(tmp_path / "r", 4), weights(tuned, 4))


def test_every_reader_unpacks_and_merges_and_says_so(tiny_dataset, tmp_path, tuned, capsys):
    tensors = weights(tuned, 4)
    expected = unpacked(tensors)
    for name in expected:
        pairs = []
        while f"model.{factors_of(name, len(pairs))[0]}" in tensors:
            a, b = (tensors[f"model.{factor}"] for factor in factors_of(name, len(pairs)))
            pairs.append(b @ a)
        expected[name] = expected[name] + 16 / 4 * torch.cat(pairs)
    opened = open_run(str(tuned), None, "cpu", "auto")
    assert "have 4 bits; they are unpacked, and LoRA's updates are merged" in capsys.readouterr().err
    found = opened.model.state_dict()
    assert not any(name.endswith(PACKED) or is_factor(name) for name in found)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-6, atol=1e-7)
    export.run(ExportConfig(run_dir=str(tuned), out=str(tmp_path / "e")))
    assert "have 4 bits; they are unpacked" in capsys.readouterr().err
    evaluate(EvaluateConfig(run_dir=str(tuned), protocol="full"), True)
    measured = json.loads(capsys.readouterr().out)["full"]["loss"]
    last = json.loads((tuned / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["val_loss"] == pytest.approx(measured, rel=1e-5)
    chosen = choose_weights(tuned / "checkpoints", None, "last-2", WORLD.say, WORLD)
    assert {name: tensor.shape for name, tensor in chosen.each({})} == {name: t.shape for name, t in found.items()}
    run(child(tiny_dataset, tmp_path / "again", tuned) | {"max_steps": 1})  # a run that begins with merged weights


def test_the_plan_counts_4_bits(tiny_dataset, tmp_path, parent):
    config = build(RunConfig, with_origin(child(tiny_dataset, tmp_path / "r", parent), None, 1, WORLD.say))
    plan = resolve(config, find_dataset(config.data))
    plain = dataclasses.replace(plan.model_config, lora_base="compute")
    few, full = (MemoryEstimate(plan.model_class, c, 64) for c in (plan.model_config, plain))
    for layout in (ParallelLayout("single", "bf16"), ParallelLayout("fsdp", "bf16", 2, 2)):
        a, b = few.state(layout), full.state(layout)
        # 4 bits and 8 for each 64; of each of the 8 matrices two more fp32 numbers. Whole on every rank.
        assert a["weights in nf4"] == MATRICES * 33 // 64 + 8 * 8
        assert b["weights"] - a["weights"] == 4 * MATRICES // layout.shards
        assert a["moments"] == b["moments"] and a["gradients"] == b["gradients"]
    # Under autocast the plain model holds a copy of each frozen matrix in bf16. A packed one is unpacked for one product at a time.
    assert (
        few.state(ParallelLayout("single", "bf16")).get("copies", 0)
        < full.state(ParallelLayout("single", "bf16"))["copies"]
    )
    assert plan.parameters == plan.model_class.count_parameters(plain) and plan.trained == few.trained == full.trained


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"engine": {"strategy": "zero2"}}, "^model.lora_base: nf4 with engine.strategy zero2"),
        ({"model": {**LORA, "lora_base": "nf3"}}, "lora_base must be compute or nf4, not 'nf3'"),
        ({"model": {"lora_base": "nf4"}}, "^model.lora_base: has no effect without model.lora_rank"),
        ({"missing": True}, r"^model.lora_base: nf4 needs bitsandbytes; run pip install 'crescendo-lm\[quantize\]'"),
    ],
)
def test_what_cannot_be_is_one_line(tiny_dataset, tmp_path, parent, monkeypatch, changes, line):
    if changes.get("missing"):
        monkeypatch.setattr("trainer.checkpoint.quantized.is_installed", lambda: False)
        changes = {}
    values = child(tiny_dataset, tmp_path / "r", parent) | changes
    with pytest.raises(UserError, match=line):
        run(values)
    assert not (tmp_path / "r" / "checkpoints").exists()
