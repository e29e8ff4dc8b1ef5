"""Whole optimiser steps on GPUs that are not there, in a process beside the tests. rehearse.py says what is faked."""

import atexit
import functools
import importlib.metadata
import json
import linecache
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE, ROOT
from test_zoo import ZOO

from trainer.optim.rule import registered_rules

HERE = Path(__file__).parent
PLUGINS = HERE.parent / "plugins"
STRATEGIES = ("single", "ddp", "fsdp", "hsdp")

pytestmark = [
    pytest.mark.skipif("+cpu" not in importlib.metadata.version("torch"), reason="needs torch's CPU build"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to build guard.cpp"),
]


@functools.cache
def server():
    """rehearse.py, from the first case to the end of the tests."""
    process = subprocess.Popen(
        [sys.executable, str(HERE / "rehearse.py"), "--serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    atexit.register(process.wait, PATIENCE)
    atexit.register(process.stdin.close)  # the last to register is the first to be called
    return process


def rehearse(**case):
    """The Outcome of a Case of rehearse.py, both as keywords."""
    process = server()
    process.stdin.write(json.dumps(case) + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    assert answer, "rehearse.py has ended; its stderr says why"
    return json.loads(answer)


def small(name, strategy, ranks=8, **sections):
    """A Case of a few layers: two sequences a microbatch, and three for the last rank, which is played; two for others.

    sections: further keys of the run's config.
    """
    ranks = 1 if strategy == "single" else ranks
    values = {
        "model": {"name": name},
        "model_scale": 0.5,
        "data": {"tokenizer": "bytes"},
        "batch": {"sequence_length": 256, "tokens_per_step": 256 * (2 * ranks + 1), "tokens_per_microbatch": 512},
        "engine": {"strategy": strategy, "compile": False, "activation_checkpointing": "none"},
    }
    if strategy == "hsdp":
        values["engine"]["shard_size"] = ranks // 2
    if name == "hlb":  # its sequences grow
        values["batch"] |= {"sequence_start": 64, "sequence_double_every": 1}
    for key, section in sections.items():
        values[key] = values.get(key, {}) | section if isinstance(section, dict) else section
    return {"values": values, "ranks": ranks, "rank": ranks - 1}


def succeeds(**case):
    outcome = rehearse(**case)
    assert not outcome["error"], f"{outcome['where']}: {outcome['error']}"
    return outcome


@pytest.mark.parametrize(("model", "strategy"), [(model, STRATEGIES[i % 4]) for i, model in enumerate(ZOO)])
def test_a_model_takes_steps(model, strategy):
    """Three steps, the last two without waiting for the device."""
    outcome = succeeds(**small(model, strategy))
    ranks = 1 if strategy == "single" else 8
    assert outcome["engine"].startswith(f"{strategy} on {ranks} x NVIDIA H100 80GB HBM3, bf16")
    assert outcome["lengths"] == ([64, 64, 128] if model == "hlb" else [256, 256, 256])


OPTIONS = {
    "float8": small("llama", "fsdp", float8=True),
    "pure_bf16": small("gpt2", "ddp", precision="pure_bf16"),
    "fp32": small("minimal-sota", "hsdp", precision="fp32"),
    "bf16 moments": small("hlb", "single", optim={"state_precision": "bf16"}),
    "documents": small("transformer", "ddp", data={"separate_documents": True}),
    "selective": small("llama", "fsdp", engine={"activation_checkpointing": "selective"}),
    "full": small("hlb", "ddp", engine={"activation_checkpointing": "full"}),
    "offload": small("gpt2", "fsdp", engine={"offload": True}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_takes_steps(option):
    succeeds(**OPTIONS[option])


# Those of the trainer, and of the tests' plug-ins one that needs whole matrices.
RULES = {name: "" for name, rule in registered_rules().items() if rule.__module__.startswith("trainer.")}
RULES = {name: file for name, file in RULES.items() if name != "adamw"} | {"gram": str(PLUGINS / "gram.py")}


@pytest.mark.parametrize("state", ["fp32", "bf16"])
@pytest.mark.parametrize("rule", RULES)
def test_an_optimizer_takes_steps(rule, state):
    case = small("llama", "fsdp", optim={"name": rule, "state_precision": state})
    succeeds(**case, plugin=RULES[rule])


# -- that a rehearsal can fail -----------------------------------------------------------------------------------------------

# What is planted in faults.py -> what the line must say.
FAULTS = {
    "item": "DataDependentOutputException",
    "tolist": "DataDependentOutputException",
    "bool": "DataDependentOutputException",
    "nonzero": "DynamicOutputShapeException",
    "mask": "DynamicOutputShapeException",
    "mask_written": "HostSync: a mask of bools",
    "cpu": "HostSync: a copy from cuda:0 to cpu",
    "to": "HostSync: a copy from cuda:0 to cpu",
    "copied": "HostSync: a copy from cuda:0 to cpu",
    "tensor": "HostSync: a copy from cpu to cuda:0",
    "mixed": "Expected all tensors to be on the same device",
    "backward": "DataDependentOutputException",
    "synchronize": "HostSync: synchronize()",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault):
    """With the line of the model that did it."""
    model = {"d_model": 32, "n_layers": 1, "n_heads": 1}
    outcome = rehearse(**small(f"faulty_{fault}", "single", model=model), steps=2, plugin=str(HERE / "faults.py"))
    assert FAULTS[fault] in outcome["error"]
    file, line = outcome["where"].split(":")
    assert fault in linecache.getline(str(ROOT / file), int(line))
