"""laws.yaml, and what a plan makes of it: learning rate, batch, the loss to expect, and what it refuses."""

import dataclasses

import numpy as np
import pytest
from conftest import ROOT
from law_files import LAW, MODEL, RATE, laws, laws_file, values

from trainer.core.config import RunConfig
from trainer.core.errors import Damaged, UserError
from trainer.core.settings import build
from trainer.data.stream import find_dataset
from trainer.planning.expected import settings_of
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
        (lambda text: text.replace("laws format 2", "laws format 3"), UserError, "has format 3 of crescendo-lm"),
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
    for section, changed, said in (
        ("learning_rate", {"constant": -1.0}, "learning_rate.constant: -1.0 is too small; it must be above 0"),
        ("learning_rate", {"constant": 0.0}, "learning_rate.constant: 0.0 is too small"),
        ("batch", {"constant": -1.0}, "batch.constant: -1.0 is too small"),
        ("batch", {"power": float("inf")}, "batch.power: expected number"),
        ("loss", {"unit": "bits a byte"}, "loss.unit: "),
        ("loss", {"numbers": [3.0, 40.0, -0.4, 30.0, 0.4]}, "loss.numbers, loss.draws: no losses fall so"),
        ("loss", {"numbers": [-3.0, 40.0, 0.4, 30.0, 0.4]}, "loss.numbers, loss.draws: no losses fall so"),
        ("loss", {"numbers": [0.0, 0.0, 0.4, 0.0, 0.4]}, "loss.numbers, loss.draws: no losses fall so"),
        ("loss", {"draws": ["3 1e308 0.5 1e308 0.4 0"]}, "loss.numbers, loss.draws: no losses fall so"),
        ("loss", {"draws": ["3 40 0.5 30 0.4 -2"]}, "loss.numbers, loss.draws: no losses fall so"),
    ):
        part = dataclasses.replace(getattr(whole, section), **changed)
        (tmp_path / "laws.yaml").write_text(dataclasses.replace(whole, **{section: part}).text())
        with pytest.raises(UserError, match=f"laws.yaml: is not as `ladder` writes it: {said}"):
            read_laws(tmp_path / "laws.yaml")
    (tmp_path / "laws.yaml").write_text(Laws(dataclasses.replace(whole.of, vocab_size="many")).text())
    with pytest.raises(UserError, match="is not as `ladder` writes it"):
        read_laws(tmp_path / "laws.yaml")
    with pytest.raises(UserError, match="^dial: .*missing.yaml: cannot be read"):
        planned(values(tiny_dataset, tmp_path / "run", dial=str(tmp_path / "missing.yaml")))


