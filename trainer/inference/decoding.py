"""Text from a model, a batch of prompts at a time. Decoding is incremental (with a cache) if the model supports it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.core.errors import UserError
from trainer.inference.reader import Reader, tell
from trainer.inference.sampling import Noise, Sampling, choose, seen_mask
from trainer.inference.speculative import Account, Drafter, DraftModel, FurtherHeads

PROMPT_TAIL = 16  # last tokens of a prompt; `continuation` decodes them together with the new tokens
FURTHER_HEADS = "mtp"  # a value of `draft`


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
    draft: Any = None,
    draft_tokens: int = 4,
    compiles: bool = False,
    account: Account | None = None,
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

    draft: another runner with the same vocabulary, or "mtp", the model's own heads for later tokens: speculative decoding of up to
    draft_tokens tokens at a time, which changes no text (speculative.py); not where ranks generate together. compiles: whether
    passes of one token are compiled (compiled.py). account: is added to.

    Prompts of different length share a batch without padding: the model still reads a longer prompt while it already
    continues a shorter one. Each text has its own random generator, so it does not depend on the others in the batch.
    """
    if max_new_tokens == 0:
        return [[] for _ in prompts]
    training = runner.model.training
    runner.model.eval()
    try:
        batch = Decoding(runner, prompts, max_new_tokens, vocab_size, seed, Sampling(**sampling), say, compiles)
        drafter = None if draft is None else batch.drafter(draft, say)
        while batch.live and not cancelled():
            for event in batch.advance(drafter, draft_tokens, alternatives if on_token else None):
                batch.take(event, end, stopped, on_token)
        if account is not None:
            batch.settle(account, drafter)
    finally:
        runner.model.train(training)
    return batch.new


