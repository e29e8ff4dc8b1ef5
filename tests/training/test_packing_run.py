"""Runs whose rows are documents: resuming, microbatches, what the plan says, and documents that are as if alone."""

import dataclasses
import shutil

import pytest
import torch
from conftest import tiny_values
from tiny_runs import losses, make, same, weights

from models.base import IGNORE, cross_entropy
from trainer.checkpoint.format import step_name
from trainer.core.config import PrepareConfig, RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import build
from trainer.data.prepare import prepare
from trainer.data.stream import find_dataset
from trainer.planning.plan import minimum_tokens, render, resolve, summary
from trainer.training.start import start
from trainer.training.step import microbatches, optimiser_step

LENGTH = 64


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """300 documents of 3 to 50 bytes."""
    folder = tmp_path_factory.mktemp("sentences")
    draw = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 16, (300,), generator=draw).tolist()
    rows = ["".join(f"{chr(97 + (i + k) % 26)}{k} " for k in range(size)) for i, size in enumerate(sizes)]
    (folder / "rows.jsonl").write_text("".join(f'{{"text": "{row}"}}\n' for row in rows))
    values = {"source": str(folder / "rows.jsonl"), "tokenizer": "bytes", "workers": 1, "sample_length": LENGTH}
    prepare(PrepareConfig(**values, validation_fraction=0.2, out=str(folder / "data")), lambda line: None)
    return folder / "data"


def changes(dataset, packing, model="llama", size=128, **more):
    """What a tiny run is changed by; size: tokens of a microbatch."""
    data = {"path": str(dataset), "packing": packing, "separate_documents": packing == "best_fit"}
    model = {"name": model, "d_model": 32, "n_layers": 2, "n_heads": 2, "max_context": LENGTH}
    batch = {"tokens_per_step": 512, "tokens_per_microbatch": size, "sequence_length": LENGTH}
    return {"data": data, "model": model, "batch": batch, "max_steps": 6, **more}


def planned(dataset, folder, packing, **more):
    config = build(RunConfig, tiny_values(dataset, folder, **changes(dataset, packing, **more)))
    return resolve(config, find_dataset(config.data))


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_a_run_that_goes_on_is_the_uninterrupted_one(sentences, tmp_path, packing):
    """From its checkpoint of step 4."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    start(tiny_values(sentences, whole, **changes(sentences, packing)))
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / step_name(6))
    start({"run_dir": str(parts)})
    assert losses(parts) == losses(whole) and same(weights(parts, 6), weights(whole, 6))


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_each_packed_document_is_as_if_alone(sentences, tmp_path, model):
    """Logits and gradients, for learned positions (gpt2) and rotary ones; the loss of the engine is that of the documents."""
    run = make(sentences, tmp_path, **changes(sentences, "best_fit", model))
    batch = run.read(LENGTH, 4)
    assert batch["documents"].max() >= 2
    packed = run.model(batch["tokens"], documents=batch["documents"]).logits
    nats = torch.zeros(())
    for row in range(4):
        for number in batch["documents"][row].unique():
            here = batch["documents"][row] == number
            tokens, targets = batch["tokens"][row][here][None], batch["targets"][row][here][None]
            if (targets == IGNORE).all():
                continue
            alone = run.model(tokens).logits
            torch.testing.assert_close(packed[row][here][None], alone, rtol=0, atol=1e-5)
            nats = nats + cross_entropy(alone, targets, "sum")
    nats.backward()
    expected = {name: value.grad.clone() for name, value in run.model.named_parameters()}
    run.model.zero_grad()
    loss = run.engine.backward(batch, 1.0, True)[0]
    torch.testing.assert_close(loss, nats.detach(), rtol=1e-6, atol=0)
    for name, value in run.model.named_parameters():
        scale = max(1.0, expected[name].abs().max().item())
        torch.testing.assert_close(value.grad / scale, expected[name] / scale, rtol=0, atol=1e-5)
    run.stream.close()


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_a_step_counts_its_tokens_and_means_over_its_targets(sentences, tmp_path, packing):
    """Microbatches of 2 rows and one of all 8 give the same loss: the mean over targets, not over places."""
    found = []
    for size in (128, 512):
        run = make(sentences, tmp_path / str(size), **changes(sentences, packing, size=size))
        tokens = run.stream.tokens(0, LENGTH, 8)
        parts = microbatches(run, run.read(LENGTH, 8), LENGTH, 8)
        widths = [part["tokens"].shape[1] for part in parts]
        result = optimiser_step(run)
        assert result.tokens == result.step_tokens == tokens < 512
        assert run.state.position == 512
        assert packing == "best_fit" or min(widths) < LENGTH  # as wide as its own rows
        found.append((result.loss, result.grad_norm))
        run.stream.close()
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_the_plan_knows_epochs_and_padding(sentences, tmp_path, packing):
    plan = planned(sentences, tmp_path, packing, max_steps=None, epochs=2)
    facts = summary(plan)
    stream = make(sentences, tmp_path, **changes(sentences, packing)).stream
    assert facts["padding"] == stream.rows.padding() and plan.epoch.tokens == stream.rows.tokens
    assert abs(plan.config.max_steps * 8 - 2 * stream.rows.count) <= 4  # to the nearest step
    assert facts["epochs_at_least"] == pytest.approx(minimum_tokens(plan) / plan.epoch.tokens)
    assert stream.epoch(plan.config.max_steps * 512) == pytest.approx(facts["epochs_at_least"], rel=1e-4)
    (row,) = [line for line in render(plan).splitlines() if line.startswith("padding ")]
    assert f"{facts['padding']:.2%}" in row and f"of {stream.rows.count} rows" in row
    tokens = planned(sentences, tmp_path, packing, max_steps=None, tokens=5000)
    assert abs(minimum_tokens(tokens) - 5000) <= 256
    stream.close()


def test_what_cannot_be_packed_is_refused(sentences, tmp_path):
    plan = planned(sentences, tmp_path, "best_fit")
    growing = dataclasses.replace(plan.config.batch, sequence_start=16)
    dataset = find_dataset(plan.config.data)
    with pytest.raises(UserError, match="batch.sequence_start: 16, but rows of data.packing best_fit do not grow"):
        resolve(dataclasses.replace(plan.config, batch=growing), dataset)
    config = dataclasses.replace(plan.config, objective={"name": "dpo", "loss": "simpo"})
    pairs = dataclasses.replace(dataset, records="preference")
    with pytest.raises(UserError, match="data.packing: best_fit would tear the pairs of preference data"):
        resolve(config, pairs)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, packing="auto"))
    plan = resolve(config, pairs)
    assert plan.config.data.packing == "none" and plan.texts_per_row == 2


def test_auto_is_concat_for_text(sentences, tmp_path):
    plan = planned(sentences, tmp_path, "auto")
    assert plan.config.data.packing == "concat" and "padding" not in {entry.key for entry in plan.entries}
