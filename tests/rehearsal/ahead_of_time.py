"""Compiles kernels for a GPU that is not there, and prints what each of them uses: a line of JSON for each kernel, and a last one
with the number of kernels that Inductor's code launches.

    python ahead_of_time.py CASE CAPABILITY      CASE: a key of CASES; CAPABILITY: 80 (A100) or 90 (H100)

Triton, its ptxas and cuobjdump, Dynamo, AOTAutograd and Inductor are real, and so is the code of the models. Faked: Triton's
driver, which gives the properties of the GPU and launches nothing; what Inductor asks torch.cuda and Dynamo's interface of the
device; guard.cpp's device for autograd; Inductor's patterns, which would first run attention on the device; for a whole block,
the choice of torch's flash kernel, which a CPU build does not have; the end, which comes where compiled code would run. Kernels
for which Inductor would measure several candidates are all printed.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import fake_gpu  # noqa: F401  loads guard.cpp, before torch
import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch._inductor import metrics
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

from models.layers import triton_cross_entropy as loss
from models.layers.attend import attend_flex, make_attention_mask
from models.layers.distance_attention import attend_flex as attend_distances
from models.layers.linear_cross_entropy import _Form
from models.presets import Gpt2

# Of one block, in bytes: table of technical specifications in the CUDA C++ Programming Guide.
SHARED = {80: 163 << 10, 90: 227 << 10}
MULTIPROCESSORS = {80: 108, 90: 132}


class Driver:
    """What Triton and Inductor ask of a driver before a launch."""

    launcher_cls = staticmethod(lambda *_: lambda *_: None)

    def __init__(self, capability: int) -> None:
        self.capability = capability
        properties = {"max_shared_mem": SHARED[capability], "multiprocessor_count": MULTIPROCESSORS[capability]}
        properties |= {"max_num_regs": 65536, "warpSize": 32}
        self.utils = types.SimpleNamespace(
            get_device_properties=lambda device: properties, load_binary=lambda *_: (None, None, 0, 0, 1024)
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def usage(kernel: Any) -> dict[str, Any]:
    """Of one thread: registers, bytes of local memory (spills, mostly). Of one block: bytes of shared memory, warps. Whether the
    kernel holds an assertion."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    of = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", told)}
    meta = kernel.metadata
    return {
        "kernel": meta.name,
        "registers": of["REG"],
        "local": of["STACK"] + of["LOCAL"],
        "shared": meta.shared,
        "warps": meta.num_warps,
        "asserts": "__assertfail" in kernel.asm["ptx"],
    }


def telling(compile: Callable[..., Any], capability: int) -> Callable[..., Any]:
    """`compile` of Triton for the GPU; it also prints the usage."""

    def call(source: Any, target: Any = None, options: Any = None, **rest: Any) -> Any:
        kernel = compile(source, target=GPUTarget("cuda", capability, 32), options=options, **rest)
        print(json.dumps(usage(kernel)), flush=True)
        return kernel

    return call


# -- our own kernels: called as in training, on tensors whose numbers nothing reads --------------------------------------------


