"""`prepare --patches`: an entropy model is a run; what it stores cuts the text of another run, which finds it again wherever it needs more."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from cases import matrix_values, train_cases
from conftest import WITH_ENTROPIES, open_split, tiny_values, words_text
from tiny_runs import make

from trainer.commands import export
from trainer.commands.compare import read
from trainer.commands.compare.budget import lengths
from trainer.commands.compare.spec import arms
from trainer.commands.data import SurveyConfig
from trainer.commands.data import run as survey
from trainer.commands.export import ExportConfig
from trainer.commands.generate import GenerateConfig
from trainer.commands.generate import run as generate
from trainer.commands.prepare import run as prepare_run
from trainer.commands.train import run
from trainer.core.config import DataConfig, PrepareConfig
from trainer.core.errors import Damaged, UserError
from trainer.core.settings import load_yaml
from trainer.data.dataset import ENTROPIES, DatasetInfo
from trainer.data.stream import find_dataset
from trainer.inference.evaluation import validate
from trainer.inference.patches import open_patcher, threshold_for, values_of
from trainer.runs.opening import open_run
from trainer.runtime.distributed import World

GPT2 = {"name": "gpt2", "n_layers": 1, "d_model": 16, "n_heads": 2}
BLT = {"name": "blt", "d_model": 32, "n_layers": 1, "n_heads": 2, "decoder_layers": 1, "hash_size": 20}
BLT |= {"patching": "entropy"}
LENGTH, SIZE = 64, 3.0
BATCH = {"tokens_per_step": 512, "tokens_per_microbatch": 256, "sequence_length": LENGTH, "sequence_start": LENGTH}


@pytest.fixture(scope="module")
def entropy_run(tiny_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("entropy") / "run"
    run(tiny_values(tiny_dataset, folder, model=GPT2, max_steps=30, optim={"lr": 3e-2}))
    return folder


def prepared(folder, **changes):
    (folder / "texts").mkdir(parents=True)
    for i in range(8):
        (folder / "texts" / f"{i}.txt").write_text(words_text(i, 150))
    settings = {"source": str(folder / "texts"), "tokenizer": "bytes", "validation_fraction": 0.2, "workers": 1}
    settings |= {"sample_length": LENGTH, "patch_size": SIZE, "out": str(folder / "data")}
    prepare_run(PrepareConfig(**settings | changes))
    return folder / "data"


@pytest.fixture(scope="module")
def data(entropy_run, tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("stored") / "d", patches=str(entropy_run))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("blt") / "run"
    run(tiny_values(data, folder, model=BLT, batch=BATCH, max_steps=4, log__sample_tokens=4))
    return folder


def test_what_is_stored_is_the_entropy_of_each_byte(data, entropy_run):
    model, split = open_run(str(entropy_run), None, "cpu", "fp32").model, open_split(data)
    shared = np.zeros(1)
    for number in (0, 1, 2, split.counts.samples - 1):
        sample = split.sample(number)
        with torch.no_grad():
            logits = model(torch.from_numpy(sample["tokens"].astype(np.int64))[None, :-1]).logits[0, :, :257]
        p = logits.double().softmax(-1)
        expected = -(p * p.log()).sum(-1).numpy()
        # float16 holds 11 bits: half a unit in the last place is 2^-11 of the value.
        np.testing.assert_allclose(sample[ENTROPIES][1:], expected, rtol=2**-11 + 1e-5)
        if number < 3:
            assert np.array_equal(sample[ENTROPIES][:1], shared)
            shared = sample[ENTROPIES][-1:]


def test_the_thresholds_give_the_size_that_was_asked(data, entropy_run):
    info = find_dataset(DataConfig(path=str(data)))
    found = info.patches
    assert found.run == f"{entropy_run}@30" and found.patch_size == SIZE and not found.separate
    splits = [open_split(data, name) for name in info.splits]
    values = [one.sample(i)[ENTROPIES][1:].astype(np.float64) for one in splits for i in range(one.counts.samples)]
    rises = [np.diff(one).astype(np.float16).astype(np.float64) for one in values]
    for rule, numbers in (("entropy", np.concatenate(values)), ("monotonic", np.concatenate(rises))):
        # So short a training gives few different values: no size that they allow is nearer to the one that was asked.
        sizes = np.array([1 / np.mean(numbers > value) for value in np.unique(numbers)[:-1]])
        got = 1 / np.mean(numbers > found.thresholds[rule])
        assert abs(np.log(got / SIZE)) == pytest.approx(np.abs(np.log(sizes / SIZE)).min(), abs=1e-9), rule
        assert got == pytest.approx(SIZE, rel=0.15)
    assert sum(found.histogram) == sum(info.splits[name].tokens - 1 for name in info.splits)


def test_a_threshold_lies_between_two_values():
    numbers = np.array([0.5, 0.5, 1.0, 2.0, 2.0, 4.0, -1.0, 0.0], np.float16)
    counts = np.bincount(numbers.view(np.uint16), minlength=1 << 16)
    values, often = values_of(counts)
    assert values.tolist() == [-1, 0, 0.5, 1, 2, 4] and often.tolist() == [1, 1, 2, 1, 2, 1]
    assert threshold_for(counts, 8 / 3) == (1.5, 8 / 3)
    assert threshold_for(counts, 100.0) == (3.0, 8.0)


def test_a_run_trains_on_it_and_its_validation_computes_the_same_entropies(data, trained):
    """Windows of validation are whole samples here, so the patcher reads what the stored entropies are of."""
    opened = open_run(str(trained), None, "cpu", "auto")
    info = DatasetInfo.load(trained)
    assert opened.model.config.threshold == info.patches.thresholds["entropy"]
    assert opened.model.config.patch_size == SIZE
    split = open_split(data, "validation")
    sample = {name: torch.from_numpy(values.astype(np.float32)) for name, values in split.sample(1).items()}
    tokens = sample["tokens"].long()[None, :-1]
    stored = sample[ENTROPIES][None, 1:]
    found = opened.model.patcher.entropies(tokens)
    # `prepare` read another batch, so its products may round otherwise: to the next fp16 number at most, and the cuts are the same.
    torch.testing.assert_close(found, stored, rtol=2**-10, atol=0)
    threshold = opened.model.config.threshold
    assert torch.equal(found > threshold, stored > threshold)
    with torch.no_grad():
        assert torch.equal(opened.model(tokens).logits, opened.model(tokens, entropies=found).logits)
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    again = validate(opened, opened.split(opened.config.data, "validation"), opened.config, World(), 4)
    assert again["full"]["loss"] == pytest.approx(rows[-1]["val_loss"], rel=1e-5)
    assert not [name for name in opened.model.state_dict() if "patcher" in name]


def test_training_reads_the_column(data, tmp_path):
    """Other entropies give another loss, and a batch without them has the patcher's, which are the same."""
    one = make(data, tmp_path / "r", model=BLT, batch=BATCH)
    batch = one.read(LENGTH, 8)
    assert batch[ENTROPIES].shape == batch["tokens"].shape
    losses = []
    for changed in (
        batch,
        {**batch, ENTROPIES: batch[ENTROPIES].flip(1)},
        {k: batch[k] for k in ("tokens", "targets")},
    ):
        losses.append(one.engine.joined(changed).sum.item())
    assert losses[0] != losses[1]
    assert losses[2] == pytest.approx(losses[0], rel=1e-6)
    one.stream.close()


