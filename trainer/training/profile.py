"""`--profile`: a trace and a table of the top operations of a few steps. Also the error message when GPU memory runs out.

Every rank writes RUN/profile/trace-rankN.json.gz (for https://ui.perfetto.dev), rank 0 also RUN/profile/operations.txt.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.core.errors import UserError
from trainer.runtime.compat import private

SKIP, WARM_UP, RECORD = 3, 2, 3  # steps: the first ones compile and make the optimiser's state
TOP = 20
NAME, SHAPES = 48, 40  # columns of the table, in characters
HISTORY = 100_000  # allocations and frees that the allocator remembers, at a few kB each
COMPILED = "## Call CompiledFxGraph"  # torch.compile's annotation around the code it made
# Operators that start collectives or wait for them.
COLLECTIVES = ("c10d::", "_c10d_functional::", "record_param_comms")

Span = tuple[float, float]  # begin and end, in us


def window(steps: int) -> tuple[int, int, int]:
    """(skipped, warm-up, recorded) steps of a run with `steps` left. A short run skips fewer, then records fewer."""
    record = max(0, min(RECORD, steps - 1))
    warm_up = min(WARM_UP, steps - record)
    return min(SKIP, steps - record - warm_up), warm_up, record


class Profiler:
    """Records a few steps of a run and writes its files once. The figures include all that the loop does in these steps.

    The loop calls `step_done` after each optimiser step, and `close` when it ends for any reason. first_step, last_step:
    steps of the run done before the first call and after the last. say: called with one line, which names the files or
    the reason why there are none. On a GPU the allocator also records which code allocates what, for the snapshot of
    `explain_out_of_memory`.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        world_size: int,
        device: torch.device,
        first_step: int,
        last_step: int,
        say: Callable[[str], object],
    ) -> None:
        self.folder, self.rank, self.world_size, self.device, self.say = folder, rank, world_size, device, say
        skip, warm_up, record = window(last_step - first_step)
        self._done, self._first = 0, first_step
        self._begin, self._end = skip + warm_up, skip + warm_up + record
        self._began = 0.0
        quiet_profiler()
        warnings.filterwarnings("ignore", "Warning: Profiler clears events")  # torch 2.11 warns even of a single cycle
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            # Costs about 2 us per allocation and free: too much for every run. Turning it off would drop its records.
            private("_record_memory_history")(stacks="python", max_entries=HISTORY)
        schedule = torch.profiler.schedule(
            skip_first=skip, wait=0, warmup=max(1, warm_up), active=max(1, record), repeat=1
        )
        self._profile: Any = torch.profiler.profile(activities=activities, schedule=schedule, record_shapes=True)
        self._profile.start()

    def step_done(self) -> None:
        """Go on to the next step. Waits for the device when recording begins and when it ends."""
        if self._profile is None:
            return
        self._done += 1
        if self._done == self._end:
            self.close()
            return
        if self._done == self._begin:
            self._synchronise()
        self._profile.step()
        if self._done == self._begin:
            self._began = time.perf_counter()

    def close(self) -> None:
        """Stop, and write what was recorded. A second call does nothing."""
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        steps = self._done - self._begin
        first, last = self._first + self._begin + 1, self._first + self._done
        if steps < 1:
            profile.stop()
            self.say(f"--profile: nothing recorded, training ended before step {first} was done")
            return
        self._synchronise()
        wall_ms = 1000 * (time.perf_counter() - self._began)
        profile.stop()
        try:
            names = self._write(profile, steps, wall_ms, f"Steps {first} to {last}")
        except OSError as error:  # a full disk must not end a run that may still save elsewhere
            self.say(f"--profile: could not write to {self.folder / 'profile'}: {error}")
            return
        self.say(f"profile of steps {first} to {last} in {self.folder / 'profile'}: {names}")

    def _write(self, profile: Any, steps: int, wall_ms: float, title: str) -> str:
        """Write this rank's files. Returns their names."""
        folder = self.folder / "profile"
        folder.mkdir(parents=True, exist_ok=True)
        trace = f"trace-rank{self.rank}.json.gz"
        profile.export_chrome_trace(str(folder / trace))
        if self.rank != 0:
            return trace
        recorded = Recording.of(profile.events(), self.device)
        head = f"{title}, rank 0 of {self.world_size}, {self.device.type}. "
        (folder / "operations.txt").write_text(head + recorded.render(steps, wall_ms) + "\n")
        return f"operations.txt, {trace} (open it in https://ui.perfetto.dev)"

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass
class Recording:
    """The figures of the recorded events. Times are in us, summed over all recorded steps."""

    place: str  # where the operations' time was spent
    operations: dict[tuple[str, str], tuple[int, float]]  # by name and input shapes: calls, own time
    total: float  # own time of all operations, and of kernels that no known operation started
    computation: list[Span]
    communication: list[Span]

    @classmethod
    def of(cls, events: Iterable[Any], device: torch.device) -> Recording:
        """The figures of the profiler's FunctionEvents."""
        return cls.on_gpu(list(events)) if device.type == "cuda" else cls.on_cpu(list(events))

    @classmethod
    def on_gpu(cls, events: list[Any]) -> Recording:
        """Kernels and copies, by the operators that started them. NCCL's collectives are kernels."""
        kernels = [e for e in events if e.device_type.name == "CUDA" and not e.is_user_annotation]
        collectives = [e for e in kernels if e.name.startswith("nccl")]
        others = [e for e in kernels if not e.name.startswith("nccl")]
        # An annotation's time on the device repeats that of the kernels in it.
        starters = [e for e in events if e.device_type.name == "CPU" and not e.is_user_annotation]
        rows = by_operation((e, e.self_device_time_total) for e in starters)
        total = sum(e.time_range.elapsed_us() for e in kernels)
        return cls("the GPU", rows, total, whole_spans(others), whole_spans(collectives))

    @classmethod
    def on_cpu(cls, events: list[Any]) -> Recording:
        """Operators of the training thread. gloo annotates its collectives on its own threads.

        An annotation by Python (ProfilerStep, FSDP's) may contain only waiting, so its own time does not count.
        """
        main = next(e.thread for e in events if e.name.startswith("ProfilerStep"))
        operators = [
            e
            for e in events
            if e.thread == main and not e.is_async and (not e.is_user_annotation or e.name.startswith(COMPILED))
        ]
        rows = by_operation((e, e.self_cpu_time_total) for e in operators)
        total = sum(own for _, own in rows.values())
        computing = [span for e in operators if not e.name.startswith(COLLECTIVES) for span in own_spans(e)]
        return cls(
            "the main thread", rows, total, computing, whole_spans(e for e in events if e.name.startswith("gloo:"))
        )

    def render(self, steps: int, wall_ms: float) -> str:
        """The table of operations, and the totals below it. wall_ms: wall-clock of all recorded steps."""
        lines = [
            f"Own time of operations on {self.place}, without that of operations they call.\n",
            f"{'operation':{NAME}}  {'input shapes':{SHAPES}}  calls/step    ms/step   share",
        ]
        top = sorted(self.operations.items(), key=lambda item: -item[1][1])[:TOP]
        rest = self.total - sum(own for _, (_, own) in top)
        rows = [(name, shapes, f"{calls / steps:.1f}", own) for (name, shapes), (calls, own) in top]
        for name, shapes, calls, own in [*rows, ("all others", "", "", rest), ("total", "", "", self.total)]:
            lines.append(
                f"{shortened(name, NAME):{NAME}}  {shortened(shapes, SHAPES):{SHAPES}}  {calls:>10}  "
                f"{own / 1000 / steps:9.3f}  {share(own, self.total):>7}"
            )
        return "\n".join([*lines, "", *self.totals(steps, wall_ms)])

    def totals(self, steps: int, wall_ms: float) -> list[str]:
        """A line each for wall-clock, busy device and collectives, in ms per step."""
        busy, communicating, hidden = (
            us / 1000 / steps
            for us in (
                covered(self.computation),
                covered(self.communication),
                common(self.computation, self.communication),
            )
        )
        wall = wall_ms / steps
        lines = [
            f"wall-clock     {wall:10.3f} ms per step, under the profiler, which takes time itself",
            f"device busy    {busy:10.3f} ms per step, {share(busy, wall)} of the wall-clock; collectives not counted",
        ]
        if self.communication:
            lines.append(
                f"communication  {communicating:10.3f} ms per step, of which {hidden:.3f} ms "
                f"({share(hidden, communicating)}) hidden under computation"
            )
        return lines


