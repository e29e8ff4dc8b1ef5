"""Exported weights: what a stranger loads is the run's own model, to the bit, from however many files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import PATIENCE, ROOT, error_line, tiny_values, trainer
from processes import forked_trainer
from safetensors.torch import load_file

import models.base
from trainer.checkpoint import format as checkpoint
from trainer.checkpoint.weights import EVALUATION, Weights
from trainer.commands import export
from trainer.commands.export import ExportConfig, tensors
from trainer.core.config import DataConfig, RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import build
from trainer.data.stream import find_dataset
from trainer.engine.meta import build_meta
from trainer.planning.plan import resolve
from trainer.runs.folder import write_start
from trainer.runs.opening import open_run
from trainer.runtime.distributed import World


def make_run(dataset: Path, folder: Path, model: str, precision: str = "fp32") -> Path:
    """A run folder as `train` leaves it, with a checkpoint at steps 3 and 5, without the training."""
    values = tiny_values(dataset, folder, model={"name": model}, precision=precision)
    plan = resolve(build(RunConfig, values), find_dataset(build(RunConfig, values).data))
    own = build_meta(plan.model_class, plan.model_config).to_empty(device="cpu")
    for step in (3, 5):
        own.init_weights(torch.Generator().manual_seed(step))
        own = own.to(torch.bfloat16) if precision == "pure_bf16" else own
        held = {f"model.{name}": tensor for name, tensor in own.state_dict().items()}
        held |= {f"optimizer.{name}.exp_avg": tensor for name, tensor in own.state_dict().items()}
        facts = {"tokens": 512 * step}
        checkpoint.save(folder / "checkpoints", step, held, facts, World(), checkpoint.retention(9, 0))
    write_start(folder, plan.config, "plan", dataset, print, device="CPU")
    return folder


@pytest.fixture(scope="module", params=["hlb", "gpt2"])
def finished(request, tiny_dataset, tmp_path_factory) -> Path:
    return make_run(tiny_dataset, tmp_path_factory.mktemp("export") / "run", request.param)


def test_kernels_of_one_machine_do_not_bind_another(tiny_dataset, tmp_path):
    folder = make_run(tiny_dataset, tmp_path / "run", "gpt2")
    config = folder / "config.yaml"
    _, text = config.read_text().split("\n", 1)  # without the digest, as one who keeps a change
    config.write_text(text.replace("attention_kernel: auto", "attention_kernel: flash"))
    export.run(ExportConfig(run_dir=str(folder), out=str(tmp_path / "out")))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["config"]["attention_kernel"] == "auto"
    stranger(tmp_path / "out")(torch.zeros(1, 4, dtype=torch.long))


def test_a_run_of_another_device_can_be_opened(tiny_dataset, tmp_path, monkeypatch):
    """fp8 units, the room to train and the like are not needed to read what was trained."""
    folder = make_run(tiny_dataset, tmp_path / "run", "gpt2")
    values = yaml.safe_load((folder / "config.yaml").read_text())
    values |= {"float8": True, "device": "cuda", "profile": True}
    values["engine"] |= {"strategy": "hsdp", "shard_size": 8, "cuda_graphs": True, "compile": True}
    values["batch"] |= {"tokens_per_microbatch": 1 << 30}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))

    def planned(*_, **__):
        raise AssertionError("asked the planner of training")

    monkeypatch.setattr("trainer.planning.plan.resolve", planned)
    monkeypatch.setattr("trainer.planning.memory.saved_activations", planned)
    opened = open_run(str(folder), None, "cpu", "pure_bf16")
    assert opened.model(torch.zeros(1, 4, dtype=torch.long)).logits.shape[:2] == (1, 4)
    export.run(ExportConfig(run_dir=str(folder), out=str(tmp_path / "out")))
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "key, value, line",
    [
        ("n_heads", "two", "^model.n_heads: expected integer, got 'two'"),
        ("n_haeds", 2, "unknown key model.n_haeds; did you mean model.n_heads"),
        ("vocab_size", 64, "^model.vocab_size: 64 is smaller than the tokenizer's 257"),
    ],
)
def test_a_stored_model_is_read_by_its_own_config(tiny_dataset, tmp_path, key, value, line):
    folder = make_run(tiny_dataset, tmp_path / "run", "gpt2")
    values = yaml.safe_load((folder / "config.yaml").read_text())
    values["model"] |= {key: value}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=line):
        open_run(str(folder), None, "cpu", "auto")


def test_an_empty_path_is_no_folder_and_names_are_filled_in(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("WHERE", str(tmp_path))
    monkeypatch.setenv("RUN", str(finished))
    export.run(ExportConfig(run_dir="$RUN", out="$WHERE/out"))
    assert (tmp_path / "out" / "model.safetensors").exists()
    for config in (ExportConfig(run_dir=""), ExportConfig(run_dir="$RUN", out="")):
        with pytest.raises(UserError, match="is empty; name a path"):
            export.run(config)


def test_a_text_file_in_place_of_a_dataset_is_told_the_way(tiny_dataset, tmp_path):
    opened = open_run(str(make_run(tiny_dataset, tmp_path / "run", "gpt2")), None, "cpu", "auto")
    (tmp_path / "a.txt").write_text("a text")
    with pytest.raises(
        UserError, match="a.txt is a file, .* prepare --source .*a.txt --validation_source .*run/tokenizer.json"
    ):
        opened.split(DataConfig(path=str(tmp_path / "a.txt")), "validation")


def stranger(out: Path) -> torch.nn.Module:
    """The lines at the top of trainer/commands/export/__init__.py."""
    about = json.loads((out / "config.json").read_text())
    models.base.load_models()
    model_class = models.base.get_model(about["model"])
    model = model_class(model_class.Config(**about["config"]))
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(out.glob("*.safetensors")):
        loaded = load_file(file)
        assert not weights.keys() & loaded.keys()
        weights |= loaded
    model.load_state_dict(weights)
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(48).reshape(2, 24)).logits


@pytest.mark.parametrize("limit", [2 << 30, 100_000, 1])
def test_a_stranger_loads_the_same_model(finished, tmp_path, monkeypatch, limit):
    monkeypatch.setattr(tensors, "SHARD_BYTES", limit)
    out = tmp_path / "out"
    export.run(ExportConfig(run_dir=str(finished), out=str(out)))
    opened = open_run(str(finished), None, "cpu", "auto")
    assert torch.equal(logits(stranger(out)), logits(opened.model))

    own = opened.model.state_dict()
    files = sorted(path.name for path in out.glob("*.safetensors"))
    if limit == 2 << 30:
        assert files == ["model.safetensors"]
        assert not (out / "model.safetensors.index.json").exists()
    else:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in own.values())
        assert index["weight_map"].keys() == own.keys()
        assert sorted(set(index["weight_map"].values())) == files
        assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
        for name, file in index["weight_map"].items():
            assert name in load_file(out / file)
    if limit == 1:
        assert len(files) == len(own)
    elif limit == 100_000:
        assert 1 < len(files) < len(own)
        for file in files:  # at most the limit, but for one tensor that is larger by itself
            sizes = [own[name].nbytes for name, place in index["weight_map"].items() if place == file]
            assert sum(sizes) <= limit or len(sizes) == 1
    assert (out / "tokenizer.json").read_bytes() == (finished / "tokenizer.json").read_bytes()
    about = json.loads((out / "config.json").read_text())
    assert (about["step"], about["tokens"], about["precision"]) == (5, 2560, "fp32")


def test_bf16_weights_stay_so(tiny_dataset, tmp_path):
    folder = make_run(tiny_dataset, tmp_path / "run", "gpt2", "pure_bf16")
    export.run(ExportConfig(run_dir=str(folder)))
    weights = load_file(folder / "export-5" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    opened = open_run(str(folder), None, "cpu", "auto")
    assert torch.equal(logits(stranger(folder / "export-5").bfloat16()), logits(opened.model))


def write(weights: Weights, out: Path, limit: int) -> None:
    sizes = {name: shape.numel() * dtype.itemsize for name, (shape, dtype) in weights.stored().items()}
    tensors.write_tensors(sizes, weights.each({}), out, limit)


def test_the_same_bytes_however_the_checkpoint_was_written(finished, tmp_path):
    """Names in another order, as ranks leave them, and another step's export beside it."""
    path = finished / "checkpoints" / checkpoint.step_name(5)
    held = checkpoint.load(path, "model.", World())
    backwards = {f"model.{name}": held[name] for name in reversed(list(held))}
    other = checkpoint.save(tmp_path / "other", 5, backwards, {}, World(), checkpoint.retention(1, 0))
    for source, out in ((path, tmp_path / "one"), (other, tmp_path / "two")):
        out.mkdir()
        write(Weights((source,), EVALUATION, False, {}), out, 100_000)
    names = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "two").iterdir())
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


