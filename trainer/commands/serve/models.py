"""A run that is served: its model, the requests that wait for it, and the one thread in which it computes."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from trainer.commands.serve.schema import RequestError
from trainer.commands.serve.text import Answer, Piece, Spelling
from trainer.core.text import printable
from trainer.inference.decoding import TokenEvent, generate
from trainer.inference.reader import tell

ANY_LENGTH = 32768  # longest prompt of a model whose context has no limit


@dataclass(eq=False)
class Job:
    """What a request asks of a model, and where its pieces arrive. rows: the ids of each text that is continued."""

    rows: list[list[int]]
    max_new_tokens: int
    stops: list[str]
    alternatives: int | None
    seed: int
    sampling: dict[str, Any]
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    made: int = 0  # tokens, once it has ended

    def __post_init__(self) -> None:
        self._arrived: asyncio.Queue[Piece | RequestError | None] = asyncio.Queue()
        self._cancelled = threading.Event()
        self._future: Future[None] | None = None

    async def pieces(self) -> AsyncIterator[Piece]:
        """Each piece as soon as it is certain. Raises RequestError if the computation ends without an answer."""
        while (arrived := await self._arrived.get()) is not None:
            if isinstance(arrived, RequestError):
                raise arrived
            yield arrived

    def cancel(self, reason: RequestError | None = None) -> None:
        """Ends the computation before its next token, or takes it out of the queue. reason: what `pieces` raises."""
        self._cancelled.set()
        if self._future is not None:
            self._future.cancel()
        self.deliver(reason)

    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def start(self, pool: ThreadPoolExecutor, work: Callable[[Job], None]) -> Future[None]:
        self._future = pool.submit(work, self)
        return self._future

    def deliver(self, arrived: Piece | RequestError | None) -> None:
        """From any thread. None: there is nothing more."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self._arrived.put_nowait, arrived)


class ServedModel:
    """A run under its name. Its requests are computed one after the other, the texts of a request together."""

    def __init__(self, name: str, opened: Any, conversations: Any, max_requests: int, max_seconds: float) -> None:
        """opened: an OpenRun; conversations: its chat template, or None."""
        self.name, self.opened, self.conversations = name, opened, conversations
        self.tokenizer = opened.tokenizer
        self.spelling = Spelling(self.tokenizer)
        self.context: int | None = opened.model.max_context
        self._max_requests, self._max_seconds = max_requests, max_seconds
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._jobs: set[Job] = set()
        self._lock = threading.Lock()

    @property
    def fingerprint(self) -> str:
        """Names the weights."""
        return f"{self.name}-step-{self.opened.step}"

    def start(self, job: Job) -> None:
        """Put `job` into the queue. RequestError if that is full."""
        with self._lock:
            if len(self._jobs) >= self._max_requests:
                raise RequestError(
                    f"{self.name}: {len(self._jobs)} requests are computed or wait already; try again later",
                    status=429,
                    code="queue_full",
                )
            self._jobs.add(job)
        job.start(self._pool, self._compute).add_done_callback(lambda _: self._leave(job))

    def close(self) -> None:
        """Ends all that is computed or waits."""
        with self._lock:
            jobs = list(self._jobs)
        for job in jobs:
            job.cancel(RequestError("the server is being stopped", status=503, code="stopped"))

    def _leave(self, job: Job) -> None:
        with self._lock:
            self._jobs.discard(job)

    def _compute(self, job: Job) -> None:
        """Runs in the model's thread."""
        try:
            job.deliver(self._decode(job))
        except Exception as error:
            memory = isinstance(error, MemoryError) or "out of memory" in str(error)
            if not memory:
                print(traceback.format_exc(), file=sys.stderr, flush=True)
            what = (
                "out of memory; ask for fewer or shorter texts"
                if memory
                else "the model failed; see the server's terminal"
            )
            job.deliver(RequestError(f"{self.name}: {what}", status=500, code="failed"))

    def _decode(self, job: Job) -> RequestError | None:
        """Generate all texts of `job`. Returns an error if that takes too long."""
        begin, late = time.monotonic(), False
        answers = [Answer(self.tokenizer, i, row, job.stops) for i, row in enumerate(job.rows)]

        def cancelled() -> bool:
            nonlocal late
            late = time.monotonic() - begin > self._max_seconds
            return late or job.cancelled()

        def on_token(event: TokenEvent) -> None:
            piece = answers[event.row].add(event)
            if piece is not None:
                job.deliver(piece)

        generate(
            self.opened,
            job.rows,
            job.max_new_tokens,
            self.tokenizer.vocab_size,
            seed=job.seed,
            end=self.tokenizer.eot_id,
            stopped=lambda row, new: answers[row].stopped,
            on_token=on_token,
            alternatives=job.alternatives,
            cancelled=cancelled,
            say=lambda line: tell(f"{self.name}: {line}"),
            **job.sampling,
        )
        job.made = sum(answer.count for answer in answers)
        self._report(job, time.monotonic() - begin)
        if job.cancelled():
            return None
        if late:
            return RequestError(
                f"{self.name}: not ready after {self._max_seconds:g} s, the limit of this server; ask for fewer tokens or texts",
                status=504,
                code="timeout",
            )
        for answer in answers:
            job.deliver(answer.finish("length" if answer.count >= job.max_new_tokens else "stop"))
        return None

    def _report(self, job: Job, seconds: float) -> None:
        asked = sum(map(len, job.rows))
        stopped = ", cancelled" if job.cancelled() else ""
        tell(
            f"{printable(self.name)}: {asked:,} prompt tokens, {job.made:,} new in {seconds:.1f} s "
            f"({job.made / max(seconds, 1e-9):.0f} tokens/s){stopped}"
        )
