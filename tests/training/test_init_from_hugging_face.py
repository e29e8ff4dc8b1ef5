"""`train --init_from` with a Hugging Face model: a folder that transformers wrote, or one of the hub."""

import json
import shutil

import huggingface_hub
import pytest
import torch
import yaml
from conftest import text_only_transformers, tiny_values
from safetensors.torch import load_file, save_file
from tiny_runs import WORLD, make

from models.hugging_face import FAMILIES
from trainer.commands.train import resolved, run
from trainer.core.config import PrepareConfig
from trainer.core.errors import MachineError, UserError
from trainer.data.prepare import prepare
from trainer.planning.parent import with_origin
from trainer.runs.metrics import read_rows

LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
ROPE = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SIZES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "llama": LLAMA | {"rope_scaling": ROPE | {"original_max_position_embeddings": 16}},
    "llama-tied": LLAMA | {"tie_word_embeddings": True, "attention_bias": True, "num_key_value_heads": 4},
    "qwen3": LLAMA | {"head_dim": 16, "rms_norm_eps": 1e-3, "rope_theta": 500.0},
    "mamba2": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 8,
        "head_dim": 16,
        "num_heads": 4,
        "n_groups": 1,
    },
    "zamba2": {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "n_mamba_heads": 4,
    }
    | {
        "mamba_d_state": 8,
        "num_attention_heads": 4,
        "adapter_rank": 4,
        "intermediate_size": 64,
        "time_step_min": 1e-30,
    },
}
CLASSES = {
    "gpt2": "GPT2",
    "llama": "Llama",
    "llama-tied": "Llama",
    "qwen3": "Qwen3",
    "mamba2": "Mamba2",
    "zamba2": "Zamba2",
}


@pytest.fixture
def transformers(monkeypatch):
    return text_only_transformers(monkeypatch)