class Decoding:
    """A batch of texts in the making.

    new: the new tokens of each. live: the texts that are not finished. tokens: all texts on the device, [B, longest prompt +
    max_new_tokens]; known: how many tokens of each are certain, the others are drafts or nothing yet.

    A pass of the model begins where the first text has unread tokens, for all texts. A text that is ahead, because its prompt is
    longer or more of its drafts were right, gets its own tokens there. So all rows of the model's state have the same length.
    """

    def __init__(
        self,
        runner: Any,
        prompts: list[list[int]],
        max_new_tokens: int,
        vocab_size: int,
        seed: int,
        how: Sampling,
        say: Callable[[str], None],
        compiles: bool,
    ) -> None:
        self.runner, self.how, self.vocab_size, self.max_new_tokens = runner, how, vocab_size, max_new_tokens
        self.device, self.batch = runner.device, len(prompts)
        self.new: list[list[int]] = [[] for _ in prompts]
        self.live = list(range(len(prompts)))
        self.begins = [len(prompt) for prompt in prompts]
        self.known = list(self.begins)
        longest = max(self.begins) + max_new_tokens
        rows = [prompt + [0] * (longest - len(prompt)) for prompt in prompts]
        self.tokens = torch.tensor(rows, device=self.device)
        self.known_tokens = torch.tensor(self.known, device=self.device)  # [B], `known` on the device
        # The last token is sampled, but never read.
        self.reader = Reader(runner, vocab_size, len(prompts), longest - 1, say, compiles)
        self.noise = Noise(seed, len(prompts), vocab_size, self.device) if how.draws else None
        self.seen: Tensor | None = None  # [B, V], of the first `seen_to` tokens
        self.seen_to = min(self.begins)
        if how.repetition_penalty != 1:
            self.seen = seen_mask([prompt[: self.seen_to] for prompt in prompts], vocab_size, self.device)
        self.drafted = self.accepted = 0

    def drafter(self, draft: Any, say: Callable[[str], None]) -> Drafter:
        if draft == FURTHER_HEADS:
            return FurtherHeads(self.reader, self.vocab_size)
        return DraftModel(draft, self.vocab_size, self.batch, self.tokens.shape[1] - 1, say)

    def advance(self, drafter: Drafter | None, draft_tokens: int, alternatives: int | None) -> list[TokenEvent]:
        """One pass of the model: the new tokens of the live texts. alternatives: as in `generate`."""
        first = min(self.known[i] for i in self.live)  # the first position that is not known in all texts
        last = max(self.begins[i] + self.max_new_tokens for i in self.live) - 1
        count = 0
        if drafter is not None:
            count = min(draft_tokens, last - first)
            count = drafter.propose(self.tokens, self.known_tokens, first, count, self.choose_at)
            self.reader.mark()
        logits = self.reader.read(self.tokens, first + count, count + 1)[..., : self.vocab_size]  # [B, count + 1, V]
        places = range(first, first + count + 1)
        noise = None if self.noise is None else torch.stack([self.noise.at(self.places(p)) for p in places], dim=1)
        chosen = choose(logits, self.how, noise, self.seen_before(first, count + 1))  # [B, count + 1]
        found = self.accept(chosen, first)
        if drafter is not None:
            read = min(self.known[i] for i in self.live) - 1
            self.reader.rewind(self.tokens, read)
            drafter.rewind(self.tokens, read)
        if alternatives is not None:
            return with_log_probabilities(found, logits, alternatives)
        return [TokenEvent(row, token) for row, _, token in found]

    def accept(self, chosen: Tensor, first: int) -> list[tuple[int, int, int]]:
        """Enter the tokens that the model chose, up to the first one that is not its draft: (text, column, token) of each new one.

        chosen: [B, n], for the positions from `first` on; a choice is the model's own if all tokens before it are.
        """
        count = chosen.shape[1]
        held = self.tokens[:, first : first + count]
        positions = torch.arange(first, first + count, device=self.device)
        found = torch.where(positions >= self.known_tokens[:, None], chosen, held)  # [B, n]
        right = (found == held)[:, :-1].long().cumprod(1).sum(1)  # [B]
        known = torch.maximum(self.known_tokens, first + right + 1)
        mine = fetch(torch.cat((found, known[:, None]), dim=1))
        rows = self.runner.agree(mine)
        if rows != mine:
            found, known = torch.tensor(rows, device=self.device).split([count, 1], dim=1)
            known = known[:, 0]
        self.tokens[:, first : first + count] = found
        self.known_tokens = known
        new = []
        for i in self.live:
            before, self.known[i] = self.known[i], rows[i][-1]
            new += [(i, p - first, rows[i][p - first]) for p in range(before, self.known[i])]
            self.drafted += max(0, first + count - 1 - before)
            self.accepted += max(0, self.known[i] - before - 1)
            if self.noise is not None:
                self.noise.forget(i, self.known[i] - self.begins[i])
        return new

    def take(
        self,
        event: TokenEvent,
        end: int | None,
        stopped: Callable[[int, list[int]], bool],
        on_token: Callable[[TokenEvent], None] | None,
    ) -> None:
        """Add a new token to its text, unless the text has ended at an earlier one of the same pass."""
        i = event.row
        if i not in self.live:
            return
        if event.token == end:
            self.live.remove(i)
            return
        self.new[i].append(event.token)
        if on_token is not None:
            on_token(event)
        if len(self.new[i]) >= self.max_new_tokens or stopped(i, self.new[i]):
            self.live.remove(i)

    def settle(self, account: Account, drafter: Drafter | None) -> None:
        account.tokens += sum(map(len, self.new))
        account.forwards += self.reader.forwards
        account.drafted += self.drafted
        account.accepted += self.accepted
        account.draft_forwards += 0 if drafter is None else drafter.forwards

    def places(self, position: int) -> list[int | None]:
        """Which of the new tokens of each text is chosen for this position; None: none is."""
        live = set(self.live)
        return [
            position - begin if i in live and position >= self.known[i] else None for i, begin in enumerate(self.begins)
        ]

    def choose_at(self, logits: Tensor, position: int) -> Tensor:
        """Tokens [B] for a position, from logits [B, V]."""
        noise = None if self.noise is None else self.noise.at(self.places(position))
        return choose(logits, self.how, noise, self.seen_at(position))

    def seen_before(self, first: int, count: int) -> Tensor | None:
        """[B, count, V]: the tokens before each of the positions from `first` on; None without a penalty of repetition."""
        if self.seen is None:
            return None
        # What is known in all texts stays; drafts may change.
        self.seen.scatter_(1, self.tokens[:, self.seen_to : first], True)
        self.seen_to = first
        return torch.stack([self.seen_at(first + i) for i in range(count)], dim=1)  # type: ignore[misc]

    def seen_at(self, position: int) -> Tensor | None:
        """[B, V]: the tokens before a position; None without a penalty of repetition."""
        if self.seen is None or position <= self.seen_to:
            return self.seen
        return self.seen.scatter(1, self.tokens[:, self.seen_to : position], True)


def fetch(numbers: Tensor) -> list[list[int]]:
    """The one thing for which the host waits in a pass: its tokens, [B, columns]."""
    return numbers.tolist()


def with_log_probabilities(found: list[tuple[int, int, int]], logits: Tensor, alternatives: int) -> list[TokenEvent]:
    """The events of tokens (text, column, token). logits: [B, columns, V]."""
    if not found:
        return []
    rows, columns, tokens = (torch.tensor(numbers, device=logits.device) for numbers in zip(*found, strict=True))
    scores = logits[rows, columns].log_softmax(-1)  # [N, V]
    own = scores.gather(1, tokens[:, None])[:, 0].tolist()
    best = scores.topk(min(alternatives, scores.shape[1]))  # [N, alternatives]
    likeliest = [
        tuple(zip(*pair, strict=True)) for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    return [
        TokenEvent(row, token, value, others)
        for (row, _, token), value, others in zip(found, own, likeliest, strict=True)
    ]


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
