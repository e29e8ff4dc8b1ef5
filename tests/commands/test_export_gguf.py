"""`export --format gguf`: transformers reads the file and computes what the run computes."""

import numpy as np
import pytest
import torch
from conftest import text_only_transformers
from test_export_hugging_face import make_run

from trainer.commands import export
from trainer.commands.export import ExportConfig, gguf_file
from trainer.commands.export.self_test import tolerance_of
from trainer.commands.export.source import TEXT, find_source
from trainer.core.config import PrepareConfig
from trainer.core.errors import UserError
from trainer.data.prepare import prepare

gguf = pytest.importorskip("gguf", reason="needs the package gguf")


@pytest.fixture(scope="module")
def merged_dataset(tiny_dataset, tmp_path_factory):
    """With a byte-level BPE, which llama.cpp has too."""
    out = tmp_path_factory.mktemp("merged") / "data"
    keys = {"source": str(tiny_dataset.parent / "texts"), "tokenizer": "train-bpe:300", "out": str(out)}
    prepare(PrepareConfig(**keys, sample_length=64, workers=1, validation_fraction=0.1), lambda line: None)
    return out


def exported(run, out, **keys):
    export.run(ExportConfig(run_dir=str(run), format="gguf", out=str(out), **keys))
    return out


def read(folder) -> tuple[dict, dict]:
    reader = gguf.GGUFReader(folder / "model.gguf")
    keys = {key: field.contents() for key, field in reader.fields.items()}
    return keys, {tensor.name: tensor for tensor in reader.tensors}


# transformers 4.57 takes Qwen3's head width from its default, 128, and not from `attention.key_length` as llama.cpp does.
FIELDS = {
    "gpt2": {"mlp": "gelu_tanh"},
    "llama": {"d_model": 64, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "n_predict": 2, "rope_theta": 1000.0},
    "qwen3": {"d_model": 64, "n_heads": 2, "n_kv_heads": 1, "head_dim": 128, "qk_norm": True, "tied": True},
}


@pytest.mark.parametrize("kind", FIELDS)
def test_transformers_reads_the_model_of_the_run(merged_dataset, tmp_path, monkeypatch, capfd, kind):
    text_only_transformers(monkeypatch)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = make_run(merged_dataset, tmp_path / "run", "gpt2" if kind == "gpt2" else "llama", **FIELDS[kind])
    out = exported(run, tmp_path / "out")
    said = capfd.readouterr().err
    assert f"a {kind} of llama.cpp" in said and ("without 1 heads for later" in said) == (kind == "llama")
    source = find_source(str(run), None, "evaluation", "auto", print)
    own, tokens = source.model(), source.tokens()
    theirs, found = AutoModelForCausalLM.from_pretrained(
        out, gguf_file="model.gguf", dtype=torch.float32, output_loading_info=True
    )
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"]
    with torch.no_grad():
        expected, logits = own(tokens).logits, theirs.eval()(tokens).logits
    assert expected.std() > 0.1, "logits this small would agree by themselves"
    torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance_of(own, expected))
    keys, _ = read(out)
    assert keys["tokenizer.ggml.tokens"][source.tokenizer.eot_id] == "<|endoftext|>"
    assert keys["tokenizer.ggml.token_type"][source.tokenizer.eot_id] == gguf.TokenType.CONTROL
    assert len(keys["tokenizer.ggml.tokens"]) == expected.shape[-1], "a row of the embedding has no token"
    if kind != "qwen3":  # transformers splits texts as Qwen does; llama.cpp as `tokenizer.ggml.pre` says
        tokenizer = AutoTokenizer.from_pretrained(out, gguf_file="model.gguf")
        assert tokenizer.encode(TEXT, add_special_tokens=False) == source.tokenizer.encode(TEXT).tolist()
        assert tokenizer.eos_token_id == source.tokenizer.eot_id


