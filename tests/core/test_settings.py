"""Dataclasses <- YAML <- flags: precedence, coercion, and one clear line for every mistake."""

import dataclasses
import os
import random
import tempfile
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, RUN_CONFIGS
from hypothesis import given, settings
from hypothesis import strategies as st

from models.base import get_model, load_models
from trainer.commands.bench import BenchConfig
from trainer.commands.compare import CompareConfig
from trainer.commands.evaluate import EvaluateConfig
from trainer.commands.export import ExportConfig
from trainer.commands.generate import GenerateConfig
from trainer.commands.plan import PlanConfig
from trainer.core.config import PrepareConfig, RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import (
    build,
    coerce,
    coerced,
    free_sections,
    help_text,
    leaf_keys,
    load_yaml,
    merge,
    parse_flags,
    to_yaml,
)
from trainer.planning.run_config import flat

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
    values = load_yaml(tmp_path / "c.yaml")
    assert [coerce(float, values[key], key) for key in "abc"] == [3e-4, 1e6, -2e3]
    assert values["d"] == "3e4x"


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
        ({"max_steps": "1e-400"}, "max_steps: expected integer, got '1e-400'"),
        ({"max_steps": "0e999999999999999999999"}, "max_steps: expected integer"),
        ({"max_steps": "12345678901234567.5"}, "max_steps: expected integer"),
        ({"max_steps": "0x10"}, "max_steps: expected integer, got '0x10'"),
        ({"max_steps": "1:30"}, "max_steps: expected integer, got '1:30'"),
        ({"seed": "9" * 5000}, "seed: expected integer, got '999"),
        ({"batch": {"tokens_per_step": "1e23"}}, "batch.tokens_per_step: '1e23' is too large"),
        ({"model": {"name": None}}, "model.name: has no value; expected text"),
        ({"run_dir": "\udc80x"}, r"run_dir: '\udc80x' is not valid UTF-8 text"),
        ({"optim.lr": 1}, "unknown key optim.lr: write the key lr inside the section optim"),
        ({"n_epochs": 3}, "unknown key n_epochs; use epochs: how often the run reads its training split"),
        ({"n_params": 3}, "unknown key n_params; use parameters: size of the model"),
        ({"x" * 10_000: 3}, "unknown key xxx"),
        ({"max_steps": True}, "max_steps: expected integer, got True"),
        ({"seed": None}, "seed: has no value; expected integer"),
        ({"model_scale": "nan"}, "model_scale: expected number, got 'nan'"),
        ({"deterministic": "perhaps"}, "deterministic: expected true|false, got 'perhaps'"),
        ({"optim": 3}, "optim: is a section with keys name, settings, roles, recipe, lr"),
        ({"seed": [1]}, "seed: expected integer, got [1]"),
        ({"seed": ["1", "2"]}, "seed: expected integer, got ['1', '2']"),
        ({"log": {"sample_prompt": ["a", ["b"]]}}, "log.sample_prompt: expected text, got ['a', ['b']]"),
        ({"model_scale": 0}, "model_scale: 0.0 is too small; it must be above 0"),
        ({"optim": {"final_lr_fraction": 1.5}}, "optim.final_lr_fraction: 1.5 is too large; at most 1"),
    ],
)
def test_mistakes_are_named(values, expected):
    with pytest.raises(UserError) as caught:
        build(RunConfig, values)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_a_flag_given_twice_counts_as_it_was_given_last():
    words = ["--seed", "1", "--seed", "2", "--run_dir", "a", "--run_dir=b", "--optim.lr", "auto", "--optim.lr", "1e-3"]
    words += ["--precision", "bf16", "--precision", "fp32", "--profile", "false", "--profile", "--model.name", "a"]
    config = build(
        RunConfig, parse_flags([*words, "--model.name", "gpt2", "--batch.n_max", "3", "--batch.n_max", "2"])[1]
    )
    assert (config.seed, config.run_dir, config.optim.lr, config.precision) == (2, "b", 1e-3, "fp32")
    assert (config.profile, config.model["name"], config.batch.n_max) == (True, "gpt2", 2.0)
    model = coerced(get_model("llama").Config, parse_flags(["--window_pattern", "SL", "--window_pattern", "SSL"])[1])
    assert model["window_pattern"] == "SSL"
    assert build(GenerateConfig, parse_flags(["--prompt", "a", "--prompt", "b"])[1]).prompt == ["a", "b"]


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


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}]\n"
    for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "content, expected",
    [
        ("seed: !!int abc\n", "the tag !!int is not supported; .* \\(line 1\\)"),
        ("run_dir: !!timestamp abc\n", "the tag !!timestamp is not supported"),
        ("a: &x [*x]\n", "\\*x occurs inside its own value"),
        ("a: &x {b: *x}\n", "\\*x occurs inside its own value"),
        ("a: *x\n", "undefined alias|is not defined"),
        ("a: " + "[" * 5000, "more than 32 levels of nesting"),
        ("a: &x " + "[" * 20 + "]" * 20 + "\nb: " + "[" * 20 + "*x" + "]" * 20, "more than 32 levels"),
        ("".join(" " * i + "a:\n" for i in range(500)), "more than 32 levels of nesting"),
        (BOMB, "more than 10,000 values .with aliases expanded"),
        ("".join(f"k{i}: 1\n" for i in range(60_000)), "more than 10,000 values"),
        ("a: " + "x" * (1 << 21), "has more than 1 MiB"),
        ('run_dir: "\\ud800x"\n', "half a character"),
        ('run_dir: "\\U00110000"\n', "not valid YAML"),
        ("a: 1\n---\nb: 1\n", "a second document begins"),
        ("? [a]\n: 1\n", "a key must be a word"),
        ("*a : 1\n", "a key must be a word|undefined"),
        ("<<: 1\n", "`<<` takes the alias of a mapping"),
        ("a\0b: 1\n", "not valid YAML"),
        ("%YAML 1." + "9" * 5000 + "\n---\na: 1\n", "not valid YAML"),
        ("base: [a, b]\n", "`base` names one file"),
        ('base: "a\\0b"\n', "`base`: .* holds a character that is not allowed in file names"),
        ("base: ~nosuchuser/x\n", "`base`: ~nosuchuser is not a user of this machine"),
        ("base: pipe\n", "pipe: is a pipe or a device"),
        ("base: /dev/zero\n", "/dev/zero: is a pipe or a device"),
        ("base: .\n", "cannot be read: Is a directory"),
        ("a: [1", "not valid YAML"),
        ("- 1\n", "a config is a mapping"),
        ("a: 1\na: 2\n", "'a' occurs twice"),
        ("base: self.yaml\n", "leads back to this file"),
        ("base: missing.yaml\n", "no such config file"),
        ("a: !!python/object/apply:os.system ['touch pwned']\n", "not valid YAML"),
    ],
)
def test_bad_yaml(tmp_path, monkeypatch, content, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "self.yaml").write_text(content)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=expected) as caught:
        load_yaml(tmp_path / "self.yaml")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000
    assert not (tmp_path / "pwned").exists()


