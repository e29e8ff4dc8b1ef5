"""The text of one answer while its tokens are made: which part of it is certain, which tokens belong to it, where it stops."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from trainer.inference.decoding import PROMPT_TAIL, Stable, TokenEvent, continuation

SETTLE_AFTER = 64  # tokens that are decoded together; a longer text would be decoded again and again


class Token(NamedTuple):
    """A token of an answer. offset: of its first character in the answer's text."""

    event: TokenEvent
    offset: int


class Piece(NamedTuple):
    """What becomes certain at one moment. row: which answer; finish: "" while it goes on, then why it ended: stop or length."""

    row: int
    text: str
    tokens: list[Token]
    finish: str = ""


class Answer:
    """The text of the tokens after a prompt, up to a stop string.

    A text is decoded after the end of its prompt, as `continuation` does it, but not as a whole: where a character ends, what was
    decoded settles, and becomes the end of the prompt of the rest.
    """

    def __init__(self, tokenizer: Any, row: int, prompt: list[int], stops: list[str]) -> None:
        self.tokenizer, self.row, self.stops = tokenizer, row, stops
        self.count = 0  # tokens made
        self.stopped = False  # a stop string has appeared
        self._before = prompt[-PROMPT_TAIL:]
        self._fresh: list[int] = []
        self._settled = self._fresh_text = ""
        self._stable = Stable(stops)
        self._waiting: list[Token] = []
        self._offset = 0

    def add(self, event: TokenEvent) -> Piece | None:
        """A new token. Returns what it makes certain, if anything."""
        self.count += 1
        self._fresh.append(event.token)
        text = continuation(self.tokenizer, self._before, self._fresh)
        if text != self._fresh_text:  # else the token is a part of a character, as the one before it
            self._offset = len(self._settled) + len(os.path.commonprefix([self._fresh_text, text]))
        self._fresh_text = text
        self._waiting.append(Token(event, self._offset))
        whole = self._settled + text
        self.stopped = any(stop in whole for stop in self.stops)
        new = self._stable.more(whole)
        if len(self._fresh) >= SETTLE_AFTER and not text.endswith("\ufffd"):
            self._settled, self._fresh_text = whole, ""
            self._before, self._fresh = (self._before + self._fresh)[-PROMPT_TAIL:], []
        return Piece(self.row, new, self._released()) if new else None

    def finish(self, reason: str) -> Piece:
        """The rest, once no further token comes. reason: why, if no stop string did it."""
        new = self._stable.more(self._settled + self._fresh_text, ended=True)
        tokens = self._released() if self.stopped else self._waiting
        return Piece(self.row, new, tokens, "stop" if self.stopped else reason)

    def _released(self) -> list[Token]:
        """The tokens that begin within the certain part of the text, each once."""
        ready = [token for token in self._waiting if token.offset < self._stable.shown]
        self._waiting = self._waiting[len(ready) :]
        return ready


class Spelling:
    """The bytes that a token stands for in the middle of a text, and how OpenAI's objects spell them."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._anchor = tokenizer.encode("a").tolist()  # some decoders leave out the space at the beginning of a text
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token: int) -> bytes:
        """Of a tokenizer that is not one of bytes, an incomplete character is that of U+FFFD."""
        if token not in self._known:
            before, both = (self._tokenizer.decode_bytes(ids) for ids in (self._anchor, [*self._anchor, token]))
            kept = both.startswith(before)
            self._known[token] = both[len(before) :] if kept else self._tokenizer.decode_bytes([token])
        return self._known[token]

    def text_of(self, token: int) -> str:
        """A token that is no whole characters is spelled as `bytes:` and an escape for each byte."""
        data = self.bytes_of(token)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
