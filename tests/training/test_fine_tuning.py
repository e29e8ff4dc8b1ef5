"""Runs on chat and preference data: what they train on and measure."""

import json
import math
import shutil

import pytest
import torch
from conftest import tiny_values
from tiny_runs import losses, make, same, weights

from models.base import IGNORE
from trainer.checkpoint.format import step_name
from trainer.commands.evaluate import EvaluateConfig
from trainer.commands.evaluate import run as evaluate
from trainer.commands.generate import GenerateConfig
from trainer.commands.generate import run as generate
from trainer.commands.train import run
from trainer.core.config import DataConfig, PrepareConfig, RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import build
from trainer.data.dataset import LOSS_MASK
from trainer.data.prepare import prepare
from trainer.data.stream import find_dataset
from trainer.inference.evaluation import validate
from trainer.planning.plan import render, resolve
from trainer.runs.metrics import read_rows

WORDS = ("red", "blue", "green", "pink")


def prepared(folder, records, rows):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"tokenizer": "bytes", "workers": 1, "sample_length": 64, "validation_fraction": 0.1}
    prepare(
        PrepareConfig(source=str(folder / "rows.jsonl"), out=str(folder / "data"), records=records, **options),
        lambda line: None,
    )
    return folder / "data"


FULL_ROWS = {"batch__sequence_start": 64}  # rows of documents do not grow


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A word is answered in capitals within brackets."""
    rows = [{"prompt": WORDS[i % 4] * (1 + i % 3), "completion": f"[{WORDS[i % 4].upper()}]"} for i in range(64)]
    return prepared(tmp_path_factory.mktemp("chat"), "chat", rows)


@pytest.fixture(scope="module")
def preference(tmp_path_factory):
    """The same, and the worse answer shouts."""
    pairs = [(word, f"[{word.upper()}]", f"[{word.upper()}]" + "!" * i) for word in WORDS for i in range(1, 9)]
    rows = [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in pairs]
    return prepared(tmp_path_factory.mktemp("preference"), "preference", rows)


def test_what_an_objective_cannot_train_on_is_one_line(chat, preference, tiny_dataset, tmp_path):
    def plan(dataset, name):
        config = build(RunConfig, tiny_values(dataset, tmp_path, objective={"name": name}, **FULL_ROWS))
        return resolve(config, find_dataset(config.data))

    with pytest.raises(
        UserError, match="objective.name: sft trains on chat data, and .* is text; prepare data with --records"
    ):
        plan(tiny_dataset, "sft")
    with pytest.raises(UserError, match="objective.name: dpo trains on preference data, and .* is chat"):
        plan(chat, "dpo")
    with pytest.raises(UserError, match="objective.name: next_token trains on text or chat data, and .* is preference"):
        plan(preference, "next_token")
    assert "trains on prompts and answers alike" in render(plan(chat, "next_token"))
    assert "trains on prompts and answers alike" not in render(plan(chat, "sft"))


def test_validation_measures_the_answers_of_each_document_alone(chat, tmp_path):
    one = make(chat, tmp_path, objective={"name": "sft"}, **FULL_ROWS)
    split = one.validation
    found = validate(one.engine, split, one.config, one.world, 0)["full"]
    nats = count = start = 0
    for length in split.lengths().tolist():
        tokens = torch.from_numpy(split.read(start, length))
        mask = torch.from_numpy(split.read(start, length, LOSS_MASK)) != 0
        with torch.no_grad():
            logits = one.model.eval()(tokens[None, :-1]).logits[0].double()
        targets = tokens[1:].where(mask[1:], IGNORE)
        nats += torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum").item()
        count, start = count + int(mask.sum()), start + length
    assert found["tokens"] == count
    assert found["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert found["bits_per_byte_is_estimate"] and found["windows"] == split.counts.documents
    one.stream.close()


def test_the_windows_of_hlb_are_refused(chat, tmp_path):
    with pytest.raises(UserError, match="evaluation.protocol: the windows of hlb are of text, and the data are chat"):
        make(chat, tmp_path, objective={"name": "sft"}, evaluation={"protocol": "hlb"}, **FULL_ROWS)


def test_sft_goes_on_bit_for_bit(chat, tmp_path):
    values = tiny_values(
        chat, tmp_path / "run", objective={"name": "sft"}, max_steps=4, checkpoint={"every": 2, "keep": 9}, **FULL_ROWS
    )
    run(values)
    whole, rows = weights(tmp_path / "run", 4), losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / step_name(4))
    run(values)
    assert same(weights(tmp_path / "run", 4), whole) and losses(tmp_path / "run") == rows
    assert read_rows(tmp_path / "run" / "metrics.jsonl")[-1]["val_loss"] > 0


TUNED = {
    "batch": {"tokens_per_step": 1024, "tokens_per_microbatch": 1024, "sequence_length": 64},
    "checkpoint": {"every": 0},
    "log": {"every": 0, "demo_tokens": 0, "sample_tokens": 0},
}


@pytest.fixture(scope="module")
def tuned(chat, tmp_path_factory):
    """A small model that was fine-tuned until it knows the answers."""
    folder = tmp_path_factory.mktemp("tuned") / "run"
    model = {"name": "llama", "d_model": 64, "n_layers": 2, "n_heads": 2}
    objective, optim = {"name": "sft"}, {"lr": 3e-3}
    run(tiny_values(chat, folder, model=model, objective=objective, optim=optim, max_steps=120, **TUNED))
    return folder


def evaluated(capsys, folder, **changes):
    capsys.readouterr()
    evaluate(EvaluateConfig(run_dir=str(folder), **changes), as_json=True)
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_a_model_that_is_fine_tuned_answers_in_its_format(tuned, capsys):
    """An answer is the prompt's word in capitals, within brackets, and ends there."""
    for word in WORDS:
        capsys.readouterr()
        generate(GenerateConfig(run_dir=str(tuned), prompt=[word * 2], chat=True, temperature=0, max_new_tokens=20))
        assert capsys.readouterr().out == f"[{word.upper()}]\n"
    report = evaluated(capsys, tuned)
    assert "hlb" not in report and report["full"]["accuracy"] > 0.95
    last = read_rows(tuned / "metrics.jsonl")[-1]
    assert report["full"]["loss"] == pytest.approx(last["val_loss"], rel=1e-4)