@pytest.mark.parametrize(
    ("section", "changed", "key", "said"),
    [
        ("learning_rate", {"constant": 1e300, "power": 100.0}, "optim.lr", "inf"),
        ("learning_rate", {"power": -200.0}, "optim.lr", "0"),
        ("batch", {"constant": 1e300}, "batch.tokens_per_step", r"[\d.]+e\+30\d"),
        ("batch", {"constant": 1e-300}, "batch.tokens_per_step", r"[\d.]+e-29\d"),
        ("batch", {"power": 1e300}, "batch.tokens_per_step", "inf"),
    ],
)
def test_a_law_that_gives_what_no_run_can_have_is_refused(tiny_dataset, tmp_path, section, changed, key, said):
    law, path = laws(tiny_dataset, tmp_path), tmp_path / "laws.yaml"
    path.write_text(dataclasses.replace(law, **{section: dataclasses.replace(getattr(law, section), **changed)}).text())
    given = values(tiny_dataset, tmp_path / "run", dial=str(path))
    del given["batch"]["tokens_per_step"]
    with pytest.raises(UserError, match=rf"^dial: .*laws.yaml gives {key} {said} at N [\d,]+, .*; set {key}"):
        planned(given)
    part, _, name = key.partition(".")
    given[part][name] = 512 if part == "batch" else 0.5
    assert getattr(getattr(planned(given).config, part), name) == given[part][name]


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
    assert "laws of llama: loss, 9 runs; learning rate, 9 sizes; batch, 9 sizes; " in told["dial"]
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


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("optim", "weight_decay", 10.0, "optim.weight_decay 10.0 (in the ladder 0.1)"),
        ("optim", "schedule", "constant", "optim.schedule constant (in the ladder cosine)"),
        ("optim", "warmup_steps", 4, "optim.warmup_steps 4 (in the ladder by its rule)"),
        ("optim", "clip_norm", 1e-6, "optim.clip_norm 1e-06 (in the ladder 1.0)"),
        ("optim", "settings", {"beta1": 0.5}, "optim.settings.beta1 0.5 (in the ladder unset)"),
        ("optim", "roles", {"matrix": {"name": "muon"}}, "optim.roles.matrix.name muon (in the ladder unset)"),
        ("optim", "lr", 100.0, "optim.lr 100.0 (in the ladder by its rule)"),
        ("optim", "ema", 0.9, "optim.ema 0.9 (in the ladder 0.0)"),
        ("batch", "sequence_start", 16, "batch.sequence_start 16 (in the ladder 64)"),
        ("batch", "ramp_steps", 2, "batch.ramp_steps 2 (in the ladder 0)"),
        ("data", "separate_documents", True, "data.separate_documents True (in the ladder False)"),
        ("model", "init_std", 5.0, "model.init_std 5.0 (in the ladder by its rule)"),
        ("model", "vocab_size", 4096, "model.vocab_size 4096 (padded for the tokenizer of the ladder: 320)"),
        (None, "precision", "pure_bf16", "precision pure_bf16 (in the ladder "),
    ],
)
def test_what_decides_a_loss_and_is_not_as_in_the_ladder_is_said(tiny_dataset, tmp_path, section, key, value, said):
    path = laws_file(tiny_dataset, tmp_path)
    given = values(tiny_dataset, tmp_path / "run", dial=str(path))
    alike = planned(given)
    if section is None:
        given[key] = value
    else:
        given[section] = {**given[section], key: value}
    found = planned(given).expected.rule
    assert said in found and said not in alike.expected.rule and found.count(said) == 1


def test_a_rate_that_the_ladder_set_is_compared_as_a_number(tiny_dataset, tmp_path):
    """`set` there and `set` here are no reason to believe that they are the same."""
    rate = {"optim": {"recipe": "plain", "lr": 0.01}}
    settings = settings_of(*of_plan(planned(values(tiny_dataset, tmp_path / "run", **rate))))
    path = laws_file(tiny_dataset, tmp_path, settings=settings)
    same, other = (
        planned(values(tiny_dataset, tmp_path / "run", dial=str(path), optim={"recipe": "plain", "lr": lr}))
        for lr in (0.01, 100.0)
    )
    assert "optim.lr" not in same.expected.rule
    assert "optim.lr 100.0 (in the ladder 0.01)" in other.expected.rule


def of_plan(plan):
    return plan.config, plan.entries, ["d_model", "n_layers", "n_heads", "init_std"]


def test_the_config_of_a_run_is_no_way_around_the_check_of_the_subject(tiny_dataset, tmp_path):
    """It names the file with its digest; a run of its own that begins with it is checked as any other."""
    path = laws_file(tiny_dataset, tmp_path)
    stored = dataclasses.asdict(planned(values(tiny_dataset, tmp_path / "run", dial=str(path))).config)
    assert "@" in stored["dial"]
    for section, change in (("optim", {"name": "lion"}), ("model", {"mlp": "relu2"})):
        changed = {**stored, section: {**stored[section], **change}}
        with pytest.raises(UserError, match="holds laws of"):
            planned(changed)
    changed = {**stored, "optim": {**stored["optim"], "lr": 77.0}}
    assert "optim.lr 77.0 (in the ladder by its rule)" in planned(changed).expected.rule


def test_tokens_of_a_parameter_have_a_range_too(tiny_dataset, tmp_path):
    """A ladder lies on rays D = multiple x N: a corner of its box of N and D is far from every run of it."""
    law, path = laws(tiny_dataset, tmp_path), tmp_path / "laws.yaml"
    origin = dataclasses.replace(law.loss.origin, tokens_per_parameter=[1.0, 2.0])
    near = {name: dataclasses.replace(getattr(law, name), origin=origin) for name in ("loss", "learning_rate", "batch")}
    path.write_text(dataclasses.replace(law, **near).text())
    plan = planned(values(tiny_dataset, tmp_path / "run", dial=str(path)))
    share = 4 * 512 / plan.non_embedding
    said = f"extrapolated: D / N is {share:.3g} times the smallest of the fit"
    assert share < 1 and said in plan.expected.rule and said in rules(plan)["optim.lr"]
    free = values(tiny_dataset, tmp_path / "run", dial=str(path))
    del free["batch"]["tokens_per_step"]
    assert "D / N is" in rules(planned(free))["batch.tokens_per_step"]