def test_bytes_that_are_no_text_are_no_config(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"a: \xff\n")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        load_yaml(tmp_path / "a.yaml")


TEXTS = ["010", "1e3", "no", "1:30", "2026-02-30", "0x10", "1_000", "Yes", ".inf", "=", "1.0e-05", "1.50", "on", "0o7"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_key_gets_the_text_as_written(tmp_path, text):
    (tmp_path / "c.yaml").write_text(
        f"run_dir: {text}\nlog: {{sample_prompt: {text}}}\nmodel: {{pattention: {text}}}\n"
    )
    config = build(RunConfig, load_yaml(tmp_path / "c.yaml"))
    flags = build(RunConfig, parse_flags(["--run_dir", text, "--log.sample_prompt", text])[1])
    assert config.run_dir == flags.run_dir == config.log.sample_prompt == flags.log.sample_prompt == text
    if text != "1.0e-05":  # as a run's own config.yaml writes numbers of a model
        assert coerced(get_model("llama").Config, config.model)["pattention"] == text


@pytest.mark.parametrize("text, expected", [("010", 10), ("1_000", 1000), ("1e3", 1000), ("-0", 0), ("1.5e1", 15)])
def test_integers_are_decimal(tmp_path, text, expected):
    (tmp_path / "c.yaml").write_text(f"seed: {text}\n")
    assert build(RunConfig, load_yaml(tmp_path / "c.yaml")).seed == expected


def test_off_is_a_way_to_write_disabled(tmp_path):
    (tmp_path / "c.yaml").write_text("log: {wandb: off}\n")
    assert build(RunConfig, load_yaml(tmp_path / "c.yaml")).log.wandb == "disabled"


def test_anchors_and_merge_keys(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "x: &x {lr: 1, warmup_steps: 2}\ny: &y {lr: 3, clip_norm: 4}\noptim: {<<: [*x, *y], warmup_steps: 5}\nz: *x\n"
    )
    values = load_yaml(tmp_path / "c.yaml")
    assert values["optim"] == {"lr": "1", "clip_norm": "4", "warmup_steps": "5"}
    assert values["z"] == values["x"] and values["z"] is not values["x"]


@pytest.mark.parametrize("file", RUN_CONFIGS, ids=lambda file: file.stem)
def test_our_configs_mean_what_yaml_says(file):
    with file.open() as content:
        values = yaml.safe_load(content)
    base = values.pop("base", None)
    if base:
        values = merge(yaml.safe_load((file.parent / base).read_text()), values)
    assert build(RunConfig, load_yaml(file)) == build(RunConfig, values)


def test_the_config_that_an_older_version_wrote_reads_back_to_the_same_values(tmp_path):
    model = {
        "name": "llama",
        "norm_eps": 1e-05,
        "rope_theta": 1e16,
        "d_model": 64,
        "tied": True,
        "window_pattern": "010",
    }
    config = build(
        RunConfig, {"model": model, "run_dir": "runs/1e3", "log": {"sample_prompt": "it's: [a] \u00e9 #\n\t"}}
    )
    old = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True, width=120)
    (tmp_path / "c.yaml").write_text(old, encoding="utf-8")
    assert build(RunConfig, load_yaml(tmp_path / "c.yaml")) == config


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.text(st.characters(exclude_categories=["Cs"])), st.text("01eE.+-_:~ nofyestrue\n\t'\"#&*!|>%@`\x85\u2028\ufeff")
)
def test_any_text_survives_the_file(one, other):
    config = build(GenerateConfig, {"prompt": [one, other, one + other]})
    values = build(RunConfig, {"model": {"x": other, one: 1.5, "y": [other]}, "log": {"sample_prompt": one}})
    with tempfile.TemporaryDirectory() as folder:
        for before in (config, values):
            file = Path(folder, "c.yaml")
            file.write_bytes(to_yaml(before).encode())
            assert build(type(before), load_yaml(file)) == before


