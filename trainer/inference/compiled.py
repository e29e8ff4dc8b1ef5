"""One decoding step of fixed shapes, compiled; on a GPU also recorded as a CUDA graph.

A step of one token has hundreds of kernels, most of them smaller than the time that Python needs to launch one. With a
StaticState the step reads and writes the same memory for every token, so torch.compile makes one graph of it without breaks, and
a GPU replays that graph as one launch.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from models.state import DecodingState, StaticState
from trainer.runtime.compat import private

COMPILED_FROM = 4096  # new tokens for which compiling, about half a minute, is expected to pay on a GPU; not measured


def step(model: Any, tokens: Tensor, state: StaticState) -> Tensor:
    """Logits [B, 1, V] of tokens [B, 1]."""
    return model(tokens, cache=state).logits


@functools.cache
def compiled_step(device_type: str) -> Any:
    """`step`, compiled for a kind of device; a graph break is an error."""
    mode = "reduce-overhead" if device_type == "cuda" else None
    return torch.compile(step, fullgraph=True, dynamic=False, mode=mode)


class CompiledStep:
    """`step` for one batch of texts. tried: whether its logits were compared with those of a plain step; the reader does that."""

    def __init__(self, runner: Any, max_length: int) -> None:
        """max_length: most tokens that the model sees at a time."""
        self._model, self._device, self._max_length = runner.model, runner.device, max_length
        self._state: StaticState | None = None
        self._loaded = self.tried = False

    def forget(self) -> None:
        """The texts go on from another state, which the next call gets."""
        self._loaded = False

    def __call__(self, tokens: Tensor, state: DecodingState) -> Tensor:
        """Logits [B, 1, V] of tokens [B, 1]. state: has read what comes before, if it is not loaded yet; then it is emptied."""
        if not self._loaded:
            self.load(state)
            state.reset()
        if self._device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()  # the logits of the last step are no longer needed
        return compiled_step(self._device.type)(self._model, tokens.clone(), self._state)

    def load(self, state: DecodingState) -> None:
        """Go on from a copy of `state`."""
        self._loaded = True
        if self._state is not None:
            self._state.load(state)
            return
        self._state = StaticState(state, self._max_length, self._device)
        if self._device.type == "cuda":
            for tensor in self._state.tensors():
                private("mark_static_address")(tensor)  # so that a CUDA graph writes into it
