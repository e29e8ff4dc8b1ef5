"""Parameters that get no gradient, found before training: ddp and DeepSpeed would fail on them in the middle of it, the
other strategies would not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from models.base import Batch
from models.layers.linear_cross_entropy import score_nothing, scored_by
from trainer.core.errors import UserError
from trainer.core.text import printable
from trainer.objectives import build_objective
from trainer.objectives.base import ModelAndObjective
from trainer.runtime.compat import fake_tensors


def refuse_unreached(plan: Any, say: Callable[[str], None]) -> None:
    """UserError names the parameters that one backward pass leaves without a gradient. say: where that cannot be found out."""
    names = plan.unreached
    if names is None:
        try:
            names = unreached_in_training(plan)
        except Exception as error:
            cause = printable(f"{type(error).__name__}: {error}", 200)
            say(
                f"warning: whether every parameter gets a gradient is not known: tensors without numbers cannot tell ({cause})"
            )
            return
    if names:
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        raise UserError(
            f"model {plan.config.model['name']}: a backward pass gives no gradient to {', '.join(names[:4])}{more}; give one to "
            "every parameter in each pass, zeros where it plays no part (add 0 * parameter.sum() to what depends on it), and make a "
            "buffer of what is not trained"
        )


def unreached_in_training(plan: Any) -> list[str]:
    """Names of the parameters without a gradient after a forward pass as in training and, where its graph does not tell, a
    backward pass. Without numbers, so it takes no memory and hardly any time."""
    config = plan.model_class.with_kernels(plan.model_config, "auto")  # the CPU's kernels reach the same parameters
    with (
        fake_tensors(allow_non_fake_inputs=True),
        scored_by(score_nothing),
        torch.autocast("cpu", torch.bfloat16, enabled=plan.config.precision != "fp32"),
    ):
        joined = ModelAndObjective(plan.model_class(config), build_objective(plan.config.objective))
        tokens = torch.zeros(1, plan.sequence_lengths[0], dtype=torch.long)  # [B, T]
        batch: Batch = {"tokens": tokens, "targets": tokens}
        loss = joined(batch | {"documents": tokens} if plan.config.data.separate_documents else batch).sum
        names = unreached(joined.model, loss)
        if names is None:
            loss.backward()
            names = [name for name, parameter in joined.model.named_parameters() if parameter.grad is None]
    return names


def unreached(model: Any, loss: torch.Tensor) -> list[str] | None:
    """Names of the parameters that the graph of `loss` does not lead to. None: only a backward pass can tell, since an
    autograd.Function in the graph may return None for one of its inputs."""
    met, waiting = {loss.grad_fn, None}, [loss.grad_fn]
    reached: set[Any] = set()
    while waiting:
        node: Any = waiting.pop()
        function = getattr(node, "_forward_cls", None)  # the autograd.Function whose node it is
        if function is not None and not getattr(function, "gives_every_gradient", False):
            return None
        reached.add(getattr(node, "variable", None))  # of the nodes that add up the gradient of a parameter
        following = {after for after, _ in node.next_functions} - met
        met |= following
        waiting += following
    return [name for name, parameter in model.named_parameters() if parameter not in reached]
