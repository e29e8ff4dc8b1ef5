"""The device at hand: which one, its memory, its compute type, its peak."""

from __future__ import annotations

import contextlib
import os
from typing import NamedTuple

import torch

from models.layers import flex
from trainer.core.errors import UserError


class Gpu(NamedTuple):
    """A GPU to plan for. name: as its driver gives it; gibibytes: of memory as torch sees it, less than the label says;
    is_ampere: of that generation or a later one (compute capability 8.0), with bf16 units and FlexAttention's kernels;
    has_fp8: compute capability 8.9."""

    name: str
    gibibytes: float
    is_ampere: bool = True
    has_fp8: bool = False


class Target(NamedTuple):
    """The device a run is planned for. memory: bytes of a GPU, None on a CPU; flex: whether it has FlexAttention's kernels;
    here: whether it is the device at hand."""

    memory: int | None
    flex: bool = False
    here: bool = True

    @classmethod
    def at_hand(cls, device: torch.device) -> Target:
        return cls(memory_bytes(device), flex.device_refusal(device) is None)

    @classmethod
    def elsewhere(cls, gpu: Gpu) -> Target:
        return cls(int(gpu.gibibytes * 1024**3), gpu.is_ampere, here=False)


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

# Dense matrix peak in FLOP/s by exact device name and type of the factors (vendor data sheets, without sparsity). What is
# not here has no MFU, never a guess.
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
FACTORS = {"fp32": "tf32", "bf16": "bf16", "pure_bf16": "bf16"}  # what a GPU multiplies, by precision


def choose_device(wanted: str, local_rank: int = 0) -> torch.device:
    """cpu or cuda:LOCAL_RANK; auto takes a GPU where there is one."""
    available = torch.cuda.is_available()
    if wanted == "auto" and os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return torch.device("cpu")  # `accelerate launch --cpu`
    if wanted == "cuda" and not available:
        raise UserError("device: cuda was asked for, but torch sees no CUDA device; use --device cpu")
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"device: process {local_rank} of this machine has no GPU of its own ({torch.cuda.device_count()} here); "
            "start fewer processes or use --device cpu"
        )
    return torch.device("cuda", local_rank)


def keep_freed_memory() -> None:
    """CPU: let glibc reuse large freed blocks. By default each big activation is mapped and unmapped anew, and the kernel
    spends as long clearing pages as the model spends computing."""
    import ctypes

    trim_threshold, mmap_max = -1, -4  # mallopt's names for these are M_TRIM_THRESHOLD and M_MMAP_MAX
    with contextlib.suppress(OSError, AttributeError):  # no glibc: nothing to tune
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)  # never


def thread_line() -> str:
    """With how many threads a CPU computes, and how to change it; whether others keep the CPUs busy."""
    threads, cpus = (
        torch.get_num_threads(),
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    )
    line = f"threads: {threads} of {cpus} CPUs; OMP_NUM_THREADS=N changes it"
    load = os.getloadavg()[0]  # of the last minute
    if threads > 1 and load > cpus / 2:
        line += f". Other programs are at work here (load {load:.1f}): threads wait for the slowest, and fewer may be faster"
    return line


def choose_precision(wanted: str, device: torch.device) -> tuple[str, str]:
    """(precision, why). auto: bf16 where the hardware multiplies it natively, fp32 elsewhere."""
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
    """Memory of a GPU; None on a CPU, where memory is not what limits a batch."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def free_bytes(device: torch.device, local_size: int) -> int:
    """Memory that this process may still take: on a CPU its part of what the machine's `local_size` processes have left."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // local_size


def device_name(device: torch.device) -> str:
    """The GPU's name as its driver gives it, or CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


class HostCopy:
    """Numbers by name on their way from the device to the host.

    `read` waits for these numbers alone, not for what was launched after them: a plain `.item()` would wait for all of it,
    and leave the device idle until the next launch.
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
    """FLOP/s to compare with, or None where it is not known for certain, or there is no one peak (a part in fp8)."""
    return peak_of(device_name(device), precision, float8)


def peak_of(name: str, precision: str, float8: bool = False) -> float | None:
    """As `peak_flops`, of a device by name."""
    return None if float8 else PEAK.get(name, {}).get(FACTORS[precision])


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory in use so far: the allocator's on a GPU, the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
