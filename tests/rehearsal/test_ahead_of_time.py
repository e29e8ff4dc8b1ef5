"""Our Triton kernels, and Inductor's code of FlexAttention, compiled for an A100 and an H100: what each kernel uses fits the GPU.

ahead_of_time.py does it in a process of its own, without a GPU, and says what is faked. A kernel that needs more shared memory
than a block has cannot start; one that spills registers to local memory is slow. Each case takes a minute of a CPU at most.
"""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPT = Path(__file__).with_name("ahead_of_time.py")
SHARED = {80: 163 << 10, 90: 227 << 10}  # bytes for one block
REGISTERS = 65536  # of a multiprocessor
LOSSES = ("loss", "loss of an odd vocabulary", "loss of one token", "loss with a soft-cap", "loss in fp32")
FLEX = ("causal", "causal, alone", "causal, heads of 128", "window", "documents", "soft-cap", "position bias")
FLEX += ("hlb", "hlb with documents")
# Bytes of local memory that a thread of FlexAttention's forward and backward kernel uses (torch 2.13, Triton 3.7.1), where it is not
# 0. More than this is worse code, of a new torch or for other options (models/layers/flex.py).
SPILLED = {
    ("causal, heads of 128", 90): (0, 120),
    ("position bias", 90): (40, 0),
    ("hlb", 80): (0, 40),
    ("hlb with documents", 80): (0, 40),
    ("hlb with documents", 90): (0, 16),
}

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton: pip install '.[kernels]'"),
    pytest.mark.skipif("+cpu" not in importlib.metadata.version("torch"), reason="needs torch's CPU build"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to build guard.cpp"),
]


def kernels(case, capability, folder):
    """(its kernels, the number of launches)"""
    command = [sys.executable, str(SCRIPT), case, str(capability)]
    places = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}
    path = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=os.environ | places | path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    *found, last = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert all(kernel["shared"] <= SHARED[capability] for kernel in found)
    # A block has its registers at once; they are given out for a warp in steps of 8 for each thread.
    assert all(-(-kernel["registers"] // 8) * 8 * 32 * kernel["warps"] <= REGISTERS for kernel in found)
    return found, last["launches"]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("case", LOSSES)
def test_the_loss(tmp_path, case, capability):
    (kernel,), _ = kernels(case, capability, tmp_path)
    assert kernel["asserts"], "a label out of bounds would read the memory of another row"
    assert 2 * kernel["registers"] * 32 * kernel["warps"] <= REGISTERS, "two rows do not fit a multiprocessor"
    # The part of an odd row that is loaded number by number is where 8 bytes are spilled.
    assert kernel["local"] <= (8 if "odd" in case else 0)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("case", FLEX)
def test_flex_attention(tmp_path, case, capability):
    found, _ = kernels(case, capability, tmp_path)
    attention = [kernel for kernel in found if "tem_fused" in kernel["kernel"]]
    forward, backward = sorted(attention, key=lambda kernel: "flex_attention_backward" in kernel["kernel"])
    assert "backward" not in forward["kernel"] and "backward" in backward["kernel"]
    for kernel, most in zip((forward, backward), SPILLED.get((case, capability), (0, 0)), strict=True):
        assert kernel["local"] <= most, kernel
    assert all(kernel["local"] == 0 for kernel in found if kernel not in attention)


@pytest.mark.parametrize("capability", [80, 90])
def test_a_block_of_gpt2(tmp_path, capability):
    """As in the account of models/README.md: norms join the sums and casts around them."""
    found, launches = kernels("a block of gpt2", capability, tmp_path)
    assert launches <= 30
    assert any("to_copy_add_native_layer_norm_view" in kernel["kernel"] for kernel in found)
    assert all(kernel["local"] <= 16 for kernel in found)
