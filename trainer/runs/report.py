"""Reports each optimiser step and the time it took, on the console and in metrics.jsonl, wandb, TensorBoard and curves.png."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from trainer.engine.compilation import compile_seconds
from trainer.engine.meta import flops_per_token
from trainer.runs.console import format_number, open_console
from trainer.runs.metrics import MetricsFile, rewind_samples
from trainer.runs.task_results import columns, one_line, write_results
from trainer.runs.tensorboard import TensorBoard
from trainer.runs.wandb import Wandb
from trainer.runtime.device import peak_flops, peak_memory_bytes


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
    """All reports of a run."""

    def __init__(
        self, folder: Path, plan: Any, world: Any, engine: Any, step: int, seconds: float, rows: str = ""
    ) -> None:
        """rows: the digest of metrics.jsonl in the checkpoint that the run resumes from."""
        self.config, self.world, self.engine = plan.config, world, engine
        self.clock = Clock(seconds)
        # Not from the engine's model: with partitioned weights (zero3) that would count one part of them, or none.
        self._flops = {t: flops_per_token(plan.model_class, plan.model_config, t) for t in plan.sequence_lengths}
        self._peak = peak_flops(engine.device, plan.config.precision, plan.config.float8)
        self._first = True
        self._compiled_before = compile_seconds()  # the memory plan uses the compiler too
        self._stamped = seconds  # the clock at the last stamp
        self._elapsed = 0.0  # seconds since the last step that was reported
        self.last: dict[str, Any] = {}
        self._metrics: MetricsFile | None = None
        if world.leader:
            log, settings = plan.config.log, dataclasses.asdict(plan.config)
            self._metrics = MetricsFile(folder / "metrics.jsonl", step, world.say, rows)
            with world.decoration("samples.txt"):
                rewind_samples(folder / "samples.txt", step)
            self._wandb = Wandb(log.wandb, log.wandb_project, folder, settings, world)
            self._board = TensorBoard(log.tensorboard, folder, step, world)
        self.folder, self.title = folder, f"{plan.config.model['name']}, {plan.parameters / 1e6:.1f} M parameters"
        self.console = open_console(plan.config.log.console, world.leader, self.title)

    def stamp(self) -> None:
        """Add the time since the last stamp to the step that was launched last.

        On a GPU the loop runs one step ahead of the device, and so do these times. Their sums are right.
        """
        now = self.clock.seconds
        self._elapsed += now - self._stamped
        self._stamped = now

    def stop_clock(self) -> None:
        self.clock.stop()
        self.stamp()

    def row(self, m: Any) -> dict[str, Any]:
        """The row of step `m`, a StepResult, still without an evaluation. Call this once per step, in order."""
        elapsed, self._elapsed = self._elapsed, 0.0
        compiling = compile_seconds() - self._compiled_before
        if self._first:
            self._first = False
            how = f", {compiling:.1f} s of it compiling" if compiling >= 0.05 else ""
            self.console.say(f"first step: {elapsed:.1f} s{how}")
        finite = m.finite
        rate = m.step_tokens / max(elapsed, 1e-9)
        row = {
            "step": m.step,
            "tokens": m.tokens,
            "loss": m.loss if finite else None,
            "grad_norm": m.grad_norm if finite else None,
            "lr": m.lr,
            "val_loss": None,
            "val_bits_per_byte": None,
            "tokens_per_second": rate,
            "mfu": rate * self._flops[m.sequence_length] / (self._peak * self.world.size) if self._peak else None,
            "sequence_length": m.sequence_length,
            "batch_multiplier": m.batch_multiplier,
            "epoch": m.epoch,
            "seconds": self._stamped,
            "compile_seconds": compiling,
            "peak_memory_bytes": peak_memory_bytes(self.engine.device),
        }
        if self.config.log.noise_scale:
            row["noise_scale"] = m.noise_scale
        row |= {f"epoch_{name}": passed for name, passed in m.epochs.items()}
        return row | {f"loss_{name}": part if finite else None for name, part in m.parts.items()}

    def write(self, row: dict[str, Any], evaluated: Any = None) -> None:
        """Report the row of a step, with the results of an evaluation after it, an Evaluated."""
        if evaluated is not None:
            row = row | validation_columns(evaluated.validation) | evaluated.metrics
            row = row | ({} if evaluated.tasks is None else columns(evaluated.tasks))
        self.last = {**self.last, **{key: value for key, value in row.items() if value is not None}}
        if self._metrics is not None:
            with self.world.decoration("metrics.jsonl"):
                self._metrics.write(row)
            self._wandb.write(row)
            self._board.write(row)
        self._show(row, evaluated is not None)
        if evaluated is not None and evaluated.metrics:
            figures = ", ".join(f"{name} {format_number(value)}" for name, value in evaluated.metrics.items())
            self.console.say(f"step {row['step']:,}: {figures}")
        if evaluated is not None and evaluated.tasks is not None:
            self._keep_tasks(row["step"], evaluated.tasks)

    def _keep_tasks(self, step: int, results: dict[str, Any]) -> None:
        """Show the figures of the tasks, and keep them, with what no column of metrics.jsonl holds, in RUN/evaluation."""
        self.console.say(f"step {step:,}: {one_line(results)}")
        if self.world.leader:
            with self.world.decoration("evaluation"):
                write_results(self.folder, {"run": str(self.folder), "step": step, "weights": "evaluation"} | results)

    def _show(self, row: dict[str, Any], evaluated: bool) -> None:
        self.console.step(self._facts(row))
        if evaluated or (self.config.log.every and row["step"] % self.config.log.every == 0):
            self.console.row()
        average = average_line(row)
        if average:
            self.console.say(f"step {row['step']:,}: {average}")

    def _facts(self, row: dict[str, Any]) -> dict[str, Any]:
        """What the console shows of a row; `more`: what only the live view has room for."""
        return {
            "step": row["step"],
            "max_steps": self.config.max_steps,
            "loss": row["loss"],
            "val": row["val_loss"],
            "bits/byte": row["val_bits_per_byte"],
            "tokens/s": row["tokens_per_second"],
            "MFU": row["mfu"],
            "ETA": (self.config.max_steps - row["step"]) * row["seconds"] / max(1, row["step"]),
            "more": {
                "grad norm": "" if row["grad_norm"] is None else f"{row['grad_norm']:.4f}",
                "memory": f"{peak_memory_bytes(self.engine.device) / 1024**3:.2f} GiB",
                "length": str(row["sequence_length"]),
                "batch multiplier": str(row["batch_multiplier"]),
            },
        }

    def sample(self, text: str, step: int) -> None:
        """Report a text that the model wrote after `step` steps; samples.txt has it already."""
        if self._metrics is not None:
            self._board.sample(text, step)

    def sync(self) -> str:
        """Put the rows on disk before a checkpoint is saved. Returns their digest ("" on ranks without metrics.jsonl)."""
        if self._metrics is None:
            return ""
        with self.world.decoration("metrics.jsonl"):
            self._metrics.sync()
        self._board.flush()
        return self._metrics.digest

    def draw_curves(self) -> None:
        """Draw curves.png of the run so far."""
        if self._metrics is not None:
            with self.world.decoration("curves.png"):
                from trainer.runs import plots

                plots.draw(self._metrics.history, self.folder / "curves.png", f"{self.title}, {self.folder.name}")

    def close(self) -> None:
        self.console.close()
        if self._metrics is not None:
            self.world.told.discard("metrics.jsonl")  # report a failure again: these rows are lost
            with self.world.decoration("metrics.jsonl"):
                self._metrics.close()
            self._wandb.close()
            self._board.close()


def validation_columns(validation: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The keys of a row that hold what `Run.validate` returns."""
    found: dict[str, Any] = {}
    for weights, results in validation.items():
        found |= validation_keys(results, "" if weights == "evaluation" else f"{weights}_")
    return found


def validation_keys(results: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The keys of a row that hold the results of `validate`. prefix: of these keys, for other weights than the run's own."""
    best = results.get("full") or results["hlb"]
    found = {f"{prefix}val_loss": best["loss"], f"{prefix}val_bits_per_byte": best["bits_per_byte"]}
    found |= {f"{prefix}val_{key}": value for key, value in best.items() if key.startswith("objective_")}
    if "full" in results and "hlb" in results:
        found[f"{prefix}val_loss_hlb"] = results["hlb"]["loss"]
    return found


def average_line(row: dict[str, Any]) -> str:
    """What to say of the moving average in an evaluated row; "" if there is none."""
    if "ema_val_loss" not in row:
        return ""
    return (
        f"validation loss of the moving average {row['ema_val_loss']:.4f}, {row['ema_val_bits_per_byte']:.4f} bits/byte"
    )
