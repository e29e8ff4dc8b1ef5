"""CUDA graphs (engine.cuda_graphs): record forward and backward of a microbatch once, then replay them as one launch.

A small model's microbatch has hundreds of kernels. The GPU runs them faster than Python can launch them one by one; a recording
launches them all at once. A replay runs the same kernels on the same memory. So tensors that a model keeps between forward
passes must keep their memory, as parameters and buffers do, and decisions that Python made during the recording stay fixed.
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

# Microbatches of a shape that run normally before the recording. They compile and tune kernels, and create tables and gradients.
WARM_UP = 2

Call = Callable[[], Tensor]
Kind = tuple[torch.Size, tuple[str, ...]]  # shape of the tokens, keys of the batch


class GraphRecorder(Protocol):
    """run: make a call now, in the same way as it will be recorded. record: return a call that replays this one, without making
    it. forget: free the memory of all recordings; none of them may be replayed afterwards."""

    def run(self, call: Call) -> Tensor: ...

    def record(self, call: Call) -> Call: ...

    def forget(self) -> None: ...


class CudaGraphRecorder:
    """Records on the current GPU. All recordings share memory for activations, because only one runs at a time."""

    def __init__(self) -> None:
        # `run` and `record` use the same stream, not the default one: autograd remembers on which stream a parameter was first used.
        self._stream = torch.cuda.Stream()
        self._memory = torch.cuda.graph_pool_handle()

    def run(self, call: Call) -> Tensor:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = call()
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def record(self, call: Call) -> Call:
        """UserError if `call` cannot be recorded, for example because it waits for the device."""
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        failure: Exception | None = None
        try:
            # thread_local: threads that read data may use the device during the recording.
            with (
                masks_read() as masks,
                torch.cuda.graph(graph, self._memory, self._stream, capture_error_mode="thread_local"),
            ):
                try:
                    result = call()
                except Exception as error:  # ending the recording may also fail and hide this error
                    failure = error
        except RuntimeError as error:
            torch.cuda.set_stream(before)  # torch does not restore the stream here
            failure = failure or error
        if isinstance(failure, RuntimeError) and not isinstance(failure, torch.OutOfMemoryError):
            raise UserError(
                f"engine.cuda_graphs: a microbatch of this model cannot be recorded ({first_line(failure)}); turn cuda_graphs off"
            ) from failure
        if failure is not None:
            raise failure

        kept = graph, result, masks  # a replay reads and writes these, so they must stay alive

        def replay() -> Tensor:
            kept[0].replay()
            return kept[1]

        return replay

    def forget(self) -> None:
        torch.cuda.synchronize()  # the last replay may still run
        self._memory = torch.cuda.graph_pool_handle()  # a pool cannot be used again after its recordings are gone


class CudaGraphRunner:
    """microbatch(batch of tensors [B, T], scale []) -> losses [1 + parts], recorded once for each shape and kind of batch.

    The recordings add to the gradients, whose memory must stay the same from step to step. All recordings have the same length
    T. For another length, or for more sequences than in any recording, all recordings are dropped and made again, because the
    memory that they share cannot grow.
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
        return replay().clone()  # the next replay overwrites the result

    def _forget_others_than(self, shape: torch.Size) -> None:
        """Drop all recordings if they all have another length or fewer sequences."""
        sequences, length = shape
        shapes = [shape for shape, _ in self._recordings]
        if shapes and all(other[1] != length or other[0] < sequences for other in shapes):
            self._recordings.clear()
            self._recorder.forget()
