"""CUDA graphs, by choice: forward and backward of a microbatch recorded once, then launched as one.

A GPU is done with a small model's microbatch before Python has told it of its hundreds of kernels; a recording tells it at once.
Replayed, the same kernels read and write the same memory. So what a model keeps between forward passes must stay where it is, as
parameters and buffers do, and what Python decided while it was recorded stays decided.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from models.base import Batch
from models.layers.flex import masks_read
from trainer.core.errors import UserError
from trainer.engine.compilation import first_line

# Microbatches of a shape that run as they are before it is recorded: kernels are compiled and tuned, tables and gradients made.
WARM_UP = 2

Call = Callable[[], Tensor]
Kind = tuple[torch.Size, tuple[str, ...]]  # shape of the tokens, keys of the batch


class GraphRecorder(Protocol):
    """run: make a call now, as it must be made before it is recorded. record: into one that replays it, without making it.
    forget: the memory of all recordings, of which none will be replayed."""

    def run(self, call: Call) -> Tensor: ...

    def record(self, call: Call) -> Call: ...

    def forget(self) -> None: ...


class CudaGraphRecorder:
    """Records on the GPU at hand. All recordings share memory for activations, as no two of them run at a time."""

    def __init__(self) -> None:
        # One stream for both, not the default one: autograd remembers on which a parameter was first used.
        self._stream = torch.cuda.Stream()
        self._memory = torch.cuda.graph_pool_handle()

    def run(self, call: Call) -> Tensor:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = call()
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def record(self, call: Call) -> Call:
        """UserError where something in `call` cannot be recorded: it waits for the device, say."""
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        failure: Exception | None = None
        try:
            # thread_local: threads that read data may use the device meanwhile.
            with (
                masks_read() as masks,
                torch.cuda.graph(graph, self._memory, self._stream, capture_error_mode="thread_local"),
            ):
                try:
                    result = call()
                except Exception as error:  # the recording may not end either, and say so instead
                    failure = error
        except RuntimeError as error:
            torch.cuda.set_stream(before)  # torch leaves its own behind
            failure = failure or error
        if isinstance(failure, RuntimeError) and not isinstance(failure, torch.OutOfMemoryError):
            raise UserError(
                f"engine.cuda_graphs: a microbatch of this model cannot be recorded ({first_line(failure)}); leave it out"
            ) from failure
        if failure is not None:
            raise failure

        kept = graph, result, masks  # what a replay reads and writes stays as long as it may be made

        def replay() -> Tensor:
            kept[0].replay()
            return kept[1]

        return replay

    def forget(self) -> None:
        torch.cuda.synchronize()  # the last replay may still run
        self._memory = torch.cuda.graph_pool_handle()  # one whose recordings are gone cannot be used again


class CudaGraphRunner:
    """microbatch(batch of tensors [B, T], scale []) -> losses [1 + parts], recorded once for each shape and kind of batch.

    It adds to gradients, which must stay where they are from one step to the next. Recordings are of one length T: at another,
    or with more sequences than any has, all are made anew, as memory that they share does not grow with its contents.
    """

    def __init__(self, microbatch: Callable[[Batch, Tensor], Tensor], recorder: GraphRecorder) -> None:
        self._microbatch, self._recorder = microbatch, recorder
        self._met: dict[Kind, int] = {}
        self._recordings: dict[Kind, tuple[Batch, Tensor, Call]] = {}

    def __call__(self, batch: Batch, scale: Tensor) -> Tensor:
        given: Any = batch
        kind = batch["tokens"].shape, tuple(sorted(given))
        if kind not in self._recordings:
            self._forget_others_than(kind[0])
            self._met[kind] = self._met.get(kind, 0) + 1
            if self._met[kind] <= WARM_UP:
                return self._recorder.run(lambda: self._microbatch(batch, scale))
            copies: Any = {key: value.clone() for key, value in given.items()}
            own_scale = scale.clone()
            call = self._recorder.record(lambda: self._microbatch(copies, own_scale))
            self._recordings[kind] = copies, own_scale, call
        own, own_scale, replay = self._recordings[kind]
        for key, copy in own.items():
            copy.copy_(given[key])  # type: ignore[attr-defined]
        own_scale.copy_(scale)
        return replay().clone()  # the next replay writes over it

    def _forget_others_than(self, shape: torch.Size) -> None:
        """Where recordings are of another length, or all of fewer sequences."""
        sequences, length = shape
        shapes = [shape for shape, _ in self._recordings]
        if shapes and all(other[1] != length or other[0] < sequences for other in shapes):
            self._recordings.clear()
            self._recorder.forget()
