"""`data`: what it says of a dataset whose documents are known."""

import json

import numpy as np
import pytest
from conftest import PICTURE, ROOT, open_split

from trainer.commands.data import VERB, SurveyConfig, in_words
from trainer.core.config import PrepareConfig
from trainer.core.errors import UserError
from trainer.data.prepare import prepare
from trainer.data.survey import read_documents

TRAIN = ["one", "two", "three" * 50, "one", "four", "one", "five\n\u2028x"]
VALIDATION = ["six", "one", "two", "six"]


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """A dataset of TRAIN and VALIDATION as bytes, in samples of 8 tokens: documents end anywhere in them."""
    folder = tmp_path_factory.mktemp("known")
    for name, texts in (("train", TRAIN), ("valid", VALIDATION)):
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text(rows)
    options = {"source": str(folder), "tokenizer": "bytes", "sample_length": 8, "workers": 1}
    prepare(PrepareConfig(**options, out=str(folder / "data")), lambda line: None)
    return folder / "data"


@pytest.fixture(autouse=True)
def one_picture(request, monkeypatch):
    """A picture takes half a second; one test draws it."""
    if "repeats" not in request.node.name:
        monkeypatch.setattr("trainer.commands.data.render", lambda *_: PICTURE)


def report(capsys, path, **options):
    VERB.run(SurveyConfig(path=str(path), **options), True)
    return json.loads(capsys.readouterr().out)


def test_counts_quantiles_and_repeats_are_those_of_the_texts(known, tmp_path, capsys):
    found = report(capsys, known, out=str(tmp_path / "a.png"))
    for split, texts in (("train", TRAIN), ("validation", VALIDATION)):
        facts, sizes = found["splits"][split], [len(text.encode()) + 1 for text in texts]
        assert (facts["documents"], facts["tokens"]) == (len(texts), sum(sizes))
        assert facts["bytes"] == sum(sizes) - len(sizes)
        assert facts["mean_length"] == pytest.approx(np.mean(sizes))
        quantiles = facts["length_quantiles"]
        assert (quantiles["0"], quantiles["50"], quantiles["100"]) == (min(sizes), np.median(sizes), max(sizes))
    assert found["splits"]["train"]["repeats"] == 2, "`one` three times"
    assert found["splits"]["validation"]["repeats"] == 1, "`six` twice"
    assert found["splits"]["validation"]["also_in_train"] == 2, "`one` and `two`"
    assert found["splits"]["validation"]["also_in_train_share"] == 0.5
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_examples_are_drawn_with_the_seed(known, tmp_path, capsys):
    def shown(**options):
        return report(capsys, known, out=str(tmp_path / "a.png"), **options)["samples"]

    every = shown(samples=100)
    assert [sample["document"] for sample in every] == list(range(len(TRAIN)))
    for sample, text in zip(every, TRAIN, strict=True):
        assert sample["text"] == (text + "<|endoftext|>" if len(text) < 100 else text[:100])
    assert shown(samples=2, seed=1) == shown(samples=2, seed=1)
    assert len({json.dumps(shown(samples=2, seed=seed)) for seed in range(5)}) > 1
    assert shown(samples=0) == []


def test_the_picture_is_beside_the_dataset_and_never_in_it(known, tmp_path, capsys, monkeypatch):
    before = sorted(known.rglob("*"))
    assert report(capsys, known)["picture"] == str(known.parent / "data-lengths.png")
    assert (known.parent / "data-lengths.png").exists() and sorted(known.rglob("*")) == before
    monkeypatch.chdir(known)
    assert report(capsys, ".")["picture"] == str(known.parent / "data-lengths.png")
    monkeypatch.chdir(tmp_path)
    remote = report(capsys, f"file://{known}", cache=str(tmp_path / "cache"))
    assert (tmp_path / "data-lengths.png").exists(), "of a remote dataset, here"
    local = report(capsys, known)
    assert [remote[key] for key in ("splits", "samples")] == [local[key] for key in ("splits", "samples")]


def test_datasets_without_stored_lengths(capsys, tmp_path):
    """Their documents end at each end-of-text id."""
    frozen = ROOT / "tests" / "frozen" / "0.2.0" / "data"
    facts = report(capsys, frozen, out=str(tmp_path / "a.png"))["splits"]["train"]
    info = json.loads((frozen / "dataset.json").read_text())["splits"]["train"]
    assert (facts["documents"], facts["tokens"]) == (info["documents"], info["tokens"])


def test_both_ways_to_find_ends_agree(known):
    split = open_split(known)
    stored = read_documents(split, lambda number, count: None)
    split.info.format = 2
    by_id = read_documents(split, lambda number, count: None)
    assert np.array_equal(stored.lengths, by_id.lengths) and np.array_equal(stored.hashes, by_id.hashes)
    assert stored.lengths.tolist() == [len(text.encode()) + 1 for text in TRAIN]


def test_words_for_people(known, tmp_path, capsys):
    found = report(capsys, known, out=str(tmp_path / "a.png"))
    lines = in_words(found).splitlines()
    assert "| same as a document of train |            | 2 (50.00%) |" in lines
    assert "| same as an earlier document | 2 (28.57%) | 1 (25.00%) |" in lines
    assert r"document 6 of train, 10 tokens: five\n\u2028x<|endoftext|>" in in_words(
        report(capsys, known, out=str(tmp_path / "a.png"), samples=9)
    )


def test_mistakes(tmp_path, known):
    with pytest.raises(UserError, match="path: is not set"):
        VERB.run(SurveyConfig())
    with pytest.raises(UserError, match="no dataset at"):
        VERB.run(SurveyConfig(path=str(tmp_path / "none")))
    with pytest.raises(UserError, match="out: .* cannot be written"):
        VERB.run(SurveyConfig(path=str(known), out=str(tmp_path / "none" / "a.png")))
