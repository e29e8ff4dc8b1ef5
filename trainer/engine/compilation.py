"""torch.compile, block by block: the forward and backward of training run compiled code; evaluation and decoding do not.

Like activation_checkpointing.py, this module replaces only the `forward` of a block. So the hooks on the block (of FSDP2 and
DeepSpeed) stay outside of the compiled code. All blocks of a kind share the same compiled code. It is compiled with dynamic
shapes from the start. So growing sequences do not recompile (a CPU recompiles once or twice, when a sum first has more than
4,096 terms), and a resumed run uses the same code as a run that began with shorter sequences.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import sys
import traceback
import types
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from models.layers.linear_cross_entropy import in_kernel_or, score_at_once, score_in_tiles, scored_by
from trainer.runtime.compat import private, set_option
from trainer.runtime.device import Target

T = TypeVar("T")

# Most versions of compiled code: one per kind of block, and one for each size that is 1. Beyond this limit torch would run
# eagerly and only log it.
MOST_VERSIONS = 64


# What compiling costs and gains on an H100: the first step of GPT-2 124M took 14 s, that of hlb 20 s; later steps of hlb took 0.6 to
# 0.75 of the time of hlb-gpt's eager code. Our own eager code has not been timed there.
COMPILE_SECONDS = 20.0
GAIN = 0.5  # eager seconds that are saved per second of compiled training


def choose(strategy: str, target: Target, seconds: float | None = None) -> tuple[bool, str]:
    """(whether to compile if engine.compile is auto, reason). seconds: of the compiled run, if known."""
    if target.memory is None:
        return (
            False,
            "on a CPU it gains little (`bench --sweep engine.compile=false,true` measures it) and takes half a minute",
        )
    if strategy == "zero3":
        return False, "DeepSpeed's hooks on the modules inside a block break up the code to compile"
    if target.here and importlib.util.find_spec("triton") is None:
        return False, "there is no Triton to compile with"
    if seconds is not None and GAIN * seconds < COMPILE_SECONDS:
        return (
            False,
            f"the run takes about {seconds:.0f} s, so it would gain less than the {COMPILE_SECONDS:.0f} s of compiling",
        )
    return True, "fewer kernels, and each does more"


def compile_seconds() -> float:
    """Seconds that torch.compile has worked in this process so far."""
    if "torch._dynamo" not in sys.modules:
        return 0.0
    return private("calculate_time_spent")()["total_wall_time"]


class Compiled:
    """Makes the blocks of a model and its loss compile on their first call in training. say: prints a line if that fails.

    active: False as long as eager code runs instead.
    """

    def __init__(self, model: Any, say: Callable[[str], None]) -> None:
        self.say = say
        self.failed = False
        self.active = True
        prepare_compiler()
        for block in model.blocks():
            compiled = self.with_fallback(block.forward, torch.compile(block.forward, dynamic=True))
            block.forward = functools.partial(_in_training, block.forward, compiled)
        scorer = in_kernel_or(self.with_fallback(score_in_tiles, torch.compile(_score_a_vocabulary, dynamic=True)))
        # An objective either calls `loss` itself or lets `forward` call it.
        for name in ("forward", "loss"):
            setattr(model, name, scored_by(scorer)(getattr(model, name)))

    def with_fallback(self, eager: Callable[..., T], compiled: Callable[..., T]) -> Callable[..., T]:
        """A function that calls `compiled`, or `eager` after any part of the model could not be compiled."""

        def call(*args: Any, **kwargs: Any) -> T:
            if self.failed or not self.active:
                return eager(*args, **kwargs)
            try:
                return compiled(*args, **kwargs)
            except Exception as error:
                if not of_compiler(error):
                    raise
                self.failed = True
                self.say(f"engine.compile: not compiled, eager from here on: {first_line(error)}")
                return eager(*args, **kwargs)

        return call


def _score_a_vocabulary(logits: torch.Tensor, *facts: Any) -> None:
    """score_at_once with a fixed row length: only the number of rows is dynamic, which keeps vectorised loads possible."""
    # Under its own name, because the compiler must recognise it; runtime/compat.py probes it.
    torch._dynamo.mark_static(logits, 1)
    score_at_once(logits, *facts)


def _in_training(eager: Callable[..., T], compiled: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    return (compiled if torch.is_grad_enabled() else eager)(*args, **kwargs)


def _call(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    return function(*args, **kwargs)


def hold_as_compiled(model: Any) -> None:
    """Make the blocks save the same tensors for the backward pass as compiled blocks.

    The compiler splits the graph into forward and backward; then every operator runs by itself. This is for tensors without
    storage, whose values do not matter, and for one sequence length.
    """

    def as_it_is(graph: Any, inputs: Any) -> Any:
        return private("make_boxed_func")(graph.forward)

    prepare_compiler()
    backend = private("aot_autograd")(
        fw_compiler=as_it_is,
        bw_compiler=as_it_is,
        partition_fn=private("min_cut_rematerialization_partition"),
        decompositions=private("select_decomp_table")(),
    )
    # The compiler keeps what it made with the code of the function, and would try it at every later call. So it gets a function
    # with code of its own, which goes with the model. Blocks of a kind share it.
    own = types.FunctionType(_call.__code__.replace(), globals())
    compiled = torch.compile(own, backend=backend, dynamic=False)
    for block in model.blocks():
        block.forward = functools.partial(compiled, block.forward)


def prepare_compiler() -> None:
    """Settings of torch.compile for code that is compiled block by block and cached."""
    set_option("recompile_limit", max(private("recompile_limit"), MOST_VERSIONS))
    set_option("optimize_ddp", False)  # it would split blocks at the ends of DDP's buckets
    # Compile the backward pass before the forward pass runs: if this fails, eager code can still run both.
    set_option("force_non_lazy_backward_lowering", True)
    # This logger warns that blocks under `selective` must not write in place, whether they do so or not.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)


def of_compiler(error: Exception) -> bool:
    """Whether the error comes from torch.compile itself, not from the compiled code."""
    if isinstance(error, AssertionError):  # Dynamo raises an assertion of its own that failed as it is
        compiling = vars(private("convert_frame"))
        return any(frame.f_globals is compiling for frame, _ in traceback.walk_tb(error.__traceback__))
    return isinstance(error, private("TorchDynamoException"))


def first_line(error: BaseException) -> str:
    """Type and first line of an error. For a compiler's error: of the inner exception, if there is one."""
    error = getattr(error, "inner_exception", None) or error
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
