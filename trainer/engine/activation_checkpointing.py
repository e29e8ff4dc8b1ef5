"""Activation checkpointing (arXiv 1604.06174): blocks that drop what they computed, and compute it again in the backward pass.

A block keeps its place, its class and its parameters' names; only its `forward` becomes one that recomputes. Hooks on the
block itself (FSDP2's and DeepSpeed's gathering) then stand outside of what is recomputed: their backward halves have
gathered the block's own weights before it begins, and those of its submodules go off again within it. torch's
`checkpoint_wrapper` gives the same gradients, but shows `_checkpoint_wrapped_module` in the names that `named_parameters` of
the whole model gives, and hides the block's class.
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

# Here, since the compiler traces `kept_operators`.
flex_attention, inductor_compiled_code = private("flex_attention"), private("inductor_compiled_code")

PRODUCTS = (
    "mm",
    "addmm",
    "_scaled_mm",
    "_grouped_mm",
    "_scaled_grouped_mm",
)  # with weights; bmm multiplies activations
FUSED_ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)


def parse(how: str) -> tuple[int, bool]:
    """(every, selective): each `every`-th block recomputes, 0 for none. UserError for anything but none, full, every-N, selective."""
    named = {"none": (0, False), "full": (1, False), "selective": (1, True)}
    if how in named:
        return named[how]
    word, _, count = how.partition("-")
    if word == "every" and count.isdecimal() and int(count) > 0:
        return int(count), False
    raise UserError(
        f"engine.activation_checkpointing: {how!r} is not known; use none, selective, full or every-N, as in every-2"
    )


def apply(model: Any, how: str) -> None:
    """Make the blocks of `model` recompute, in place; before they are compiled, sharded or wrapped. how: as in `parse`."""
    every, selective = parse(how)
    if every == 0:
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if selective:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _selected)
    for block in model.blocks()[every - 1 :: every]:
        # Partials, not closures: in a copy of the model they lead to the copy's own block.
        recomputing = functools.partial(checkpoint, block.forward, **options)
        block.forward = functools.partial(_forward, block.forward, recomputing)


def _forward(plain: Callable[..., Any], recomputing: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # Evaluation and decoding have no backward pass to prepare.
    return (recomputing if torch.is_grad_enabled() else plain)(*args, **kwargs)


def _selected(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    # A function: the compiler cannot trace a list with inductor_compiled_code in it.
    return CheckpointPolicy.MUST_SAVE if operator in kept_operators() else CheckpointPolicy.PREFER_RECOMPUTE


@functools.cache
def kept_operators() -> frozenset[Any]:
    """What `selective` keeps, of the operators this torch has: products with weights, and fused attention."""
    # FlexAttention as an operator of a compiled block, as a kernel of its own in an eager one, and as it stands in plans.
    operators: list[Any] = [flex_attention, inductor_compiled_code, flex.HELD_BY_FLEX]
    for name in (*PRODUCTS, *FUSED_ATTENTION):
        packet = getattr(torch.ops.aten, name, None)
        if packet is not None:
            operators += [getattr(packet, overload) for overload in packet.overloads() if "out" not in overload]
    return frozenset(operators)
