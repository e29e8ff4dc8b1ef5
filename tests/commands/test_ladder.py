"""`ladder`: fits of known laws, the prediction that comes before its run, and the rule of the learning rate beside the optimum."""

import dataclasses
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import LADDERS, tiny_values

from trainer.commands.compare import queue as compare_queue
from trainer.commands.compare.budget import plan_of
from trainer.commands.compare.experiment import State, Task
from trainer.commands.compare.spec import Arm
from trainer.commands.ladder import VERB, LadderConfig, read
from trainer.commands.ladder.command import final_loss, fit_points, ladder, predicted
from trainer.commands.ladder.fit import fit, non_negative
from trainer.commands.ladder.laws_file import keep, laws_of, origin
from trainer.commands.ladder.page import compute_laws, ratio
from trainer.commands.ladder.rates import Optimum, optimum, power_law
from trainer.commands.ladder.spec import check_numbers, held_out_scale
from trainer.commands.ladder.sweeps import LEARNING_RATES, TOKENS_OF_A_STEP, first_batches, next_value
from trainer.commands.ladder.work import Work, loss_or_diverged
from trainer.core.errors import UserError
from trainer.core.files import DIGEST, Damaged, read_json, sealed
from trainer.core.settings import help_text, load_yaml
from trainer.data.stream import find_dataset
from trainer.planning.laws import LAWS, Law, PowerLaw, parse_laws, read_laws

CHINCHILLA = Law(("N", "D"), 1.69, (406.4, 410.7), (0.34, 0.28))
POINTS = [(size, size * multiple) for size in (1e6, 2e6, 4e6, 8e6) for multiple in (5, 10, 20)]

# -- fits ------------------------------------------------------------------------------------------------------------------


def test_an_exact_law_is_found_again():
    found = fit(("N", "D"), POINTS, [CHINCHILLA.loss(*point) for point in POINTS], draws=3)
    assert found.law.irreducible == pytest.approx(1.69, abs=2e-3)
    assert found.law.exponents == pytest.approx((0.34, 0.28), abs=2e-3)
    off = [found.law.loss(*point) / CHINCHILLA.loss(*point) - 1 for point in POINTS]
    assert max(map(abs, off)) < 1e-5  # the search stops at steps of 1e-5 of the exponents
    loss, low, high = found.predict(64e6, 1280e6)  # 8 times beyond the largest
    assert low <= loss <= high and loss == pytest.approx(CHINCHILLA.loss(64e6, 1280e6), rel=1e-4)
    one = Law(("C",), 2.0, (90.0,), (0.15,))
    found = fit(("C",), [(10.0**k,) for k in range(12, 18)], [one.loss(10.0**k) for k in range(12, 18)], draws=0)
    assert found.law.exponents[0] == pytest.approx(0.15, abs=1e-3) and found.law.scales[0] == pytest.approx(
        90, rel=1e-2
    )


def test_a_run_that_went_wrong_does_not_bend_the_law():
    losses = [CHINCHILLA.loss(*point) for point in POINTS]
    losses[4] *= 1.2
    law = fit(("N", "D"), POINTS, losses, draws=0).law
    right = [index for index in range(len(POINTS)) if index != 4]
    assert max(abs(law.loss(*POINTS[i]) / losses[i] - 1) for i in right) < 0.01  # plain least squares: 0.03


def test_the_interval_is_as_wide_as_the_scatter():
    noise = 0.002 * np.random.default_rng(3).standard_normal(len(POINTS))
    noisy = [CHINCHILLA.loss(*point) * (1 + error) for point, error in zip(POINTS, noise, strict=True)]
    found = fit(("N", "D"), POINTS, noisy, draws=30)
    loss, low, high = found.predict(16e6, 160e6)
    truth = CHINCHILLA.loss(16e6, 160e6)
    assert low < truth < high and 0.002 < (high - low) / loss < 0.05
    assert found.predict(16e6, 160e6) == (loss, low, high)  # nothing in it is left to chance


