"""The command line as a user meets it: speed of help, errors, print_config, and peace with the launchers' own options."""

import json
import shutil
import statistics
import subprocess
import sys
import time
import zipfile

import pytest
import yaml
from conftest import PATIENCE, ROOT, RUN_CONFIGS, error_line, trainer
from processes import forked_trainer

import trainer.commands as trainer_commands
from models.base import get_model, load_models
from trainer.__main__ import dispatch, import_plugins, main
from trainer.commands import find_verbs
from trainer.core.errors import UserError
from trainer.core.settings import coerced, leaf_keys
from trainer.runs.console import Table
from trainer.runtime.distributed import World

ALL_KEYS = sorted(
    {"print_config", "json", "help"}
    # But check, which no launcher starts.
    | {key for verb in find_verbs().values() if verb.name != "check" for key in leaf_keys(verb.config)}
    | {"model.name", "model.d_model", "model.n_layers", "model.vocab_size", "model.n_heads", "model.norm_eps"}
)


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['trainer', '--help']; import trainer.__main__ as m; m.main(); "
        "sys.argv[1:] = ['train', '--help']; m.main(); "
        "heavy = {'torch', 'streaming', 'deepspeed', 'wandb', 'numpy', 'rich', 'matplotlib'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)


def test_a_verb_is_one_file(tmp_path, monkeypatch, capsys):
    """It declares its name, help, keys, what its word stands for and whether it has --json; nothing else names it."""
    (tmp_path / "greet.py").write_text(
        "from dataclasses import dataclass\n"
        "from trainer.commands import Verb\n"
        "@dataclass\nclass Greeting:\n    who: str = 'all'\n"
        "def run(config, as_json):\n    print('hello', config.who, as_json)\n"
        "VERB = Verb('greet', 'say hello', Greeting, run, json=True, positional=lambda word, flags: {'who': word})\n"
    )
    monkeypatch.setattr("trainer.commands.__path__", [*trainer_commands.__path__, str(tmp_path)])
    dispatch(["--help"])
    assert "  greet            say hello\n" in capsys.readouterr().out
    dispatch(["greet", "--help"])
    assert "--who <text> [all]" in capsys.readouterr().out
    dispatch(["greet", "you", "--json"])
    dispatch(["greet", "--who", "me"])
    dispatch(["greet", "--who", "me", "--print_config"])
    assert capsys.readouterr().out == "hello you True\nhello me False\nwho: me\n"
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    dispatch(["greet"])  # under all ranks, unless it says `alone`
    assert capsys.readouterr().out == "hello all False\n"
    dispatch(["plan", "--model_scale", "0.01"])
    assert capsys.readouterr().out == ""
    del sys.modules["trainer.commands.greet"]


def test_help_names_the_verbs_and_reports_its_time(capsys):
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        done = trainer("--help")
        seconds.append(time.perf_counter() - begin)
    for verb in ("prepare", "plan", "train", "generate", "evaluate", "export", "bench", "preflight"):
        assert verb in done.stdout
    with capsys.disabled():
        print(f"\n--help answers in {statistics.median(seconds):.3f} s (median of 3)")


