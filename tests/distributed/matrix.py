"""Worker of the matrix tests: trains the cases of a JSON file one after the other in the processes it is started with.

A case is {"name", "values"} with values as in a run's YAML; optional: "load" (a checkpoint folder to go on from), "save" (a folder
to write one to, at the end), "steps" (how many, 10), "texts" (after the second step write texts of so many tokens, the likeliest ones),
"matrices" (try the hook for matrix optimisers afterwards), "newton_schulz" (count the matrices of its calls), "halves_of" (so many
ranks, whose first halves of a step are the first half here), "averages" (after each step the loss of the moving average on the
validation split). Rank 0 writes {name: {"loss": [...], "grad_norm": [...], ...}} to the last argument.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import odd_model  # noqa: F401  # registers it
import plugins.gram
import plugins.lion  # noqa: F401
import torch
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.checkpoint import format as checkpoint
from trainer.core.config import RunConfig
from trainer.core.settings import build
from trainer.data.stream import find_dataset
from trainer.inference.decoding import generate
from trainer.optim.rules import muon
from trainer.planning.plan import resolve
from trainer.runtime.distributed import World, join, read_world
from trainer.runtime.signals import StopSignals
from trainer.runtime.watchdog import Watchdog
from trainer.training.run import Run
from trainer.training.step import microbatches, optimiser_step


def without_fp16() -> None:
    """As on a CPU that has no fp16, whichever this is: there DeepSpeed takes bf16 where it is told a type."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: False


def train(case: dict[str, Any], world: World, watchdog: Watchdog) -> dict[str, Any]:
    begin = time.monotonic()
    config = build(RunConfig, case["values"])
    if config.engine.strategy.startswith("zero"):
        without_fp16()
    dataset = find_dataset(config.data)
    assert dataset is not None
    run = Run(resolve(config, dataset), world, dataset, watchdog, StopSignals(world))
    if "load" in case:  # also under another strategy, or with moments of another type
        chosen = checkpoint.choose(Path(case["load"]) / "checkpoints", None, world.say, world)
        assert chosen is not None
        run.go_on(*chosen)
    else:
        run.begin()
    if "halves_of" in case:
        read_halves_of(run, case["halves_of"])
    result: dict[str, Any] = {"engine": run.engine.describe(), "loss": [], "grad_norm": []}
    result |= {"noise_scale": [], "microbatches": [], "graphs": []}
    orthogonalised = count_newton_schulz() if case.get("newton_schulz") else []
    for _ in range(case.get("steps", 10)):
        if run.state.step == 2 and "texts" in case:
            result["texts"], result["gathers"] = zip(*[write_text(run, count) for count in case["texts"]], strict=True)
        count = 0

        def counting(*arguments: Any, backward: Any = run.engine.backward) -> Any:
            nonlocal count
            count += 1
            return backward(*arguments)

        with contextlib.ExitStack() as stack:
            original = run.engine.backward
            run.engine.backward = counting
            stack.callback(setattr, run.engine, "backward", original)
            measured = optimiser_step(run)
        result["loss"].append(measured.loss)
        result["grad_norm"].append(measured.grad_norm)
        result["noise_scale"].append(measured.noise_scale)
        result["microbatches"].append(count)
        if "averages" in case:
            result.setdefault("average", []).append(run.validate()["ema"]["full"]["loss"])
        result["graphs"].append(counters["stats"]["unique_graphs"])  # compiled so far
    if case.get("newton_schulz"):
        result["newton_schulz"] = world.gather(sum(orthogonalised))
    if "matrices" in case:
        result["matrices"] = matrix_updates(run)
    if "save" in case:
        keep = checkpoint.retention(9, 0)
        folder = Path(case["save"]) / "checkpoints"
        checkpoint.save(folder, run.state.step, run.engine.tensors(), run.facts(0.0), world, keep)
    run.stream.close()
    run.engine.close()
    result["seconds"] = time.monotonic() - begin
    return result


def write_text(run: Run, tokens: int) -> tuple[list[int], int]:
    """(the likeliest tokens after the first three bytes, how often weights were gathered for them)."""
    with Gathers() as gathers, run.engine.gathered():
        [text] = generate(run.engine, [[1, 2, 3]], tokens, 256, temperature=0)
    return text, gathers.count


def read_halves_of(run: Run, ranks: int) -> None:
    """From now on `run`, alone, reads the first halves of all shares, then the second ones."""
    read = run.read

    def halves_first(length: int, sequences: int) -> Any:
        shares = {name: rows.unflatten(0, (ranks, 2, -1)) for name, rows in read(length, sequences).items()}
        return {name: rows.transpose(0, 1).flatten(0, 2) for name, rows in shares.items()}

    run.read = halves_first  # type: ignore[method-assign]


def count_newton_schulz() -> list[int]:
    """How many matrices each call of the rule muon makes orthogonal from now on; to be filled."""
    found: list[int] = []
    original = muon.orthogonalised

    def counting(matrices: torch.Tensor, *arguments: Any) -> torch.Tensor:
        found.append(len(matrices))
        return original(matrices, *arguments)

    muon.orthogonalised = counting
    return found


class Gathers(TorchDispatchMode):
    """Counts all-gathers within."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "allgather" in str(function)
        return function(*args, **kwargs or {})


def matrix_updates(run: Run) -> dict[str, Any]:
    """The hook of matrix optimisers on one more batch: of each update some entries, and which rank computed it."""
    length = run.plan.sequence_length(run.state.step)
    sequences = run.config.batch.tokens_per_step // length
    batch = run.read(length, sequences)
    parts = microbatches(run, batch, length, sequences)
    for part in parts:
        run.engine.backward(part, 1 / (sequences * length), part is parts[-1])
    computed = []

    def cubic(tensors: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Needs the whole of both matrices: g g^T w / |g|^2."""
        computed.extend(tensors)
        return {name: g @ (g.t() @ w) / g.square().sum() for name, (g, w) in tensors.items()}

    names = [name for name, shape in run.engine.shapes.items() if len(shape) == 2]
    run.engine.collect_gradients()
    updates = run.engine.update_matrices(names, cubic)
    whole = {name: run.engine.as_stored(name, update) for name, update in updates.items()}
    entries = {
        name: (w.full_tensor() if isinstance(w, DTensor) else w).flatten()[::97].tolist() for name, w in whole.items()
    }
    return {"entries": entries, "computed": run.world.gather(computed)}


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    world = read_world()
    join(world, "cpu", 5, alone=True)
    results = {}
    watchdog = Watchdog(world, 300)
    for case in cases:
        results[case["name"]] = train(case, world, watchdog)
    watchdog.close()
    if world.leader:
        Path(sys.argv[2]).write_text(json.dumps(results))
    world.stop()


if __name__ == "__main__":
    main()
