"""launch/accelerate and launch/deepspeed as the libraries themselves read them; tests/distributed starts them."""

import argparse
import json
import shlex
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from trainer.core.config import RunConfig
from trainer.core.settings import build
from trainer.engine.deepspeed_config import deepspeed_settings
from trainer.planning.launcher_config import LauncherConfig, read_launcher_config, reconcile

YAMLS = sorted((ROOT / "launch" / "accelerate").iterdir())
SEVERAL = [path for path in YAMLS if path.name != "single_gpu.yaml"]
JSONS = sorted((ROOT / "launch" / "deepspeed").iterdir())
# What each YAML asks of the engine.
LAUNCHER_CONFIGS: dict[str, dict[str, str]] = {
    "single_gpu.yaml": {},
    "ddp.yaml": {},
    "fsdp2.yaml": {"strategy": "fsdp"},
    "zero1.yaml": {"strategy": "zero1"},
    "zero2.yaml": {"strategy": "zero2"},
    "zero3.yaml": {"strategy": "zero3"},
    "multi_node.yaml": {},
}
# The strategy and the offload that each JSON asks for.
SETTINGS = {
    "zero1.json": ("zero1", False),
    "zero2.json": ("zero2", False),
    "zero2_offload.json": ("zero2", True),
    "zero3.json": ("zero3", False),
    "zero3_offload.json": ("zero3", True),
}


def name(path: Path) -> str:
    return path.name


def header_command(path: Path, **changes: str) -> list[str]:
    """The words after `accelerate` of the command in a YAML's first comment. changes: other values of its options."""
    lines = path.read_text().splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("#   accelerate launch "))
    text = ""
    for line in lines[begin:]:
        text += line.removeprefix("#")
        if not text.endswith("\\"):
            break
        text = text.removesuffix("\\")
    words = shlex.split(text)[1:]
    for option, value in changes.items():
        words[words.index(f"--{option}") + 1] = value
    return words


def test_every_file_is_known_here():
    """A new file gets an entry above, and with it the tests below and those that start it."""
    assert {path.name for path in YAMLS} == set(LAUNCHER_CONFIGS)
    assert {path.name for path in JSONS} == set(SETTINGS)


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser()


@pytest.mark.parametrize("path", YAMLS, ids=name)
def test_accelerate_understands_a_file(path, parser, caplog):
    """It refuses unknown keys at the top; in the sections it takes any, so they must be options of its command line."""
    from accelerate.commands.config import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command

    load_config_from_file(str(path))
    options = {action.dest for action in parser._actions}
    for section in yaml.safe_load(path.read_text()).values():
        assert set(section if isinstance(section, dict) else ()) <= options
    words = header_command(path)
    assert words[:3] == ["launch", "--config_file", str(path.relative_to(ROOT))]
    assert words[-4:] == ["-m", "trainer", "train", "CONFIG.yaml"]
    _validate_launch_command(parser.parse_args(words[1:]))
    assert not caplog.records, "accelerate warns of what it misses"


def handed_on(words: list[str], parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, dict[str, str]]:
    """(accelerate's arguments with the file in them, the environment it would start processes with)."""
    from accelerate.commands.launch import _validate_launch_command
    from accelerate.utils import launch

    args, defaults, _ = _validate_launch_command(parser.parse_args(words[1:]))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        command, environ = launch.prepare_deepspeed_cmd_env(args)
        assert command is None, "it would start pdsh"
        return args, environ
    if args.use_fsdp or args.multi_gpu:
        return args, launch.prepare_multi_gpu_env(args)
    return args, launch.prepare_simple_launcher_cmd_env(args)[1]


@pytest.mark.parametrize("path", YAMLS, ids=name)
def test_what_a_file_asks_of_the_engine(path, parser, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, environ = handed_on(header_command(path), parser)
    assert read_launcher_config(environ) == LauncherConfig(launcher="accelerate", **LAUNCHER_CONFIGS[path.name])


@pytest.mark.parametrize("path", SEVERAL, ids=name)
def test_a_file_goes_on_several_machines(path, parser, monkeypatch):
    """With the options of multi_node.yaml every machine starts its own part of the processes, without ssh."""
    monkeypatch.chdir(ROOT)
    words = header_command(ROOT / "launch" / "accelerate" / "multi_node.yaml", config_file=str(path), machine_rank="1")
    args, environ = handed_on(words, parser)
    assert (args.nnodes, args.node_rank, args.nproc_per_node) == ("2", 1, "8")
    assert args.rdzv_endpoint == "HEAD:29500"
    assert read_launcher_config(environ) == LauncherConfig(launcher="accelerate", **LAUNCHER_CONFIGS[path.name])


@pytest.mark.parametrize("path", SEVERAL, ids=name)
def test_accelerate_asks_for_a_number_of_processes(path, parser):
    from accelerate.commands.launch import _validate_launch_command

    with pytest.raises(ValueError, match="need to manually pass in `--num_processes`"):
        _validate_launch_command(parser.parse_args(["--config_file", str(path), "-m", "trainer", "train", "x.yaml"]))


@pytest.mark.parametrize("path", JSONS, ids=name)
def test_deepspeed_understands_a_file(path):
    """Known keys, right types, and nothing that DeepSpeed would do by itself. At the top it takes any key, so there is one."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    content = json.loads(path.read_text())
    assert set(content) == {"zero_optimization"}
    section = content["zero_optimization"]
    stage = section.pop("stage")
    chosen, default = DeepSpeedZeroConfig(stage=stage, **section), DeepSpeedZeroConfig(stage=stage)
    differing = {
        field.alias or key
        for key, field in DeepSpeedZeroConfig.model_fields.items()
        if getattr(chosen, key) != getattr(default, key)
    }
    assert differing == set(section)


def test_deepspeed_refuses_a_misspelt_setting():
    """What the test above stands on."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        DeepSpeedZeroConfig(stage=2, reduce_buckets_size=1)


@pytest.mark.parametrize("path", JSONS, ids=name)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_a_deepspeed_file_asks_of_the_engine(path, precision):
    values = {"precision": precision, "optim": {"clip_norm": 1.0}, "engine": {"deepspeed_config": str(path)}}
    config = build(RunConfig, values)
    reconcile(config, LauncherConfig(launcher="torchrun"), 2)
    assert (config.engine.strategy, config.engine.offload) == SETTINGS[path.name]
    settings = deepspeed_settings(config)["zero_optimization"]
    assert settings.items() >= json.loads(path.read_text())["zero_optimization"].items()