def test_draws_of_the_bootstrap_are_not_bounded_by_their_search():
    """Points with much scatter tell an exponent within a factor of more than 2 only."""
    noise = 0.01 * np.random.default_rng(3).standard_normal(len(POINTS))
    noisy = [CHINCHILLA.loss(*point) * (1 + error) for point, error in zip(POINTS, noise, strict=True)]
    found = fit(("N", "D"), POINTS, noisy, draws=40)
    ratios = [law.exponents[0] / found.law.exponents[0] for law in found.draws]
    assert min(ratios) < 0.45 and max(ratios) > 2.2


def test_more_seeds_of_the_same_points_are_no_new_points(monkeypatch):
    """What a law misses at a size is the same for all its seeds: three equal ones tell nothing more."""
    monkeypatch.setattr("trainer.commands.ladder.command.fit", lambda *data: fit(*data, draws=5))
    noise = 0.005 * np.random.default_rng(3).standard_normal(len(POINTS))
    rungs = [SimpleNamespace(point=point, arm=SimpleNamespace(key=(f"{i}", 1.0))) for i, point in enumerate(POINTS)]
    losses = [CHINCHILLA.loss(*point) * (1 + error) for point, error in zip(POINTS, noise, strict=True)]
    one, three = (
        fit_points([(rung, seed, loss) for rung, loss in zip(rungs, losses, strict=True) for seed in range(seeds)])
        for seeds in (1, 3)
    )  # of five draws each
    assert one.predict(64e6, 640e6) == pytest.approx(three.predict(64e6, 640e6), rel=1e-6)


def test_the_law_of_the_compute_has_intervals_too():
    """Four sizes at five tokens a parameter; the three at ten are too few for a law."""
    flops = [(5, 10.0**k) for k in (12, 13, 14, 15)] + [(10, 10.0**k) for k in (12, 13, 14)]
    rungs = [
        SimpleNamespace(multiple=multiple, length=SimpleNamespace(flops=c), arm=SimpleNamespace(key=(f"{multiple}", c)))
        for multiple, c in flops
    ]
    scatter = (1.001, 0.999, 1.001, 0.999) * 2
    points = [(one, 1, (2 + 90 * one.length.flops**-0.15) * by) for one, by in zip(rungs, scatter, strict=False)]
    (line,) = compute_laws(points)
    assert line.startswith("at 5 tokens a parameter: L(C) = ")
    for name, true in (("E", 2.0), ("k", 90.0), ("gamma", 0.15)):
        low, high = map(float, re.search(rf" {name} [-+.e\d]+ \[([-+.e\d]+), ([-+.e\d]+)\]", line).groups())
        assert low < true < high


def test_few_tokens_a_parameter_are_not_shown_as_none():
    assert [
        ratio(value) for value in (0.03125, 0.5, 1.0004, 20.46, 99.96, 1250.0)
    ] == "0.0312 0.5 1 20.5 100 1,250".split()


def test_numbers_below_zero_are_left_out():
    """The best non-negative solution, against a search over a grid."""
    generator = np.random.default_rng(0)
    columns, weights = generator.random((3, 6, 3)) - 0.2, np.ones((3, 6))
    found = non_negative(columns, weights)
    axis = np.linspace(0, 3, 61)
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    for one, solution in zip(columns, found, strict=True):
        assert (solution >= 0).all()
        searched = ((grid @ one.T - 1) ** 2).sum(axis=1).min()
        assert ((one @ solution - 1) ** 2).sum() <= searched + 1e-12


@pytest.mark.parametrize(
    "points, said", [(POINTS[:5], "5 points"), ([(1e6, 1e6 * k) for k in range(1, 9)], "1 values of N")]
)
def test_too_few_points_are_no_law(points, said):
    with pytest.raises(ValueError, match=said):
        fit(("N", "D"), points, [3.0] * len(points))


# -- learning rates --------------------------------------------------------------------------------------------------------