def test_a_config_of_this_installation_is_found_by_name_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_yaml("configs/llama.yaml") == load_yaml(ROOT / "configs" / "llama.yaml")
    (tmp_path / "mine.yaml").write_text("base: configs/llama.yaml\nseed: 5\n")
    assert load_yaml("mine.yaml")["seed"] == "5" and load_yaml("mine.yaml")["model"]["name"] == "llama"
    with pytest.raises(UserError, match="configs/lama.yaml: no such config file; did you mean configs/llama.yaml?"):
        load_yaml("configs/lama.yaml")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "llama.yaml").write_text("seed: 7\n")
    assert load_yaml("configs/llama.yaml") == {"seed": "7"}


def test_names_of_the_environment_are_filled_in(tmp_path, monkeypatch):
    monkeypatch.setenv("WHERE", str(tmp_path))
    (tmp_path / "base.yaml").write_text("seed: 3\n")
    (tmp_path / "top.yaml").write_text("base: $WHERE/base.yaml\n")
    assert load_yaml("$WHERE/top.yaml") == {"seed": "3"}


def test_help_has_one_word_for_what_is_inferred():
    for cls in (RunConfig, PrepareConfig, GenerateConfig, EvaluateConfig, BenchConfig, PlanConfig, ExportConfig):
        assert "none:" not in help_text(cls) and "null" not in help_text(cls)