@pytest.mark.slow
def test_dpo_raises_the_margin_and_keeps_the_held_out_loss(tuned, preference, tmp_path, capsys):
    """From ln 2, where the model is its reference. The better answers of the validation split may lose 0.1 nats a token."""
    before = evaluated(capsys, tuned, data=DataConfig(path=str(preference)))["full"]["loss"]
    values = tiny_values(preference, tmp_path / "run", objective={"name": "dpo"}, max_steps=12, **TUNED)
    del values["model"], values["model_scale"]
    run(values | {"init_from": str(tuned), "optim": {"lr": 3e-4, "warmup_steps": 2}})
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert rows[0]["loss_margin"] == pytest.approx(0, abs=1e-5)
    last = rows[-1]
    assert last["val_objective_margin"] > 0.05 and last["val_objective_accuracy"] > 0.9
    assert last["val_objective_loss"] < math.log(2)
    assert last["val_loss"] < before + 0.1


def test_a_reference_is_named_or_begun_with(preference, tmp_path):
    def plan(**changes):
        config = build(RunConfig, tiny_values(preference, tmp_path, **FULL_ROWS, **changes))
        return resolve(config, find_dataset(config.data))

    with pytest.raises(UserError, match="objective.reference: name a model"):
        plan(objective={"name": "dpo"})
    with pytest.raises(UserError, match="objective.reference: the run begins with the ema weights of init_from"):
        plan(objective={"name": "dpo"}, init_from="anything", init_weights="ema")
    simpo = plan(objective={"name": "dpo", "loss": "simpo"})
    assert not simpo.frozen and simpo.texts_per_row == 2


def test_only_a_run_on_messages_chats(finished):
    with pytest.raises(UserError, match="chat: .*: its data are text without a chat template"):
        generate(GenerateConfig(run_dir=str(finished), prompt=["a"], chat=True))
    with pytest.raises(UserError, match="prompt: --chat answers a message; give one"):
        generate(GenerateConfig(run_dir=str(finished), chat=True))


def test_a_conversation_is_one_document_whatever_ends_its_answers(tmp_path):
    turns = [{"role": role, "content": role[0] * 2} for role in ("user", "assistant") * 2]
    dataset = prepared(tmp_path, "chat", [{"messages": turns}] * 6)
    model = {"name": "llama", "n_layers": 1, "d_model": 16, "n_heads": 2}

    def plan(packing):
        data = {"path": str(dataset), "separate_documents": True, "packing": packing}
        values = tiny_values(dataset, tmp_path, model=model, objective={"name": "sft"}, **FULL_ROWS)
        config = build(RunConfig, values | {"data": data})
        return resolve(config, find_dataset(config.data))

    assert plan("none").end_of_text is None and plan("best_fit").end_of_text is None
    with pytest.raises(UserError, match="data.separate_documents: in rows of packing concat .* so does each answer"):
        plan("concat")