def test_an_optimum_between_the_rates_is_found():
    def curve(*rates):
        return {rate: [3 + 0.1 * np.log(rate / 3e-3) ** 2] for rate in rates}

    rates, diverged = (1e-3, 2e-3, 4e-3), [float("inf")]
    found = optimum(1000, 1e-3, curve(*rates))
    assert (found.best, found.bracketed) == (4e-3, False)  # the highest that was tried
    assert found.verdict.startswith("open") and found.error is None
    found = optimum(1000, 4e-3, curve(*rates, 8e-3))
    assert (found.best, found.lowest) == (
        pytest.approx(3e-3),
        *curve(4e-3)[4e-3],
    )  # the lowest is one that was measured
    assert found.bracketed and found.lost == 0 and found.verdict == "within 0.01"
    found = optimum(1000, 1e-3, {**curve(*rates), 8e-3: diverged})  # worse than any other
    assert found.bracketed and found.lost > 0.1 and found.verdict == "off: the best is 4 times as large"
    found = optimum(1000, 2e-3, {1e-3: diverged, 2e-3: [3.0], 4e-3: [3.2]})  # also below the best
    assert (found.best, found.bracketed) == (2e-3, True)


def test_the_optimum_of_several_seeds_is_that_of_their_means():
    losses = {
        1e-3: [3.10, 3.00, 3.05],
        2e-3: [3.04, 2.98, 3.04],
        4e-3: [3.00, 3.08, 3.07],
        8e-3: [2.9, float("inf"), 2.9],
    }
    found = optimum(1000, 1e-3, losses)
    assert (found.own_loss, found.lowest) == (pytest.approx(3.05), pytest.approx(3.02)) and found.bracketed
    assert found.error == pytest.approx(np.std([0.06, 0.02, 0.01], ddof=1) / 3**0.5)  # the seeds' own differences
    assert optimum(1000, 8e-3, losses).error is None and optimum(1000, 8e-3, losses).lost == float("inf")


def test_the_law_of_the_optima():
    optima = [Optimum(size, 1e-3, 3.0, 0.7 * size**-0.4, 3.0, None, True) for size in (10**5, 10**6, 10**7)]
    assert power_law(optima) == (pytest.approx(0.7), pytest.approx(-0.4))
    with pytest.raises(ValueError, match="two sizes"):
        power_law(optima[:1])


def test_the_help_says_what_the_guide_says():
    told = help_text(LadderConfig)
    assert "SPEC.yaml" in VERB.help and "every run is a point" not in told
    assert "their mean is one point" in told and "three or more; of --check, two or more" in told
    check_numbers(read({"check": "lr", "scales": [1, 2], "held_out_scale": 4}))


# -- the verb --------------------------------------------------------------------------------------------------------------

# Stands for `train`. Its loss follows CHINCHILLA in the numbers that the table gives for its scale, and is lowest at lr 2e-3, and with
# 4096 tokens a step.
STUB = """
import json, math, re, sys
from pathlib import Path

config = dict(re.findall(r"^ *([a-z_]+): (.+)$", Path(sys.argv[1]).read_text(), re.MULTILINE))
folder, steps, lr = Path(config["run_dir"]), int(config["max_steps"]), float(config["lr"])
work = folder.parent.parent.parent
if "held-out" in config["run_dir"]:
    assert (work / "prediction.json").exists(), "the prediction comes first"
size = json.loads((work / "sizes.json").read_text())[config["model_scale"]]
batch = int(config["tokens_per_step"])
loss = 1.69 + 406.4 * size**-0.34 + 410.7 * (batch * steps)**-0.28
if folder.parent.parent.name == "batches":
    loss = 3 + 0.1 * math.log(batch / 4096)**2
if folder.parent.parent.name == "learning-rates":
    loss = loss + 0.1 * math.log(lr / 2e-3)**2 if lr < 3e-3 else None  # above, it diverges
(folder / "checkpoints" / f"step-{steps:08d}").mkdir(parents=True)
(folder / "checkpoints" / f"step-{steps:08d}" / "manifest.json").write_text("{}")
row = dict(step=steps, tokens=batch * steps, loss=loss, grad_norm=1.0, lr=lr, val_loss=loss, val_bits_per_byte=1.0,
           tokens_per_second=1.0, seconds=1.0)
(folder / "metrics.jsonl").write_text(json.dumps(row) + "\\n")
(folder / "config.yaml").write_text("# crescendo-lm stub\\n")
"""


