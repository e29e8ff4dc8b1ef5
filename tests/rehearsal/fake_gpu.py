"""GPUs that are not there: torch believes in them, and tensors on them have shapes, types and devices but no numbers.

Importing this module loads guard.cpp, which must happen before torch is imported: only in a process of its own (rehearse.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import getpass
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

GUARD = Path(__file__).with_name("guard.cpp")


def load_guard() -> None:
    """Load guard.cpp. It is built once for each torch, which takes some seconds."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    root, version = Path(spec.origin).parent, importlib.metadata.version("torch")
    folder = Path(tempfile.gettempdir()) / f"crescendo-rehearsal-{getpass.getuser()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    built = folder / f"guard-{version}-{hashlib.sha256(GUARD.read_bytes()).hexdigest()[:12]}.so"
    if not built.exists():
        flags = ["-O1", "-std=c++20", "-shared", "-fPIC", f"-I{root}/include", f"-L{root}/lib", "-lc10", "-ltorch_cpu"]
        aside = built.with_suffix(f".{os.getpid()}")
        subprocess.run(["g++", str(GUARD), "-o", str(aside), *flags], check=True)
        aside.replace(built)
    for library in ("libtorch_global_deps.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(root / "lib" / library), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(built))


load_guard()
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from trainer.runtime.device import GPUS  # noqa: E402

PER_MACHINE = 8
CAPABILITIES = {"a100-40gb": (8, 0), "a100-80gb": (8, 0), "h100-80gb": (9, 0), "h200-141gb": (9, 0)}
FLASH_WIDTH = 256  # channels of a head that torch's flash kernel supports


# -- waiting ---------------------------------------------------------------------------------------------------------


class HostSync(Exception):
    """The host waits for the device."""


class NoWaiting(TorchDispatchMode):
    """Raises HostSync where torch on a GPU would wait for it and FakeTensorMode has no objection: at copies between CPU and GPU that
    block, masks that are written through, and synchronize(). FakeTensorMode itself refuses all that needs numbers: .item(), bool(), nonzero, masks."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, dist.tensor.DTensor) for kind in types):
            return NotImplemented  # the operators on its local tensor come here
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        name = function.overloadpacket.__name__
        if name == "_to_copy":
            self.check_copy(out, args[0], kwargs.get("non_blocking", False))
        elif name == "copy_":
            self.check_copy(args[0], args[1], args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        elif name in ("index_put", "index_put_") and args[0].is_cuda and (args[2].is_cuda or args[2].numel() > 1):
            if any(index is not None and index.dtype == torch.bool for index in args[1]):  # of one number: masked_fill
                raise HostSync("a mask of bools as an index waits for the device")
        return out

    @staticmethod
    def check_copy(to: Any, given: Any, non_blocking: bool) -> None:
        if to.is_cuda != given.is_cuda and not non_blocking:
            raise HostSync(f"a copy from {given.device} to {to.device} without non_blocking waits for the device")


class OnlyWhatCudaHas(TorchDispatchMode):
    """Raises NotImplementedError, as torch on a GPU does, at operators that CUDA lacks for these types, or has only in forms that give
    other numbers each time. FakeTensorMode, which asks the CPU's code for shapes, has no objection."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, dist.tensor.DTensor) for kind in types):
            return NotImplemented  # the operators on its local tensor come here
        given = next((value for value in args if isinstance(value, torch.Tensor)), None)
        if given is not None and given.is_cuda:
            name, exact = function.overloadpacket.__name__, not given.dtype.is_floating_point
            if exact and name.startswith(("replication_pad", "reflection_pad")):
                raise NotImplementedError(f"{name} of {given.dtype} on CUDA")
            if not exact and name in UNREPEATABLE and torch.are_deterministic_algorithms_enabled():
                raise NotImplementedError(f"{name} on CUDA under deterministic algorithms")
        return function(*args, **(kwargs or {}))


# Of those that torch.use_deterministic_algorithms names, the ones a model could want.
UNREPEATABLE = ("cumsum", "put_", "histc", "bincount", "kthvalue", "median", "replication_pad1d_backward")


def _wait(*_: Any) -> None:
    if any(isinstance(mode, NoWaiting) for mode in torch.utils._python_dispatch._get_current_dispatch_mode_stack()):
        raise HostSync("synchronize() waits for the device")


class Stream:
    """A stream on which nothing runs."""

    device, device_index, stream_id = torch.device("cuda", 0), 0, 0

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...

    synchronize = _wait

    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: Any) -> None: ...


class Event:
    """An event that has happened already."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...

    synchronize = _wait

    def query(self) -> bool:
        return True


# -- torch -----------------------------------------------------------------------------------------------------------


def at_once(_, bucket):
    """DDP's sum over ranks, done: the fake process group returns no tensor for it."""
    done: Any = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


