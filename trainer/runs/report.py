"""Collects what each optimiser step measured and tells it: console, metrics.jsonl, wandb.

What the device measures of a step is read when the next step has been launched, so reading never makes the device wait.
"""

from __future__ import annotations

import dataclasses
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.core.errors import UserError
from trainer.engine.meta import flops_per_token
from trainer.inference.evaluation import safe_exp
from trainer.runs.console import open_console
from trainer.runs.metrics import MetricsFile, rewind_samples
from trainer.runs.wandb import Wandb
from trainer.runtime.device import HostCopy, peak_flops, peak_memory_bytes
from trainer.runtime.signals import STOPPING


@dataclass
class Measured:
    """One optimiser step. numbers: what only the device knows: loss, gradient norm, 1.0 if both are finite else 0.0, on how
    many ranks each of signals.STOPPING came, on how many an asynchronous save has failed, the losses named in `parts`."""

    step: int  # optimiser steps done, this one included
    tokens: int  # trained on so far
    step_tokens: int
    epoch: float
    length: int
    multiplier: int
    lr: float
    numbers: HostCopy
    parts: tuple[str, ...] = ()
    elapsed: float = 0.0  # seconds of training it took, and of the run so far: set by Report
    seconds: float = 0.0

    @property
    def grad_norm(self) -> float:
        return self.numbers.read()[1]


class Clock:
    """Seconds of training only: evaluation, samples and checkpoints stop it."""

    def __init__(self, seconds: float) -> None:
        self._before, self._since = seconds, time.perf_counter()
        self._running = True

    @property
    def seconds(self) -> float:
        return self._before + (time.perf_counter() - self._since if self._running else 0.0)

    def stop(self) -> None:
        self._before, self._running = self.seconds, False

    def start(self) -> None:
        if not self._running:
            self._since, self._running = time.perf_counter(), True


