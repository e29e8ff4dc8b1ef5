"""AdamW that is told on the device what to do, with moments as wide as their parameter or in bf16."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Numbers that are updated at a time where moments are narrower than their parameter; a multiple of any vector's width,
# so that where a parameter is cut changes no bit. CPU: the fp32 copies (8 MiB) stay in a cache, and threads meet
# seldom. GPU: a launch must have much to do; 128 MiB of copies are little, and gone when activations come.
PIECE = {"cpu": 2**20, "cuda": 2**24}


class GuardedAdamW(torch.optim.AdamW):
    """Fused AdamW with two things told on the device, so that nothing waits for it: `finite` (0.0: change neither
    weights nor moments) and `decay` (the weight decay of groups with loss_driven_decay). An engine may call `step`
    for some groups at a time, or put tensors of its own (DeepSpeed's flat partitions) in the place of the parameters.

    narrow: the moments of fp32 parameters are bf16, made before the step by whoever calls it. The update is computed
    in fp32 from them, and what they become is rounded to nearest. That loses a change of less than half a spacing,
    which lies between 2^-9 and 2^-8 of a bf16 number. With beta2 = 0.95 a step takes 5 % off a second moment whose
    gradient is 0, so it follows all the way down (0.999 would take off 0.1 % < 2^-9: it could never fall). It rests
    only where the squared gradient is within 2^-8 / 0.05 = 8 % of it, 4 % in the root that divides; a first moment
    rests within 2^-8 / 0.1 = 4 % of the gradient with beta1 = 0.9, within 1 % with 0.6. The roundings of many steps
    add up to no more than that either, 2^-8 / (1 - beta) of the largest moment among them, and mostly cancel where
    gradients fluctuate. Tiny moments are as safe as in fp32, whose exponents bf16 has.
    """

    finite: Tensor
    decay: Tensor

    def __init__(self, groups: list[dict[str, Any]], narrow: bool) -> None:
        super().__init__(groups, fused=True)
        self.narrow = narrow

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if group["loss_driven_decay"] and group["params"]:
                shrink = 1 - group["lr"] * self.decay * self.finite
                torch._foreach_mul_(group["params"], shrink.to(group["params"][0].device))
        # The fused kernel reads it on the device of the parameters; it would not wait for a copy from another.
        device = next(parameter.device for group in self.param_groups for parameter in group["params"])
        self.found_inf = (1 - self.finite).to(device)
        if not self.narrow:
            super().step()
            return
        for group in self.param_groups:
            self._step_in_pieces(group)

    def _step_in_pieces(self, group: dict[str, Any]) -> None:
        """The kernel wants moments of the parameter's type: it gets fp32 copies, of some numbers at a time. Where it
        changes nothing, neither does the way to fp32 and back."""
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return
        states = [self.state[parameter] for parameter in parameters]
        torch._foreach_add_([state["step"] for state in states], 1 - self.found_inf)
        rows = [
            [*map(flat, (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])), state["step"]]
            for parameter, state in zip(parameters, states, strict=True)
        ]
        size = PIECE[parameters[0].device.type]
        copies = parameters[0].new_empty(2, min(size, sum(parameter.numel() for parameter in parameters)))
        for weights, gradients, averages, squares, steps in batches(rows, size):
            numbers = [piece.numel() for piece in averages]
            wide = [copy for half in copies for copy in half[: sum(numbers)].split(numbers)]
            torch._foreach_copy_(wide, averages + squares)
            torch._fused_adamw_(
                weights,
                gradients,
                wide[: len(averages)],
                wide[len(averages) :],
                [],
                steps,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
                found_inf=self.found_inf,
            )
            torch._foreach_copy_(averages + squares, wide)


def flat(tensor: Tensor) -> Tensor:
    """A view [n] of its numbers in the order of memory, in which gradients and moments lie as their parameter does."""
    return tensor.as_strided((tensor.numel(),), (1,))


def batches(rows: list[list[Tensor]], size: int) -> Iterator[list[list[Tensor]]]:
    """Cut rows of [n] tensors (the last of a row is a scalar, and stays whole) into pieces of at most `size` numbers;
    yield them by column, as many at a time as have at most `size` numbers together."""
    batch: list[tuple[Tensor, ...]] = []
    held = 0
    for *tensors, scalar in rows:
        for piece in zip(*(tensor.split(size) for tensor in tensors), strict=True):
            if held + piece[0].numel() > size:
                yield [list(column) for column in zip(*batch, strict=True)]
                batch, held = [], 0
            batch.append((*piece, scalar))
            held += piece[0].numel()
    yield [list(column) for column in zip(*batch, strict=True)]
