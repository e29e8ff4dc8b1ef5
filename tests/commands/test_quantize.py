"""`quantize`: the folder generates and evaluates as the table says, is checked, and what cannot be done is one line."""

import json
import shutil

import pytest
import torch
from conftest import tiny_values
from safetensors.torch import load_file, save_file
from test_export import make_run

from models.quantization import packed_layers
from trainer.checkpoint.format import file_entry
from trainer.checkpoint.quantized import MANIFEST, WEIGHTS
from trainer.commands import evaluate, export, generate, quantize, train
from trainer.commands.evaluate import EvaluateConfig
from trainer.commands.export import ExportConfig
from trainer.commands.generate import GenerateConfig
from trainer.commands.quantize import QuantizeConfig
from trainer.core.errors import Damaged, UserError
from trainer.core.files import sealed
from trainer.runs.opening import open_run


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch):
    monkeypatch.setattr("trainer.commands.quantize.DECODED", 3)
    monkeypatch.setattr("trainer.commands.quantize.REPEATS", 1)


@pytest.fixture(scope="module")
def folder(tiny_dataset, tmp_path_factory):
    return make_run(tiny_dataset, tmp_path_factory.mktemp("quantize") / "run", "gpt2")


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "int8"
    quantize.run(QuantizeConfig(run_dir=str(folder), to="int8", out=str(out)))
    return out


def table(capsys, **keys) -> dict:
    capsys.readouterr()
    quantize.run(QuantizeConfig(**keys), True)
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("to, bits", [("nf4", 4.127), ("int8", 8), ("ternary", 2), ("sign", 1)])
def test_the_folder_is_what_the_table_says(folder, tmp_path, capsys, to, bits):
    if to == "nf4":
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (the extra quantize)")
    report = table(capsys, run_dir=str(folder), to=to, step=3, out=str(tmp_path / "q"))
    before, after = report["before"], report["after"]
    opened = open_run(str(tmp_path / "q"), None, "cpu", "auto")
    assert opened.step == report["step"] == 3 and len(packed_layers(opened.model)) == report["matrices"] > 0
    # The scales of a narrow model's rows weigh more: of int8 there is one of 32 bits for each row.
    assert bits <= after["bits_per_matrix_weight"] < bits + 1
    assert after["memory_bytes"] < before["memory_bytes"] and after["disk_bytes"] < before["disk_bytes"]
    assert before["bits_per_weight"] == 32 and before["tokens_per_second"] > 0 < after["tokens_per_second"]
    for run_dir, column in ((folder, before), (tmp_path / "q", after)):
        evaluate.run(EvaluateConfig(run_dir=str(run_dir), step=3, protocol="full"), True)
        measured = json.loads(capsys.readouterr().out)["full"]
        assert measured["loss"] == column["loss"] and measured["bits_per_byte"] == column["bits_per_byte"]
    assert before["loss"] != after["loss"]
    generate.run(GenerateConfig(run_dir=str(tmp_path / "q"), prompt=["the"], max_new_tokens=3, device="cpu"))
    assert capsys.readouterr().out.startswith("the")


@pytest.mark.parametrize("kind, to", [("bitnet", "ternary"), ("sign", "sign")])
def test_a_run_trained_so_is_packed_without_loss(tiny_dataset, tmp_path, capsys, kind, to):
    """From training to the table; another format is refused."""
    model = {"name": "gpt2", "n_layers": 2, "d_model": 32, "n_heads": 2, "linear": kind}
    train.run(tiny_values(tiny_dataset, tmp_path / "run", model=model, max_steps=2))
    report = table(capsys, run_dir=str(tmp_path / "run"), to=to, out=str(tmp_path / "q"))
    assert report["after"]["loss"] == report["before"]["loss"]
    assert report["after"]["bits_per_matrix_weight"] < 1.1 * (1 + (to == "ternary"))
    with pytest.raises(
        UserError, match=f"^to: the run was trained with model.linear {kind}, so --to {to} loses nothing"
    ):
        quantize.run(QuantizeConfig(run_dir=str(tmp_path / "run"), to="int8", out=str(tmp_path / "r")))


def test_what_is_not_a_matrix_stays_to_the_bit(folder, packed):
    whole, few = (open_run(str(run_dir), None, "cpu", "auto").model for run_dir in (folder, packed))
    kept = dict(few.named_parameters())
    assert {"embedding.weight", "norm.weight"} <= kept.keys()
    for name, parameter in whole.named_parameters():
        if name in kept:
            assert torch.equal(parameter, kept[name]), name
        else:
            assert name in packed_layers(few)
    assert all(layer.weight.dtype == torch.float32 for layer in packed_layers(few).values())


