"""Text from a model, a batch of prompts at a time. Decoding is incremental (with a cache) if the model supports it."""

from __future__ import annotations

import math
import os
import sys
import weakref
from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.layers.bit_linear import LEVELS
from models.layers.float8 import E4M3, Float8Linear
from models.layers.quantized import rounds_inputs
from models.state import State
from trainer.core.errors import UserError
from trainer.core.text import printable
from trainer.inference.sampling import Sampling, sample

CHECKED_TOKENS = 8  # to find out whether a model decodes incrementally
PROMPT_TAIL = 16  # last tokens of a prompt; `continuation` decodes them together with the new tokens

_told: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()  # topics reported, by model


def tell(text: str) -> None:
    """Print a line to stderr."""
    print(text, file=sys.stderr, flush=True)


class TokenEvent(NamedTuple):
    """A new token of a text. row: index of the prompt. The log-probabilities (nats) are of the model's own distribution: before
    temperature, penalty and the other options. alternatives: (id, log-probability) of the likeliest tokens, best first."""

    row: int
    token: int
    log_probability: float | None = None  # None: not asked for
    alternatives: tuple[tuple[int, float], ...] = ()


@torch.no_grad()
def generate(
    runner: Any,
    prompts: list[list[int]],
    max_new_tokens: int,
    vocab_size: int,
    *,
    seed: int = 0,
    end: int | None = None,
    stopped: Callable[[int, list[int]], bool] = lambda row, new: False,
    on_token: Callable[[TokenEvent], None] | None = None,
    alternatives: int | None = None,
    cancelled: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = tell,
    **sampling: Any,
) -> list[list[int]]:
    """Continue each prompt (at least one token id) by up to `max_new_tokens` tokens. Returns only the new tokens.

    runner: has model, predict(), device, precision, autocast() and agree(), as an engine does. vocab_size: ids from here on
    are padding and never sampled. end: id that ends a text (not returned). stopped(index of the prompt, its new tokens):
    whether that text ends here, asked after each token. sampling: fields of Sampling.

    on_token: called with each new token, before `stopped`; not with `end`. alternatives: how many likeliest tokens an event
    names, with log-probabilities (0: that of the token alone); None: no log-probabilities are computed.
    cancelled: asked before each forward pass; once it says yes, what has been made so far is returned. Where ranks generate
    together, on_token and stopped run on each, and cancelled must say the same on all.

    Prompts of different length share a batch without padding: the model still reads a longer prompt while it already
    continues a shorter one. Each text has its own random generator, so it does not depend on the others in the batch.
    """
    if max_new_tokens == 0:
        return [[] for _ in prompts]
    model, device, how = runner.model, runner.device, Sampling(**sampling)
    training = model.training
    model.eval()
    draws = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    new: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    at = min(len(prompt) for prompt in prompts)
    column = torch.tensor([prompt[:at] for prompt in prompts], device=device)  # [B, at], then [B, 1]
    # The last token is sampled, but never read.
    longest = max(len(prompt) for prompt in prompts) + max_new_tokens - 1
    reader = Reader(runner, vocab_size, len(prompts), longest, say)
    while not (all(done) or cancelled()):
        logits = reader.read(column)[:, :vocab_size]  # [B, V]
        following = [
            prompt[at] if at < len(prompt) else sample(logits[i], how, draws[i], chain(prompt, new[i]))
            for i, prompt in enumerate(prompts)
        ]
        following = runner.agree(following)
        live = [i for i in range(len(prompts)) if not done[i] and at >= len(prompts[i])]
        ended = [i for i in live if following[i] == end]
        for i in ended:
            done[i] = True
        going_on = [i for i in live if i not in ended]
        events = [TokenEvent(i, following[i]) for i in going_on]
        if on_token is not None and alternatives is not None:
            events = with_log_probabilities(events, logits, alternatives)
        for i, event in zip(going_on, events, strict=True):
            new[i].append(event.token)
            if on_token is not None:
                on_token(event)
            done[i] = len(new[i]) >= max_new_tokens or stopped(i, new[i])
        column = torch.tensor(following, device=device)[:, None]
        at += 1
    model.train(training)
    return new


