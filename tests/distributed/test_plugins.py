"""Plug-ins of a user train on one device, and on two processes the same: models, parts of them, objectives."""

import processes
import pytest
from cases import start
from conftest import ROOT, beyond, tiny_values

from trainer.runs.metrics import read_rows

SMALL = {"name": "gpt2", "d_model": 32, "n_layers": 2, "n_heads": 2}
PLUGINS = {
    "label_smoothing": {"model": SMALL, "objective": {"name": "label_smoothing", "smoothing": 0.2}},
    "masked": {"model": SMALL, "objective": {"name": "masked"}},
    "convolution": {"model": {"name": "convolution", "d_model": 32, "n_layers": 2}},
    "temperature": {"model": {**SMALL, "attention": "temperature"}},
    "mish": {"model": {**SMALL, "mlp": "mish"}},
}
SAMPLE = [
    ("label_smoothing", "fsdp"),
    ("masked", "ddp"),
    ("convolution", "fsdp"),
    ("temperature", "ddp"),
    ("mish", "fsdp"),
]
CASES = [(name, strategy) for name in PLUGINS for strategy in ("ddp", "fsdp")]


@pytest.mark.parametrize(("name", "other"), beyond(SAMPLE, CASES, several=True))
def test_a_plugin_trains_the_same_everywhere(name, other, tiny_dataset, tmp_path):
    losses, started = {}, {}
    for strategy in ("single", other):
        values = tiny_values(
            tiny_dataset, tmp_path / strategy, engine={"strategy": strategy}, max_steps=3, **PLUGINS[name]
        )
        values["log"]["sample_tokens"] = 4
        plugins = (ROOT / "tests" / "plugins" / f"{name}.py",)
        started[strategy] = start(values, 1 if strategy == "single" else 2, plugins=plugins)
    for strategy, config in started.items():
        ended = processes.wait(config)
        assert not any(ended.codes), ended.said
        rows = read_rows(tmp_path / strategy / "metrics.jsonl")
        losses[strategy] = [
            value for row in rows for value in (row["loss"], row["grad_norm"], row["val_loss"]) if value
        ]
    assert len(losses["single"]) == 7
    assert losses[other] == pytest.approx(losses["single"], rel=1e-4)
