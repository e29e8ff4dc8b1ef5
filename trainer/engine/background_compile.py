"""Compile a run's code in a second process, while the run trains with eager code (engine.background_compile).

The second process runs the forward pass of one microbatch at each sequence length, with weights of its own. It keeps the
activations of one block at a time, so it needs little memory. The compiler puts the code into its cache on disk. Then the run
traces its blocks too, which takes a few seconds, and finds all code in the cache.

Eager and compiled steps differ by rounding, and the step at which compiled code takes over depends on the machine. The run
prints that step. A deterministic run compiles before its first step instead.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from models.materialise import materialise
from trainer.core.text import printable
from trainer.engine.compilation import first_line
from trainer.engine.meta import build_meta
from trainer.runtime.compat import private
from trainer.runtime.device import device_name

MOST_SECONDS = 600.0  # a process that needs longer is ended
NICENESS = 10  # the training process launches kernels and must not wait for a CPU


class BackgroundCompiler:
    """The second process. marker: a file that it makes when all code is in the cache."""

    def __init__(self, plan: Any, objective: Any, device: torch.device, marker: Path) -> None:
        self._begun = time.monotonic()
        # Of its own session: signals for the run do not end it before the run decides what to do.
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            start_new_session=True,
        )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already, which `finished` will see
            pickle.dump((plan, objective, device, marker), self._process.stdin)
            self._process.stdin.flush()  # and kept open: the process ends when this one does

    def finished(self) -> bool:
        """Whether the process has ended, or has run for MOST_SECONDS."""
        return self._process.poll() is not None or self._seconds() > MOST_SECONDS

    def result(self) -> tuple[bool, str]:
        """(whether the run should use compiled code now, one phrase that says why). Call it once `finished`; it ends the process.

        If the process could not trace the model, the run compiles by itself. If it was ended, the run may be about to end too.
        """
        seconds = f"{self._seconds():.0f} s"
        code = self._process.poll()
        if code is None:
            self.close()
            return False, f"the second process did not finish in {seconds}"
        assert self._process.stdout is not None
        # Without waiting for the end of the pipe: a process of the compiler may still hold it.
        os.set_blocking(self._process.stdout.fileno(), False)
        said = (self._process.stdout.read() or b"").decode(errors="replace")
        self.close()
        if code != 0:
            return False, f"the second process ended with exit status {code}"
        return True, said or f"compiled in the background in {seconds}"

    def close(self) -> None:
        """End the process, and those that the compiler has started in it."""
        self._process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # of what it has not read
                    pipe.close()

    def _seconds(self) -> float:
        return time.monotonic() - self._begun


def start_background(plan: Any, objective: Any, device: torch.device) -> BackgroundCompiler | None:
    """Start to compile for a run. None if an earlier run has left the code in the cache: then the first step loads it."""
    marker = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / f"crescendo-{_fingerprint(plan, device)}"
    return None if marker.exists() else BackgroundCompiler(plan, objective, device, marker)


def _fingerprint(plan: Any, device: torch.device) -> str:
    """Of what the code depends on. It need not be complete: without the code in the cache the first step compiles."""
    config = plan.config
    source = Path(inspect.getfile(plan.model_class)).read_bytes()
    shapes = plan.sequence_lengths, config.batch.tokens_per_step, config.batch.tokens_per_microbatch
    numbers = config.precision, config.float8, config.engine.activation_checkpointing
    where = torch.__version__, device_name(device)
    facts = where, plan.model_config, source, shapes, numbers, config.objective, plan.end_of_text
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def main() -> None:
    """The second process. It prints what went wrong in one line, or nothing."""
    os.nice(NICENESS)
    plan, objective, device, marker = pickle.load(sys.stdin.buffer)  # noqa: S301 - written by the run itself
    threading.Thread(target=_end_with_parent, daemon=True).start()
    said: list[str] = []
    try:
        trace(plan, objective, device, said.append)
    except Exception as error:
        said.append(f"the second process cannot trace this model ({printable(first_line(error), 200)})")
    if not said:
        marker.parent.mkdir(parents=True, exist_ok=True)  # a model without blocks leaves no code
        marker.touch()
    sys.stdout.write("".join(said[:1]))
    sys.stdout.flush()
    os._exit(0)  # without waiting for the compiler's own processes


def _end_with_parent() -> None:
    sys.stdin.buffer.read()  # until the parent closes the pipe, or ends
    os._exit(1)


def trace(plan: Any, objective: Any, device: torch.device, say: Callable[[str], None]) -> None:
    """Run the forward pass of a microbatch at each sequence length, so that all its code is compiled.

    The code of the backward pass is compiled with the forward pass. Real tensors of the real sizes: the compiler tunes its code
    for the sizes that it sees, and traces tensors without storage in another way.
    """
    from trainer.data.documents import document_numbers
    from trainer.engine.base import autocast, prepare_blocks, prepare_device
    from trainer.objectives.base import ModelAndObjective, example_batch

    config = plan.config
    prepare_device(device, config.deterministic)
    meta = build_meta(plan.model_class, plan.model_config)
    meta = meta.to(torch.bfloat16) if config.precision == "pure_bf16" else meta
    model: Any = materialise(meta, device, torch.Generator().manual_seed(config.seed))
    prepare_blocks(model, config, say)
    for block in model.blocks():
        block.forward = _without_history(block.forward)
    joined = ModelAndObjective(model, objective)
    for length in plan.sequence_lengths:
        rows = min(config.batch.tokens_per_step, config.batch.tokens_per_microbatch) // length
        tokens = torch.zeros(max(1, rows), length, dtype=torch.long, device=device)
        batch: Any = example_batch(objective, model, tokens)
        documents = document_numbers(tokens, plan.end_of_text)
        with autocast(device, config.precision):
            joined(batch if documents is None else batch | {"documents": documents})


def _without_history(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A block whose activations are freed after its forward pass. The next block gets the same kind of tensors."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return private("tree_map_only")(torch.Tensor, _cut, forward(*args, **kwargs))

    return call


def _cut(x: torch.Tensor) -> torch.Tensor:
    return x.detach().requires_grad_(x.requires_grad)


if __name__ == "__main__":
    main()
