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
from conftest import PATIENCE, ROOT, beyond
from test_zoo import ZOO

from trainer.optim.rule import get_rule, registered_rules
from trainer.runtime.device import GPUS

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
    """All but the first without waiting for the device."""
    lengths = [64, 64, 128, 256] if model == "hlb" else [256, 256]
    outcome = succeeds(**small(model, strategy), steps=len(lengths))
    assert outcome["lengths"] == lengths
    ranks = 1 if strategy == "single" else 8
    assert outcome["engine"].startswith(f"{strategy} on {ranks} x NVIDIA H100 80GB HBM3, bf16")


OPTIONS = {
    "float8, a moving average": small("llama", "fsdp", float8=True, optim={"ema": 0.999}),
    "pure_bf16, a moving average": small("gpt2", "ddp", precision="pure_bf16", optim={"ema": 0.999}),
    "fp32": small("minimal-sota", "hsdp", precision="fp32"),
    "bf16 residual stream": small("gpt2", "ddp", model={"residual_dtype": "bf16"}),
    "bf16 moments": small("hlb", "single", optim={"state_precision": "bf16"}),
    "hlb's FlexAttention": small("hlb", "ddp", model={"attention_kernel": "flex"}),
    "documents": small("transformer", "ddp", data={"separate_documents": True}),
    "documents, a delta rule": small("rwkv7", "ddp", data={"separate_documents": True}),
    "documents, a state space": small("zamba2", "fsdp", data={"separate_documents": True}),
    "documents, patches": small("megabyte", "single", data={"separate_documents": True}),
    "deterministic, a delta rule": small("gated-delta-net", "single", deterministic=True),
    "deterministic, decays of channels": small(
        "gated-delta-net", "single", model={"decay": "channel"}, deterministic=True
    ),
    "deterministic, a known bound": small("rwkv7", "single", deterministic=True),
    "deterministic, a state space": small("mamba2", "ddp", deterministic=True),
    "deterministic, a forget gate": small("transformer", "single", model={"forget_gate": True}, deterministic=True),
    "selective": small("llama", "fsdp", engine={"activation_checkpointing": "selective"}),
    "full": small("hlb", "ddp", engine={"activation_checkpointing": "full"}),
    "no sequence for this rank": small("gpt2", "fsdp", batch={"tokens_per_step": 4 * 256}) | {"rank": 0},
    "offload": small("gpt2", "fsdp", engine={"offload": True}),
    "noise scale": small("gpt2", "fsdp", log={"noise_scale": True}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_takes_steps(option):
    succeeds(**OPTIONS[option])


# Those of the trainer, and of the tests' plug-ins one that needs whole matrices.
RULES = {name: "" for name, rule in registered_rules().items() if rule.__module__.startswith("trainer.")}
RULES = {name: file for name, file in RULES.items() if name != "adamw"} | {"gram": str(PLUGINS / "gram.py")}


# Where a rule can keep its state in bf16, per commit so; where it cannot, in fp32.
NARROW = [(rule, "bf16") for rule in RULES if rule == "gram" or not get_rule(rule).narrow_refusal()]
WIDE = [(rule, "fp32") for rule in RULES]


@pytest.mark.parametrize(
    "rule, state",
    beyond([*NARROW, *(case for case in WIDE if (case[0], "bf16") not in NARROW)], [*NARROW, *WIDE], several=True),
)
def test_an_optimizer_takes_steps(rule, state):
    case = small("llama", "fsdp", optim={"name": rule, "state_precision": state})
    succeeds(**case, plugin=RULES[rule])


# -- the memory plan ---------------------------------------------------------------------------------------------------------

LENGTH, TOKENS = 1024, 4096  # of a sequence and of a microbatch


def check_memory(name, strategy, microbatches=2, how="none", precision="bf16", scale=1.0, ema=0.0, **model):
    """The plan's peak against that of torch's tracker. They may differ, in bytes, by

    6 d_model per token that the plan lacks: the hidden states (fp32, and a copy in bf16) which are alive while the loss runs, but
    not when the forward pass has ended, which is when the plan looks;
    2 d_model per token and norm that a CPU's RMSNorm holds, on which the plan measures, but a GPU's does not;
    8 + blocks for each pair of positions and sequence but the first, in hlb: distances in int64 and a mask in each block, which all
    sequences share, but the plan counts for each of them;
    1 % for the 512 bytes to which the allocator rounds.
    """
    case = small(name, strategy, data={"tokenizer": "gpt2"}, precision=precision, model_scale=scale, model=model)
    case["values"]["optim"] = {"ema": ema}
    case["values"]["engine"]["activation_checkpointing"] = how
    case["values"]["batch"] = {
        "sequence_length": LENGTH,
        "sequence_start": LENGTH,
        "tokens_per_step": microbatches * TOKENS * case["ranks"],
        "tokens_per_microbatch": TOKENS,
        "dynamic": False,
    }
    outcome = succeeds(**case, tracked=True)
    planned, peak, d_model = outcome["planned"]["total"], outcome["peak"], outcome["d_model"]
    assert planned >= 0.99 * peak - 6 * d_model * TOKENS
    norms, pairs = 2 * outcome["blocks"] + 1, LENGTH**2 * (TOKENS // LENGTH - 1) * (name == "hlb")
    assert planned <= 1.01 * peak + 2 * norms * d_model * TOKENS + (8 + outcome["blocks"]) * pairs
    return outcome


@pytest.mark.parametrize(("name", "strategy"), [("hlb", "fsdp")])
def test_the_memory_plan_is_what_a_step_holds(name, strategy):
    check_memory(name, strategy, scale=0.5, ema=0.999)


@pytest.mark.nightly
@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ZOO)
def test_the_memory_plan_of_every_model(name, strategy, microbatches):
    check_memory(name, strategy, microbatches)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("how", "precision"), [("selective", "bf16"), ("full", "bf16"), ("none", "fp32"), ("none", "pure_bf16")]
)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["gpt2", "llama", "hlb"])
def test_the_memory_plan_of_options(name, strategy, how, precision):
    check_memory(name, strategy, how=how, precision=precision)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_what_a_residual_stream_in_bf16_saves(name):
    """2 bytes of each input of a norm in a block, in the plan and on the GPU, to the 512 bytes to which the allocator rounds."""
    wide, narrow = (check_memory(name, "ddp", residual_dtype=dtype) for dtype in ("auto", "bf16"))
    saved = 2 * 2 * wide["blocks"] * wide["d_model"] * TOKENS
    assert wide["peak"] - narrow["peak"] == pytest.approx(saved, rel=0.01)
    assert wide["planned"]["total"] - narrow["planned"]["total"] == pytest.approx(saved, rel=0.01)


