"""The objects of the answers, as OpenAI defines them."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from trainer.commands.serve.schema import Asked
from trainer.commands.serve.text import Piece, Spelling, Token

LEAST = -9999.0  # for a token that cannot come: JSON has no -inf


@dataclass
class Replies:
    """Builds the objects of one request. fingerprint: names the weights; echoed: of each answer, what comes before its text."""

    asked: Asked
    chat: bool
    fingerprint: str
    spelling: Spelling
    echoed: list[str]
    id: str = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{secrets.token_hex(12)}"

    def whole(self, answers: list[list[Piece]], usage: dict[str, int]) -> dict[str, Any]:
        """The answer of a request that is not streamed. answers: the pieces of each."""
        choices = [self._choice(row, pieces) for row, pieces in enumerate(answers)]
        return self._object("chat.completion" if self.chat else "text_completion", choices) | {"usage": usage}

    def opening(self) -> list[dict[str, Any]]:
        """The chunks before the first token."""
        if self.chat:
            return [self._chunk(row, {"role": "assistant", "content": ""}) for row in range(len(self.echoed))]
        return [self._chunk(row, text) for row, text in enumerate(self.echoed) if text]

    def piece(self, piece: Piece) -> dict[str, Any]:
        """The chunk of a stream for `piece`."""
        content: Any = piece.text
        if self.chat:
            content = {"content": piece.text} if piece.text or piece.tokens else {}
        return self._chunk(piece.row, content, self._logprobs(piece.row, piece.tokens), piece.finish or None)

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last chunk of a stream, if the request asks for it."""
        return self._object("chat.completion.chunk" if self.chat else "text_completion", []) | {"usage": usage}

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.asked.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }

    def _choice(self, row: int, pieces: list[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        tokens = [token for piece in pieces for token in piece.tokens]
        content: dict[str, Any] = {"text": self.echoed[row] + text}
        if self.chat:
            content = {"message": {"role": "assistant", "content": text, "refusal": None}}
        finish = {"logprobs": self._logprobs(row, tokens), "finish_reason": pieces[-1].finish}
        return {"index": row, **content, **finish}

    def _chunk(self, row: int, content: Any, logprobs: Any = None, finish: str | None = None) -> dict[str, Any]:
        choice = {
            "index": row,
            "delta" if self.chat else "text": content,
            "logprobs": logprobs,
            "finish_reason": finish,
        }
        chunk = self._object("chat.completion.chunk" if self.chat else "text_completion", [choice])
        return chunk | ({"usage": None} if self.asked.with_usage else {})

    def _logprobs(self, row: int, tokens: list[Token]) -> dict[str, Any] | None:
        if self.asked.alternatives is None:
            return None
        if self.chat:
            return {"content": [self._chat_token(token) for token in tokens], "refusal": None}
        before = len(self.echoed[row])
        return {
            "tokens": [self.spelling.text_of(token.event.token) for token in tokens],
            "token_logprobs": [finite(token.event.log_probability) for token in tokens],
            "top_logprobs": [self._likeliest(token) for token in tokens] if self.asked.alternatives else None,
            "text_offset": [before + token.offset for token in tokens],
        }

    def _likeliest(self, token: Token) -> dict[str, float]:
        """The likeliest tokens with their log-probabilities, and the chosen one, which may not be among them."""
        pairs = [*token.event.alternatives, (token.event.token, token.event.log_probability)]
        return {self.spelling.text_of(other): finite(value) for other, value in pairs}

    def _chat_token(self, token: Token) -> dict[str, Any]:
        chosen = self._entry(token.event.token, token.event.log_probability)
        return chosen | {"top_logprobs": [self._entry(*pair) for pair in token.event.alternatives]}

    def _entry(self, token: int, value: float | None) -> dict[str, Any]:
        return {
            "token": self.spelling.text_of(token),
            "logprob": finite(value),
            "bytes": list(self.spelling.bytes_of(token)),
        }


def finite(value: float | None) -> float:
    """A log-probability as JSON can hold it. The request has asked for it, so it is there."""
    assert value is not None
    return max(value, LEAST)
