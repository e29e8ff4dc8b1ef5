"""Dataclasses <- YAML <- flags: precedence, coercion, and one clear line for every mistake."""

import pytest

from models.base import get_model, load_models
from trainer.config import EvaluateConfig, GenerateConfig, PrepareConfig, RunConfig
from trainer.errors import UserError
from trainer.settings import Repeated, build, help_text, leaf_keys, load_yaml, merge, parse_flags, to_yaml

load_models()


def test_precedence_defaults_yaml_base_flags(tmp_path):
    (tmp_path / "base.yaml").write_text("seed: 1\nmax_steps: 10\noptim:\n  lr: 1e-3\n  clip_norm: 2\n")
    (tmp_path / "top.yaml").write_text("base: base.yaml\nmax_steps: 20\noptim: {lr: 3e-4}\n")
    _, flags = parse_flags(["--optim.lr", "5e-4", "--data.path=x"])
    config = build(RunConfig, merge(load_yaml(tmp_path / "top.yaml"), flags))
    assert (config.seed, config.max_steps, config.optim.lr, config.optim.clip_norm) == (1, 20, 5e-4, 2.0)
    assert config.data.path == "x"
    assert config.precision == "auto"


def test_scientific_notation_is_a_number(tmp_path):
    (tmp_path / "c.yaml").write_text("a: 3e-4\nb: 1E6\nc: -2e+3\nd: 3e4x\n")
    assert load_yaml(tmp_path / "c.yaml") == {"a": 3e-4, "b": 1e6, "c": -2e3, "d": "3e4x"}


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"optim": {"lrr": 1}}, "unknown key optim.lrr; did you mean optim.lr?"),
        ({"lr": 1}, "unknown key lr; did you mean optim.lr?"),
        ({"precison": "fp32"}, "unknown key precison; did you mean precision?"),
        ({"precision": "fp16"}, "precision: 'fp16' is not allowed; did you mean"),
        ({"precision": "fp16"}, "(allowed: auto, fp32, bf16, pure_bf16)"),
        ({"max_steps": "ten"}, "max_steps: expected integer, got 'ten'"),
        ({"max_steps": 1.5}, "max_steps: expected integer, got 1.5"),
        ({"max_steps": True}, "max_steps: expected integer, got True"),
        ({"max_steps": None}, "max_steps: has no value; expected integer"),
        ({"model_scale": "nan"}, "model_scale: expected number, got 'nan'"),
        ({"deterministic": "perhaps"}, "deterministic: expected true|false, got 'perhaps'"),
        ({"optim": 3}, "optim: is a section with keys recipe, lr"),
        ({"seed": [1]}, "seed: expected integer, got [1]"),
        ({"seed": ["1", "2"]}, "seed: expected integer, got ['1', '2']"),
        ({"seed": Repeated(["1", "2"])}, "seed: was given 2 times (1, 2); it takes one value"),
        ({"run_dir": Repeated(["a", "b"])}, "run_dir: was given 2 times (a, b); it takes one value"),
        ({"log": {"sample_prompt": ["a", ["b"]]}}, "log.sample_prompt: expected text, got ['a', ['b']]"),
        ({"model_scale": 0}, "model_scale: 0.0 is too small; it must be above 0"),
        ({"optim": {"final_lr_fraction": 1.5}}, "optim.final_lr_fraction: 1.5 is too large; at most 1"),
    ],
)
def test_mistakes_are_named(values, expected):
    with pytest.raises(UserError) as caught:
        build(RunConfig, values)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_section_changes_nothing(tmp_path):
    (tmp_path / "base.yaml").write_text("optim: {lr: 1e-3}\n")
    (tmp_path / "top.yaml").write_text("base: base.yaml\noptim:\n#  lr: 2e-3\n")
    assert build(RunConfig, load_yaml(tmp_path / "top.yaml")).optim.lr == 1e-3


def test_flags():
    positional, nested = parse_flags(
        ["c.yaml", "--a.b", "1", "--json", "--p=x=y", "--q", "one", "--q", "two", "--n", "-3"]
    )
    assert positional == ["c.yaml"]
    assert nested == {"a": {"b": "1"}, "json": "true", "p": "x=y", "q": ["one", "two"], "n": "-3"}


def test_value_and_section_conflict():
    with pytest.raises(UserError, match="both a value and sub-keys"):
        parse_flags(["--data", "x", "--data.path", "y"])


def test_numbers_keep_their_precision():
    config = build(RunConfig, {"seed": "12345678901234567", "batch": {"tokens_per_step": "1_000"}, "max_steps": "1e3"})
    assert (config.seed, config.batch.tokens_per_step, config.max_steps) == (12345678901234567, 1000, 1000)


def test_text_stays_text():
    config = build(GenerateConfig, {"prompt": ["1856", "a, b: c"], "stop": "null"})
    assert config.prompt == ["1856", "a, b: c"]
    assert config.stop == ["null"]


@pytest.mark.parametrize("cls", [RunConfig, PrepareConfig, GenerateConfig, EvaluateConfig])
def test_yaml_round_trip_and_help(cls, tmp_path):
    config = build(cls, {})
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert build(cls, load_yaml(tmp_path / "c.yaml")) == config
    text = help_text(cls)
    for key in leaf_keys(cls):
        assert f"--{key} " in text
    assert all(line.strip() for line in text.splitlines()), "every key has a help text"


@pytest.mark.parametrize(
    "content, expected",
    [
        ("a: [1", "not valid YAML"),
        ("- 1\n", "a config is a mapping"),
        ("a: 1\na: 2\n", "'a' stands twice"),
        ("base: self.yaml\n", "leads back to this file"),
        ("base: missing.yaml\n", "no such config file"),
        ("a: !!python/object/apply:os.system ['touch pwned']\n", "not valid YAML"),
    ],
)
def test_bad_yaml(tmp_path, monkeypatch, content, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "self.yaml").write_text(content)
    with pytest.raises(UserError, match=expected) as caught:
        load_yaml(tmp_path / "self.yaml")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()


def test_a_text_setting_takes_a_list_as_words_with_commas(tmp_path):
    (tmp_path / "c.yaml").write_text("model: {pattention: [qkv, out], prediction_weights: [1, 0.5], n_predict: 2}\n")
    model = load_yaml(tmp_path / "c.yaml")["model"]
    found = build(get_model("llama").Config, model)
    assert (found.pattention, found.prediction_weights) == ("qkv,out", "1,0.5")


def test_a_repeated_flag_is_a_list_in_yaml(tmp_path):
    config = build(RunConfig, parse_flags(["--model.x", "1", "--model.x", "2", "--model.x", "3"])[1])
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert load_yaml(tmp_path / "c.yaml")["model"]["x"] == ["1", "2", "3"]


def test_a_missing_base_names_the_file_that_asks_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nosuc.yaml").write_text("base: nosuch.yaml\n")
    with pytest.raises(UserError) as caught:
        load_yaml("nosuc.yaml")
    assert str(caught.value) == "nosuc.yaml: `base` is nosuch.yaml: no such config file"
    (tmp_path / "nosuchh.yaml").write_text("")
    with pytest.raises(UserError, match="no such config file; did you mean nosuchh.yaml?"):
        load_yaml("nosuc.yaml")


def test_missing_file_suggests_a_near_one(tmp_path):
    (tmp_path / "quickstart.yaml").write_text("")
    with pytest.raises(UserError, match="did you mean .*quickstart.yaml"):
        load_yaml(tmp_path / "quikstart.yaml")
