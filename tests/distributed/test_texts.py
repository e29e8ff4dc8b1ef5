"""Texts in the middle of a run whose weights are in shards: gathered once, and the run goes on as if there were none."""

import json
from pathlib import Path

import pytest
import torch
from cases import matrix_values, train_cases

from trainer.checkpoint import format as checkpoint
from trainer.runtime.distributed import World

pytestmark = pytest.mark.slow

# By these DeepSpeed leaves weights whole that are as few as here.
KEEPS = ("param_persistence_threshold", "max_reuse_distance", "prefetch_bucket_size")


def test_fsdp_gathers_each_block_once_for_a_text_and_trains_on_bit_for_bit(tiny_dataset, tmp_path):
    def case(name, strategy="fsdp", **more):
        folder = tmp_path / name
        return {
            "name": name,
            "values": matrix_values(tiny_dataset, folder, "gpt2", strategy),
            "save": str(folder),
            **more,
        }

    texts = [10, 40]
    cases = [case("none", steps=4), case("texts", steps=4, texts=texts), case("two steps", steps=2)]
    results = train_cases(cases, 2, tmp_path)
    ours, calm = results["texts"], results["none"]
    # Three blocks and what is outside of them, once more before the first text for the trial of the cache at most.
    assert 0 < ours["gathers"][1] <= ours["gathers"][0] <= 2 * 4, "a longer text gathers no more"
    assert [ours[key] for key in ("loss", "grad_norm")] == [calm[key] for key in ("loss", "grad_norm")]
    mine, expected = (
        checkpoint.load(tmp_path / name / "checkpoints" / checkpoint.step_name(4), "", World())
        for name in ("texts", "none")
    )
    assert mine.keys() == expected.keys() and all(torch.equal(mine[key], expected[key]) for key in expected)
    alone = case("alone", "single", steps=1, texts=texts, load=str(tmp_path / "two steps"))
    assert train_cases([alone], 1, tmp_path)["alone"]["texts"] == ours["texts"]


def test_zero3_gathers_once_for_a_text_and_trains_on_bit_for_bit(tiny_dataset, tmp_path):
    def case(name, strategy="zero3", precision="fp32", keeps=False, **more):
        folder = tmp_path / name
        values = matrix_values(tiny_dataset, folder, "gpt2", strategy, precision=precision)
        if keeps:
            del values["engine"]["deepspeed_config"]
        elif strategy == "zero3":
            settings = {"zero_optimization": {f"stage3_{key}": 0 for key in KEEPS}}
            Path(values["engine"]["deepspeed_config"]).write_text(json.dumps(settings))
        return {"name": name, "values": values, "save": str(folder), "steps": 4, **more}

    texts = [10, 40]
    cases = [
        case("none"),
        case("texts", texts=texts),
        case("bf16 none", precision="bf16", keeps=True),
        case("bf16 texts", precision="bf16", keeps=True, texts=texts),
        case("two steps", steps=2),
    ]
    results = train_cases(cases, 2, tmp_path)
    for name in ("", "bf16 "):
        ours, calm = results[f"{name}texts"], results[f"{name}none"]
        assert ours["gathers"][0] == ours["gathers"][1] < 60, "as many for a longer text: one for each weight"
        assert [ours[key] for key in ("loss", "grad_norm")] == [calm[key] for key in ("loss", "grad_norm")]
        mine, expected = (
            checkpoint.load(tmp_path / case / "checkpoints" / checkpoint.step_name(4), "", World())
            for case in (f"{name}texts", f"{name}none")
        )
        assert mine.keys() == expected.keys()
        assert all(torch.equal(mine[key], expected[key]) for key in expected)
    alone = case("alone", "single", steps=1, texts=texts, load=str(tmp_path / "two steps"))
    assert train_cases([alone], 1, tmp_path)["alone"]["texts"] == results["texts"]["texts"]
