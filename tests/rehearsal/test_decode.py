"""Decoding on a GPU that is not there: in each pass the host waits for its tokens, and for nothing else."""

import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE, ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("+cpu" not in importlib.metadata.version("torch"), reason="needs torch's CPU build"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to build guard.cpp"),
]
OPTIONS = {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2}


def decode(model, *more):
    command = [sys.executable, str(Path(__file__).with_name("decode.py")), model, json.dumps(OPTIONS), *more]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE)


@pytest.mark.parametrize("model", ["gpt2", "hlb"])
def test_the_host_waits_for_the_tokens_alone(model):
    done = decode(model)
    assert done.returncode == 0, done.stderr
    # Prompts of 2, 3 and 4 tokens, 5 new ones each: positions 2 to 8.
    assert json.loads(done.stdout.splitlines()[-1]) == {"passes": 7, "fetched": 7, "device": "cuda:0"}


def test_logits_that_go_to_the_cpu_are_found():
    assert "HostSync: a copy from cuda:0 to cpu" in decode("gpt2", "fault").stderr