def test_text_is_written_with_the_patcher_step_by_step(trained, capsys):
    generate(GenerateConfig(run_dir=str(trained), prompt=["the cat sat", "a dog"], max_new_tokens=12, temperature=0))
    out, err = capsys.readouterr()
    assert "the cat sat" in out and "24 tokens" in err and "the whole context" not in err


@pytest.mark.slow
def test_the_run_goes_on_and_two_ranks_train_as_one(data, trained, tmp_path):
    """Rows have other numbers of patches on each rank; the loss is over all bytes."""
    run({"run_dir": str(trained), "max_steps": 5})

    def cases(*strategies):
        return [
            {
                "name": strategy,
                "values": matrix_values(data, tmp_path / strategy, "blt", strategy) | {"model": BLT, "batch": BATCH},
                "steps": 3,
            }
            for strategy in strategies
        ]

    [alone] = train_cases(cases("single"), 1, tmp_path).values()
    for name, result in train_cases(cases("ddp", "fsdp"), 2, tmp_path).items():
        assert result["loss"] == pytest.approx(alone["loss"], rel=3e-5), name
        assert result["grad_norm"] == pytest.approx(alone["grad_norm"], rel=3e-5), name


def test_an_export_for_transformers_is_refused_because_it_holds_one_model(trained, tmp_path):
    pytest.importorskip("transformers", reason="needs Hugging Face transformers")
    with pytest.raises(
        UserError, match="^format: hf holds one model, and model.patching entropy needs the entropies of a"
    ):
        export.run(ExportConfig(run_dir=str(trained), format="hf", out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    export.run(ExportConfig(run_dir=str(trained), out=str(tmp_path / "out")))


def test_our_comparison_of_patches_can_run(data):
    spec = read(load_yaml(WITH_ENTROPIES))
    info = dataclasses.replace(find_dataset(DataConfig(path=str(data))), sample_length=1024)
    found = lengths(arms(spec), spec.budget, lambda _: info, rate=None)
    assert not [length.refused for length in found.values() if length.refused]


def test_the_picture_of_a_dataset_shows_its_patches(data, tmp_path, capsys):
    survey(SurveyConfig(path=str(data), out=str(tmp_path / "picture.png")), as_json=True)
    report = json.loads(capsys.readouterr().out)
    for name in ("picture.png", "picture-patches.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    found, thresholds = report["patches"], find_dataset(DataConfig(path=str(data))).patches.thresholds
    assert found["thresholds"] == thresholds
    split = open_split(data)
    values = [split.sample(i)[ENTROPIES][1:].astype(np.float64) for i in range(split.counts.samples)]
    share = np.mean(np.concatenate(values) > thresholds["entropy"])
    assert found["sizes"]["train"]["entropy"] == pytest.approx(1 / share, rel=1e-6)
    survey(SurveyConfig(path=str(data), out=str(tmp_path / "picture.png")))
    assert "tokens of a patch, entropy above" in capsys.readouterr().out


def test_another_model_under_the_same_name_is_noticed(data, entropy_run, tmp_path):
    info = find_dataset(DataConfig(path=str(data)))
    changed = dataclasses.replace(info.patches, weights="0" * 64)
    with pytest.raises(Damaged, match="has other weights than when the data were prepared"):
        open_patcher(changed, info.tokenizer, torch.device("cpu"), World())
    gone = dataclasses.replace(info.patches, run=str(tmp_path / "gone@30"))
    with pytest.raises(UserError, match="^patches: .*gone"):
        open_patcher(gone, info.tokenizer, torch.device("cpu"), World())


def test_what_cannot_be_is_one_line(tiny_dataset, data, entropy_run, tmp_path):
    for number, (changes, why) in enumerate(
        (
            ({"tokenizer": "chars"}, r"^patches: .*texts was prepared with tokenizer chars"),
            ({"patches": "nowhere"}, r"^patches: nowhere is not a run's folder"),
            ({"sample_length": 2048}, r"^patches: .* reads 1024 tokens at most; set sample_length \(2048\)"),
            ({"teacher": str(entropy_run)}, "^patches: one model at a time predicts"),
        )
    ):
        with pytest.raises(UserError, match=why):
            prepared(tmp_path / str(number), **{"patches": str(entropy_run), **changes})
        assert not (tmp_path / str(number) / "data").exists()
    needs = r"^model.patching: entropy needs the entropies of another model, and .* has none: prepare the data with --patches RUN"
    with pytest.raises(UserError, match=needs):
        make(tiny_dataset, tmp_path / "r", model=BLT)
    with pytest.raises(UserError, match="^data.separate_documents: the entropies of .* see across documents"):
        make(data, tmp_path / "r", model=BLT, data={"path": str(data), "separate_documents": True})
    objective = {"name": "fim", "prefix": "a", "middle": "b", "suffix": "c"}
    with pytest.raises(UserError, match=OTHER_TOKENS):
        make(data, tmp_path / "r", model=BLT, batch=BATCH, objective=objective)


OTHER_TOKENS = "^objective.name: the objective changes the tokens, and entropies are of those that the batch holds; train with another"


def test_pairs_of_answers_are_refused_in_one_line(entropy_run, tmp_path):
    """dpo puts both answers of a pair into the batch that the model reads. With other patching it trains."""
    row = {"prompt": "say a", "chosen": "aaaa b", "rejected": "cc dd"}
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(row)] * 16))
    source = {"source": str(tmp_path / "rows.jsonl"), "records": "preference"}
    pairs = prepared(tmp_path / "pairs", patches=str(entropy_run), **source)
    simpo = {"batch": BATCH, "objective": {"name": "dpo", "loss": "simpo"}}
    with pytest.raises(UserError, match=OTHER_TOKENS):
        make(pairs, tmp_path / "r", model=BLT, **simpo)
    make(pairs, tmp_path / "r", model=BLT | {"patching": "space"}, **simpo)


def test_a_description_that_prepare_would_not_write_is_refused(data, tmp_path):
    text = (data / "dataset.json").read_text()
    for key, value in (("patch_size", "large"), ("weights", "xyz"), ("thresholds", {"entropy": math.nan})):
        content = json.loads(text)
        content["patches"][key] = value
        with pytest.raises(Damaged, match="malformed"):
            DatasetInfo.from_json(json.dumps(content), "here")