@pytest.mark.parametrize(
    "words, expected",
    [
        (["trian"], "unknown verb 'trian'; did you mean train?"),
        (["plan", "nothing.yaml"], "nothing.yaml: no such config file"),
        (["plan", "configs/quikstart.yaml"], "did you mean configs/quickstart.yaml?"),
        (["plan", "--modelscale", "2"], "unknown key modelscale; did you mean model_scale?"),
        (
            ["plan", "--model.name", "llama", "--model.window", "2048"],
            "model.window: 2048 is more than the longest sequence (1024)",
        ),
        (
            ["plan", "--model.name", "gpt3"],
            "model.name: 'gpt3' is not known (allowed: aunet, blagpt, ",
        ),
        (["plan", "--model.d_modle", "64"], "unknown key model.d_modle; did you mean model.d_model?"),
        (["plan", "--model.d_model", "wide"], "model.d_model: expected integer, got 'wide'"),
        (["plan", "--batch.sequence_length", "1000"], "does not divide the stored samples of 1024"),
        (["plan", "--batch.sequence_length", "2048"], "prepare the data with --sample_length 2048"),
        (["plan", "--max_steps", "0"], "max_steps: 0 is too small; at least 1"),
        (["plan", "--plugin", "no_such_module"], "plugin: cannot import no_such_module"),
        (["plan", "--plugin.x", "1"], "--plugin: expected text, got {'x': '1'}"),
        (["plan", ""], "config: is empty; name a path"),
        (["plan", "--"], "--: is not a key; write words joined by dots"),
        (["plan", "--total_tokens", "5"], "unknown key total_tokens; use tokens: length of the run"),
        (["plan", "--n_params", "5"], "unknown key n_params; use parameters: size of the model"),
        (["plan", "one.yaml", "two"], "takes one file or folder before its flags"),
        (["train"], "data.path: no data to train on"),
        (["train", "--data.path", "nowhere"], "nowhere"),
        (["generate", "--json"], "--json: generate has no JSON output"),
        (["train", "--device", "cuda", "--data.path", "x"], "x"),
        (["generate"], "run_dir: name the run's folder"),
        (["generate", "nowhere"], "nowhere is not a run folder"),
        (["generate", "nowhere", "--top_p", "2"], "top_p: 2.0 is too large; at most 1"),
        (["generate", "nowhere", "--stop", ""], "stop: is empty"),
        (["generate", "nowhere", "--draft", "x", "--beams", "2"], "draft: speculative decoding samples"),
        (["generate", "nowhere", "--compile", "true", "--draft", "x"], "compile: is for sampling one token at a time"),
        (["generate", "nowhere", "--draft_tokens", "2"], "draft_tokens: is for speculative decoding; give --draft too"),
        (["plan", "--optim.lr", "-1"], "optim.lr: -1.0 is too small; it must be above 0"),
        (["plan", "--model_scale", "-2"], "model_scale: -2.0 is too small"),
        (["plan", "--seed", "-1"], "seed: -1 is too small; at least 0"),
        (["plan", "--batch.sequence_start", "0"], "batch.sequence_start: 0 is too small"),
        (["plan", "--batch.sequence_start", "2048"], "batch.sequence_start: 2048 is more than"),
        (["plan", "--max_steps", "1e30"], "max_steps: "),
        (["plan", "--model.vocab_size", "abc"], "model.vocab_size: expected integer, got 'abc'"),
        (["plan", "--data.tokenizer", "no_such_folder"], "no_such_folder"),
        (["train", "pyproject.toml/x"], "no data to train on"),
        (["train", "--run_dir", "pyproject.toml"], "pyproject.toml is a file, not a folder"),
        (["evaluate", "nowhere"], "nowhere is not a run folder"),
        (["prepare", "--source", "missing.txt", "--out", "never"], "missing.txt"),
        (["prepare", "--out", "never"], "source"),
    ],
)
def test_bad_input_is_one_line(words, expected, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as caught:
        dispatch(words)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


BROKEN_PLUGINS = {
    "1 / 0": r"cannot import broken: ZeroDivisionError: division by zero \(.*broken\.py, line 5\)",
    "1 +": r"cannot import broken: SyntaxError: invalid syntax \(broken\.py, line 5\)",
    "with_defaults('C', mpl=1)": r"TypeError: no such fields: mpl \(.*broken\.py, line 5\)",
    "def f():\n    raise KeyError(1)\nf()": r"KeyError: 1 \(.*broken\.py, line 6\)",
    "register('b')(type('B', (LanguageModel,), {'blocks': 1}))": r"TypeError: B must define hidden and logits "
    r"\(or forward\), Config, init_weights, parameter_groups: see LanguageModel",
}


@pytest.mark.parametrize("line", BROKEN_PLUGINS)
def test_a_broken_plugin_is_told_with_its_line(line, tmp_path, monkeypatch):
    code = "from models.base import LanguageModel, register\nfrom models.presets import with_defaults\n\n\n"
    (tmp_path / "broken.py").write_text(code + line + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=f"^plugin: .*{BROKEN_PLUGINS[line]}") as caught:
        import_plugins(["broken"])
    assert "\n" not in str(caught.value)


def test_a_broken_file_of_the_zoo_is_told_in_one_line(tmp_path):
    for package in ("models", "trainer"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "models" / "broken.py").write_text("from models.base import nothing\n")
    done = trainer("plan", "--model.name", "gpt2", env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path)
    [line] = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith(
        "error: cannot import models.broken: ImportError: cannot import name"
    )
    assert line.endswith("models/broken.py, line 1)")


def test_a_folder_called_models_hides_nothing(tmp_path):
    """`python -m` has the current folder before ours on the path."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("raise SystemExit('the wrong models')\n")
    done = trainer("plan", "configs/quickstart.yaml", "--model.name", "gpt2", "--model_scale", "0.01", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "model.d_model" in done.stdout


def test_what_is_shown_moves_no_cursor(capfd, monkeypatch):
    evil = "\x1b[2J\x9b31m\r\n"
    monkeypatch.setattr(sys, "argv", ["trainer", "plan", f"--{evil}", "1"])
    monkeypatch.setattr("trainer.__main__.leave", lambda code: None)
    main()
    World().say(f"{evil}x\ty")
    World().say_from(evil)
    Table().say(evil)
    shown = capfd.readouterr().err
    assert "\x1b" not in shown and "\x9b" not in shown and "\r" not in shown
    assert shown.startswith(r"error: unknown key \x1b[2J\x9b31m\r\n (allowed: ")
    assert "\\x1b[2J\\x9b31m\\r\nx\ty\n" in shown


@pytest.mark.slow
def test_a_wheel_brings_its_configs(tmp_path):
    pytest.importorskip("setuptools", reason="builds a wheel without a network")
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "tests", "build", "*.egg-info", "__pycache__"))
    words = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path), str(source)]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True, capture_output=True, timeout=PATIENCE)
    [wheel] = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    assert (tmp_path / "site" / "trainer" / "commands" / "serve" / "page.html").is_file()
    (tmp_path / "models").mkdir()
    words = ["plan", "configs/llama.yaml", "--model_scale", "0.01", "--model.d_model", "96", "--print_config"]
    done = trainer(*words, "--data.tokenizer", "bytes", env={"PYTHONPATH": str(tmp_path / "site")}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["model"]["name"] == "llama"


def test_an_error_leaves_one_line_and_a_code(tmp_path):
    line = error_line(trainer("train", "--data.path", tmp_path / "nowhere", "--optim.lr", "1e-3"))
    assert str(tmp_path / "nowhere") in line
    assert "did you mean optim.lr?" in error_line(trainer("train", "--lr", "1"))


def test_a_reader_that_leaves_early_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m trainer train --help | head -1", shell=True, capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.startswith("python -m trainer train")
    assert done.stderr == ""


def test_print_config_run_again_is_the_same(tmp_path):
    first = forked_trainer("plan", "--model_scale", "0.5", "--optim.lr", "1e-3", "--print_config")
    assert first.returncode == 0, first.stderr
    (tmp_path / "resolved.yaml").write_text(first.stdout)
    second = forked_trainer("plan", tmp_path / "resolved.yaml", "--print_config")
    assert second.stdout == first.stdout
    values = yaml.safe_load(first.stdout)
    assert values["optim"]["lr"] == 1e-3
    assert values["model"]["d_model"] == 256


def test_plan_json_is_one_object_on_stdout():
    done = forked_trainer("plan", "--model_scale", "2", "--json")
    facts = json.loads(done.stdout)
    assert (facts["params"], facts["d_model"], facts["n_layers"]) == (97_678_093, 640, 13)
    assert round(facts["lr"], 8) == 1.74876e-3
    assert facts["sequence_lengths"] == [32, 64, 128, 256, 512, 1024]
    assert facts["tokens_per_microbatch"] > 0


def test_no_key_is_an_abbreviation_of_a_torchrun_option():
    from torch.distributed.run import get_args_parser

    options = get_args_parser()._option_string_actions
    taken = {key: option for key in ALL_KEYS for option in options if key != "help" and option.startswith(f"--{key}")}
    assert not taken


def test_torchrun_passes_every_key_through():
    from torch.distributed.run import get_args_parser

    script_words = [word for key in ALL_KEYS if key != "help" for word in (f"--{key}", "1")]
    parsed = get_args_parser().parse_args(["--nproc_per_node", "2", "-m", "trainer", "train", "c.yaml", *script_words])
    assert parsed.training_script_args == ["train", "c.yaml", *script_words]


def test_accelerate_passes_every_key_through():
    from accelerate.commands.launch import launch_command_parser

    script_words = [word for key in ALL_KEYS if key != "help" for word in (f"--{key}", "1")]
    parsed = launch_command_parser().parse_args(["-m", "trainer", "train", "c.yaml", *script_words])
    assert parsed.training_script_args == ["train", "c.yaml", *script_words]


def test_every_config_file_resolves(capsys):
    load_models()
    assert RUN_CONFIGS
    for file in RUN_CONFIGS:
        text = file.read_text()
        assert text.startswith("# "), f"{file.name} says in its first line what it is for"
        if "\nbase: " in text and file.stem != "modded":  # one for all: these differ in the network, and little else
            choices = yaml.safe_load(text)["model"]
            model = get_model(choices.pop("name"))
            shape = coerced(model.Config, choices, "model.") | {"d_model": 768, "n_layers": 12, "n_heads": 12}
            config = model.config_for_scale(1, 50304, 124_000_000, **shape)
            assert 0.6 < model.count_parameters(config) / 124e6 < 1.6, file.name
            continue
        # Its data must be prepared with another model: tests/inference/test_patches.py does.
        elsewhere = ["--data.path", "auto", "--data.tokenizer", "bytes", "--model.patching", "static"]
        dispatch(["plan", str(file), "--json", *(elsewhere if file.stem == "blt" else [])])
        json.loads(capsys.readouterr().out)


def test_every_setting_is_used_somewhere():
    """A key that nothing reads would be a promise nobody keeps."""
    sources = [p.read_text() for p in (ROOT / "trainer").rglob("*.py") if p.name not in ("config.py", "settings.py")]
    everything = "\n".join(sources)
    for verb in find_verbs().values():
        for key in leaf_keys(verb.config):
            leaf = key.rsplit(".", 1)[-1]
            assert f".{leaf}" in everything or f'"{leaf}"' in everything, f"nothing reads {key}"
