"""Rehearse a run: whole optimiser steps of the trainer on GPUs that are not there.

    python tests/rehearsal/rehearse.py [CONFIG.yaml] [--gpu h100-80gb] [--ranks 64] [--rank 0] [--steps 2] --model.name hlb ...

takes any key of a run and prints what was built, the memory of the plan beside that of torch's tracker, or the line of code that
waited for the device, mixed devices, or failed. It needs a CPU build of torch and g++, a few seconds and no data.

What is real: planning, the engine, DDP and FSDP2 around it, activation checkpointing, the optimiser, the step, and the types,
shapes and devices of every tensor. What is faked, so that nothing is proven of it:

- numbers: there are none. Losses and norms that a step reports are 1.0. What init_weights leaves unset goes unnoticed.
- data: rows of zeros; a run is planned without a dataset, for GPT-2's vocabulary.
- the driver and its answers about the GPU (fake_gpu.py), streams and events (their order is not checked), pinned memory.
- the other ranks: torch's "fake" process group, whose collectives return at once; gathered objects are copies of this rank's.
  DDP keeps its first buckets. A mesh, a store, a watchdog, NCCL: not tested.
- kernels: FlexAttention is the memory plan's operator of the same tensors (its score functions do not run); scaled_dot_product_attention is the kernel that torch would take;
  nothing stands for the loss's Triton kernel, which writes in place. Other Triton, Inductor, Liger, flash-attn, fla, mamba-ssm: none.
  engine.compile traces (Dynamo, AOTAutograd) and then runs the graphs operator by operator.
- what only the real thing shows: alignment, tile sizes, workspaces, the allocator's fragmentation.

The first step may wait for the device (it builds tables and masks), the later ones may not. An offloaded run may: FSDP waits
until gradients are in CPU memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(HERE)]

from fake_gpu import PER_MACHINE, NoWaiting, OnlyWhatCudaHas, fake_gpus  # noqa: E402, I001  (before torch)
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily  # noqa: E402
from torch.distributed._tools.mem_tracker import MemTracker  # noqa: E402

import trainer.engine.fsdp_engine  # noqa: E402
import trainer.engine.torch_engine  # noqa: E402
from models.base import load_models  # noqa: E402
from models.layers import flex  # noqa: E402
from models.layers.linear_cross_entropy import score_nothing  # noqa: E402
from trainer.commands.plugins import import_plugin  # noqa: E402
from trainer.core.config import RunConfig  # noqa: E402
from trainer.core.settings import build, load_yaml, merge, parse_flags  # noqa: E402
from trainer.data.stream import Stream  # noqa: E402
from trainer.planning.memory import expected_memory  # noqa: E402
from trainer.planning.plan import resolve  # noqa: E402
from trainer.runtime.distributed import World  # noqa: E402
from trainer.runtime.signals import StopSignals  # noqa: E402
from trainer.runtime.watchdog import Watchdog  # noqa: E402
from trainer.training.run import Run  # noqa: E402
from trainer.training.step import optimiser_step  # noqa: E402

PATIENCE = 240  # seconds for one case


@dataclass
class Case:
    """values: keys of a RunConfig; gpu: a key of trainer.runtime.device.GPUS; rank: the one that is played; steps: at least 2;
    plugin: a file to import; tracked: whether torch's memory
    tracker watches."""

    values: dict[str, Any] = field(default_factory=dict)
    gpu: str = "h100-80gb"
    ranks: int = 1
    rank: int = 0
    steps: int = 2
    plugin: str = ""
    tracked: bool = False


@dataclass
class Outcome:
    """error: one line, "" if all went well; where: the line of our code it came from, FILE:LINE; engine, kernels: what was
    built; lengths: of the sequences of each step; blocks, d_model: of the model; graphs: that Dynamo traced for the run; peak: bytes by torch's tracker; planned: the
    plan's, by part."""

    error: str = ""
    where: str = ""
    engine: str = ""
    kernels: str = ""
    lengths: list[int] = field(default_factory=list)
    blocks: int = 0
    d_model: int = 0
    graphs: int = 0  # that Dynamo traced
    peak: int = 0
    planned: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0  # of CPU time


# -- what stands for parts of the trainer ------------------------------------------------------------------------------------