def test_a_text_setting_takes_a_list_as_words_with_commas(tmp_path):
    (tmp_path / "c.yaml").write_text("model: {pattention: [qkv, out], prediction_weights: [1, 0.5], n_predict: 2}\n")
    model = load_yaml(tmp_path / "c.yaml")["model"]
    found = build(get_model("llama").Config, model)
    assert (found.pattention, found.prediction_weights) == ("qkv,out", "1,0.5")


def test_a_repeated_flag_is_a_list_in_yaml(tmp_path):
    config = build(RunConfig, parse_flags(["--model.x", "1", "--model.x", "2", "--model.x", "3"])[1])
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert load_yaml(tmp_path / "c.yaml")["model"]["x"] == ["1", "2", "3"]


@pytest.mark.parametrize(
    "cls, key, text, expected",
    [
        (CompareConfig, "seeds", "1,2", "seeds: expected integer, got '1,2'; for several, repeat the flag: --seeds 1 --seeds 2"),
        (CompareConfig, "learning_rates", "0,5", "expected number, got '0,5'; for several"),  # may be a decimal comma
        (BenchConfig, "baselines", "bare,eager,", "got 'bare,eager,'; for several, repeat the flag: --baselines bare --baselines eager$"),
    ],
)  # fmt: skip
def test_a_list_with_commas_is_told_how_several_values_are_given(cls, key, text, expected):
    with pytest.raises(UserError, match=expected):
        build(cls, parse_flags([f"--{key}", text])[1])


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


VALUES = (
    *("010", "1e3", "no", "1:30", "2026-02-30", "0x10", "1_000", ".inf", "nan", "=", "~", "auto", "9" * 5000, "1e400"),
    *(
        "-1",
        "0",
        "1e18",
        str(2**62),
        str(2**63),
        "1e308",
        "0.5",
        "!!int abc",
        "!!timestamp abc",
        '"a\\0b"',
        '"\\ud800x"',
    ),
    *(
        '"\\x1b[31m"',
        "~nosuchuser/x",
        "[a, [b]]",
        "{a: 1}",
        "&x [*x]",
        "*x",
        "''",
        "|\n  a",
        "? a",
        "- a",
        "\u6f22",
        "a: b",
    ),
)


def changed(draw: random.Random, text: str, keys: list[str]) -> tuple[bytes, str, str]:
    """A config with one key set otherwise, in half of the cases damaged here and there: (bytes, that key, its text)."""
    key, value = draw.choice(keys), draw.choice(VALUES)
    section, _, leaf = key.rpartition(".")
    added = f"{section}:\n  {leaf}: {value}\n" if section else f"{key}: {value}\n"
    data = bytearray((text + added).encode())
    if draw.random() < 0.5:
        for _ in range(draw.randrange(1, 6)):
            at = draw.randrange(len(data))
            data[at : at + draw.randrange(3)] = bytes(
                draw.choice(b":[]{}&*!|>'\"%@`#,?-\n\t \0\xff\\<9") for _ in range(2)
            )
        value = ""
    return bytes(data), key, value


def test_no_config_gives_a_traceback_or_another_value(tmp_path):
    """Some hundred changed files: each is refused in one line, or every text and whole number of it is what was written."""
    draw, file, outcomes = random.Random(7), tmp_path / "c.yaml", Counter()
    keys = [key for key in leaf_keys(RunConfig) if key not in free_sections(RunConfig)]
    for _ in range(300):
        data, key, value = changed(draw, "model: {name: llama}\nmodel_scale: 0.01\n", keys)
        file.write_bytes(data)
        try:
            config = build(RunConfig, load_yaml(file))
        except UserError as error:
            assert len(str(error)) < 3000 and str(error).isprintable(), data
            outcomes["refused"] += 1
            continue
        found = dict(flat(config))[key]
        if type(found) is int and value:
            assert found == int(Decimal(value)), data
        elif type(found) is str and value and value[0] not in "!\"'&*[{|?-~":
            assert found in (value, "disabled"), data
        assert build(RunConfig, yaml.safe_load(to_yaml(config))) == config, data
        outcomes["read"] += 1
    assert min(outcomes["read"], outcomes["refused"]) > 10, outcomes  # a new key changes what is drawn