def test_pure_bf16_changes_no_scale(tiny_dataset, tmp_path):
    """The packed tensors keep their types where the rest is bf16."""
    run = make_run(tiny_dataset, tmp_path / "run", "hlb", "pure_bf16")
    quantize.run(QuantizeConfig(run_dir=str(run), to="int8", out=str(tmp_path / "q")))
    model = open_run(str(tmp_path / "q"), None, "cpu", "auto").model
    assert model.embedding.weight.dtype == torch.bfloat16
    for layer in packed_layers(model).values():
        assert layer.packed["scales"].dtype == torch.float32 and layer.weight.dtype == torch.bfloat16


def test_what_needs_whole_weights_refuses_the_folder(packed, tiny_dataset, tmp_path):
    line = "holds weights in int8, made from .*@5; name that run instead"
    with pytest.raises(UserError, match=f"^run_dir: .*{line}"):
        train.run({"run_dir": str(packed)})
    with pytest.raises(UserError, match=f"^init_from: .*{line}"):
        train.run({"run_dir": str(tmp_path / "r"), "init_from": str(packed), "data": {"path": str(tiny_dataset)}})
    with pytest.raises(UserError, match=f"^run_dir: .*{line}"):
        export.run(ExportConfig(run_dir=str(packed), out=str(tmp_path / "e")))
    with pytest.raises(UserError, match=f"^run_dir: .*{line}"):
        quantize.run(QuantizeConfig(run_dir=str(packed), to="int8", out=str(tmp_path / "again")))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "keys, line",
    [
        ({}, "^run_dir: name it, as in"),
        ({"run_dir": "RUN"}, "^to: name it, as in"),
        ({"run_dir": "RUN", "to": "int8", "step": 4}, "^step: there is no checkpoint of step 4"),
        ({"run_dir": "RUN", "to": "int8", "weights": "ema"}, "^weights: .* holds no moving average"),
        ({"run_dir": "RUN", "to": "int8", "out": "RUN"}, "^out: .* exists already"),
    ],
)
def test_one_line_for_what_cannot_be_done(folder, tmp_path, keys, line):
    keys = {key: str(folder) if value == "RUN" else value for key, value in keys.items()}
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match=line) as told:
        quantize.run(QuantizeConfig(**keys))
    assert "\n" not in str(told.value) and sorted(folder.iterdir()) == before


def test_a_missing_package_is_one_line(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.checkpoint.quantized.is_installed", lambda: False)
    with pytest.raises(UserError, match=r"^to: nf4 needs bitsandbytes; run pip install 'crescendo-lm\[quantize\]'"):
        quantize.run(QuantizeConfig(run_dir=str(folder), to="nf4", out=str(tmp_path / "q")))
    assert not (tmp_path / "q").exists()


def test_other_weights_than_those_in_the_folder_are_refused(packed):
    with pytest.raises(UserError, match=r"^step: 3 is not in .*, which holds those of .*@5 alone"):
        open_run(str(packed), 3, "cpu", "auto")
    with pytest.raises(UserError, match=r"^weights: last-2 is not in"):
        open_run(str(packed), None, "cpu", "auto", weights="last-2")


def test_damage_is_found(packed, tmp_path):
    """A flipped byte of the weights, a changed manifest, weights of another format under a right digest."""
    out = tmp_path / "q"
    shutil.copytree(packed, out)
    data = (out / WEIGHTS).read_bytes()
    (out / WEIGHTS).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(Damaged, match="model.safetensors is damaged: its hash is not the manifest's"):
        open_run(str(out), None, "cpu", "auto")
    (out / WEIGHTS).write_bytes(data)
    manifest = json.loads((out / MANIFEST).read_text())
    (out / MANIFEST).write_text(json.dumps({**manifest, "to": "ternary"}))
    with pytest.raises(Damaged, match="its digest is not that of its content"):
        open_run(str(out), None, "cpu", "auto")
    (out / MANIFEST).write_text(sealed({**manifest, "to": "ternary"}))
    with pytest.raises(UserError, match=r"qkv.weight is not packed as ternary for the model of config.yaml"):
        open_run(str(out), None, "cpu", "auto")
    (out / MANIFEST).write_text(sealed({**manifest, "to": "octal"}))
    with pytest.raises(Damaged, match="does not name a known format"):
        open_run(str(out), None, "cpu", "auto")
    (out / MANIFEST).write_text(sealed({**manifest, "format": 2}))
    with pytest.raises(UserError, match="has format 2; this version reads formats up to 1"):
        open_run(str(out), None, "cpu", "auto")


def test_a_tensor_of_another_shape_is_named(packed, tmp_path):
    out = tmp_path / "q"
    shutil.copytree(packed, out)
    tensors = load_file(out / WEIGHTS)
    save_file(tensors | {"norm.weight": tensors["norm.weight"][:-1]}, out / WEIGHTS)
    manifest = json.loads((out / MANIFEST).read_text())
    (out / MANIFEST).write_text(sealed({**manifest, "files": {WEIGHTS: file_entry(out / WEIGHTS)}}))
    with pytest.raises(UserError, match="norm.weight"):
        open_run(str(out), None, "cpu", "auto")
