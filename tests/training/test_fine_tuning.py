"""Runs on chat and preference data: what they train on and measure."""

import json
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
from trainer.core.config import PrepareConfig, RunConfig
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
    """The better answer is short."""
    rows = [
        {"prompt": WORDS[i % 4], "chosen": f"[{WORDS[i % 4]}]", "rejected": f"[{WORDS[i % 4]}]" + "!" * (1 + i % 5)}
        for i in range(64)
    ]
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


@pytest.mark.slow
def test_a_model_that_is_fine_tuned_answers_in_its_format(chat, tmp_path, capsys):
    """An answer is the prompt's word in capitals, within brackets, and ends there."""
    folder = tmp_path / "run"
    run(
        tiny_values(
            chat,
            folder,
            model={"name": "llama", "d_model": 64, "n_layers": 2, "n_heads": 2},
            objective={"name": "sft"},
            max_steps=150,
            optim={"lr": 3e-3},
            batch={"tokens_per_step": 1024, "tokens_per_microbatch": 1024, "sequence_length": 64},
            checkpoint={"every": 0},
        )
    )
    capsys.readouterr()
    for word in WORDS:
        generate(GenerateConfig(run_dir=str(folder), prompt=[word * 2], chat=True, temperature=0, max_new_tokens=20))
        assert capsys.readouterr().out == f"[{word.upper()}]\n"
    evaluate(EvaluateConfig(run_dir=str(folder)), as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert "hlb" not in report and report["full"]["accuracy"] > 0.95
    last = read_rows(folder / "metrics.jsonl")[-1]
    assert report["full"]["loss"] == pytest.approx(last["val_loss"], rel=1e-4)


def test_only_a_run_on_messages_chats(finished):
    with pytest.raises(UserError, match="chat: .*: its data are text without a chat template"):
        generate(GenerateConfig(run_dir=str(finished), prompt=["a"], chat=True))
    with pytest.raises(UserError, match="prompt: --chat answers a message; give one"):
        generate(GenerateConfig(run_dir=str(finished), chat=True))
