"""How a model reads texts from left to right: with a cache if it can, and past the end of its context."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from models.layers.bit_linear import LEVELS
from models.layers.float8 import E4M3, Float8Linear
from models.layers.quantized import rounds_inputs
from models.state import DecodingState, State
from trainer.core.text import printable
from trainer.inference.compiled import CompiledStep

CHECKED_TOKENS = 8  # to find out whether a model decodes incrementally

_told: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()  # topics reported, by model


def tell(text: str) -> None:
    """Print a line to stderr."""
    print(text, file=sys.stderr, flush=True)


def say_once(model: nn.Module, topic: str, text: str, say: Callable[[str], None]) -> None:
    """Say `text` once per model and topic. A run takes many samples of one model."""
    topics = _told.setdefault(model, set())
    if topic not in topics:
        topics.add(topic)
        say(text)


class Reader:
    """Reads texts from left to right. With a cache the model reads only the new tokens, else its whole context each time.

    length: tokens that are read of each text. forwards: passes of the model; last_stop: where the last one ended in the texts.
    predict: as of the runner; another one may be put in its place.

    A model with a limited context sees of a longer text only the end. Whenever the context is full, the model drops the first
    half of what it sees, reads the rest again, and goes on with the cache. Where that happens follows from the position in the
    text alone, so that a text is the same in every batch, and with and without a cache.
    """

    def __init__(
        self,
        runner: Any,
        vocab_size: int,
        batch: int,
        max_length: int,
        say: Callable[[str], None],
        compiles: bool = False,
    ) -> None:
        """batch: number of texts; max_length: most tokens of a text that are read; compiles: whether passes of one token are compiled
        (compiled.py), if the model allows it."""
        self.runner, self.say = runner, say
        self.limit: int | None = runner.model.max_context
        self.length = self.base = 0  # base: where what the model sees begins
        self.forwards = self.last_stop = 0
        self.predict: Callable[..., Tensor] = runner.predict
        # Ranks that compute together must make the same choice.
        why_not = runner.agree(why_not_incremental(runner, vocab_size))
        longest = max_length if self.limit is None else min(max_length, self.limit)
        self.state = None if why_not else new_state(runner, batch, longest)
        self._mark: tuple[int, Any] | None = None  # a length, and the state's snapshot of then
        self._step = CompiledStep(runner, longest) if compiles and isinstance(self.state, DecodingState) else None
        if why_not:
            text = f"text: the whole context is computed again for every token: {why_not}"
            say_once(runner.model, "cache", text, say)

    def read(self, texts: Tensor, stop: int, count: int = 1) -> Tensor:
        """Read the tokens texts[:, length:stop] of texts [B, T]. Returns the logits after each of the last `count`, fp32
        [B, count, V] on the device."""
        parts, first = [], stop - count
        while first < stop:
            base = self.base_of(first + 1)
            if base != self.base:
                self.length = self.base = base
                self._mark = None
                if self.state is not None:
                    self.state.reset()
                if self._step is not None:
                    self._step.forget()
            end = stop if self.limit is None else min(stop, base + self.limit)
            parts.append(self._forward(texts, end)[:, first - end :].float())
            first = end
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _forward(self, texts: Tensor, stop: int) -> Tensor:
        """Logits of a pass that reads the texts up to `stop`."""
        start, self.length, self.last_stop = self.length, stop, stop
        self.forwards += 1
        with self.runner.autocast():
            if self.state is None:
                return self.predict(texts[:, self.base : stop])
            if self._step is not None and stop - start == 1 and start > self.base:
                assert isinstance(self.state, DecodingState)
                return self._compiled(self._step, texts[:, start:stop], self.state)
            return self.predict(texts[:, start:stop], cache=self.state)

    def _compiled(self, step: CompiledStep, tokens: Tensor, state: DecodingState) -> Tensor:
        """Logits of a pass of one token by compiled code. The first pass is also made without it, and must give the same."""
        if step.tried:
            return step(tokens, state)
        step.load(state)
        logits, why_not = self.predict(tokens, cache=state), ""
        try:
            if apart := difference(step(tokens, state).float(), logits.float(), self.runner):
                why_not = f"its logits differ by {apart:.2g} from those of the plain one"
        except Exception as error:  # of the compiler, or of a model that cannot read with fixed shapes
            why_not = f"{type(error).__name__}: {printable(str(error).strip().split(chr(10))[0], 200)}"
        if why_not:
            self._step = None
            text = f"text: a decoding step is not compiled, which changes no text: {why_not}"
            say_once(self.runner.model, "compile", text, self.say)
        else:
            step.tried = True
            state.reset()
        return logits

    def base_of(self, length: int) -> int:
        """Where what the model sees of the first `length` tokens begins."""
        if self.limit is None or length <= self.limit:
            return 0
        text = f"text: longer than the model's context of {self.limit} tokens: whenever it is full, only its last half is kept"
        say_once(self.runner.model, "context", text, self.say)
        step = max(1, self.limit // 2)
        return step * -((self.limit - length) // step)

    def mark(self) -> None:
        """Make `rewind` to any longer length possible, also where the state itself does not go back so far."""
        if self.state is not None:
            self._mark = self.length, self.state.snapshot()

    def rewind(self, texts: Tensor, length: int) -> None:
        """Go back to the first `length` tokens, not fewer than at the last `mark`."""
        if length >= self.length:
            return
        if self.state is not None and length >= self.base:
            try:
                self.state.crop(length - self.base)
            except ValueError:  # recurrent state, or a window: go back further, and read again
                self._return_to_mark(self.state)
                if self.length < length:
                    self._forward(texts, length)
        self.length = length

    def _return_to_mark(self, state: State) -> None:
        if self._mark is None:
            self.length = self.base
            state.reset()
        else:
            self.length, snapshot = self._mark
            state.restore(snapshot)

    def select(self, rows: list[int]) -> None:
        """Go on with these texts: row i is the old row rows[i]."""
        if self.state is not None:
            self.state.select(torch.tensor(rows, device=self.runner.device))


def why_not_incremental(runner: Any, vocab_size: int) -> str:
    """Why a model cannot decode incrementally, found by a trial on a few tokens; "" if it can.

    It can if the logits with a cache are those of the whole text, to half of the digits that the products have.
    """
    model = runner.model
    length = min(CHECKED_TOKENS, model.max_context or CHECKED_TOKENS)
    tokens = torch.randint(vocab_size, (1, length), generator=torch.Generator().manual_seed(0)).to(runner.device)
    parts = [length - length // 2] + [1] * (length // 2)
    state = new_state(runner, 1, length)
    if state is None:
        return "the model says that it does not decode incrementally"
    with runner.autocast():
        whole = runner.predict(tokens).float()  # [1, T, V]
        try:
            cached = torch.cat(
                [runner.predict(part, cache=state) for part in tokens.split(parts, dim=1)], dim=1
            ).float()
        except Exception as error:
            return f"with a cache the model fails ({type(error).__name__}: {printable(error, 200)})"
    apart = difference(cached, whole, runner)
    return f"with a cache the model's logits differ by {apart:.2g} from those of the whole" if apart else ""


def difference(logits: Tensor, expected: Tensor, runner: Any) -> float:
    """The largest difference between logits [..., V], if it is more than rounding explains; else 0."""
    counted = expected.isfinite()  # masked logits are -inf
    if not counted.any():
        return 0.0
    apart = (logits - expected)[counted].abs().max().item()
    size = (expected[counted] - expected[counted].mean()).abs().max().item()
    return 0.0 if apart <= math.sqrt(rounding(runner)) * size else apart


def new_state(runner: Any, batch: int, max_length: int) -> State | None:
    """The model's decoding state, in the type that the runner computes in."""
    dtype = torch.float32 if runner.precision == "fp32" else torch.bfloat16
    return runner.model.new_state(batch, max_length, runner.device, dtype)


def rounding(runner: Any) -> float:
    """Relative rounding error of the runner's matrix products."""
    if any(isinstance(module, Float8Linear) for module in runner.model.modules()):
        return torch.finfo(E4M3).eps
    if any(map(rounds_inputs, runner.model.modules())):
        return 1 / LEVELS
    if runner.precision != "fp32":
        return torch.finfo(torch.bfloat16).eps
    return 2.0**-10 if runner.device.type == "cuda" else torch.finfo(torch.float32).eps  # TF32 on a GPU
