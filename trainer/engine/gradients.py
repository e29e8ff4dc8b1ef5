"""Parameters that get no gradient, found before training: ddp and DeepSpeed would fail on them in the middle of it, the
other strategies would not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from models.base import Batch
from models.layers.linear_cross_entropy import scored_by
from trainer.core.errors import UserError
from trainer.core.text import printable
from trainer.engine.meta import KERNEL_FIELDS
from trainer.objectives import build_objective
from trainer.objectives.base import ModelAndObjective


def refuse_unreached(plan: Any, say: Callable[[str], None]) -> None:
    """UserError names the parameters that one backward pass leaves without a gradient. say: where that cannot be found out."""
    kernels = [name for name in KERNEL_FIELDS if hasattr(plan.model_config, name)]  # those of the CPU reach the same
    config = replace(plan.model_config, **dict.fromkeys(kernels, "auto"))
    try:
        # No numbers, so no memory, and hardly any time. The loss in tiles takes the longest of it, and scores keep nothing.
        with (
            FakeTensorMode(allow_non_fake_inputs=True),
            scored_by(lambda *facts: None),
            torch.autocast("cpu", torch.bfloat16, enabled=plan.config.precision != "fp32"),
        ):
            joined = ModelAndObjective(plan.model_class(config), build_objective(plan.config.objective))
            names = unreached(joined, plan.sequence_lengths[0], documents=plan.config.data.separate_documents)
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


def unreached(joined: ModelAndObjective, length: int, documents: bool = False) -> list[str]:
    """Names of the model's parameters that have no gradient after one backward pass, as in training, through `length` tokens."""
    tokens = torch.zeros(1, length, dtype=torch.long)
    batch: Batch = {"tokens": tokens, "targets": tokens}
    joined(batch | {"documents": tokens} if documents else batch).sum.backward()
    return [name for name, parameter in joined.model.named_parameters() if parameter.grad is None]