class Reducer:
    """DDP's reducer, which keeps its first buckets: to order them anew it would send numbers to the other ranks."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def _rebuild_buckets(self) -> bool:
        return False


class Ddp(torch.nn.parallel.DistributedDataParallel):
    """With a sum that is done at once, and without its log, which asks CUDA for the time."""

    def __init__(self, *args: Any, **options: Any) -> None:
        with mock.patch("torch.nn.parallel.distributed._verify_param_shape_across_processes", lambda *_, **__: True):
            super().__init__(*args, **options, init_sync=False)
        self.register_comm_hook(None, at_once)
        self.logger, self.reducer = mock.Mock(), Reducer(self.reducer)


def fused_attention(q, k, v, mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """scaled_dot_product_attention by the kernel that torch takes on a GPU: a CPU build would take its plain one.

    Not torch's own choice: flash in half precision without a mask, else the memory-efficient kernel. cuDNN's, which torch may
    prefer, holds the same tensors as flash.
    """
    if not q.is_cuda:
        return SDPA(q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if mask is None and q.dtype != torch.float32 and q.shape[-1] <= FLASH_WIDTH:
        width = v.shape[-1]
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        q, k, v = (torch.nn.functional.pad(x, (0, -width % 8)) if width % 8 else x for x in (q, k, v))  # as torch does
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0][
            ..., :width
        ]
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask.logical_not(), -torch.inf)
    if mask is not None:
        mask = mask.expand(*q.shape[:3], k.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, mask, q.requires_grad, dropout_p, is_causal, scale=scale
    )[0]


SDPA = torch.nn.functional.scaled_dot_product_attention
TENSOR, COMPILE = torch.tensor, torch.compile


def tensor(data: Any, *, device: Any = None, **options: Any) -> Any:
    """torch.tensor, whose copy to the device the dispatcher sees. It blocks, as torch's does."""
    made = TENSOR(data, **options)
    return made if device is None else torch.empty(made.shape, dtype=made.dtype, device=device).copy_(made)


def compile_without_triton(function: Any, *, dynamic: Any = None, **_: Any) -> Any:
    """torch.compile up to the generated code: Dynamo and AOTAutograd trace, then the graphs run operator by operator."""
    return COMPILE(function, dynamic=dynamic, backend="aot_eager")


def patches(card: str, rank: int, ranks: int) -> dict[str, Any]:
    """What stands for what of torch: name -> object."""
    gpu, (major, minor), local = GPUS[card], CAPABILITIES[card], min(ranks, PER_MACHINE)
    properties = types.SimpleNamespace(
        name=gpu.name, total_memory=int(gpu.gibibytes * 2**30), major=major, minor=minor, multi_processor_count=108
    )
    stream = Stream()

    return {
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.is_initialized": lambda: True,
        "torch.cuda.device_count": lambda: local,
        "torch.cuda.current_device": lambda: rank % local,
        "torch.cuda.set_device": lambda device: None,
        "torch.cuda.get_device_properties": lambda device=None: properties,
        "torch.cuda.get_device_capability": lambda device=None: (major, minor),
        "torch.cuda.get_device_name": lambda device=None: gpu.name,
        "torch.cuda.is_bf16_supported": lambda including_emulation=True: gpu.is_ampere,
        "torch.cuda.Stream": Stream,
        "torch.cuda.Event": Event,
        "torch.cuda.stream": contextlib.nullcontext,
        "torch.cuda.current_stream": lambda device=None: stream,
        "torch.cuda.default_stream": lambda device=None: stream,
        "torch.cuda.synchronize": _wait,
        "torch.Tensor.pin_memory": lambda self, *_: torch.empty(self.shape, dtype=self.dtype),
        "torch.Tensor.record_stream": lambda self, stream: None,
        "torch.tensor": tensor,
        "torch.cuda.get_rng_state": lambda device="cuda": torch.zeros(
            16, dtype=torch.uint8
        ),  # Dynamo keeps it while it traces
        "torch.cuda.set_rng_state": lambda state, device="cuda": None,
        "torch._C._cuda_getDevice": lambda: rank % local,  # a CPU build lacks it; Dynamo asks it what a guard would
        "torch.compile": compile_without_triton,
        "torch.nn.functional.scaled_dot_product_attention": fused_attention,
        "torch.nn.parallel.DistributedDataParallel": Ddp,
    }


@contextlib.contextmanager
def fake_gpus(card: str, rank: int, ranks: int, group: bool) -> Iterator[None]:
    """In this context this process is `rank` of `ranks`, each with one GPU `card`. group: whether it is in a process group."""
    with contextlib.ExitStack() as stack:
        for name, value in patches(card, rank, ranks).items():
            stack.enter_context(mock.patch(name, value, create=True))
        if group:
            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
            stack.callback(dist.destroy_process_group)
        yield