@pytest.fixture
def spec(tiny_dataset, tmp_path, monkeypatch):
    """A function: the config of a ladder of three tiny sizes in tmp_path, with changes."""
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.setattr(compare_queue, "TRAIN", [sys.executable, "-IS", str(tmp_path / "stub.py")])
    monkeypatch.setattr(compare_queue, "POLL_SECONDS", 0.02)
    plans: dict = {}  # the same in every command of a test, and they take most of its time

    def plan_once(arm, datasets):
        key = (arm.scale, str(arm.values))
        if key not in plans:
            plans[key] = plan_of(arm, datasets)
        return plans[key]

    monkeypatch.setattr("trainer.commands.ladder.work.plan_of", plan_once)
    common = tiny_values(tiny_dataset, tmp_path, model={"name": "llama"}, optim={"recipe": "plain"})
    for key in ("run_dir", "max_steps", "model_scale"):
        del common[key]
    common["batch"] = {"tokens_per_step": 512, "sequence_start": 64, "sequence_length": 64, "dynamic": False}

    sizes: dict[str, int] = {}

    def made(**changes):
        values = {
            "ladder_dir": str(tmp_path / "ladder"),
            "common": common,
            "scales": [0.15, 0.3, 0.6],
            "tokens_per_parameter": [0.5, 1, 2],
            "held_out_scale": 0.45,
            **changes,
        }
        config = read(values)
        if not sizes:
            rungs = Work(config, tmp_path / "ladder").rungs([(scale, 1) for scale in (*config.scales, 0.45)])
            sizes.update({f"{one.arm.scale:g}": one.size for one in rungs})
            (tmp_path / "ladder").mkdir()
            (tmp_path / "ladder" / "sizes.json").write_text(json.dumps(sizes))
        return config

    return made