def score(dtype: torch.dtype, vocab_size: int, softcap: float | None = None) -> None:
    logits = torch.zeros(2, -(-vocab_size // 64) * 64, dtype=dtype)[:, :vocab_size]
    labels, row = torch.zeros(2, dtype=torch.long), torch.zeros(2)
    loss.score_in_kernel(logits, labels, row, row.clone(), row.clone(), _Form(softcap, 1e-4, vocab_size))


# -- FlexAttention, forward and backward, as a part of a compiled block, and a whole block --------------------------------------


class Compiled(BaseException):
    """All code is compiled; nothing can run."""


def compile_for_gpu(function: Callable[..., Tensor], *inputs: Any, alone: bool = False, **options: Any) -> None:
    """alone: as in eager blocks, where `function` compiles its kernel itself, for any length."""

    def run(*_: Any) -> None:
        raise Compiled

    with (
        mock.patch("torch._inductor.output_code.CompiledFxGraph.__call__", run),
        torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
        # Folding constants would compute them on the device.
        torch._inductor.config.patch(compile_threads=1, force_disable_caches=True, joint_graph_constant_folding=False),
    ):
        try:
            (function if alone else torch.compile(function, dynamic=True))(*inputs, **options)
        except Compiled:
            return
    raise RuntimeError("the compiled code ran")


def entries(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda", requires_grad=True)


def attend(width: int = 64, heads: int = 12, window: int = 0, documents: bool = False, **options: Any) -> None:
    """As the decoder calls it: 8 sequences of 1,024 tokens."""
    numbers = torch.empty(8, 1024, dtype=torch.long, device="cuda") if documents else None
    mask = make_attention_mask("flex", 0, 1024, window, numbers, torch.device("cuda"))
    q, k, v = (entries(8, heads, 1024, width) for _ in range(3))
    compile_for_gpu(attend_flex, q, k, v, mask, scale=width**-0.5, **options)


def attend_hlb(documents: bool = False) -> None:
    numbers = torch.empty(8, 1024, dtype=torch.long, device="cuda") if documents else None
    mask = make_attention_mask("flex", 0, 1024, 0, numbers, torch.device("cuda")).blocks
    slope = entries(1, dtype=torch.float32)
    compile_for_gpu(attend_distances, entries(8, 1024, 48), entries(8, 1024, 48), entries(8, 1024, 384), slope, mask)


def flash(q: Tensor, k: Tensor, v: Tensor, *_: Any, is_causal: bool, scale: float, **__: Any) -> Tensor:
    """scaled_dot_product_attention of half precision on a GPU."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[0]


def block() -> None:
    """A block of GPT-2 124M under autocast, 32 sequences of 1,024 tokens."""
    with torch.device("cuda"):
        model = Gpt2(Gpt2.Config(vocab_size=50304, d_model=768, n_layers=2, n_heads=12))
        context = model.context(torch.empty(32, 1024, dtype=torch.long), None, None)
    second, x = model.blocks()[1], entries(32, 1024, 768, dtype=torch.float32)
    with torch.autocast("cuda", torch.bfloat16), mock.patch.object(F, "scaled_dot_product_attention", flash):
        compile_for_gpu(lambda x: second(x, None, context)[0], x)


CASES: dict[str, Callable[[], None]] = {
    "loss": lambda: score(torch.bfloat16, 50304),
    "loss of an odd vocabulary": lambda: score(torch.bfloat16, 50257),
    "loss of one token": lambda: score(torch.float16, 1),
    "loss with a soft-cap": lambda: score(torch.bfloat16, 50304, 30.0),
    "loss in fp32": lambda: score(torch.float32, 50304, 30.0),
    "causal": attend,
    "causal, heads of 128": lambda: attend(width=128, heads=6),
    "window": lambda: attend(window=256),
    "documents": lambda: attend(documents=True),
    "soft-cap": lambda: attend(softcap=30.0),
    "position bias": lambda: attend(attention_bias=entries(8, 12, 1024, dtype=torch.float32)),
    "causal, alone": lambda: attend(alone=True),
    "hlb": attend_hlb,
    "hlb with documents": lambda: attend_hlb(documents=True),
    "a block of gpt2": block,
}


def properties_of(capability: int) -> Any:
    return types.SimpleNamespace(
        name="a GPU that is not there",
        major=capability // 10,
        minor=capability % 10,
        total_memory=80 << 30,
        multi_processor_count=MULTIPROCESSORS[capability],
        shared_memory_per_block_optin=SHARED[capability],
        shared_memory_per_block=48 << 10,
        shared_memory_per_multiprocessor=SHARED[capability] + 1024,
        regs_per_multiprocessor=65536,
        warp_size=32,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        L2_cache_size=40 << 20,
        gcnArchName="",
    )


def patches(capability: int) -> dict[str, Any]:
    """What stands for what: name -> object."""
    properties = properties_of(capability)
    pair = divmod(capability, 10)
    interface = "torch._dynamo.device_interface.CudaInterface"
    return {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda._exchange_device": lambda device: 0,
        "torch.cuda._maybe_exchange_device": lambda device: 0,
        "torch.cuda.get_device_properties": lambda device=None: properties,
        "torch.cuda.get_device_capability": lambda device=None: pair,
        "torch.cuda.get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "torch.cuda.set_rng_state": lambda *_: None,
        "torch.cuda.synchronize": lambda device=None: None,
        f"{interface}.is_available": staticmethod(lambda: True),
        f"{interface}.get_compute_capability": staticmethod(lambda device=None: capability),
        f"{interface}.get_device_properties": staticmethod(lambda device=None: properties),
        f"{interface}.Worker.get_device_properties": staticmethod(lambda device=None: properties),
        "torch._inductor.runtime.triton_helpers.set_driver_to_gpu": lambda: None,
        "torch._inductor.runtime.triton_heuristics.CachingAutotuner._make_launchers": lambda self: None,
        "torch._inductor.fx_passes.joint_graph.lazy_init": lambda device=None: None,
        "triton.compile": telling(triton.compile, capability),
        "triton.compiler.compile": telling(triton.compile, capability),
    }


def main(case: str, capability: int) -> None:
    triton.runtime.driver.set_active(Driver(capability))
    with contextlib.ExitStack() as stack:
        for name, value in patches(capability).items():
            stack.enter_context(mock.patch(name, value))
        # A CPU build of torch does not have this name.
        stack.enter_context(mock.patch("torch._C._cuda_getCurrentRawStream", lambda device: 0, create=True))
        if not case.startswith("loss"):
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        CASES[case]()
    print(json.dumps({"launches": metrics.generated_kernel_count}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
