"""Both protocols against arithmetic done by hand."""

import contextlib
import json
import math

import pytest
import torch
from conftest import tiny_values

from trainer.commands import evaluate as verb
from trainer.commands.evaluate import render
from trainer.core.config import PrepareConfig, RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import build
from trainer.data.prepare import prepare
from trainer.data.stream import Split, find_dataset
from trainer.engine.torch_engine import TorchEngine
from trainer.inference import evaluation as evaluate
from trainer.planning.plan import resolve
from trainer.runs.opening import open_run
from trainer.runtime.distributed import World
from trainer.runtime.signals import StopSignals
from trainer.runtime.watchdog import Watchdog
from trainer.training.run import Run

WORLD = World()


@pytest.fixture(scope="module")
def engine_and_split(tiny_dataset, tmp_path_factory):
    config = build(RunConfig, tiny_values(tiny_dataset, tmp_path_factory.mktemp("r")))
    info = find_dataset(config.data)
    return TorchEngine(resolve(config, info), WORLD), Split(config.data, info, "validation")


def by_hand(model, split, length):
    """One window at a time; sum of -log p of every token but the first."""
    tokens = torch.from_numpy(split.read(0, split.counts.tokens))
    nats, right = 0.0, 0
    for start in range(0, len(tokens) - 1, length):
        window = tokens[start : start + length + 1]
        with torch.no_grad():
            logits = model(window[None, :-1]).logits[0].double()
        nats -= logits.log_softmax(-1).gather(1, window[1:, None]).sum().item()
        right += (logits.argmax(-1) == window[1:]).sum().item()
    return nats, right


