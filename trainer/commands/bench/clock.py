"""Clocks of `bench`: phases of a step on the device's own time, collectives, memory, compilations."""

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
    """Wait until the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PhaseClock:
    """Marks where phases begin and end: CUDA events on a GPU, so that nothing waits, the wall clock on a CPU."""

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
        """Time every forward pass of `module` from now on, with what other hooks do in it (FSDP's gathering)."""

        def begin(*_: Any) -> None:
            self._began = self._mark()

        def end(*_: Any) -> None:
            self._spans.setdefault(phase, []).append((self._began, self._mark()))

        module.register_forward_pre_hook(begin, prepend=True)
        module.register_forward_hook(end)

    def measure(self, step: Callable[[], object], steps: int) -> dict[str, float | None]:
        """Medians over `steps` steps, in ms: of each phase, "other" and the whole "step".

        The phase backward is taken to have been watched with the forward pass in it; forward is None, and its time
        backward's, where it never ran by itself (engine.cuda_graphs).
        """
        step()  # the first one under watch may compile anew
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
    """Time of a step with any collective under way, alone or beside computation; None where the profiler saw none."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    quiet_profiler()
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            step()
        synchronise(device)
    # gloo's collectives are annotated on its threads, NCCL's are kernels.
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.name.startswith("gloo:") or (event.name.startswith("nccl") and event.device_type.name == "CUDA")
    ]
    return covered(spans) / 1000 / steps if spans else None


class PeakMemory:
    """Most bytes that torch's allocator has handed out at a time within the context, beyond what it held before."""

    bytes = 0


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[PeakMemory]:
    """The CUDA allocator counts by itself; the CPU's tells the profiler of every block."""
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
