"""The device of this process: choice, memory, precision, peak FLOP/s."""

from __future__ import annotations

import contextlib
import os
from typing import NamedTuple

import torch

from models.layers import flex
from trainer.core.errors import UserError


class Gpu(NamedTuple):
    """A GPU to plan for.

    name: the driver's name for it; gibibytes: memory that torch sees, less than the label says; is_ampere: compute capability
    8.0 or higher, with bf16 units and FlexAttention's kernels; has_fp8: compute capability 8.9 or higher.
    """

    name: str
    gibibytes: float
    is_ampere: bool = True
    has_fp8: bool = False


class Target(NamedTuple):
    """The device that a run is planned for.

    memory: bytes of a GPU, None on a CPU; triton: whether Triton's kernels run on it (FlexAttention, the loss); here: whether
    it is the device of this process; name: as of `device_name`.
    """

    memory: int | None
    triton: bool = False
    here: bool = True
    name: str = "CPU"

    @classmethod
    def at_hand(cls, device: torch.device) -> Target:
        return cls(memory_bytes(device), flex.device_refusal(device) is None, name=device_name(device))

    @classmethod
    def elsewhere(cls, gpu: Gpu) -> Target:
        return cls(int(gpu.gibibytes * 1024**3), gpu.is_ampere, here=False, name=gpu.name)


GPUS = {
    "t4-16gb": Gpu("Tesla T4", 14.6, is_ampere=False),
    "v100-16gb": Gpu("Tesla V100-SXM2-16GB", 15.8, is_ampere=False),
    "l4-24gb": Gpu("NVIDIA L4", 22.0, has_fp8=True),
    "rtx4090-24gb": Gpu("NVIDIA GeForce RTX 4090", 23.6, has_fp8=True),
    "a100-40gb": Gpu("NVIDIA A100-SXM4-40GB", 39.4),
    "l40s-48gb": Gpu("NVIDIA L40S", 44.4, has_fp8=True),
    "a100-80gb": Gpu("NVIDIA A100-SXM4-80GB", 79.1),
    "h100-80gb": Gpu("NVIDIA H100 80GB HBM3", 79.1, has_fp8=True),
    "h200-141gb": Gpu("NVIDIA H200", 139.7, has_fp8=True),
}

# Peak FLOP/s of dense matrix products, by exact device name and number type of the inputs (vendor data sheets, without
# sparsity). For a device that is not listed no MFU is reported.
PEAK = {
    "NVIDIA A100-SXM4-40GB": {"bf16": 312e12, "tf32": 156e12},
    "NVIDIA A100-SXM4-80GB": {"bf16": 312e12, "tf32": 156e12},
    "NVIDIA A100-PCIE-40GB": {"bf16": 312e12, "tf32": 156e12},
    "NVIDIA A100 80GB PCIe": {"bf16": 312e12, "tf32": 156e12},
    "NVIDIA H100 80GB HBM3": {"bf16": 989.4e12, "tf32": 494.7e12},
    "NVIDIA H100 PCIe": {"bf16": 756e12, "tf32": 378e12},
    "NVIDIA H200": {"bf16": 989.4e12, "tf32": 494.7e12},
    "NVIDIA L4": {"bf16": 121e12, "tf32": 60e12},
    "NVIDIA L40S": {"bf16": 362e12, "tf32": 183e12},
}
FACTORS = {"fp32": "tf32", "bf16": "bf16", "pure_bf16": "bf16"}  # precision -> number type that a GPU multiplies


def choose_device(wanted: str, local_rank: int = 0) -> torch.device:
    """cpu or cuda:LOCAL_RANK. auto takes a GPU if there is one."""
    available = torch.cuda.is_available()
    if wanted == "auto" and os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return torch.device("cpu")  # `accelerate launch --cpu`
    if wanted == "cuda" and not available:
        raise UserError("device: cuda was requested, but torch sees no CUDA device; use --device cpu")
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"device: process {local_rank} of this machine has no GPU of its own ({torch.cuda.device_count()} here); "
            "start fewer processes or use --device cpu"
        )
    return torch.device("cuda", local_rank)