@pytest.mark.parametrize("length", [64, 100])
def test_full_protocol(engine_and_split, length, monkeypatch):
    engine, split = engine_and_split
    nats, right = by_hand(engine.model, split, length)
    count = split.counts.tokens - 1
    share = count / split.counts.tokens
    for rows in (1, 7, 1000):  # however many windows go through at once
        monkeypatch.setattr(evaluate, "rows_at_once", lambda *_, rows=rows: rows)
        result = evaluate.full(engine, split, length, WORLD)
        assert result["loss"] == pytest.approx(nats / count, rel=1e-5)
        assert result["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
        assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / split.counts.bytes / share, rel=1e-5)
        assert result["word_perplexity"] == pytest.approx(math.exp(nats / split.counts.words / share), rel=1e-3)
        assert result["accuracy"] == pytest.approx(right / count)
        assert (result["tokens"], result["windows"]) == (count, -(-count // length))


def test_hlb_protocol_is_seeded(engine_and_split):
    engine, split = engine_and_split
    first = evaluate.hlb(engine, split, 1.0, WORLD, seed=1, step=50)
    assert first == evaluate.hlb(engine, split, 1.0, WORLD, seed=1, step=50)
    assert first["loss"] != evaluate.hlb(engine, split, 1.0, WORLD, seed=1, step=100)["loss"]
    assert first["loss"] != evaluate.hlb(engine, split, 1.0, WORLD, seed=2, step=50)["loss"]
    assert first["windows"] == 150


def test_evaluation_leaves_the_model_in_training(engine_and_split):
    engine, split = engine_and_split
    engine.model.train()
    evaluate.full(engine, split, 64, WORLD, max_tokens=64)
    assert engine.model.training
    assert all(parameter.grad is None for parameter in engine.model.parameters())


def test_window_count_of_the_original_validation_text():
    """247,289 tokens (WikiText-103 raw by public reports): 241 whole windows of 1024, and the tail."""
    from trainer.data.stream import ordered_windows

    class Counted:
        class counts:
            tokens = 247_289

    windows = list(ordered_windows(Counted, 1024))
    assert sum(count == 1024 for _, count in windows) == 241
    assert sum(count for _, count in windows) == 247_288


def test_a_split_of_two_tokens_has_one_target_and_no_random_windows(tiny_dataset, tmp_path):
    (tmp_path / "train.txt").write_text("the cat sat on a mat and ran far away " * 20)
    (tmp_path / "one.txt").write_text("a")
    prepare(
        PrepareConfig(
            source=str(tmp_path / "train.txt"),
            validation_source=str(tmp_path / "one.txt"),
            tokenizer="bytes",
            sample_length=64,
            out=str(tmp_path / "data"),
            workers=1,
        ),
        lambda line: None,
    )
    config = build(RunConfig, tiny_values(tmp_path / "data", tmp_path / "r", evaluation__protocol="hlb"))
    info = find_dataset(config.data)
    split = Split(config.data, info, "validation")
    result = evaluate.full(TorchEngine(resolve(config, info), WORLD), split, 64, WORLD)
    assert result["tokens"] == 1 and math.isfinite(result["loss"]) and result["bits_per_byte_is_estimate"]
    for protocol in ("hlb", "both"):
        with pytest.raises(UserError, match=f"^protocol: {protocol} needs at least 3 tokens, .* has 2; prepare more"):
            evaluate.check_enough(split, protocol, "protocol")
    with (
        contextlib.closing(Watchdog(WORLD, 600)) as watchdog,
        pytest.raises(UserError, match="^evaluation.protocol: hlb"),
    ):
        Run(resolve(config, info), WORLD, info, watchdog, StopSignals(WORLD))


def test_the_report_says_what_is_an_estimate(engine_and_split):
    engine, split = engine_and_split
    whole, part = (evaluate.full(engine, split, 64, WORLD, tokens) for tokens in (0, 64))
    assert not whole["bits_per_byte_is_estimate"] and part["bits_per_byte_is_estimate"]
    report = {"run": "r\x1b[31m", "step": 3, "weights": "evaluation", "data": "d", "split": "validation"}
    text = render(report | {"full": whole | {"word_perplexity": None}})
    assert "estimate" not in text and "\x1b" not in text and "word_perplexity" not in text
    assert text.count("\n") == 1
    hlb = evaluate.hlb(engine, split, 1.0, WORLD, seed=1, step=50)
    text = render(report | {"full": part, "hlb": hlb})
    assert "are estimates: the split's bytes, in proportion" in text and "bytes of the split's average token" in text


def test_a_text_file_counts_every_token_and_byte(finished, tmp_path, capsys):
    """Whatever the window, the bits are those of all bytes after an end-of-text id."""
    text = "the cat sat on the mat. " * 4 + "caf\u00e9"
    (tmp_path / "text.txt").write_text(text)
    opened = open_run(str(finished), None, "cpu", "auto")
    ids = torch.tensor([[opened.tokenizer.eot_id, *opened.tokenizer.encode(text).tolist()]])
    with torch.no_grad():
        logits = opened.model(ids[:, :-1]).logits[0].double()
    nats = -logits.log_softmax(-1).gather(1, ids[0, 1:, None]).sum().item()
    verb.run(verb.EvaluateConfig(run_dir=str(finished), text=str(tmp_path / "text.txt"), sequence_length=200), True)
    found = json.loads(capsys.readouterr().out)["full"]
    size = len(text.encode())
    assert found["tokens"] == len(ids[0]) - 1 and not found["bits_per_byte_is_estimate"]
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert found["word_perplexity"] == pytest.approx(math.exp(nats / len(text.split())), rel=1e-4)


@pytest.mark.parametrize(
    "content, changes, line",
    [
        (b"", {}, "holds no text"),
        (b"a\xff", {}, "is not UTF-8 at byte 1"),
        (None, {}, "cannot be read"),
        (b"abc", {"split": "train"}, "leave out data.path and split"),
    ],
)
def test_a_text_that_cannot_be_evaluated_is_one_line(finished, tmp_path, content, changes, line):
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    config = verb.EvaluateConfig(run_dir=str(finished), text=str(tmp_path / "text.txt"), protocol="full", **changes)
    with pytest.raises(UserError, match=line):
        verb.run(config)