@pytest.mark.parametrize("name", ["hlb", "llama"])
def test_the_laws_of_the_record_are_whole(name):
    """They are read as any file of laws, and predict what the page beside them says."""
    folder = ROOT / "configs" / "record" / "ladders"
    law = read_laws(folder / f"{name}.yaml").loss
    page, said = (folder / f"{name}.md").read_text(), law.held_out
    assert (
        f"90% between {said['low']:.4f} and {said['high']:.4f}" in page and f"measured: {said['measured']:.4f}" in page
    )
    assert law.fit().predict(said["N"], said["D"])[0] == pytest.approx(said["loss"], abs=1e-4)


@pytest.mark.parametrize("name", ["hlb", "llama", "mamba2"])
def test_the_learning_rates_of_the_record_are_whole(name):
    """The law goes through what its page calls the best, as near as three sizes and the page's digits allow."""
    folder = ROOT / "configs" / "record" / "ladders"
    laws, page = read_laws(folder / f"{name}.yaml"), (folder / f"learning-rates-{name}.md").read_text()
    law = laws.learning_rate
    assert law.law in page and f"`{law.origin.command}`" in page and laws.of.fingerprint[:12] in page
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| 0.")]
    assert len(rows) == law.origin.points == 3 and laws.of.model["name"] == name
    sizes, best = ([float(row[at].replace(",", "")) for row in rows] for at in (1, 4))
    power, constant = np.polyfit(np.log(sizes), np.log(best) - 0.5 * np.log(1024), 1)
    # Three digits are within 0.3 %; over a ratio of 3 of the sizes this is 0.005 of the power, and e^(0.005 ln N) = 7 % of the constant.
    assert (law.power, law.constant) == (pytest.approx(power, abs=0.006), pytest.approx(np.exp(constant), rel=0.08))
    assert all(row[-1] == "within 0.01" for row in rows)  # what the guide says of the rules


@pytest.mark.parametrize("name", ["hlb", "llama"])
def test_the_batches_of_the_record_are_whole(name):
    folder = ROOT / "configs" / "record" / "ladders"
    law, page = read_laws(folder / f"{name}.yaml").batch, (folder / f"batches-{name}.md").read_text()
    assert law.law in page and f"`{law.origin.command}`" in page
    sizes = [float(line.split("|")[2].replace(",", "")) for line in page.splitlines() if line.startswith("| 0.")]
    best = [float(line.split("|")[5].replace(",", "")) for line in page.splitlines() if line.startswith("| 0.")]
    power, _ = np.polyfit(np.log(sizes), np.log(best), 1)
    assert law.power == pytest.approx(power, abs=0.006)  # the page's whole tokens are within 0.2 %


@pytest.mark.parametrize("name, known", [("llama", True), ("gpt2", False)])
def test_a_plan_without_a_dial_names_the_laws_that_there_are(tiny_dataset, tmp_path, name, known):
    said = rules(
        planned(values(tiny_dataset, tmp_path / "run", model={**MODEL, "name": name}, optim={"recipe": "plain"}))
    )
    assert said.get("dial", "").endswith("llama.yaml has laws of this model: --dial takes it") == known
    assert ("dial" in said) == known


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


def test_a_file_without_a_law_is_refused(tiny_dataset, tmp_path):
    """`ladder --check lr` writes one if no sweep has an optimum with worse neighbours."""
    path = tmp_path / "laws.yaml"
    path.write_text(Laws(laws(tiny_dataset, tmp_path).of).text())
    with pytest.raises(UserError, match="^dial: .*laws.yaml: holds no law, .*leave dial out$"):
        planned(values(tiny_dataset, tmp_path / "run", dial=str(path)))


def test_sizes_are_free(tiny_dataset, tmp_path):
    path = laws_file(tiny_dataset, tmp_path)
    given = values(
        tiny_dataset, tmp_path / "run", dial=str(path), model={"name": "llama", "d_model": 64, "n_layers": 2}
    )
    assert planned(given).expected.loss is not None
