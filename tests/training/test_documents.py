"""`data.separate_documents`: training, validation, the bare loop and the plan keep documents apart; elsewhere nothing does."""

import dataclasses
import itertools

import pytest
import torch
from conftest import tiny_values

from models.base import IGNORE, cross_entropy, get_model
from trainer.commands.bench.baselines import BareLoop
from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import build
from trainer.data.documents import document_numbers
from trainer.data.stream import Split, find_dataset
from trainer.engine.torch_engine import TorchEngine
from trainer.inference import evaluation as evaluate
from trainer.planning.memory import expected_memory
from trainer.planning.plan import resolve
from trainer.runtime.distributed import World

WORLD = World()
MODEL = {"name": "llama", "d_model": 64, "n_layers": 2, "n_heads": 2, "max_context": 64}


@pytest.fixture(scope="module")
def planned(tiny_dataset, tmp_path_factory):
    """(dataset, {whether documents are separate: the plan})."""
    data = {"path": str(tiny_dataset)}
    values = tiny_values(tiny_dataset, tmp_path_factory.mktemp("r"), model=MODEL)
    configs = {on: build(RunConfig, values | {"data": data | {"separate_documents": on}}) for on in (True, False)}
    dataset = find_dataset(configs[True].data)
    return dataset, {on: resolve(config, dataset) for on, config in configs.items()}


def test_the_end_is_the_last_token_of_its_document():
    tokens = torch.tensor([[5, 9, 9, 1, 2], [1, 2, 3, 4, 9]])
    assert document_numbers(tokens, 9).tolist() == [[0, 0, 1, 2, 2], [0, 0, 0, 0, 0]]
    assert document_numbers(tokens, None) is None


def test_in_training_a_document_does_not_see_the_one_before(planned):
    dataset, plans = planned
    ends = 20
    rows = torch.randint(97, 123, (2, 65), generator=torch.Generator().manual_seed(0))  # letters
    rows[:, ends] = dataset.tokenizer.eot_id
    targets = rows[:, 1:].clone()
    targets[:, : ends + 1] = IGNORE  # the first token of a document is predicted from the end of the one before
    other = rows.clone()
    other[:, :ends] = other[:, :ends].flip(1)
    for on, plan in plans.items():
        engine = TorchEngine(plan, WORLD)
        first, second = (
            engine.backward({"tokens": tokens[:, :-1], "targets": targets}, 1.0, True)[0] for tokens in (rows, other)
        )
        assert (first == second) == on


def test_validation_is_of_documents_on_their_own(planned):
    """Here each word is a document, by a space as its end: a document of the data has more tokens than a window."""
    dataset, plans = planned
    split, space = Split(plans[True].config.data, dataset, "validation"), ord(" ")
    engine, length, nats = TorchEngine(plans[True], WORLD), 64, 0.0
    assert engine.plan.end_of_text == dataset.tokenizer.eot_id
    engine.plan = dataclasses.replace(plans[True], end_of_text=space)
    for start in range(0, 10 * length, length):
        window = torch.from_numpy(split.read(start, length + 1))
        ends = (window[:-1] == space).nonzero().flatten() + 1
        for first, after in itertools.pairwise(sorted({0, *ends.tolist(), length})):
            with torch.no_grad():
                logits = engine.model(window[None, first:after]).logits
            nats += cross_entropy(logits, window[None, first + 1 : after + 1], "sum").item()
    apart = evaluate.full(engine, split, length, WORLD, max_tokens=10 * length)
    assert apart["tokens"] == 10 * length
    assert apart["loss"] == pytest.approx(nats / apart["tokens"], rel=1e-5)  # fp32 sums of 64 terms: 64 * 2^-24 = 4e-6
    random = evaluate.hlb(engine, split, 8.0, WORLD, seed=0, step=0)
    engine.plan = plans[False]
    together = evaluate.full(engine, split, length, WORLD, max_tokens=10 * length)
    assert abs(together["loss"] / apart["loss"] - 1) > 1e-3
    assert abs(evaluate.hlb(engine, split, 8.0, WORLD, seed=0, step=0)["loss"] / random["loss"] - 1) > 1e-3


def test_the_bare_loop_has_the_loss_of_the_engine(planned):
    dataset, plans = planned
    losses = []
    for plan in plans.values():
        baseline = BareLoop("peer", plan, dataset, WORLD, torch.device("cpu"))
        baseline.build()
        rows = baseline.read()[:2]
        rows[:, 20] = dataset.tokenizer.eot_id
        losses.append(baseline.forward(rows).item())
        batch = {"tokens": rows[:, :-1], "targets": rows[:, 1:]}
        baseline.close()
        assert losses[-1] == TorchEngine(plan, WORLD).backward(batch, 1.0, True)[0]
    assert losses[0] != losses[1]


def test_the_plan_counts_what_masks_hold(planned):
    apart, together = (expected_memory(planned[1][on])["activations"] for on in (True, False))
    assert apart > together


def test_a_model_that_does_not_mask_is_refused(planned, monkeypatch):
    dataset, plans = planned
    monkeypatch.setattr(get_model("llama"), "masks_documents", False)
    with pytest.raises(UserError, match="data.separate_documents: llama does not mask documents"):
        resolve(plans[True].config, dataset)
    assert resolve(plans[False].config, dataset).end_of_text is None