class Rows(Stream):
    """The data: rows of zeros."""

    def __init__(self, *_: Any) -> None: ...

    def batch(self, position: int, length: int, first: int, count: int) -> Any:
        return {name: np.zeros((count, length), dtype=np.int64) for name in ("tokens", "targets")}

    def epoch(self, position: int) -> float:
        return 0.0


def kernel_refusal(device: torch.device) -> str | None:
    """models.layers.linear_cross_entropy.kernel_refusal where Triton is installed."""
    ampere = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return None if ampere else "it needs Triton and compute capability 8.0"


def flex_refusal(device: torch.device) -> str | None:
    """models.layers.flex.device_refusal where Triton is installed."""
    return None if flex._planning else kernel_refusal(device)


def loss_kernel(device: torch.device) -> Any:
    """models.layers.linear_cross_entropy._kernel, which holds what Triton's kernel holds: nothing."""
    return score_nothing if kernel_refusal(device) is None else None


class Reaching(torch.autograd.Function):
    """out, as if computed from `tensors` too: they get gradients."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        return gradient, *map(torch.zeros_like, ctx.saved_tensors)


ATTENTION = flex.attention


def flex_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    """models.layers.flex.attention, which holds what the kernel holds."""
    if not q.is_cuda:
        return ATTENTION(q, k, v, **options)
    score = options["score_mod"]
    read = [cell.cell_contents for cell in score.__closure__] if score else []
    trained = [one for one in read if isinstance(one, torch.Tensor) and one.requires_grad]
    return Reaching.apply(flex.held_by_flex(q, k, v)[0], *trained)


RANKS_OF = trainer.engine.matrices.ranks_of


def ranks_of(mesh: Any) -> list[list[int]]:
    """trainer.engine.matrices.ranks_of: the ranks of a mesh are numbers in CPU memory."""
    with unset_fake_temporarily():
        return RANKS_OF(mesh)


class Tracker(MemTracker):
    """torch's memory tracker without its tables of modules, which know one forward pass per step."""

    def _nothing(self, *_: Any) -> None: ...

    _pre_fw_hook = _post_fw_hook = _pre_bw_hook = _post_bw_hook = _nothing


def patches() -> dict[str, Any]:
    """What stands for what of the trainer and of its models: name -> object."""
    return {
        "models.materialise.refuse_unset": lambda model: None,
        "models.layers.flex.device_refusal": flex_refusal,
        "models.layers.flex.attention": flex_attention,
        "models.layers.recurrent_kernels.import_failure": lambda *_: "nothing stands for it",
        "models.layers.linear_cross_entropy.kernel_refusal": kernel_refusal,
        "models.layers.linear_cross_entropy._kernel": loss_kernel,
        "models.layers.linear_cross_entropy._on_gpu": lambda x: x.is_cuda,
        "trainer.engine.matrices.ranks_of": ranks_of,
        "trainer.engine.torch_engine.DistributedDataParallel": torch.nn.parallel.DistributedDataParallel,
        "trainer.runtime.device.HostCopy.read": lambda self: {name: [1.0] * n for name, n in self._sizes.items()},
        "trainer.runtime.distributed.World.gather": lambda self, value: [value] * self.size,
        "trainer.runtime.distributed.World.limit_groups": lambda self: None,
        "trainer.training.run.fingerprint": lambda *_: "",
        "trainer.training.run.Run.hold_patcher": lambda self: None,  # a dataset says which
        "trainer.training.run.open_stream": Rows,
        "trainer.training.run.Split": lambda *_: None,
        "trainer.training.run.check_enough": lambda *_: None,
    }


@contextlib.contextmanager
def without_numbers(tracker: Any) -> Iterator[None]:
    """From the moment when a model gets storage, all tensors have no numbers; `tracker` watches them. (Before, it is on the meta
    device, and torch cannot move a fake tensor from there.)"""
    with contextlib.ExitStack() as stack:

        def then(function: Any) -> Any:
            def call(*args: Any, **options: Any) -> Any:
                if not modes:
                    modes.append(stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True)))
                    modes.append(stack.enter_context(tracker))
                return function(*args, **options)

            return call

        modes: list[Any] = []
        for name in ("trainer.engine.base.materialise", "trainer.engine.fsdp_engine.fully_shard"):
            module, attribute = name.rsplit(".", 1)
            stack.enter_context(mock.patch(name, then(getattr(sys.modules[module], attribute))))
        yield