def by_operation(timed: Iterable[tuple[Any, float]]) -> dict[tuple[str, str], tuple[int, float]]:
    """Calls and time summed by name and input shapes, from (event, its own time in us). Events without time are left out."""
    rows: dict[tuple[str, str], tuple[int, float]] = {}
    for event, own in timed:
        if own > 0:
            name = "compiled code" if event.name.startswith(COMPILED) else event.name
            shapes = ", ".join("x".join(map(str, shape)) for shape in event.input_shapes or [] if shape)
            calls, before = rows.get((name, shapes), (0, 0.0))
            rows[name, shapes] = calls + 1, before + own
    return rows


def whole_spans(events: Iterable[Any]) -> list[Span]:
    """(begin, end) of each event."""
    return [(e.time_range.start, e.time_range.end) for e in events]


def own_spans(event: Any) -> list[Span]:
    """The parts of an event outside the events that it encloses."""
    spans, at = [], event.time_range.start
    for begin, end in sorted(whole_spans(event.cpu_children)):
        spans.append((at, begin))
        at = max(at, end)
    spans.append((at, event.time_range.end))
    return [(begin, end) for begin, end in spans if begin < end]


def covered(spans: list[Span]) -> float:
    """Length of the union of intervals."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def common(first: list[Span], second: list[Span]) -> float:
    """Length of the intersection of the unions of two lists of intervals."""
    return covered(first) + covered(second) - covered(first + second)


def share(part: float, whole: float) -> str:
    """`part` in per cent of `whole`."""
    return f"{100 * part / whole if whole else 0.0:.1f} %"


def shortened(text: str, width: int) -> str:
    """`text`, cut with dots to at most `width` characters."""
    return text if len(text) <= width else text[: width - 3] + "..."


def quiet_profiler() -> None:
    """Silence the lines that the profiler's library writes to stderr."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")


