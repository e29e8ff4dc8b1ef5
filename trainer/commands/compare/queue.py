"""Trains the runs of a comparison on this machine: each in a process of its own, several at a time if there are several GPUs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from trainer.commands.compare.experiment import Experiment, State, Task
from trainer.core.errors import Stopped, UserError
from trainer.core.text import printable
from trainer.runtime.exit_status import VARIABLE
from trainer.runtime.signals import follow_launcher

TRAIN = [sys.executable, "-m", "trainer", "train"]
POLL_SECONDS = 0.2
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class Job:
    """A run in training. slot: the environment of its device."""

    task: Task
    process: subprocess.Popen[bytes]
    slot: dict[str, str]
    outcome: Path
    log: Path
    begins: int  # bytes of the log that earlier tries wrote
    since: float


class Queue:
    """Runs everything that an experiment asks for. slots: one environment per run at a time, which names its device."""

    def __init__(
        self, experiment: Experiment, slots: list[dict[str, str]], plugins: list[str], say: Callable[[str], None]
    ):
        self.experiment, self.free, self.plugins, self.say = experiment, list(slots), plugins, say
        self.jobs: list[Job] = []
        self.seconds: list[float] = []  # of the runs that this queue has finished
        self._waited = False  # whether it has said that it waits for another process

    def run(self) -> None:
        """Until no run is waiting. A signal stops the runs with a checkpoint; raises Stopped then."""
        with requests_to_stop() as asked:
            while not asked:
                self.start_what_fits()
                if not self.jobs and not self.wait_for_others():
                    return
                self.collect()
                time.sleep(POLL_SECONDS)
            self.stop(asked)

    def start_what_fits(self) -> None:
        while self.free:
            task = next(iter(self.experiment.waiting()), None)
            if task is None:
                return
            self.start(task)

    def start(self, task: Task) -> None:
        config = self.experiment.write_config(task)
        log = self.experiment.folder / "logs" / f"{task.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        outcome = log.with_suffix(".outcome")
        outcome.unlink(missing_ok=True)
        slot = self.free.pop(0)
        words = [*TRAIN, str(config), *(word for plugin in self.plugins for word in ("--plugin", plugin))]
        begins = log.stat().st_size if log.exists() else 0
        with log.open("ab") as file:
            # A session of its own: Ctrl-C reaches only this process, which asks each run once. If this process is killed, the
            # kernel asks them.
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, **slot, VARIABLE: str(outcome)},
                start_new_session=True,
                preexec_fn=follow_launcher,
            )
        self.jobs.append(Job(task, process, slot, outcome, log, begins, time.monotonic()))
        self.experiment.running.add(task.name)
        self.experiment.write()
        left = sum(map(self.experiment.most_runs_left, self.experiment.arms))
        self.say(
            f"{task.purpose}: {task.name} begins; at most {left} run{'s' if left > 1 else ''} left{self.time_left(left)}"
        )

    def time_left(self, runs: int) -> str:
        """How long the rest may take, from the runs that this queue has finished."""
        if not self.seconds:
            return ""
        hours = sum(self.seconds) / len(self.seconds) * runs / (len(self.jobs) + len(self.free)) / 3600
        return f", about {hours:.1f} h" if hours >= 0.1 else f", about {60 * hours:.0f} min"

    def collect(self) -> None:
        """Take up the runs that have ended."""
        for job in [job for job in self.jobs if job.process.poll() is not None]:
            self.jobs.remove(job)
            self.free.append(job.slot)
            self.experiment.running.discard(job.task.name)
            self.experiment.end(job.task, self.how_it_ended(job))
            state = self.experiment.state(job.task)
            if state.word == "finished":
                self.seconds.append(time.monotonic() - job.since)
            what = state.message if state.loss is None else f"validation loss {state.loss:.4f}"
            self.say(f"{job.task.purpose}: {job.task.name} {state.word}: {what}")

    def how_it_ended(self, job: Job) -> State:
        """For a run whose folder does not say that it is finished: refused or failed, with its last words."""
        outcome = job.outcome.read_text(encoding="utf-8", errors="replace") if job.outcome.exists() else ""
        said = next((line for line in reversed(tail(job.log, job.begins)) if "error" in line.lower()), "")
        if outcome.startswith("refused: "):
            return State("refused", printable(outcome.removeprefix("refused: ").strip(), 500))
        code = job.process.returncode
        how = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
        return State("failed", f"{how}; {printable(said, 500) or 'no error line'}; see {job.log}")

    def wait_for_others(self) -> bool:
        """Whether runs of the experiment are in training in processes of another queue."""
        others = [task for task in self.experiment.tasks() if self.experiment.state(task).word == "running"]
        if others and not self._waited:
            self._waited = True
            self.say(f"waiting: another process is training {others[0].name}")
        return bool(others)

    def stop(self, asked: list[int]) -> None:
        """Ask every run to write a checkpoint and stop. A second request ends them at once."""
        if self.jobs:
            self.say(
                f"{signal.Signals(asked[0]).name}: runs in progress ({len(self.jobs)}) write a checkpoint and stop; again: at once"
            )
        sent = 0
        while any(job.process.poll() is None for job in self.jobs):
            if sent < len(asked):
                sent = len(asked)
                for job in self.jobs:
                    job.process.send_signal(signal.SIGTERM)
            time.sleep(POLL_SECONDS)
        self.experiment.running.clear()
        self.experiment.write()
        raise Stopped(asked[0], "stopped; the same command goes on")


@contextmanager
def requests_to_stop() -> Iterator[list[int]]:
    """The numbers of the signals that asked this process to stop, as they come."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def tail(path: Path, begins: int, most: int = 1 << 16) -> list[str]:
    """The last lines of a log, of those after byte `begins`."""
    with path.open("rb") as file:
        file.seek(max(begins, file.seek(0, os.SEEK_END) - most))
        return file.read().decode("utf-8", errors="replace").splitlines()


def device_slots(jobs: int | None, device: str) -> list[dict[str, str]]:
    """An environment for each run at a time. On GPUs: one per GPU, which it alone sees. On a CPU: `jobs`, which share the cores."""
    from trainer.runtime.device import choose_device

    if choose_device(device).type == "cuda":
        import torch

        count = torch.cuda.device_count()
        if jobs is not None and jobs > count:
            raise UserError(f"jobs: {jobs} runs at a time need as many GPUs; there are {count}")
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = seen.split(",") if seen else [str(index) for index in range(count)]
        return [{"CUDA_VISIBLE_DEVICES": name} for name in names[: jobs or count]]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = jobs or 1
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // jobs))
    return [{"OMP_NUM_THREADS": threads} for _ in range(jobs)]