def test_a_ladder_predicts_and_then_checks_itself(spec, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("trainer.commands.ladder.command.fit", lambda *data: fit(*data, draws=5))
    ladder(spec())
    folder = tmp_path / "ladder"
    before = (folder / "prediction.json").read_bytes()
    found = json.loads((folder / "ladder.json").read_text())
    assert len(found["points"]) == 9 and (folder / "ladder.png").stat().st_size > 5000
    assert found["measured"] == pytest.approx(found["prediction"]["loss"], rel=1e-3)  # the stub's runs follow one law
    assert found["numbers"]["alpha"]["value"] == pytest.approx(0.34, abs=0.02)
    page = capsys.readouterr().out
    assert "predicted before the run: scale 0.45" in page and "measured: " in page and "earlier fit" not in page
    laws = read_laws(folder / LAWS)
    assert (laws.of.model["name"], laws.of.tokenizer, laws.loss.origin.points) == ("llama", "bytes", 9)
    assert {"d_model", "n_layers", "n_heads"} <= {*laws.of.sized} and "mlp" in laws.of.model
    said = found["prediction"]
    assert laws.loss.fit().predict(said["N"], said["D"]) == pytest.approx(
        (said["loss"], said["low"], said["high"]), rel=1e-4
    )
    assert laws.loss.held_out["measured"] == found["measured"] and laws.loss.origin.B == [512, 512]
    assert laws.of.settings["optim.weight_decay"] == 0.1 and laws.of.settings["optim.warmup_steps"] == "by its rule"
    assert laws.loss.origin.tokens_per_parameter == pytest.approx([0.5, 2.0], rel=0.05)
    assert laws.loss.origin.epochs > 1 and f"the data are read up to {laws.loss.origin.epochs:.3g} times" in page

    (tmp_path / "stub.py").write_text(STUB.replace("1.69 +", "1.79 +"))
    ladder(spec(seeds=[1, 2]))  # more points do not change what was said before the held-out run
    page = capsys.readouterr().out
    assert page.count(f"the prediction is of an earlier fit: L(N, D) = {said['law']}\n") == 1
    assert len(json.loads((folder / "ladder.json").read_text())["points"]) == 18
    assert (folder / "prediction.json").read_bytes() == before
    whole = (folder / LAWS).read_text()
    (folder / LAWS).write_text(whole.replace("points: 18", "points: 19"))
    with pytest.raises(Damaged, match="put it back, or delete it and run every `ladder` command of its folder again$"):
        ladder(spec(seeds=[1, 2]))
    (folder / LAWS).unlink()
    ladder(spec(seeds=[1, 2]))
    assert read_laws(folder / LAWS).loss.numbers == parse_laws(whole.encode(), LAWS).loss.numbers
    work = Work(spec(), folder)
    (other,) = work.rungs([(0.45, 2)])
    with pytest.raises(UserError, match="put the spec back"):
        predicted(folder / "prediction.json", fit(("N",), [(k,) for k in range(1, 6)], [3.0] * 5, draws=1), other)
    (folder / "prediction.json").write_bytes(before.replace(b'"loss"', b'"lost"'))
    with pytest.raises(Damaged, match="digest"):
        ladder(spec(seeds=[1, 2]))
    (folder / "prediction.json").unlink()
    with pytest.raises(UserError, match="would be no prediction"):
        ladder(spec(seeds=[1, 2]))


def test_the_rule_of_the_learning_rate_is_compared_with_the_optimum(spec, tmp_path, capsys):
    ladder(spec(check="lr", common={**spec().common, "optim": {"recipe": "plain", "lr": 5e-4}}))
    found = json.loads((tmp_path / "ladder" / "learning-rates.json").read_text())
    assert [one["own"] for one in found["sizes"]] == [5e-4] * 3
    assert [one["best"] for one in found["sizes"]] == pytest.approx([2e-3] * 3, rel=1e-3)
    assert found["law"].startswith("lr = ") and all(one["bracketed"] for one in found["sizes"])
    assert not any("Infinity" in path.read_text() for path in (tmp_path / "ladder").glob("*.json"))
    page = capsys.readouterr().out
    assert page.count("off: the best is 4 times as large") == 3
    assert re.search(r"- scale 0.3, lr and loss: 0.000354 [\d.]+, .*, 0.00283 [\d.]+\n", page)
    assert " given lr " in page and "optim.lr is given: this says nothing of its rule" in page and "rule's" not in page
    assert (tmp_path / "ladder" / "learning-rates.png").stat().st_size > 5000
    law = read_laws(tmp_path / "ladder" / LAWS).learning_rate
    assert law.value(1e5, 512) == pytest.approx(2e-3, rel=1e-2) and law.value(1e5, 2048) == pytest.approx(
        4e-3, rel=1e-2
    )


def test_a_sweep_of_several_seeds(spec, tmp_path, capsys):
    """Seeds disagree by 0.02 nats, about the slope too: the page has their means and the error of the difference. More seeds join later."""
    noise = STUB.replace("2e-3)**2 if", "2e-3)**2 + int(config['seed']) * (0.02 + 0.001 * math.log(lr)) if")
    (tmp_path / "stub.py").write_text(noise)
    common = {**spec().common, "optim": {"recipe": "plain", "lr": 5e-4}}
    config = spec(check="lr", scales=[0.15, 0.3], seeds=[1], common=common)
    ladder(config)
    assert "one seed, which may move" in capsys.readouterr().out
    config.seeds = [1, 3]
    ladder(config)
    page = capsys.readouterr().out
    assert "losses: means of 2 seeds; ±: standard error of the difference" in page
    found = json.loads((tmp_path / "ladder" / "learning-rates.json").read_text())["sizes"]
    for one in found:
        own = one["losses"][f"{one['own']:g}"]
        lowest = min((of for of in one["losses"].values() if None not in of), key=sum)
        assert one["lost"] == pytest.approx(np.mean(own) - np.mean(lowest))
        assert one["error"] == pytest.approx(abs((own[0] - lowest[0]) - (own[1] - lowest[1])) / 2)
    laws = read_laws(tmp_path / "ladder" / LAWS)
    assert laws.learning_rate.origin.seeds == [1, 3]
    told = f"- runs: llama, recipe plain, optimizer adamw; {laws.of.data}, fingerprint {laws.of.fingerprint[:12]}, tokenizer bytes; `python -m"
    assert told in page


def test_a_rule_whose_runs_diverge_loses_without_end(spec, tmp_path, capsys):
    """The sweep goes down from there."""
    ladder(spec(check="lr", scales=[0.15, 0.3]))
    found = json.loads((tmp_path / "ladder" / "learning-rates.json").read_text())["sizes"]
    assert all(
        one["own"] > 3e-3 and one["losses"][f"{one['own']:g}"] == [None] and one["lost"] is None for one in found
    )
    assert all(one["bracketed"] and 1.4e-3 < one["best"] < 2.8e-3 for one in found)  # within a step of the stub's
    assert re.search(
        r"\| +inf \| +[\d.]+ \| +inf \| +off: the best is 0\.\d+ times as large \|", capsys.readouterr().out
    )


def test_the_rule_of_the_batch_is_compared_with_the_optimum(spec, tmp_path, capsys, monkeypatch):
    """From 512 tokens up to 8192, with a learning rate that follows; its law joins those that the file has."""
    folder = tmp_path / "ladder"
    config = spec(check="batch", scales=[0.15, 0.3])
    rungs = Work(config, folder).rungs([(scale, 1) for scale in config.scales])
    before = laws_of(folder, rungs, find_dataset(rungs[0].arm.config().data))
    before.learning_rate = PowerLaw("lr = 1", 1.0, 0.0, 0.0, [], origin(config, rungs, 2))
    keep(folder, before)
    ladder(config)
    found = json.loads((folder / "batches.json").read_text())
    assert [sorted(map(float, one["losses"])) for one in found["sizes"]] == [[256, 512, 1024, 2048, 4096, 8192]] * 2
    assert [one["best"] for one in found["sizes"]] == pytest.approx([4096] * 2)
    runs = json.loads((folder / "batches" / "experiment.json").read_text())["runs"]
    for scale in config.scales:
        rates = [run["learning_rate"] for run in runs if run["scale"] == scale]
        assert max(rates) / min(rates) == pytest.approx(32**0.5, rel=1e-4)
    laws = read_laws(folder / LAWS)
    assert laws.batch.value(5e4) == pytest.approx(4096) and laws.learning_rate.law == "lr = 1"
    assert "embeddings and head: B = " in capsys.readouterr().out
    before = (folder / "batches.json").read_text()
    monkeypatch.setattr(compare_queue, "TRAIN", ["false"])
    ladder(config)  # knows the batches that the sweep went on to, and trains nothing
    assert json.loads((folder / "batches.json").read_text())["sizes"] == json.loads(before)["sizes"]

    with pytest.raises(UserError, match="^ladder_dir: .*laws.yaml holds laws with another sequence_length"):
        ladder(
            spec(
                check="lr",
                common={
                    **config.common,
                    "batch": {**config.common["batch"], "sequence_length": 32, "sequence_start": 32},
                },
            )
        )


def test_a_folder_of_an_earlier_release_goes_on(spec, tmp_path):
    """It names a tuning seed, which no ladder has any more."""
    work = Work(spec(), tmp_path / "ladder")
    rungs = work.rungs([(0.15, 1)])
    work.experiment("losses", rungs, [1]).write()
    path = tmp_path / "ladder" / "losses" / "experiment.json"
    content = read_json(path) | {"tuning_seed": 0}
    del content[DIGEST]
    path.write_text(sealed(content))
    work.experiment("losses", rungs, [1]).write()
    assert read_json(path)["tuning_seed"] == 0


def test_a_sweep_ends():
    def rung(batch, rate=1e-3):
        run = SimpleNamespace(batch=SimpleNamespace(tokens_per_step=batch, sequence_length=64))
        return SimpleNamespace(plan=SimpleNamespace(config=run), length=SimpleNamespace(learning_rate=rate))

    def next_batch(losses, most=6):
        return next_value(TOKENS_OF_A_STEP, rung(64), losses, most)

    assert first_batches(rung(1000)) == [960, 448, 1920] and first_batches(rung(64)) == [64, 128]
    assert next_batch({64: [3.0], 128: [3.1]}) is None  # no batch is smaller than a sequence
    assert next_batch({128: [3.0], 256: [3.1]}) == 64 and next_batch({128: [3.1], 256: [3.0]}) == 512
    assert (
        next_batch({64: [3.1], 128: [3.0], 256: [3.1]}) is None and next_batch({64: [2.0], 128: [1.0]}, most=2) is None
    )
    assert next_batch({64: [3.0, 3.3], 128: [3.1, 3.1], 256: [3.1, 3.3]}) is None  # by the mean of the seeds

    def next_rate(losses):
        return next_value(LEARNING_RATES, rung(64), losses, 8)

    diverged = [float("inf")]
    assert next_rate({1e-3: [3.0], 2e-3: [3.1], 4e-3: [3.2]}) == 5e-4
    assert next_rate({1e-3: [3.2], 2e-3: [3.1], 4e-3: [3.0]}) == 8e-3
    assert next_rate({1e-3: diverged, 2e-3: diverged, 4e-3: diverged}) == 5e-4  # the highest that does not is below


def test_a_run_that_diverged_ends_the_ladder(spec, tmp_path):
    """The same command does not try it again, and does not say so."""
    (tmp_path / "stub.py").write_text(
        STUB.replace("    loss = 3 + 0.1 * math.log(batch / 4096)**2", "    pass").replace(
            "(folder /", "loss = loss if size < 1e5 else None\n(folder /", 1
        )
    )
    for _ in range(2):
        with pytest.raises(UserError, match="diverged: step .* has no law, or its prediction failed"):
            ladder(spec())
    assert not (tmp_path / "ladder" / "prediction.json").exists()


@pytest.mark.parametrize(
    "loss, said",
    [
        (0.0, "has a validation loss of 0, .* above 0; delete runs/x, "),
        (-1.0, "has a validation loss of -1, "),
        (float("nan"), "has a validation loss of nan, "),
        (1e308, "diverged: its loss is above 100 nats a token; so this ladder has no law"),
    ],
)
def test_a_loss_that_no_run_can_have_is_no_point(loss, said):
    made = Arm("1x", 0.5, {}, {}, None)
    experiment: Any = SimpleNamespace(
        lengths={made.key: SimpleNamespace(learning_rate=1e-3)},
        state=lambda task: State("finished", loss=loss),
        run_folder=lambda task: Path("runs/x"),
    )
    name = Task(made, 1e-3, 1, "test").name
    with pytest.raises(UserError, match=f"^{re.escape(name)}: {said}"):
        final_loss(experiment, made, 1)
    if loss > 0:  # in a sweep it is worse than any other
        assert loss_or_diverged(experiment, Task(made, 1e-3, 1, "tuning")) == float("inf")


def test_a_folder_of_another_learning_rate_is_refused(spec, tmp_path):
    ladder(spec(check="lr"))
    given = spec(check="lr", common={**spec().common, "optim": {"recipe": "plain", "lr": 5e-4}})
    with pytest.raises(
        UserError, match=r"holds laws with another optim.lr \(by its rule, now 0.0005\); choose another"
    ):
        ladder(given)
    (tmp_path / "ladder" / LAWS).unlink()
    with pytest.raises(UserError, match="was begun with baseline 1x lr .*, now it is 1x lr 0.0005"):
        ladder(given)
    work = Work(spec(), tmp_path / "ladder")
    rungs = work.rungs([(0.15, 1), (0.3, 1)])
    work.experiment("other", rungs, [1]).write()
    rungs[0] = dataclasses.replace(rungs[0], length=dataclasses.replace(rungs[0].length, learning_rate=1e-4))
    with pytest.raises(
        UserError, match="^ladder_dir: .* and learning rate .*, now it has .* and learning rate 0.0001; choose another"
    ):
        work.experiment("other", rungs, [1])


@pytest.mark.parametrize(
    "changes", [{"held_out_scale": 0.301}, {"scales": [0.15, 0.3, 0.301]}, {"check": "lr", "scales": [0.3, 0.301]}]
)
def test_two_scales_of_one_size_are_no_ladder(spec, changes):
    with pytest.raises(
        UserError, match=r"^scales: 0.3(01)? and 0.3(01)? are one size, [\d,]+ parameters without embeddings and head"
    ):
        ladder(spec(**changes))


def test_an_estimate_counts_the_run_that_is_predicted(spec, monkeypatch, capsys):
    monkeypatch.setattr(
        "trainer.commands.compare.estimate.measure_speed",
        lambda *_: {"tokens_per_second": {"median": 1e4}, "peak_memory_bytes": 1},
    )
    ladder(spec(estimate=True))
    first, second = capsys.readouterr().out.split("The run that is predicted:")
    assert (
        "runs left: 9, each at one learning rate" in first
        and "runs left: 1, each at one learning rate" in second
        and "0.45" in second
    )


def test_a_run_without_a_loss_is_no_point(spec, tmp_path):
    (tmp_path / "stub.py").write_text("raise SystemExit('error: lost the device')")
    with pytest.raises(UserError, match="failed: exit code 1; error: lost the device"):
        ladder(spec())
    assert not (tmp_path / "ladder" / "prediction.json").exists()


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"scales": [0.1, 0.2]}, "scales: a ladder needs 3 or more"),
        ({"scales": [0.1, 0.2, 0.2]}, "scales: is empty, names a value twice"),
        ({"tokens_per_parameter": [1, 2]}, "three or more"),
        ({"held_out_scale": 0.3}, "held_out_scale: is one of `scales`"),
        ({"common": {"max_steps": 3}}, "common: leave max_steps out; the ladder's own tokens_per_parameter"),
        ({"common": {"model_scale": 3}}, "common: leave model_scale out; use `scales`"),
    ],
)
def test_specs_that_make_no_ladder(tmp_path, changes, said):
    values = {"ladder_dir": str(tmp_path / "ladder"), "scales": [0.15, 0.3, 0.6], "held_out_scale": 0.45, **changes}
    with pytest.raises(UserError, match=said):
        ladder(read(values))


@pytest.mark.parametrize("file", LADDERS, ids=lambda file: file.stem)
def test_our_ladders_can_run(file, tmp_path, monkeypatch):
    """Every size of configs/ladder-*.yaml resolves, and is larger than the one before it."""
    monkeypatch.chdir(tmp_path)
    config = read(load_yaml(file))
    check_numbers(config)
    sizes = [
        one.size for one in Work(config, tmp_path).rungs([(s, 1) for s in (*config.scales, held_out_scale(config))])
    ]
    assert sizes == sorted(set(sizes)) and sizes[-1] > 1.5 * sizes[-2]


def test_each_length_has_the_rate_of_its_compute(spec, tmp_path):
    """Four times as many tokens in the same batch, which is large enough: 4^-0.125 of the rate."""
    common = spec().common
    config = spec(common={**common, "batch": {**common["batch"], "tokens_per_step": 8192}})
    short, long = (one.length for one in Work(config, tmp_path / "ladder").rungs([(0.3, 8), (0.3, 32)]))
    assert long.learning_rate / short.learning_rate == pytest.approx((long.tokens / short.tokens) ** -0.125, rel=1e-4)


def test_the_next_scale_of_the_series():
    assert held_out_scale(read({"scales": [1, 2, 0.5]})) == 4
