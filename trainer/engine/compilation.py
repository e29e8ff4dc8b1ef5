"""torch.compile, block by block: the forward and backward of training run compiled code; evaluation and decoding do not.

As activation_checkpointing.py does, this changes the `forward` of a block alone, so hooks on it (FSDP2's, DeepSpeed's) stand outside of what is
compiled. All blocks of a kind share one compiled code. It is made for any sequence length and microbatch from the beginning, so that
growing sequences do not compile anew each time (on a CPU once or twice more, where a sum first has more than 4,096 terms), and
a resumed run computes as one that has seen the shorter ones before.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from models.layers.linear_cross_entropy import score_at_once, score_in_tiles, scored_by
from trainer.runtime.compat import private, set_option
from trainer.runtime.device import Target

T = TypeVar("T")

# Block kinds, and sizes that are one and so a code of their own; past it torch would go on eagerly and only log it.
MOST_VERSIONS = 64


def choose(strategy: str, target: Target) -> tuple[bool, str]:
    """(whether to compile where engine.compile does not say, why)."""
    if target.memory is None:
        return (
            False,
            "it brings a CPU little (`bench --sweep engine.compile=false,true` measures it) and takes it half a minute",
        )
    if strategy == "zero3":
        return False, "DeepSpeed's hooks on the modules of a block stand between what could be compiled"
    if target.here and importlib.util.find_spec("triton") is None:
        return False, "there is no Triton to compile with"
    return True, "fewer kernels, each does more"


def keep_compiled_code() -> None:
    """Compiled code in the user's cache folder, where a later start finds it (torch's own default is emptied at boot)."""
    cache = Path.home() / ".cache" / "crescendo" / "inductor"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))


class Compiled:
    """The blocks of a model and its loss, made to compile on their first call in training. say: is told if that fails."""

    def __init__(self, model: Any, say: Callable[[str], None]) -> None:
        self.say = say
        self.failed = False
        prepare_compiler()
        for block in model.blocks():
            compiled = self.with_fallback(block.forward, torch.compile(block.forward, dynamic=True))
            block.forward = functools.partial(_in_training, block.forward, compiled)
        scorer = self.with_fallback(score_in_tiles, torch.compile(_score_a_vocabulary, dynamic=True))
        # The objective calls the loss itself, or lets the forward pass do it.
        for name in ("forward", "loss"):
            setattr(model, name, scored_by(scorer)(getattr(model, name)))

    def with_fallback(self, eager: Callable[..., T], compiled: Callable[..., T]) -> Callable[..., T]:
        """`compiled`, or `eager` once anything of the model could not be compiled."""

        def call(*args: Any, **kwargs: Any) -> T:
            if self.failed:
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
    """score_at_once of rows of one length: only their number changes, so that loads of several entries stay possible."""
    torch._dynamo.mark_static(
        logits, 1
    )  # by its own name, which the compiler must recognise; probed in runtime/compat.py
    score_at_once(logits, *facts)


def _in_training(eager: Callable[..., T], compiled: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    return (compiled if torch.is_grad_enabled() else eager)(*args, **kwargs)


def hold_as_compiled(model: Any) -> None:
    """Have the blocks keep for the backward pass what they keep when compiled: the compiler divides what they compute, and then
    every operator runs by itself. For tensors without storage, whose numbers do not matter, and one length of sequences."""

    def as_it_is(graph: Any, inputs: Any) -> Any:
        return private("make_boxed_func")(graph.forward)

    prepare_compiler()
    backend = private("aot_autograd")(
        fw_compiler=as_it_is,
        bw_compiler=as_it_is,
        partition_fn=private("min_cut_rematerialization_partition"),
        decompositions=private("select_decomp_table")(),
    )
    for block in model.blocks():
        block.forward = torch.compile(block.forward, backend=backend, dynamic=False)


def prepare_compiler() -> None:
    """Settings of torch.compile for code that is block by block, and kept."""
    keep_compiled_code()
    set_option("recompile_limit", max(private("recompile_limit"), MOST_VERSIONS))
    set_option("optimize_ddp", False)  # it would cut blocks where DDP's buckets end
    # A backward pass that cannot be compiled is found before the forward pass has run, when eager code can still do both.
    set_option("force_non_lazy_backward_lowering", True)
    # It warns that blocks under `selective` must not write in place, whether they do or not.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)


def of_compiler(error: Exception) -> bool:
    """Whether torch.compile failed, rather than what it compiles."""
    return isinstance(error, private("TorchDynamoException"))


def first_line(error: BaseException) -> str:
    """Type and beginning of an error whose text may be many lines; of what the compiler met, where it says."""
    error = getattr(error, "inner_exception", None) or error
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
