"""The measurements of `bench`: phases of a step in the device's own time, collectives, peak memory, compilations."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from trainer.runtime.compat import private
from trainer.training.profile import covered, quiet_profiler

PHASES = ("data", "forward", "backward", "optimiser")


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PhaseClock:
    """Marks where phases begin and end: with CUDA events on a GPU (the host does not wait), with the wall clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._spans: dict[str, list[tuple[Any, Any]]] = {}
        self._began: Any = None

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def watch(self, owner: Any, method: str, phase: str) -> None:
        """Time every call of `owner.method` from now on."""
        original = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = self._mark()
            result = original(*args, **kwargs)
            self._spans.setdefault(phase, []).append((begin, self._mark()))
            return result

        setattr(owner, method, timed)

    def watch_module(self, module: nn.Module, phase: str) -> None:
        """Time every forward pass of `module` from now on, including other hooks (FSDP's all-gather)."""

        def begin(*_: Any) -> None:
            self._began = self._mark()

        def end(*_: Any) -> None:
            self._spans.setdefault(phase, []).append((self._began, self._mark()))

        module.register_forward_pre_hook(begin, prepend=True)
        module.register_forward_hook(end)

    def measure(self, step: Callable[[], object], steps: int) -> dict[str, float | None]:
        """Medians over `steps` steps, in ms: of each phase, "other" and the whole "step".

        The watched phase "backward" contains the forward pass, so the time of "forward" is subtracted from it. If the forward
        pass never ran as a separate call (engine.cuda_graphs), "forward" is None and "backward" has the time of both.
        """
        step()  # the first watched step may recompile
        synchronise(self.device)
        taken = []
        for _ in range(steps):
            self._spans, begin = {}, self._mark()
            step()
            taken.append((self._spans, (begin, self._mark())))
        synchronise(self.device)
        rows = []
        for spans, whole in taken:
            row = {phase: sum(map(self._milliseconds, spans.get(phase, []))) for phase in PHASES}
            row["backward"] -= row["forward"]
            row["other"] = self._milliseconds(whole) - sum(row.values())
            row["step"] = self._milliseconds(whole)
            rows.append(row)
        medians: dict[str, float | None] = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
        return medians if "forward" in taken[0][0] else medians | {"forward": None}

    def _milliseconds(self, span: tuple[Any, Any]) -> float:
        begin, end = span
        return begin.elapsed_time(end) if self.device.type == "cuda" else 1000 * (end - begin)


def communication_ms(step: Callable[[], object], steps: int, device: torch.device) -> float | None:
    """Milliseconds of a step with any collective under way, beside computation or not; None if the profiler saw none."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    quiet_profiler()
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            step()
        synchronise(device)
    # The profiler records gloo's collectives as annotations on gloo's threads, and NCCL's as kernels.
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.name.startswith("gloo:") or (event.name.startswith("nccl") and event.device_type.name == "CUDA")
    ]
    return covered(spans) / 1000 / steps if spans else None


class PeakMemory:
    """Peak bytes that torch's allocator hands out within the context, beyond what was in use before it."""

    bytes = 0


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[PeakMemory]:
    """Measure PeakMemory. The CUDA allocator counts its own peak; the CPU allocator reports every block to the profiler."""
    peak = PeakMemory()
    if device.type == "cuda":
        synchronise(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    quiet_profiler()
    with torch.autograd.profiler.profile(use_kineto=True, profile_memory=True) as profile:
        yield peak
    results: Any = profile.kineto_results
    blocks = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(results.events()) if e.name() == "[memory]")
    held = 0
    for _, _, size in blocks:
        held += size
        peak.bytes = max(peak.bytes, held)


def compilations() -> int:
    """Graphs that torch.compile has made in this process so far."""
    return private("counters")["stats"]["unique_graphs"]
