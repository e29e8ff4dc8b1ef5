"""Plugin of the fault tests: `--plugin faults` does to a run what the environment variable FAULTS says.

FAULTS is a JSON list of {"do": an action below, "moment", "rank", "step" (the first is 1), "attempt" (of torchrun),
"try" (of a Slurm job), "element" (of a job array)}; what is left out matches all. Moments: build (of the model), forward,
update (after backward), validation, window (each forward pass of one), save and publish (once the tensors of a checkpoint are
written, and before it gets its name).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from typing import Any

import torch

import trainer.training.loop
import trainer.training.run
from trainer.checkpoint import format as checkpoint
from trainer.inference import evaluation as evaluate

FAULTS = json.loads(os.environ["FAULTS"])
HERE = {
    "rank": int(os.environ.get("RANK", "0")),
    "attempt": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
    "try": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    "element": int(os.environ.get("SLURM_ARRAY_TASK_ID", "0")),
    "step": 0,
}

ACTIONS: dict[str, Any] = {
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGKILL all": lambda: os.killpg(0, signal.SIGKILL),
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "SIGTERM launcher": lambda: os.kill(os.getppid(), signal.SIGTERM),
    "SIGUSR1": lambda: os.kill(os.getpid(), signal.SIGUSR1),
    "sleep": lambda: time.sleep(1000),
    "slow": lambda: time.sleep(0.2),
    "crash": lambda: os._exit(3),
    "validate window by window": lambda: setattr(evaluate, "rows_at_once", lambda *_: 1),
    "Slurm warning": lambda: slurm(
        "scancel", "--batch", "--signal=USR1"
    ),  # as of --signal=B:USR1 before the time limit
    "Slurm cancel": lambda: slurm("scancel"),
}


def slurm(*words: str) -> None:
    """Give a command of Slurm's about our job, or element of an array."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    subprocess.run([*words, job])  # not checked: Slurm's SIGTERM may end scancel itself, once it has done its work


def due(moment: str, **place: Any) -> list[str]:
    """What is to be done at this moment."""
    here = HERE | {"moment": moment} | place
    return [fault["do"] for fault in FAULTS if all(here[key] == fault[key] for key in fault if key != "do")]


def strike(moment: str, **place: Any) -> None:
    for name in due(moment, **place):
        if name in ACTIONS:
            ACTIONS[name]()


def before(owner: Any, name: str, work: Any) -> None:
    """Have `work` called, with the same arguments, before each call of a function."""
    original = getattr(owner, name)

    def both(*args: Any, **kwargs: Any) -> Any:
        work(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, both)


def build_engine(*args: Any, original: Any = trainer.training.run.build_engine) -> Any:
    strike("build")
    engine = original(*args)
    engine.model.register_forward_hook(spoil_loss)
    engine.model.token_embedding().register_forward_hook(spoil_gradient)
    before(engine, "backward", lambda *_: strike("forward"))
    before(engine, "step", lambda *_: strike("update"))
    return engine


def spoil_loss(model: Any, inputs: Any, output: Any) -> Any:
    """Only the loss is NaN, not its gradient."""
    if output.loss is not None and "nan loss" in due("forward"):
        return output._replace(loss=output.loss + float("nan"))
    return output


def spoil_gradient(embedding: Any, inputs: Any, output: torch.Tensor) -> None:
    """The loss is finite; the gradient of one entry of one token's row is NaN, which only one rank's shard holds."""
    if output.requires_grad and "nan gradient" in due("forward"):

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            gradient = gradient.clone()
            gradient[0, 0, 0] = float("nan")
            return gradient

        output.register_hook(spoil)


def step_of(folder: Any) -> int:
    return int(folder.name.removeprefix("step-").removesuffix(".tmp"))


trainer.training.run.build_engine = build_engine
before(trainer.training.loop, "optimiser_step", lambda run: HERE.update(step=run.state.step + 1))
before(trainer.training.run, "validate", lambda *_, **__: strike("validation"))
before(evaluate, "score", lambda *_: strike("window"))
before(checkpoint, "_hash_own_files", lambda folder, *_: strike("save", step=step_of(folder)))
before(checkpoint, "_publish", lambda folder, *_: strike("publish", step=step_of(folder)))
