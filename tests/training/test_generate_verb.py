"""`generate` on a run: exact counts, and drafts that change no text."""

from dataclasses import replace

import pytest
from conftest import tiny_values

from trainer.commands.generate import GenerateConfig, compiles
from trainer.commands.generate import run as generate
from trainer.commands.train import run
from trainer.core.config import PrepareConfig
from trainer.core.errors import UserError
from trainer.data.prepare import prepare
from trainer.inference.compiled import COMPILED_FROM

SMALL = {"name": "transformer", "d_model": 32, "n_layers": 1, "n_heads": 2, "n_predict": 3}


def written(capsys, folder, **options):
    """(stdout, lines of stderr) of `generate`."""
    generate(GenerateConfig(run_dir=str(folder), device="cpu", **options))
    out, err = capsys.readouterr()
    return out, err.splitlines()


def test_the_tokens_are_counted_as_they_were_made(finished, capsys):
    """Also with bytes of which several make one character, and with several texts."""
    options = {"prompt": ["the cat", "a"], "samples": 2, "max_new_tokens": 9, "temperature": 2.0}
    _, lines = written(capsys, finished, **options)
    assert lines[-1].startswith("36 tokens in ")


def test_a_draft_model_changes_no_text(finished, capsys):
    options = {"prompt": ["the cat", "a"], "max_new_tokens": 11, "temperature": 0.7}
    plain, _ = written(capsys, finished, **options)
    drafted, lines = written(capsys, finished, draft=f"{finished}@12", draft_tokens=2, **options)
    assert drafted == plain
    assert lines[-2].startswith("22 tokens in ")
    assert lines[-1].startswith("drafts: 100% of ") and "passes of the draft model)" in lines[-1]


def test_when_steps_are_compiled():
    long, short = (GenerateConfig(max_new_tokens=n) for n in (COMPILED_FROM, 128))
    assert [compiles(long, "cuda"), compiles(short, "cuda"), compiles(long, "cpu")] == [True, False, False]
    assert compiles(GenerateConfig(compile=True), "cpu") and not compiles(replace(long, compile=False), "cuda")
    assert not compiles(replace(long, draft="mtp"), "cuda")


def test_own_heads_draft(finished, tiny_dataset, tmp_path, capsys):
    run(tiny_values(tiny_dataset, tmp_path / "heads", max_steps=1, model=SMALL))
    options = {"prompt": ["the cat", "a"], "max_new_tokens": 11}
    plain, _ = written(capsys, tmp_path / "heads", **options)
    drafted, lines = written(capsys, tmp_path / "heads", draft="mtp", **options)
    assert drafted == plain and lines[-1].startswith("drafts: ")
    with pytest.raises(UserError, match="^draft: mtp: this .* has no heads for later tokens"):
        generate(GenerateConfig(run_dir=str(finished), draft="mtp"))


def test_a_draft_that_cannot_be_is_one_line(finished, tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("the cat sat on the mat.\n" * 500)
    prepare(
        PrepareConfig(
            source=str(text),
            validation_fraction=0.2,
            tokenizer="train-bpe:270",
            sample_length=64,
            out=str(tmp_path / "data"),
            workers=1,
        ),
        lambda line: None,
    )
    run(tiny_values(tmp_path / "data", tmp_path / "other", max_steps=1, model=SMALL))
    with pytest.raises(UserError, match="^draft: .*other uses tokenizer train-bpe:270, but the run uses bytes"):
        generate(GenerateConfig(run_dir=str(finished), draft=str(tmp_path / "other")))
    with pytest.raises(UserError, match="^draft: .*nowhere is not a run's folder"):
        generate(GenerateConfig(run_dir=str(finished), draft=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="^draft: .* has no checkpoint of step 3"):
        generate(GenerateConfig(run_dir=str(finished), draft=f"{finished}@3"))