def test_weights_in_bf16_keep_vectors_and_positions_in_fp32(merged_dataset, tmp_path):
    run = make_run(merged_dataset, tmp_path / "run", "gpt2", mlp="gelu_tanh")
    keys, tensors = read(exported(run, tmp_path / "out", dtype="bf16"))
    assert keys["general.file_type"] == gguf.LlamaFileType.MOSTLY_BF16
    wide = {name for name, tensor in tensors.items() if tensor.tensor_type == gguf.GGMLQuantizationType.F32}
    assert wide == {name for name, tensor in tensors.items() if len(tensor.shape) == 1} | {"position_embd.weight"}
    table = tensors["token_embd.weight"]
    held = gguf.dequantize(table.data, table.tensor_type)
    own = dict(find_source(str(run), None, "evaluation", "bf16", print).each())["embedding.weight"]
    assert np.array_equal(held, own.float()[: len(held)].numpy())


@pytest.mark.parametrize("name", ["bytes", "chars"])
def test_a_tokenizer_that_llama_cpp_cannot_have_is_refused(tiny_dataset, tmp_path, name):
    dataset = tiny_dataset
    if name == "chars":
        dataset = tmp_path / "data"
        keys = {"source": str(tiny_dataset.parent / "texts"), "tokenizer": name, "out": str(dataset)}
        prepare(PrepareConfig(**keys, sample_length=64, workers=1, validation_fraction=0.1), lambda line: None)
    run = make_run(dataset, tmp_path / "run", "llama")
    with pytest.raises(UserError, match=f"^format: gguf holds byte-level BPE .* not {name}; --format hf writes any"):
        exported(run, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    "model, fields, words",
    [
        ("ngpt", {}, "no class of transformers computes Ngpt"),
        ("mamba2", {"d_model": 64}, "this model is a Mamba2ForCausalLM"),
        ("gpt2", {"mlp": "gelu"}, "this model has mlp gelu"),
        ("llama", {"attention_bias": "all"}, "this model has biases"),
        (
            "llama",
            {"rope_scaling": "interpolate", "rope_factor": 2.0},
            "this model has rope_scaling {'rope_type': 'linear'",
        ),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(tiny_dataset, tmp_path, model, fields, words):
    run = make_run(tiny_dataset, tmp_path / "run", model, **fields)
    with pytest.raises(UserError, match=f"^format: gguf holds GPT-2 .* Llama and Qwen3 without biases.*; {words}"):
        exported(run, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_mistakes_and_a_file_that_holds_something_else(merged_dataset, tmp_path, monkeypatch):
    run = make_run(merged_dataset, tmp_path / "run", "llama")
    written = gguf_file.write
    damages = {
        "output_norm.weight": lambda name, value: (name, value + (name == "output_norm.weight")),
        "output.weight": lambda name, value: ("other" if name == "output.weight" else name, value),
    }
    tensors = gguf_file.tensors
    for words, damage in damages.items():

        def damaged(source, found, values, file, damage=damage):
            with monkeypatch.context() as patch:
                patch.setattr(gguf_file, "tensors", lambda *given: (damage(*one) for one in tensors(*given)))
                written(source, found, values, file)

        monkeypatch.setattr(gguf_file, "write", damaged)
        with pytest.raises(UserError, match=f"^format: model.gguf holds another {words} than was written"):
            exported(run, tmp_path / "out")

    def changed(source, found, values, file):
        written(source, found, values | {"llama.rope.freq_base": 7.0}, file)

    monkeypatch.setattr(gguf_file, "write", changed)
    with pytest.raises(UserError, match="^format: model.gguf holds another llama.rope.freq_base than was written"):
        exported(run, tmp_path / "out")
    with pytest.raises(UserError, match="^license: is for the model card of --format hf"):
        exported(run, tmp_path / "out", license="mit")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="^format: gguf needs the package gguf; run `pip install 'crescendo-lm.gguf.'"):
        exported(run, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