# -- one case ----------------------------------------------------------------------------------------------------------------


def rehearse(case: Case) -> Outcome:
    """Plan the case, build its run and take its steps."""
    load_models()
    if case.plugin:
        import_plugin(case.plugin)
    config, local = build(RunConfig, case.values), min(case.ranks, PER_MACHINE)
    world = World(case.rank, case.ranks, case.rank % local, local)
    with contextlib.ExitStack() as stack:
        stack.enter_context(fake_gpus(case.gpu, case.rank, case.ranks, config.engine.strategy != "single"))
        for name, value in patches().items():
            stack.enter_context(mock.patch(name, value))
        plan = resolve(config, None, world)
        if config.data.separate_documents:
            plan = dataclasses.replace(plan, end_of_text=0)  # resolve has it from a dataset
        tracker: Any = Tracker() if case.tracked else contextlib.nullcontext()
        before = traced_graphs()
        with without_numbers(tracker), OnlyWhatCudaHas():
            run = Run(plan, world, None, Watchdog(World(), 60), StopSignals(World()))
            results = [optimiser_step(run)]
            with contextlib.nullcontext() if config.engine.offload else NoWaiting():
                results += [optimiser_step(run) for _ in range(case.steps - 1)]
            peak = tracker.get_tracker_snapshot("peak")[run.device]["Total"] if case.tracked else 0
            return Outcome(
                engine=run.engine.describe(),
                kernels=run.model.describe_kernels(run.device),
                lengths=[result.sequence_length for result in results],
                blocks=len(run.model.blocks()),
                d_model=plan.config.model["d_model"],
                graphs=traced_graphs() - before,
                peak=peak,
                planned=expected_memory(plan),
            )


def traced_graphs() -> int:
    """How many graphs Dynamo has traced in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else dynamo.counters["stats"]["unique_graphs"]


def outcome(case: Case) -> Outcome:
    """`rehearse`, with an error as a line."""
    try:
        found = rehearse(case)
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        found = Outcome(error=f"{type(error).__name__}: {first}", where=where(error))
        if os.environ.get("REHEARSAL_TRACEBACK"):
            traceback.print_exc()
    found.seconds = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    return found


def where(error: BaseException) -> str:
    """The innermost line of the trainer, of a model or of a plug-in."""
    ours = [ROOT / "trainer", ROOT / "models", HERE / "faults.py"]
    frames = traceback.extract_tb(error.__traceback__)
    lines = [
        f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno}"
        for frame in frames
        if any(Path(frame.filename).is_relative_to(place) for place in ours)
    ]
    return lines[-1] if lines else ""


# -- many cases, and the command line ----------------------------------------------------------------------------------------


def in_fork(case: Case) -> Outcome:
    """`outcome` in a process of its own, which has all imports already: no case leaves anything to the next."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(PATIENCE)
            with os.fdopen(write, "w") as pipe:
                json.dump(dataclasses.asdict(outcome(case)), pipe)
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    status = os.waitpid(pid, 0)[1]
    return Outcome(**json.loads(text)) if text else Outcome(error=f"the process ended, status {status}")


def serve() -> None:
    """A case a line on stdin, its outcome a line on stdout, both JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a case prints is no answer
    for line in sys.stdin:
        print(json.dumps(dataclasses.asdict(in_fork(Case(**json.loads(line))))), file=answers, flush=True)


def main() -> None:
    positional, flags = parse_flags(sys.argv[1:])
    own = {name: flags.pop(name) for name in ("gpu", "ranks", "rank", "steps", "plugin") if name in flags}
    values = merge(load_yaml(positional[0]) if positional else {}, flags)
    done = outcome(build(Case, own | {"values": values, "tracked": True}))
    if done.error:
        sys.exit(f"{done.where}: {done.error}")
    print(f"{done.engine}\n{done.kernels}\nsequence lengths {done.lengths}")
    print(f"memory, GiB: {done.peak / 2**30:.3f} held at the peak, {done.planned['total'] / 2**30:.3f} planned")


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["--serve"] else main()
