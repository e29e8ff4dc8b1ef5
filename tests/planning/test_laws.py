"""laws.yaml, and what a plan makes of it: learning rate, batch, the loss to expect, and what it refuses."""

import dataclasses

import pytest
from law_files import LAW, MODEL, RATE, laws, laws_file, values

from trainer.core.config import RunConfig
from trainer.core.errors import Damaged, UserError
from trainer.core.settings import build
from trainer.data.stream import find_dataset
from trainer.planning.laws import Laws, read_laws
from trainer.planning.plan import render, resolve, summary


def planned(given):
    config = build(RunConfig, given)
    return resolve(config, find_dataset(config.data))


def rules(plan):
    return {entry.key: entry.rule for entry in plan.entries}


def test_a_file_reads_back_as_it_was_written(tiny_dataset, tmp_path):
    written = laws(tiny_dataset, tmp_path)
    (tmp_path / "laws.yaml").write_text(written.text())
    read = read_laws(tmp_path / "laws.yaml")
    assert dataclasses.replace(read, digest="", file="") == written
    assert read.loss.fit().law == LAW and len(read.loss.fit().draws) == 21
    assert read.text() == read.file  # the same laws have the same digest


@pytest.mark.parametrize(
    "change, error, said",
    [
        (lambda text: text.replace("points: 9", "points: 8"), Damaged, "its digest is not that of its content"),
        (lambda text: text[:-10], Damaged, "its digest is not that of its content"),
        (lambda text: text.replace("laws format 1", "laws format 2"), UserError, "has format 2 of crescendo-lm"),
        (lambda text: text.split("\n", 1)[1], UserError, "is not a file of laws"),
        (lambda text: "", UserError, "is not a file of laws"),
    ],
)
def test_a_file_that_was_changed_is_refused(tiny_dataset, tmp_path, change, error, said):
    path = laws_file(tiny_dataset, tmp_path)
    path.write_text(change(path.read_text()))
    with pytest.raises(error, match=said) as caught:
        planned(values(tiny_dataset, tmp_path / "run", dial=str(path)))
    assert str(caught.value).startswith("dial: ") and "\n" not in str(caught.value)


def test_content_that_no_ladder_writes_is_refused(tiny_dataset, tmp_path):
    """With a right digest, as a program of someone else may write it."""
    whole = laws(tiny_dataset, tmp_path)
    short, empty = (
        dataclasses.replace(whole.loss, numbers=[1.0, 2.0]),
        dataclasses.replace(whole.loss.origin, N=[0.0, 5.0]),
    )
    for changed, said in (
        (short, "five finite numbers"),
        (dataclasses.replace(whole.loss, origin=empty), "origin.N: must be"),
    ):
        (tmp_path / "laws.yaml").write_text(dataclasses.replace(whole, loss=changed).text())
        with pytest.raises(UserError, match=said):
            read_laws(tmp_path / "laws.yaml")
    (tmp_path / "laws.yaml").write_text(Laws(dataclasses.replace(whole.of, vocab_size="many")).text())
    with pytest.raises(UserError, match="is not as `ladder` writes it"):
        read_laws(tmp_path / "laws.yaml")
    with pytest.raises(UserError, match="^dial: .*missing.yaml: cannot be read"):
        planned(values(tiny_dataset, tmp_path / "run", dial=str(tmp_path / "missing.yaml")))


def test_the_laws_replace_the_rules_of_the_recipe(tiny_dataset, tmp_path):
    path = laws_file(tiny_dataset, tmp_path)
    given = values(tiny_dataset, tmp_path / "run", dial=str(path))
    del given["batch"]["tokens_per_step"]
    plan = planned(given)
    batch = plan.config.batch.tokens_per_step
    assert batch == round(4 * plan.non_embedding**0.5 / 64) * 64
    rate = RATE["constant"] * plan.non_embedding ** RATE["power"] * batch**0.5
    assert plan.config.optim.lr == pytest.approx(rate, rel=1e-5)
    told = rules(plan)
    assert told["optim.lr"].startswith("lr = 0.0001 N^-0.100 B^0.5; laws.yaml")
    assert told["batch.tokens_per_step"].startswith("B = 4 N^0.500; laws.yaml")
    assert planned(dataclasses.asdict(plan.config)).config == plan.config  # nothing is left to decide
    set_by_user = planned(values(tiny_dataset, tmp_path / "run", dial=str(path), optim={"recipe": "plain", "lr": 0.5}))
    assert (set_by_user.config.optim.lr, rules(set_by_user)["optim.lr"]) == (0.5, "set")
    assert set_by_user.config.batch.tokens_per_step == 512