def keep_freed_memory() -> None:
    """On a CPU, let glibc reuse large freed blocks.

    By default glibc maps and unmaps memory for every large activation, and the kernel spends as long clearing pages as the
    model spends computing.
    """
    import ctypes

    trim_threshold, mmap_max = -1, -4  # mallopt's names for these are M_TRIM_THRESHOLD and M_MMAP_MAX
    with contextlib.suppress(OSError, AttributeError):  # no glibc: nothing to tune
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)  # never


def thread_line() -> str:
    """A line with the number of CPU threads, how to change it, and a warning if other programs keep the CPUs busy."""
    threads, cpus = (
        torch.get_num_threads(),
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    )
    line = f"threads: {threads} of {cpus} CPUs; OMP_NUM_THREADS=N changes it"
    load = os.getloadavg()[0]  # average of the last minute
    if threads > 1 and load > cpus / 2:
        line += f". Other programs use these CPUs (load {load:.1f}): all threads wait for the slowest, so fewer may be faster"
    return line


def choose_precision(wanted: str, device: torch.device) -> tuple[str, str]:
    """(precision, reason). auto: bf16 if the hardware multiplies it natively, else fp32."""
    if wanted != "auto":
        return wanted, "set"
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher == "bf16":
        return "bf16", "accelerate's mixed_precision"
    if launcher != "no":
        raise UserError(
            f"precision: accelerate's mixed_precision {launcher} is not supported; choose bf16 or no in accelerate's config"
        )
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "this GPU multiplies bf16") if native else ("fp32", "this GPU has no bf16 units")
    if cpu_has_bf16():
        return "bf16", "this CPU multiplies bf16 (AMX or AVX-512 BF16)"
    return "fp32", "this CPU has no bf16 units"


def cpu_has_bf16() -> bool:
    """Whether the CPU has matrix instructions for bf16 (without them bf16 is slower than fp32)."""
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def memory_bytes(device: torch.device) -> int | None:
    """Memory of a GPU; None on a CPU, where memory does not limit the batch."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def free_bytes(device: torch.device, local_size: int) -> int:
    """Memory that this process can still use. On a CPU: its share, 1 / `local_size`, of the machine's free memory."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // local_size


def device_name(device: torch.device) -> str:
    """The driver's name for the GPU, or CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


class HostCopy:
    """An asynchronous copy of named numbers from the device to the host.

    `read` waits only for these numbers, not for kernels that were launched after them. A plain `.item()` would wait for all
    of these kernels, and the device would then be idle until the next launch.
    """

    def __init__(self, **numbers: torch.Tensor) -> None:
        """numbers: 1-D tensors of one type and device."""
        self._sizes = {name: len(tensor) for name, tensor in numbers.items()}
        self._numbers = torch.cat(list(numbers.values()))
        self._arrived = None
        if self._numbers.is_cuda:
            there = self._numbers
            self._numbers = torch.empty(there.shape, dtype=there.dtype, pin_memory=True)
            self._numbers.copy_(there, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> dict[str, list[float]]:
        if self._arrived is not None:
            self._arrived.synchronize()
        parts = self._numbers.split(list(self._sizes.values()))
        return {name: part.tolist() for name, part in zip(self._sizes, parts, strict=True)}


def peak_flops(device: torch.device, precision: str, float8: bool = False) -> float | None:
    """Peak FLOP/s for the MFU; None if the device is not in PEAK, or with float8, which mixes two number types."""
    return peak_of(device_name(device), precision, float8)


def peak_of(name: str, precision: str, float8: bool = False) -> float | None:
    """`peak_flops` for a device name."""
    return None if float8 else PEAK.get(name, {}).get(FACTORS[precision])


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: of torch's allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