class Report:
    """The voice of a run."""

    def __init__(
        self, folder: Path, plan: Any, world: Any, engine: Any, step: int, seconds: float, rows: str = ""
    ) -> None:
        """rows: the digest of metrics.jsonl that the checkpoint has which the run goes on from."""
        self.config, self.world, self.engine = plan.config, world, engine
        self.clock = Clock(seconds)
        # Not of the engine's model: where its weights are cut into parts (zero3) it would count those of one part, or none.
        self._flops = {t: flops_per_token(plan.model_class, plan.model_config, t) for t in plan.sequence_lengths}
        self._peak = peak_flops(engine.device, plan.config.precision, plan.config.float8)
        self._waiting: Measured | None = None
        self._first = True
        self._seconds_then = seconds
        self._skips = 0
        self.asked: signal.Signals | None = None  # to stop; this and the next as all ranks agree, a step late
        self.save_failed = False
        self.last: dict[str, Any] = {}
        self._metrics: MetricsFile | None = None
        if world.leader:
            log, settings = plan.config.log, dataclasses.asdict(plan.config)
            self._metrics = MetricsFile(folder / "metrics.jsonl", step, world.say, rows)
            with world.decoration("samples.txt"):
                rewind_samples(folder / "samples.txt", step)
            self._wandb = Wandb(log.wandb, log.wandb_project, folder, settings, world)
        self.folder, self.title = folder, f"{plan.config.model['name']}, {plan.parameters / 1e6:.1f} M parameters"
        self.console = open_console(plan.config.log.console, world.leader, self.title)

    def step_done(self, measured: Measured) -> None:
        """Take a step's measurements; tells those of the step before, which the device has finished by now."""
        self.flush()
        self._waiting = measured
        self._stamp()

    def _stamp(self) -> None:
        """Count the time since the last stamp to the step that is waiting.

        On a GPU the loop runs one step ahead of the device, and so does this attribution; sums are right.
        """
        if self._waiting is not None:
            now = self.clock.seconds
            self._waiting.elapsed += now - self._seconds_then
            self._waiting.seconds = self._seconds_then = now

    def wait(self) -> None:
        """For the device to finish the last step."""
        if self._waiting is not None:
            self._waiting.numbers.read()

    def stop_clock(self) -> None:
        """Wait for the device to finish the last step, then stop counting."""
        self.wait()
        self.clock.stop()
        self._stamp()

    def flush(self, validation: dict[str, Any] | None = None, train_accuracy: float | None = None) -> None:
        """Tell the step that is waiting, with the results of an evaluation made after it. Raises at a non-finite step."""
        if self._waiting is None:
            return
        m, self._waiting = self._waiting, None
        loss, grad_norm, finite, *others = m.numbers.read()
        stops, failed, parts = others[: len(STOPPING)], others[len(STOPPING)], others[len(STOPPING) + 1 :]
        self.save_failed = failed > 0
        self.asked = next((number for number, count in zip(STOPPING, stops, strict=True) if count), self.asked)
        rate = m.step_tokens / max(m.elapsed, 1e-9)
        mfu = rate * self._flops[m.length] / (self._peak * self.world.size) if self._peak else None
        best = (validation or {}).get("full") or (validation or {}).get("hlb") or {}
        row = {
            "step": m.step,
            "tokens": m.tokens,
            "loss": loss if finite else None,
            "grad_norm": grad_norm if finite else None,
            "lr": m.lr,
            "val_loss": best.get("loss"),
            "val_bits_per_byte": best.get("bits_per_byte"),
            "tokens_per_second": rate,
            "mfu": mfu,
            "sequence_length": m.length,
            "microbatch_steps": m.multiplier,
            "epoch": m.epoch,
            "seconds": m.seconds,
        }
        row |= {f"loss_{name}": part if finite else None for name, part in zip(m.parts, parts, strict=True)}
        if validation and "full" in validation and "hlb" in validation:
            row["val_loss_hlb"] = validation["hlb"]["loss"]
        self.last = {**self.last, **{key: value for key, value in row.items() if value is not None}}
        if self._metrics is not None:
            with self.world.decoration("metrics.jsonl"):
                self._metrics.write(row)
            self._wandb.write(row)
        if self._first:
            self._first = False
            how = ", compilation included" if self.config.engine.compile else ""
            self.console.say(f"first step: {m.elapsed:.1f} s{how}")
        self._show(row, best, train_accuracy)
        self._guard(m.step, bool(finite))

    def _show(self, row: dict[str, Any], best: dict[str, Any], train_accuracy: float | None) -> None:
        facts = self._facts(row)
        self.console.step(facts)
        every = self.config.log.every
        if not best and (every == 0 or row["step"] % every):
            return
        cells = {
            "epoch": int(row["epoch"]),
            "curr_step": row["step"],
            "train_loss": row["loss"],
            "val_loss": row["val_loss"],
            "val_perplexity": safe_exp(row["val_loss"]) if best else None,
            "train_acc": train_accuracy,
            "val_acc": best.get("accuracy"),
            "grad_norm": row["grad_norm"],
            "microbatch_steps": row["microbatch_steps"] if best else None,
            "total_seconds": row["seconds"] if best else None,
        }
        self.console.row(cells, facts)

    def _facts(self, row: dict[str, Any]) -> dict[str, Any]:
        """What the live view shows."""
        left = (self.config.max_steps - row["step"]) * row["seconds"] / max(1, row["step"])
        return {
            "step": row["step"],
            "max_steps": self.config.max_steps,
            "loss": _short(row["loss"]),
            "val": _short(row["val_loss"]),
            "bits/byte": _short(row["val_bits_per_byte"]),
            "grad norm": _short(row["grad_norm"]),
            "tokens/s": f"{row['tokens_per_second']:,.0f}",
            "MFU": f"{row['mfu']:.1%}" if row["mfu"] else "n/a",
            "memory": f"{peak_memory_bytes(self.engine.device) / 1024**3:.2f} GiB",
            "length": row["sequence_length"],
            "microbatches": row["microbatch_steps"],
            "ETA": f"{int(left // 60)} min {int(left % 60):02d} s",
        }

    def _guard(self, step: int, finite: bool) -> None:
        self._skips = 0 if finite else self._skips + 1
        if finite:
            return
        optim = self.config.optim
        if optim.non_finite == "stop" or self._skips > optim.max_skips:
            raise UserError(
                f"step {step}: loss or gradient is not finite ({self._skips} in a row); it did not touch the weights; go on "
                "from the last checkpoint with --optim.non_finite skip, or start with a lower --optim.lr in another --run_dir"
            )
        self.console.say(f"step {step}: loss or gradient is not finite; the step is skipped")

    def sync(self) -> str:
        """Rows on disk, before a checkpoint that continues from them; their digest ("" on ranks that keep none)."""
        if self._metrics is None:
            return ""
        with self.world.decoration("metrics.jsonl"):
            self._metrics.sync()
        return self._metrics.digest

    def draw_curves(self) -> None:
        """curves.png of the run so far."""
        if self._metrics is not None:
            with self.world.decoration("curves.png"):
                from trainer.runs import plots

                plots.draw(self._metrics.history, self.folder / "curves.png", f"{self.title}, {self.folder.name}")

    def close(self) -> None:
        self.console.close()
        if self._metrics is not None:
            self.world.told.discard("metrics.jsonl")  # what is lost now is lost
            with self.world.decoration("metrics.jsonl"):
                self._metrics.close()
            self._wandb.close()


def _short(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"