def saved(transformers, folder, kind, **options):
    """A model with random weights, saved in `folder`."""
    config = getattr(transformers, f"{CLASSES[kind]}Config")(vocab_size=300, initializer_range=0.2, **SIZES[kind])
    torch.manual_seed(0)
    suffix = "LMHeadModel" if kind == "gpt2" else "ForCausalLM"
    model = getattr(transformers, CLASSES[kind] + suffix)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # transformers leaves biases at 0 and gains at 1
            if "norm" in name or "ln_" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    if kind == "zamba2":  # transformers 4.57 refuses to save the shared blocks of its own model
        model.config.save_pretrained(folder)
        save_file({name: value.clone() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    else:
        model.save_pretrained(folder, **options)
    return model


def child(dataset, folder, parent, **changes) -> dict:
    values = tiny_values(dataset, folder, **{"init_from": str(parent), "max_steps": 2, **changes})
    return {key: value for key, value in values.items() if key not in ("model", "model_scale") or key in changes}


def distance(values: dict, theirs) -> float:
    """The largest difference of logits between the run at step 0 and their model."""
    whole = with_origin(values, None, 1, WORLD.say)
    keys = ("init_from", "model", "parameters")
    one = make(whole["data"]["path"], whole["run_dir"], model_scale=None, **{key: whole[key] for key in keys})
    one.begin()
    one.stream.close()
    tokens = torch.randint(300, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens).logits
        found = one.model(tokens).logits[..., :300]
    assert expected.std() > 0.5, "logits this small would agree by themselves"
    return (found - expected).abs().max().item()


@pytest.mark.parametrize("kind", SIZES)
def test_a_run_begins_with_the_logits_of_transformers(transformers, tiny_dataset, tmp_path, kind):
    """Llama's weights in several files, as large models are saved."""
    theirs = saved(transformers, tmp_path / "m", kind, max_shard_size="20KB" if kind == "llama" else "1GB")
    assert (tmp_path / "m" / "model.safetensors.index.json").exists() == (kind == "llama")
    # fp32 sums of some hundred terms in another order.
    assert distance(child(tiny_dataset, tmp_path / "r", tmp_path / "m"), theirs) < 1e-4


def test_adapters_leave_the_logits_as_they_are(transformers, tiny_dataset, tmp_path):
    """Even adapters that have more parameters than the model, whose size the parent states."""
    theirs = saved(transformers, tmp_path / "m", "llama")
    assert distance(child(tiny_dataset, tmp_path / "r", tmp_path / "m", model={"lora_rank": "64"}), theirs) < 1e-4


def test_openais_own_files_name_the_weights_in_another_way(transformers, tiny_dataset, tmp_path):
    theirs = saved(transformers, tmp_path / "m", "gpt2")
    file, config = tmp_path / "m" / "model.safetensors", json.loads((tmp_path / "m" / "config.json").read_text())
    save_file({name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}, file)
    kept = ("model_type", "vocab_size", "n_embd", "n_layer", "n_head", "n_positions", "layer_norm_epsilon")
    (tmp_path / "m" / "config.json").write_text(json.dumps({key: config[key] for key in kept}))
    assert distance(child(tiny_dataset, tmp_path / "r", tmp_path / "m"), theirs) < 1e-4


# What the classes of transformers put in the place of None. Ours needs the layers of a Zamba2, and says so.
FILLED_IN = {
    "num_key_value_heads": lambda theirs: theirs.num_attention_heads,
    "intermediate_size": lambda theirs: 4 * theirs.hidden_size,
    "layers_block_type": lambda theirs: theirs.layers_block_type,
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_field_that_a_config_lacks_means_what_it_means_to_transformers(transformers, kind):
    theirs = getattr(transformers, f"{CLASSES[kind]}Config")()
    for key, value in FAMILIES[kind].absent_means.items():
        expected = FILLED_IN[key](theirs) if value is None and key in FILLED_IN else value
        rope = getattr(theirs, "rope_parameters", {})  # where transformers 5 keeps rope_theta
        assert (rope[key] if key in rope else getattr(theirs, key)) == expected, key


def test_it_trains_and_goes_on_without_the_folder(transformers, tiny_dataset, tmp_path, monkeypatch, capsys):
    saved(transformers, tmp_path / "m", "qwen3")
    shutil.copy(tiny_dataset / "tokenizer.json", tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    run(child(tiny_dataset, tmp_path / "r", "m", precision="pure_bf16"))
    shutil.rmtree(tmp_path / "m")
    run(child(tiny_dataset, tmp_path / "r", "m", precision="pure_bf16", max_steps=3))
    config = yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())
    assert config["init_from"] == str(tmp_path / "m") and config["model"]["qk_norm"] is True
    assert config["data"]["tokenizer"] == str(tmp_path / "m")
    assert [row["step"] for row in read_rows(tmp_path / "r" / "metrics.jsonl")] == [1, 2, 3]
    assert "holds no tokenizer" not in capsys.readouterr().err


def test_a_tokenizer_that_is_not_the_models(transformers, tiny_dataset, tmp_path, capsys):
    saved(transformers, tmp_path / "m", "gpt2")
    run(child(tiny_dataset, tmp_path / "r", tmp_path / "m"))
    assert f"{tmp_path / 'm'} holds no tokenizer, so nothing proves" in capsys.readouterr().err
    shutil.copy(tiny_dataset / "tokenizer.json", tmp_path / "m")
    (tmp_path / "text.txt").write_text("the cat sat on the mat.\n" * 500)
    corpus = {"source": str(tmp_path / "text.txt"), "validation_fraction": 0.2, "sample_length": 64}
    prepare(PrepareConfig(**corpus, tokenizer="chars", workers=1, out=str(tmp_path / "chars")), lambda line: None)
    with pytest.raises(UserError, match=r"was prepared with tokenizer chars, .*prepare it with --tokenizer .*/m$"):
        run(child(tmp_path / "chars", tmp_path / "r2", tmp_path / "m"))


@pytest.mark.parametrize(
    "config, changes, words",
    [
        (
            {"model_type": "mamba"},
            {},
            "config.json: model_type 'mamba' is not implemented here, only gpt2, llama, qwen3",
        ),
        ({"activation_function": "relu"}, {}, "config.json: activation_function 'relu' of gpt2 is not implemented"),
        ({"n_embd": "wide"}, {}, "config.json: "),
        ({"n_layer": 1}, {}, "the model has no place for transformer.h.1."),
        ({"n_layer": 3}, {}, "lacks the weights 'transformer.h.2."),
        ({}, {"init_weights": "ema"}, "is not a run, so it has no ema"),
        ({}, {"model": {"d_model": 64}}, "init_from: model.d_model is 64 (was 32), which the weights of"),
        ({}, {"model_scale": 1.0}, "init_from: model_scale is 1, but the size of the model is that of"),
    ],
)
def test_what_does_not_fit_is_one_line(transformers, tiny_dataset, tmp_path, config, changes, words):
    saved(transformers, tmp_path / "m", "gpt2")
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    with pytest.raises(UserError) as error:
        run(child(tiny_dataset, tmp_path / "r", tmp_path / "m", **changes))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_missing_or_damaged(transformers, tiny_dataset, tmp_path):
    saved(transformers, tmp_path / "m", "gpt2")
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"^init_from: .*model.safetensors cannot be read"):
        run(child(tiny_dataset, tmp_path / "r", tmp_path / "m"))
    file.unlink()
    with pytest.raises(UserError, match=r"holds neither model.safetensors nor .*index.json; save the model as safe"):
        run(child(tiny_dataset, tmp_path / "r", tmp_path / "m"))
    (tmp_path / "m" / "model.safetensors.index.json").write_text('{"weight_map": {"transformer.wte.weight": "../x"}}')
    with pytest.raises(UserError, match=r"'../x' is not the name of a file in this folder"):
        run(child(tiny_dataset, tmp_path / "r", tmp_path / "m"))


def test_a_model_of_the_hub_is_named_by_its_commit(transformers, tiny_dataset, tmp_path, monkeypatch):
    """Without a network: huggingface_hub.snapshot_download is faked."""
    commit, asked = "0123456789abcdef0123456789abcdef01234567", []
    saved(transformers, tmp_path / "snapshots" / commit, "gpt2")

    def download(repository, revision, allow_patterns):
        asked.append((repository, revision))
        return str(tmp_path / "snapshots" / commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    values = child(tiny_dataset, tmp_path / "r", "hf://org/name")
    run(values)
    assert yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())["init_from"] == f"hf://org/name@{commit}"
    assert asked == [("org/name", None), ("org/name", commit)], "planned, then loaded as it was planned"
    run({**values, "max_steps": 3})
    assert len(asked) == 2, "a run that goes on asked the hub"


@pytest.mark.parametrize("name, kind", [("ConnectionError", MachineError), ("RepositoryNotFoundError", UserError)])
def test_a_hub_that_does_not_answer_is_one_line(tiny_dataset, tmp_path, monkeypatch, name, kind):
    def download(*arguments, **options):
        raise type(name, (Exception,), {})("several\nlines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError) as error:
        resolved(child(tiny_dataset, tmp_path / "r", "hf://org/name"))
    assert type(error.value) is kind
    assert str(error.value) == (
        f"init_from: hf://org/name cannot be fetched from the Hugging Face hub ({name}); download it elsewhere and give its folder"
    )