def test_the_expected_loss_has_its_interval_and_says_where_it_is_extrapolated(tiny_dataset, tmp_path):
    path = laws_file(tiny_dataset, tmp_path)
    plan = planned(values(tiny_dataset, tmp_path / "run", dial=str(path)))
    expected = plan.expected
    assert expected.loss == pytest.approx(LAW.loss(plan.non_embedding, 4 * 512))
    assert (expected.low, expected.high) == pytest.approx(
        (expected.loss - 0.09, expected.loss + 0.09)
    )  # 19 of 21 draws
    line = next(line for line in render(plan).splitlines() if line.startswith("expected loss"))
    assert f"{expected.loss:.4f}" in line and "90% between" in line and str(path) in line
    assert "extrapolated" not in line and "data are read" not in line
    assert summary(plan)["expected_loss"]["low"] == expected.low

    more = planned(values(tiny_dataset, tmp_path / "run", dial=str(path), max_steps=100))
    assert "extrapolated: D is 5.12 times the largest of the fit" in more.expected.rule
    assert "the data are read" in more.expected.rule  # 51,200 tokens of a smaller text
    assert "extrapolated: D is 5.12 times" in rules(more)["optim.lr"]
    dynamic = values(tiny_dataset, tmp_path / "run", dial=str(path))
    dynamic["batch"]["dynamic"] = True
    assert planned(dynamic).expected.entry()[1] == "unknown"
    nothing = planned(values(tiny_dataset, tmp_path / "run"))
    assert nothing.expected is None and "expected loss" not in render(nothing)


def test_what_is_not_as_in_the_ladder_is_said(tiny_dataset, tmp_path):
    path = laws_file(tiny_dataset, tmp_path, fingerprint="f" * 64, sequence_length=32)
    plan = planned(values(tiny_dataset, tmp_path / "run", dial=str(path)))
    assert "data far/away there (fingerprint ffffffffffff)" in rules(plan)["dial"]
    assert "sequences of 64 (in the ladder 32)" in plan.expected.rule
    assert (
        "had another rule (a rule)" in plan.expected.rule
    )  # the file's law, where the ladder's runs followed `a rule`


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lion", "schedule-free", "adafactor"])
def test_the_rule_of_a_learning_rate_is_the_same_at_every_size(tiny_dataset, tmp_path, optimizer):
    """Its text holds no number of one size, so a run of another size than the ladder's has the ladder's rule."""
    small, large = (
        planned(
            values(
                tiny_dataset,
                tmp_path / "run",
                model={**MODEL, "d_model": width},
                optim={"recipe": "plain", "name": optimizer},
            )
        )
        for width in (32, 64)
    )
    assert small.non_embedding < large.non_embedding and rules(small)["optim.lr"] == rules(large)["optim.lr"]


def test_that_a_dial_file_extrapolates_is_no_other_rule(tiny_dataset, tmp_path):
    """The ladder's runs took their rates from the same laws, at other sizes."""
    law, path = laws(tiny_dataset, tmp_path), tmp_path / "laws.yaml"
    rule = rules(planned(values(tiny_dataset, tmp_path / "run", dial=str(laws_file(tiny_dataset, tmp_path)))))[
        "optim.lr"
    ]
    for rates, other in (
        (f"{rule.partition('; extrapolated')[0]}; extrapolated: N is 9 times the largest of the fit", False),
        ("x", True),
    ):
        origin = dataclasses.replace(law.loss.origin, rates=rates)
        path.write_text(dataclasses.replace(law, loss=dataclasses.replace(law.loss, origin=origin)).text())
        plan = planned(values(tiny_dataset, tmp_path / "run", dial=str(path)))
        assert ("another rule" in plan.expected.rule) == other


@pytest.mark.parametrize(
    "changes, run, said",
    [
        ({"optimizer": "muon"}, {}, "holds laws of optim.name muon, this run has adamw"),
        ({"recipe": "hlb"}, {}, "holds laws of optim.recipe hlb, this run has plain"),
        ({"tokenizer_sha256": "0" * 64}, {}, "predicts losses over the 257 ids of tokenizer bytes"),
        ({}, {"model": {**MODEL, "name": "gpt2"}}, "holds laws of model.name llama, this run has gpt2"),
        ({}, {"model": {**MODEL, "mlp": "relu2"}}, "holds laws of model.mlp swiglu, this run has relu2"),
        ({}, {"model": {**MODEL, "linear": "bitnet"}}, "model.linear"),
        ({}, {"init_from": "somewhere"}, "not with those of init_from"),
    ],
    ids=str,
)
def test_laws_of_something_else_are_refused(tiny_dataset, tmp_path, changes, run, said):
    path = laws_file(tiny_dataset, tmp_path, **changes)
    with pytest.raises(UserError, match=said) as caught:
        planned(values(tiny_dataset, tmp_path / "run", dial=str(path), **run))
    assert str(caught.value).startswith("dial: ")


def test_sizes_are_free(tiny_dataset, tmp_path):
    path = laws_file(tiny_dataset, tmp_path)
    given = values(
        tiny_dataset, tmp_path / "run", dial=str(path), model={"name": "llama", "d_model": 64, "n_layers": 2}
    )
    assert planned(given).expected.loss is not None
