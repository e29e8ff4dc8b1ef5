"""What a request may hold. A field that is unknown, wrong or not supported is an error that names it; none is ignored."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainer.core.errors import Damaged
from trainer.core.files import parse_json
from trainer.core.text import printable

MOST_STOPS = 16
MOST_ALTERNATIVES = 20
# Fields of OpenAI that this server lacks, with the values that mean "off", which clients send without being asked.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "metadata": ({},),
    "web_search_options": (),
}
INSTEAD = dict.fromkeys(("presence_penalty", "frequency_penalty"), "; this server has repetition_penalty (above 1)")


class RequestError(Exception):
    """A request that is not answered. status: of HTTP; param: the field that is wrong; code: a word for programs."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def content(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool = Field(False, description="padding against eavesdroppers, which this server has not")


class Asked(BaseModel):
    """The fields that both endpoints have. user: a name that clients may send; it changes nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    default_max_tokens: ClassVar[int | None] = None

    model: str
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=1e-3, le=1e3)  # beyond these, fp32 overflows
    n: int = Field(1, ge=1)
    stop: Any = None
    seed: int | None = Field(None, ge=0, le=2**62)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    @property
    def sampling(self) -> dict[str, Any]:
        """The fields of trainer.inference.sampling.Sampling."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        return {name: getattr(self, name) for name in names}

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def new_tokens(self) -> int | None:
        """Most new tokens of a text; None: the request does not say."""
        given = [value for value in (self.max_tokens, self.max_completion_tokens) if value is not None]
        return given[0] if given else self.default_max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many likeliest tokens the answer names at each token; None: no log-probabilities."""
        raise NotImplementedError

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self) -> None:
        """RequestError for values that pydantic cannot judge."""
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options: is for a stream; set stream to true too", "stream_options")
        if self.stream_options is not None and self.stream_options.include_obfuscation:
            raise RequestError("stream_options.include_obfuscation: is not supported", "stream_options")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise RequestError("max_tokens and max_completion_tokens differ; give one of them", "max_tokens")
        for name in ("max_tokens", "max_completion_tokens"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise RequestError(f"{name}: {value} is too small; at least 0", name)
        stops = self.stops
        if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
            raise RequestError("stop: must be a text or a list of texts, none of them empty", "stop")
        if len(stops) > MOST_STOPS:
            raise RequestError(f"stop: {len(stops)} texts are too many; at most {MOST_STOPS}", "stop")


class Completion(Asked):
    """Of /v1/completions. prompt: a text, a list of texts, a list of token ids, or a list of such lists."""

    default_max_tokens: ClassVar[int | None] = 16

    prompt: Any
    logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)
    echo: bool = False

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    def check(self) -> None:
        super().check()
        if self.echo and self.logprobs is not None:
            raise RequestError(
                "echo: log-probabilities of a prompt are not supported; leave out echo or logprobs", "echo"
            )

    @property
    def prompts(self) -> list[str | list[int]]:
        """RequestError if `prompt` is none of its types."""
        given = self.prompt
        prompts = [given] if isinstance(given, str) or is_ids(given) else given
        if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) or is_ids(p) for p in prompts):
            raise RequestError(
                "prompt: must be a text, a list of texts, a list of token ids, or a list of such lists; none may be an empty list",
                "prompt",
            )
        return prompts


class Chat(Asked):
    """Of /v1/chat/completions. messages: each an object with role and content."""

    messages: Any
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MOST_ALTERNATIVES)

    @property
    def alternatives(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs: needs logprobs: true", "top_logprobs")

    @property
    def plain_messages(self) -> list[dict[str, Any]]:
        """The messages with their content as one text. RequestError for what this server cannot read."""
        if not isinstance(self.messages, list) or not self.messages:
            raise RequestError("messages: must be a list of messages, each with role and content", "messages")
        return [_plain(message, f"messages[{i}]") for i, message in enumerate(self.messages)]


def _plain(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RequestError(f"{where}: must be an object with role and content", "messages")
    if further := [key for key in message if key not in ("role", "content")]:
        raise RequestError(f"{where}.{printable(further[0], 60)}: is not supported; leave it out", "messages")
    content = message.get("content")
    if isinstance(content, list):
        texts = [p.get("text") if isinstance(p, dict) and p.keys() == {"type", "text"} else None for p in content]
        if not all(isinstance(text, str) for text in texts) or any(p["type"] != "text" for p in content):
            raise RequestError(f"{where}.content: holds a part that is not text; only text is supported", "messages")
        content = "".join(texts)  # type: ignore[arg-type]
    return {"role": message.get("role"), "content": content}


def is_ids(value: Any) -> bool:
    """Whether `value` is a list of token ids."""
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def parse(kind: type[Asked], body: bytes) -> Any:
    """The request in `body`, an instance of `kind`. RequestError if it is not one."""
    try:
        given = parse_json(body, "body")
    except Damaged as error:
        raise RequestError(str(error)) from None
    values = {}
    for name, value in given.items():
        if name in UNSUPPORTED:
            if value is not None and value not in UNSUPPORTED[name]:
                raise RequestError(
                    f"{name}: is not supported by this server; leave it out{INSTEAD.get(name, '')}", name
                )
        elif name not in kind.model_fields:
            known = ", ".join(kind.model_fields)
            name = printable(name, 60)
            raise RequestError(
                f"{name}: is not a field of this endpoint (known: {known})", name, code="unknown_parameter"
            )
        elif value is not None:  # null is what clients send for a field that is not set
            values[name] = value
    try:
        asked = kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        raise RequestError(f"{name}: {first['msg']}", name) from None
    asked.check()
    return asked
