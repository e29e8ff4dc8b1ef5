"""Activation checkpointing (arXiv 1604.06174): blocks drop their activations and compute them again in the backward pass.

A block keeps its place, its class and the names of its parameters; only its `forward` is replaced. So hooks on the block itself
(with which FSDP2 and DeepSpeed gather weights) stay outside of the recomputation: in the backward pass they gather the block's
own weights before it begins. Hooks on submodules run again within it. torch's `checkpoint_wrapper` gives the same gradients,
but it hides the block's class and adds `_checkpoint_wrapped_module` to the names of the model's parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from models.layers import flex
from trainer.core.errors import UserError
from trainer.runtime.compat import private

# At module level, because the compiler traces `kept_operators`.
flex_attention, inductor_compiled_code = private("flex_attention"), private("inductor_compiled_code")

# Products with weights. bmm, which multiplies activations, is not one.
PRODUCTS = ("mm", "addmm", "_scaled_mm", "_grouped_mm", "_scaled_grouped_mm")
FUSED_ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)


def parse(how: str) -> tuple[int, bool]:
    """(every, selective): each `every`-th block recomputes; 0: none. UserError unless `how` is none, full, every-N or selective."""
    named = {"none": (0, False), "full": (1, False), "selective": (1, True)}
    if how in named:
        return named[how]
    word, _, count = how.partition("-")
    if word == "every" and count.isdecimal() and int(count) > 0:
        return int(count), False
    raise UserError(
        f"engine.activation_checkpointing: {how!r} is not known; use none, selective, full or every-N, such as every-2"
    )


def apply(model: Any, how: str) -> None:
    """Make the blocks of `model` recompute, in place. Call it before they are compiled, sharded or wrapped. how: see `parse`."""
    every, selective = parse(how)
    if every == 0:
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if selective:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _selected)
    for block in model.blocks()[every - 1 :: every]:
        # Partials instead of closures: in a deep copy of the model they refer to the block of the copy.
        recomputing = functools.partial(checkpoint, block.forward, **options)
        block.forward = functools.partial(_forward, block.forward, recomputing)


def _forward(plain: Callable[..., Any], recomputing: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # Evaluation and decoding have no backward pass, so they do not need it.
    return (recomputing if torch.is_grad_enabled() else plain)(*args, **kwargs)


def _selected(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    # `create_selective_checkpoint_contexts` gets this function and not a list of operators, because the compiler cannot trace a
    # list that contains inductor_compiled_code.
    return CheckpointPolicy.MUST_SAVE if operator in kept_operators() else CheckpointPolicy.PREFER_RECOMPUTE


@functools.cache
def kept_operators() -> frozenset[Any]:
    """The operators whose results `selective` saves, as far as this torch has them: products with weights, fused attention."""
    # FlexAttention in a compiled block, in an eager block (as a kernel of its own), and in the plan's estimate.
    operators: list[Any] = [flex_attention, inductor_compiled_code, flex.HELD_BY_FLEX]
    for name in (*PRODUCTS, *FUSED_ATTENTION):
        packet = getattr(torch.ops.aten, name, None)
        if packet is not None:
            operators += [getattr(packet, overload) for overload in packet.overloads() if "out" not in overload]
    return frozenset(operators)