@contextlib.contextmanager
def explain_out_of_memory(folder: Path, rank: int, device: torch.device, advice: Callable[[], str]) -> Iterator[None]:
    """If a GPU's memory runs out inside, write RUN/profile/memory-rankN.pickle and raise UserError.

    advice: returns which settings to change; called only then. With --profile the snapshot also shows which code allocated it.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        if device.type != "cuda":
            raise
        raise UserError(f"rank {rank}: {what_ran_out(error)}; {advice()}; {write_snapshot(folder, rank)}") from error


def what_ran_out(error: torch.OutOfMemoryError) -> str:
    """One line: what was requested and what was held. (torch's own advice about fragmentation is left out.)"""
    return " ".join(str(error).partition("If reserved")[0].split()).rstrip(".")


def write_snapshot(folder: Path, rank: int) -> str:
    """Write a snapshot of the CUDA allocator. Returns where it is and how to view it, or why it could not be written."""
    path = folder / "profile" / f"memory-rank{rank}.pickle"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        private("_dump_snapshot")(str(path))
    except Exception as failure:  # the out-of-memory error must be reported in any case
        why = " ".join(f"{type(failure).__name__}: {failure}".split())
        return f"no snapshot of the memory could be written ({why})"
    return (
        f"what held the memory is in {path}: open it at https://pytorch.org/memory_viz or with "
        f"`python -m torch.cuda._memory_viz trace_plot {path} -o out.html`; with --profile it also names the code"
    )
