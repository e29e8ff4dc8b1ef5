"""`prepare --teacher`: what is stored beside a token is what the teacher predicted of it, and distillation from it is that from the
teacher itself."""

import numpy as np
import pytest
import torch
from conftest import open_split, tiny_values, words_text
from tiny_runs import make

from trainer.commands.prepare import run as prepare_run
from trainer.commands.train import run
from trainer.core.config import PrepareConfig
from trainer.core.errors import UserError
from trainer.data.dataset import TEACHER_IDS, TEACHER_LOG_PROBS
from trainer.runs.opening import open_run

GPT2 = {"name": "gpt2", "n_layers": 1, "d_model": 16, "n_heads": 2}
LENGTH, K = 64, 5


@pytest.fixture(scope="module")
def teacher(tiny_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "run"
    # Small weights: the logits that two steps leave to the padding of the vocabulary are then no matter. Only what is stored lacks them.
    run(tiny_values(tiny_dataset, folder, model=GPT2 | {"init_std": 0.02}, max_steps=2, optim={"lr": 1e-2}))
    return folder


def prepared(folder, **changes):
    (folder / "texts").mkdir(parents=True)
    for i in range(8):
        (folder / "texts" / f"{i}.txt").write_text(words_text(i, 150))
    settings = {"source": str(folder / "texts"), "tokenizer": "bytes", "validation_fraction": 0.2, "workers": 1}
    settings |= {"sample_length": LENGTH, "teacher_top_k": K, "out": str(folder / "data")}
    prepare_run(PrepareConfig(**settings | changes))
    return folder / "data"


@pytest.fixture(scope="module")
def data(teacher, tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("stored") / "d", teacher=str(teacher))


def test_what_is_stored_beside_a_token_is_what_was_predicted_of_it(data, teacher):
    """In every sample, also in the last, shorter one, and for the token that two samples share."""
    model = open_run(str(teacher), None, "cpu", "fp32").model
    split = open_split(data)
    shared = np.zeros((1, K))
    for number in (*range(10), split.counts.samples - 1):
        sample = split.sample(number)
        with torch.no_grad():
            logits = model(torch.from_numpy(sample["tokens"].astype(np.int64))[None, :-1]).logits[0, :, :257]
        predicted = logits.log_softmax(-1)
        ids = torch.from_numpy(sample[TEACHER_IDS][1:].astype(np.int64))
        assert sample[TEACHER_IDS].dtype == np.uint16 and sample[TEACHER_LOG_PROBS].dtype == np.float16
        # The K most likely, in order: two that are equal but for rounding may change places, as `prepare` read another batch.
        np.testing.assert_allclose(predicted.gather(-1, ids).numpy(), predicted.topk(K).values.numpy(), rtol=2**-20)
        assert all(len(set(row)) == K for row in ids.tolist())
        # float16 holds 11 bits: half a unit in the last place is 2^-11 of the value.
        np.testing.assert_allclose(sample[TEACHER_LOG_PROBS][1:], predicted.gather(-1, ids).numpy(), rtol=2**-11 + 1e-5)
        if number < 10:
            assert np.array_equal(sample[TEACHER_IDS][:1], shared)
            shared = sample[TEACHER_IDS][-1:]


def test_distillation_from_what_is_stored_is_that_from_the_teacher(data, teacher, tmp_path):
    """Windows of whole samples, where both read the same context. A log-probability of about -6 is off by 2^-9 at most, and so is
    the loss."""
    losses = []
    for source in ({}, {"teacher": str(teacher)}):
        objective = {"name": "distill", "top_k": K, "alpha": 1.0, "temperature": 2.0, **source}
        batch = {
            "tokens_per_step": 256,
            "tokens_per_microbatch": 128,
            "sequence_length": LENGTH,
            "sequence_start": LENGTH,
        }
        one = make(data, tmp_path / "r", model=GPT2, objective=objective, batch=batch, seed=3)
        rows = one.read(LENGTH, 2)
        losses.append(one.engine.backward(rows, 1 / 128, True)[0].item())
        one.stream.close()
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    run(tiny_values(data, tmp_path / "r", model=GPT2, objective={"name": "distill"}, max_steps=4))


def test_what_cannot_be_is_one_line(tiny_dataset, teacher, tmp_path):
    for number, (changes, why) in enumerate(
        (
            ({"tokenizer": "chars"}, r"^teacher: .*texts was prepared with tokenizer chars"),
            ({"teacher": "nowhere"}, r"^teacher: nowhere is not a run's folder"),
            ({"sample_length": 2048}, r"^teacher: .* reads 1024 tokens at most; set sample_length \(2048\)"),
        )
    ):
        with pytest.raises(UserError, match=why):
            prepared(tmp_path / str(number), **{"teacher": str(teacher), **changes})
        assert not (tmp_path / str(number) / "data").exists()
    with pytest.raises(UserError, match="^objective.teacher: name a model, or prepare the data with --teacher"):
        make(tiny_dataset, tmp_path / "r", model=GPT2, objective={"name": "distill"})