# -- larger runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.nightly
@pytest.mark.parametrize(("gpu", "ranks"), [("a100-40gb", 64), ("h100-80gb", 512)])
@pytest.mark.parametrize("strategy", STRATEGIES[1:])
@pytest.mark.parametrize("name", ZOO)
def test_many_ranks(name, strategy, gpu, ranks):
    """The last rank is played."""
    succeeds(**small(name, strategy, ranks, model_scale=1, data={"tokenizer": "gpt2"}), gpu=gpu)


@pytest.mark.nightly
@pytest.mark.parametrize("scale", [8, 32, 148])
@pytest.mark.parametrize("name", ["hlb", "llama", "gpt2"])
def test_a_large_model(name, scale):
    """Up to 3 B parameters, as planned for 64 A100s: strategy, checkpointing and microbatches are the plan's choice."""
    values = {"model": {"name": name}, "model_scale": scale, "engine": {"compile": False}}
    succeeds(values=values, gpu="a100-80gb", ranks=64, rank=63)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_three_billion_parameters_on_one_gpu_of_40_gb(name):
    """In pure_bf16, with several microbatches. The rest is the plan's choice."""
    values = {"model": {"name": name}, "model_scale": 148, "precision": "pure_bf16", "engine": {"compile": False}}
    values["batch"] = {"tokens_per_step": 2 * TOKENS}
    outcome = succeeds(values=values, gpu="a100-40gb", tracked=True)
    assert outcome["engine"].startswith("single on 1 x NVIDIA A100-SXM4-40GB, pure_bf16")
    planned = outcome["planned"]["total"]
    assert outcome["peak"] / 1.01 < planned < 0.9 * GPUS["a100-40gb"].gibibytes * 2**30


@pytest.mark.nightly
@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp"])
@pytest.mark.parametrize("name", ZOO)
def test_a_compiled_model_takes_steps(name, strategy):
    """Traced and split into forward and backward; what is then run is not what Inductor would make (see rehearse.py)."""
    outcome = succeeds(**small(name, strategy, engine={"compile": True, "background_compile": False}))
    assert "compiled" in outcome["engine"] and outcome["graphs"] > 0, (
        "an engine that fell back to eager code says compiled too"
    )


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
    "mixed": "cuda:0",
    "backward": "DataDependentOutputException",
    "synchronize": "HostSync: synchronize()",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault):
    """With the line of the model that did it."""
    model = {"d_model": 32, "n_layers": 1, "n_heads": 1}
    outcome = rehearse(**small(f"faulty_{fault}", "single", model=model), plugin=str(HERE / "faults.py"))
    assert FAULTS[fault] in outcome["error"]
    file, line = outcome["where"].split(":")
    assert fault in linecache.getline(str(ROOT / file), int(line))
