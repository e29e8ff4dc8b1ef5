"""Updates a piece at a time, which bounds the memory of what a rule computes on the way.

bf16 state of fp32 parameters: rules compute with fp32 copies of the piece, and their results are rounded to nearest, or at random.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from trainer.optim.rule import STEP

# Numbers updated at a time: a multiple of every vector width, so that the results are bit for bit the same wherever a parameter
# is cut. CPU: the fp32 copies (8 MiB with two moments) stay in a cache, and threads seldom wait for each other. GPU: each
# launch has much work, and the copies (128 MiB) are freed before the next activations.
PIECE = {"cpu": 2**20, "cuda": 2**24}

Update = Callable[[list[Tensor], list[Tensor], list[dict[str, Tensor]]], None]  # (parameters, gradients, states)


class StochasticRounding:
    """Rounds fp32 numbers to one of their two neighbours in bf16, to the nearer one with the higher probability, so that the mean is
    the number itself and no change is too small to count (arXiv 2010.06192).

    The random numbers follow from (seed, step), so that all copies of a parameter on several ranks are rounded alike, and a run
    that goes on rounds as one that was not interrupted. A number that is one of bf16, or not finite, stays.
    """

    def __init__(self, seed: int) -> None:
        self._seed, self._step = seed, 0
        self._generators: dict[torch.device, torch.Generator] = {}

    def begin(self, step: int) -> None:
        """Every step draws its own numbers. step: 0-based."""
        self._step = step
        self._generators = {}

    def __call__(self, values: Tensor) -> None:
        """Round a contiguous fp32 tensor in place; a copy in bf16 is then exact."""
        noise = torch.randint(
            0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=self._of(values)
        )
        # The upper 16 bits of fp32 are a bf16; the lower ones carry into them as often as they are part of the way.
        values.view(torch.int32).add_(noise).bitwise_and_(-1 << 16)

    def _of(self, values: Tensor) -> torch.Generator:
        if values.device not in self._generators:
            seed = zlib.crc32(f"{self._seed}:{self._step}:rounding".encode())
            self._generators[values.device] = torch.Generator(values.device).manual_seed(seed)
        return self._generators[values.device]


def is_narrow(parameter: Tensor, state: dict[str, Tensor]) -> bool:
    """Whether any state has fewer bits than the parameter."""
    return any(value.itemsize < parameter.itemsize for value in state.values())


def update_in_pieces(
    parameters: list[Tensor],
    gradients: list[Tensor],
    states: list[dict[str, Tensor]],
    update: Update,
    rounding: StochasticRounding | None = None,
) -> None:
    """Call `update` for PIECE numbers at a time, with fp32 copies of narrow state. If it changes nothing, the state stays as it was.
    rounding: of narrow state; None: to nearest."""
    first = parameters[0]
    cut = [key for key in states[0] if key != STEP]
    narrow = [key for key in cut if states[0][key].itemsize < first.itemsize]
    rows = [
        [*map(flat, (parameter, gradient, *(state[key] for key in cut))), state]
        for parameter, gradient, state in zip(parameters, gradients, states, strict=True)
    ]
    size = PIECE[first.device.type]
    copies = first.new_empty(len(narrow), min(size, sum(parameter.numel() for parameter in parameters)))
    for weights, slopes, *columns, whole in batches(rows, size):
        pieces = dict(zip(cut, columns, strict=True))
        numbers = [piece.numel() for piece in weights]
        wide = {key: list(copy[: sum(numbers)].split(numbers)) for key, copy in zip(narrow, copies, strict=True)}
        held, copied = sum((pieces[key] for key in narrow), []), sum(wide.values(), [])
        if narrow:
            torch._foreach_copy_(copied, held)
        given: dict[str, Any] = {**pieces, **wide}
        update(
            weights,
            slopes,
            [{**state, **{key: given[key][number] for key in cut}} for number, state in enumerate(whole)],
        )
        if narrow:
            if rounding is not None:
                for copy in copies:
                    rounding(copy[: sum(numbers)])
            torch._foreach_copy_(held, copied)


def update_whole(
    parameters: list[Tensor],
    gradients: list[Tensor],
    states: list[dict[str, Tensor]],
    update: Update,
    rounding: StochasticRounding | None = None,
) -> None:
    """Like `update_in_pieces`, for rules that must see each parameter whole: as many parameters at a time as have PIECE numbers
    together, or a single larger one."""
    limit, itemsize = PIECE[parameters[0].device.type], parameters[0].itemsize
    for batch in whole_batches([parameter.numel() for parameter in parameters], limit):
        wide = [
            {key: value.to(parameters[0].dtype) for key, value in state.items() if value.itemsize < itemsize}
            for state in states[batch]
        ]
        given = [{**state, **copies} for state, copies in zip(states[batch], wide, strict=True)]
        update(parameters[batch], gradients[batch], given)
        for state, copies in zip(states[batch], wide, strict=True):
            for key, value in copies.items():
                if rounding is not None:
                    rounding(value)
                state[key].copy_(value)


def whole_batches(sizes: list[int], limit: int) -> Iterator[slice]:
    """Neighbours with at most `limit` numbers together, or one that has more."""
    begin = held = 0
    for end, size in enumerate(sizes):
        if begin < end and held + size > limit:
            yield slice(begin, end)
            begin, held = end, 0
        held += size
    yield slice(begin, len(sizes))


def flat(tensor: Tensor) -> Tensor:
    """A view [n] of the numbers in memory order, which is the same for a parameter, its gradient and its state."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def batches(rows: list[list[Any]], size: int) -> Iterator[list[list[Any]]]:
    """Cut the [n] tensors of each row into pieces of at most `size` numbers; the last entry of a row is not a tensor and is not
    cut. Yield batches of pieces with at most `size` numbers together, as columns."""
    batch: list[tuple[Any, ...]] = []
    held = 0
    for *tensors, whole in rows:
        for piece in zip(*(tensor.split(size) for tensor in tensors), strict=True):
            if held + piece[0].numel() > size:
                yield [list(column) for column in zip(*batch, strict=True)]
                batch, held = [], 0
            batch.append((*piece, whole))
            held += piece[0].numel()
    yield [list(column) for column in zip(*batch, strict=True)]