@pytest.mark.slow
def test_as_a_command(finished, tmp_path):
    done = trainer("export", finished, "--step", "3", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/out: the weights of {finished}/checkpoints/step-00000003" in done.stderr
    assert json.loads((tmp_path / "out" / "config.json").read_text())["step"] == 3
    assert not list(tmp_path.glob("*.tmp"))
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert "out exists already" in error_line(forked_trainer("export", finished, "--out", tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert "there is no checkpoint of step 4" in error_line(forked_trainer("export", finished, "--step", "4"))


def test_mistakes_are_named(tmp_path):
    for config, expected in (
        (ExportConfig(), "run_dir: name the run's folder"),
        (ExportConfig(run_dir=str(tmp_path)), "is not a run folder"),
    ):
        with pytest.raises(UserError, match=expected):
            export.run(config)


@pytest.mark.slow
def test_nothing_half_done_stays(finished, tmp_path):
    """The kernel refuses more than 20 kB to a file, as where a disk is full."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))"
    code = f"{limit}; import sys; from trainer.__main__ import main; main()"
    words = [sys.executable, "-c", code, "export", str(finished), "--out", str(tmp_path / "out")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    line = error_line(done)
    assert "out.tmp/model.safetensors could not be written" in line and "File too large" in line
    assert not list(tmp_path.iterdir())


MEASURE = """
import resource, sys
from pathlib import Path
from trainer.checkpoint.weights import EVALUATION, Weights
from trainer.commands.export.tensors import write_tensors
import safetensors.torch
import torch.distributed.checkpoint
source, out, limit = sys.argv[1:]
def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) << 10
before = peak()
weights = Weights((Path(source),), EVALUATION, False, {})
sizes = {name: shape.numel() * dtype.itemsize for name, (shape, dtype) in weights.stored().items()}
write_tensors(sizes, weights.each({}), Path(out), int(limit))
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_is_that_of_a_shard(tmp_path):
    """64 tensors of 4 MiB in files of 16 MiB.

    Held at once are one file's tensors, perhaps their bytes once more (older safetensors copy them), a tensor while it is
    read, and up to 16 MiB of libraries that are loaded at the first read: 52 MiB where everything would be 256. A second
    file's tensors do not fit.
    """
    mib = 1 << 20
    held = {f"model.{i:02d}": torch.full((mib,), float(i)) for i in range(64)}
    source = checkpoint.save(tmp_path / "run", 1, held, {}, World(), checkpoint.retention(1, 0))
    (tmp_path / "out").mkdir()
    words = [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "out"), str(16 * mib)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 16
    assert int(done.stdout) < 52 * mib, f"{int(done.stdout) / mib:.0f} MiB"
