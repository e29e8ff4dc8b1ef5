"""Finds parameters that get no gradient, before training starts. ddp and DeepSpeed would fail on them during training; the other
strategies would not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from models.base import Batch
from models.layers.linear_cross_entropy import score_nothing, scored_by
from trainer.core.errors import UserError
from trainer.core.text import printable
from trainer.engine.meta import stand_ins
from trainer.objectives import build_objective
from trainer.objectives.base import ModelAndObjective, example_batch
from trainer.optim import trained_parameters
from trainer.runtime.compat import fake_tensors


def refuse_unreached(plan: Any, say: Callable[[str], None]) -> None:
    """UserError names the parameters without a gradient after one backward pass. say: prints a warning if this is unknown."""
    names = plan.unreached
    if names is None:
        try:
            names = unreached_in_training(plan)
        except Exception as error:
            cause = printable(f"{type(error).__name__}: {error}", 200)
            say(
                f"warning: it is not known whether every parameter gets a gradient: the test without values failed ({cause})"
            )
            return
    if names:
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        raise UserError(
            f"model {plan.config.model['name']}: a backward pass gives no gradient to {', '.join(names[:4])}{more}; give one to "
            "every parameter in each pass, zeros if the pass does not use it (add 0 * parameter.sum() to an output), and make "
            "tensors that are not trained buffers"
        )


def unreached_in_training(plan: Any) -> list[str]:
    """Names of the parameters without a gradient after a forward pass as in training.

    If the graph of the forward pass does not show them, a backward pass follows. The tensors have no values, so this takes no
    memory and little time.
    """
    config = plan.model_class.with_kernels(plan.model_config, "auto")  # the CPU's kernels reach the same parameters
    with (
        fake_tensors(allow_non_fake_inputs=True),
        scored_by(score_nothing),
        torch.autocast("cpu", torch.bfloat16, enabled=plan.config.precision != "fp32"),
    ):
        objective = build_objective(plan.config.objective, stand_ins(plan.frozen))
        joined = ModelAndObjective(plan.model_class(config), objective)
        tokens = torch.zeros(1, plan.sequence_lengths[0], dtype=torch.long)  # [B, T]
        batch: Batch = example_batch(objective, joined.model, tokens)
        loss = joined(batch | {"documents": tokens} if plan.config.data.separate_documents else batch).sum
        names = unreached(joined.model, loss)
        if names is None:
            loss.backward()
            trained = trained_parameters(joined.model)
            names = [name for name, parameter in trained.items() if parameter.grad is None]
    return names


def unreached(model: Any, loss: torch.Tensor) -> list[str] | None:
    """Names of the trained parameters that the graph of `loss` does not reach. None if only a backward pass can show them, because an
    autograd.Function in the graph may return None for one of its inputs."""
    met, waiting = {loss.grad_fn, None}, [loss.grad_fn]
    reached: set[Any] = set()
    while waiting:
        node: Any = waiting.pop()
        function = getattr(node, "_forward_cls", None)  # the autograd.Function that made the node
        if function is not None and not getattr(function, "gives_every_gradient", False):
            return None
        reached.add(getattr(node, "variable", None))  # AccumulateGrad nodes have one: their parameter
        following = {after for after, _ in node.next_functions} - met
        met |= following
        waiting += following
    return [name for name, parameter in trained_parameters(model).items() if parameter not in reached]
