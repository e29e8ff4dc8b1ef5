"""What the guides show is what works."""

import re
import runpy
import sys

import pytest
import torch
from conftest import ROOT, tiny_values

from trainer.__main__ import import_plugins
from trainer.commands.train import run
from trainer.runs.metrics import read_rows


def blocks(file, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / file).read_text(), re.DOTALL)


def test_the_model_of_the_guide_trains(tiny_dataset, tmp_path, monkeypatch):
    code = blocks("models/README.md", "python")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 11, "ten lines and a title"
    (tmp_path / "silu.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    import_plugins(["silu"])
    run(tiny_values(tiny_dataset, tmp_path / "run", model={"name": "gpt2-silu"}, max_steps=3))
    assert len(read_rows(tmp_path / "run" / "metrics.jsonl")) == 3
    from models.base import _REGISTRY

    del _REGISTRY["gpt2-silu"], sys.modules["silu"]


@pytest.mark.parametrize("number, name", [(1, "LLAMA"), (2, "GPT2")])
def test_the_weights_of_the_guide_give_the_same_logits(number, name, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="needs Hugging Face transformers as the reference")
    monkeypatch.setattr("transformers.utils.import_utils._torchvision_available", False, raising=False)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    sizes = {
        "LLAMA": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"num_key_value_heads": 2, "rope_theta": 500.0, "rms_norm_eps": 1e-3, "initializer_range": 0.2},
        "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "initializer_range": 0.2},
    }
    kind = {"LLAMA": "Llama", "GPT2": "GPT2"}[name]
    config = getattr(transformers, f"{kind}Config")(vocab_size=97, **sizes[name])
    torch.manual_seed(0)
    model = getattr(transformers, {"LLAMA": "LlamaForCausalLM", "GPT2": "GPT2LMHeadModel"}[name])(config)
    model.save_pretrained(tmp_path)
    code = blocks("models/README.md", "python")[number]
    # Where transformers is imported first, this is what keeps it from a torchvision that does not fit.
    assert code.index('sys.modules["torchvision"] = None') < code.index("from transformers")
    (tmp_path / "guide.py").write_text(code.replace(f'"{name}"', repr(str(tmp_path))))
    found = runpy.run_path(str(tmp_path / "guide.py"))
    tokens = torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = found["ours"](tokens).logits, found["theirs"].eval()(tokens).logits
    # fp32 sums of some hundred terms in another order.
    assert (ours - theirs).abs().max() < 1e-4 < theirs.std()


@pytest.mark.parametrize("file", ["README.md", "models/README.md", "launch/README.md", "trainer/data/README.md"])
def test_links_and_files_exist(file):
    text = (ROOT / file).read_text()
    assert "@@" not in text
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (ROOT / file).parent.joinpath(target).exists(), target
    for config in re.findall(r"configs/[\w.-]+\.yaml", text):
        assert (ROOT / config).exists(), config


def test_commands_use_known_keys():
    """Every --key on a `python -m trainer` line of a guide is a key of that verb."""
    from trainer.commands import find_verbs
    from trainer.core.settings import leaf_keys

    verbs = find_verbs()
    found = 0
    for file in ("README.md", "models/README.md", "launch/README.md", "trainer/data/README.md"):
        for verb, rest in re.findall(r"-m trainer (\w+)([^`\n]*)", (ROOT / file).read_text()):
            if verb not in verbs:
                continue
            for key in re.findall(r"--([\w.]+)", rest):
                known = [*leaf_keys(verbs[verb].config), "help", "json", "print_config", "plugin"]
                assert key in known or key.startswith("model."), (file, verb, key)
                found += 1
    assert found > 5
