"""What the guides show is what works."""

import re
import sys

import pytest
from conftest import ROOT, tiny_values

from trainer.__main__ import import_plugins
from trainer.metrics.record import read_rows
from trainer.train import run


def blocks(file, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / file).read_text(), re.DOTALL)


def test_the_model_of_the_guide_trains(tiny_dataset, tmp_path, monkeypatch):
    [code] = blocks("models/README.md", "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 11, "ten lines and a title"
    (tmp_path / "silu.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    import_plugins(["silu"])
    run(tiny_values(tiny_dataset, tmp_path / "run", model={"name": "gpt2-silu"}, max_steps=3))
    assert len(read_rows(tmp_path / "run" / "metrics.jsonl")) == 3
    from models.base import _REGISTRY

    del _REGISTRY["gpt2-silu"], sys.modules["silu"]


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
    from trainer.config import EvaluateConfig, GenerateConfig, PrepareConfig, RunConfig
    from trainer.settings import leaf_keys

    schemas = {"prepare": PrepareConfig, "plan": RunConfig, "train": RunConfig, "generate": GenerateConfig,
               "evaluate": EvaluateConfig}  # fmt: skip
    found = 0
    for file in ("README.md", "models/README.md", "launch/README.md", "trainer/data/README.md"):
        for verb, rest in re.findall(r"-m trainer (\w+)([^`\n]*)", (ROOT / file).read_text()):
            if verb not in schemas:
                continue
            for key in re.findall(r"--([\w.]+)", rest):
                known = [*leaf_keys(schemas[verb]), "help", "json", "print_config", "plugin"]
                assert key in known or key.startswith("model."), (file, verb, key)
                found += 1
    assert found > 5