def with_log_probabilities(events: list[TokenEvent], logits: Tensor, alternatives: int) -> list[TokenEvent]:
    """The events with their log-probabilities and alternatives. logits: [B, V]."""
    if not events:
        return []
    rows = torch.tensor([event.row for event in events], device=logits.device)
    tokens = torch.tensor([event.token for event in events], device=logits.device)
    scores = logits[rows].log_softmax(-1)  # [N, V]
    own = scores.gather(1, tokens[:, None])[:, 0].tolist()
    best = scores.topk(min(alternatives, scores.shape[1]))  # [N, alternatives]
    likeliest = [
        tuple(zip(*pair, strict=True)) for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    return [
        TokenEvent(event.row, event.token, value, others)
        for event, value, others in zip(events, own, likeliest, strict=True)
    ]


class Reader:
    """Reads texts from left to right. With a cache the model reads only the new tokens, else its whole context each time."""

    def __init__(self, runner: Any, vocab_size: int, batch: int, max_length: int, say: Callable[[str], None]) -> None:
        """batch: number of texts; max_length: most tokens of a text."""
        self.runner, self.say = runner, say
        self.limit: int | None = runner.model.max_context
        self.context: Tensor | None = None  # [B, T], the tokens within the model's context
        # Ranks that compute together must make the same choice.
        why_not = runner.agree(why_not_incremental(runner, vocab_size))
        longest = max_length if self.limit is None else min(max_length, self.limit)
        self.state = None if why_not else new_state(runner, batch, longest)
        if why_not:
            self.say_once("cache", f"text: the whole context is computed again for every token: {why_not}")

    def read(self, tokens: Tensor) -> Tensor:
        """Read the next tokens [B, T] of all texts. Returns the logits of the token after them, fp32 [B, V] on the CPU."""
        held = self.context
        self.context = context = tokens if held is None else torch.cat((held, tokens), dim=1)
        if self.limit is not None and context.shape[1] > self.limit:
            self.context = context = context[:, -self.limit :]
            self.state = None  # every token's position has changed
            self.say_once(
                "context", f"text: longer than the model's context: only the last {self.limit} tokens are used"
            )
        with self.runner.autocast():
            if self.state is None:
                logits = self.runner.predict(context)
            else:
                logits = self.runner.predict(tokens, cache=self.state)
        return logits[:, -1].float().cpu()

    def select(self, rows: list[int]) -> None:
        """Go on with these texts: row i is the old row rows[i]."""
        index = torch.tensor(rows, device=self.runner.device)
        if self.context is not None:
            self.context = self.context[index]
        if self.state is not None:
            self.state.select(index)

    def say_once(self, topic: str, text: str) -> None:
        """Say `text` once per model and topic. A run takes many samples of one model."""
        topics = _told.setdefault(self.runner.model, set())
        if topic not in topics:
            topics.add(topic)
            self.say(text)


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
    counted = whole.isfinite()  # masked logits are -inf
    if not counted.any():
        return ""
    apart = (cached - whole)[counted].abs().max().item()
    size = (whole[counted] - whole[counted].mean()).abs().max().item()
    if apart <= math.sqrt(rounding(runner)) * size:
        return ""
    return f"with a cache the model's logits differ by {apart:.2g} from those of the whole"


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


def cut_at(text: str, stops: list[str]) -> str:
    """`text` up to the first of the stop strings."""
    return text[: min([text.find(stop) for stop in stops if stop in text], default=len(text))]


def continuation(tokenizer: Any, prompt: list[int], new: list[int]) -> str:
    """The text that the `new` tokens add to the prompt. They are decoded after the end of the prompt: some decoders leave out
    the space before the first word of a text."""
    tail = prompt[-PROMPT_TAIL:]
    before, whole = tokenizer.decode(tail), tokenizer.decode(tail + new)
    # Compare the texts: where the prompt ends within a character, the new tokens complete it, and len(before) is wrong.
    return whole[len(os.path.commonprefix([before, whole])) :]


class Stable:
    """The part of a growing text that no further token changes, for a terminal: it ends before an unfinished character, and before
    what may be the beginning of a stop string."""

    def __init__(self, stop: list[str]) -> None:
        self.stop, self.shown = stop, 0

    def more(self, text: str, ended: bool = False) -> str:
        """What `text`, the whole continuation so far, adds to the stable part. ended: all of it is stable."""
        text = cut_at(text, self.stop)
        if not ended:
            text = text.rstrip("\ufffd")
            held = max((n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
            text = text[: len(text) - held]
        new = text[self.shown :]
        self.shown += len(new)
        return new


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """The token ids of a prompt. An empty one starts as a document does, after an end-of-text token. UserError if it is no text."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError("prompt: is not valid UTF-8 text") from None
    return tokenizer.encode(prompt).tolist() or [tokenizer.eot_id]


def complete(
    runner: Any,
    tokenizer: Any,
    prompts: list[str],
    max_new_tokens: int,
    stop: list[str],
    say: Callable[[str], None] = tell,
    show: Callable[[str], None] | None = None,
    **options: Any,
) -> list[str]:
    """Continuations of text prompts, each up to the first of the stop strings. show: called with the pieces of the first text as
    they become known. options: further ones of `generate`."""
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    stable = Stable(stop)

    def stopped(row: int, new: list[int]) -> bool:
        if not stop and (show is None or row > 0):
            return False
        text = continuation(tokenizer, encoded[row], new)
        if show is not None and row == 0:
            show(stable.more(text))
        return any(word in text for word in stop)

    new = generate(
        runner,
        encoded,
        max_new_tokens,
        tokenizer.vocab_size,
        end=tokenizer.eot_id,
        stopped=stopped,
        say=say,
        **options,
    )
    texts = [cut_at(continuation(tokenizer, *pair), stop) for pair in zip(encoded, new, strict=True)]
    if show is not None:
        show(stable.more(texts[0], ended=True))
    return texts
