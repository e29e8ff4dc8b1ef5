"""What is checked of every request before the endpoints see it, and the headers that every answer carries."""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import re
from typing import Any

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trainer.commands.serve.schema import RequestError
from trainer.core.text import printable

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """ASGI middleware. It refuses

    - a Host header with a name that is not known: a web page could give its own name the address of this machine, and then read the
      answers (DNS rebinding). An address cannot be used so;
    - a request without the API key, if there is one;
    - a body that is not JSON by its type: a page of another origin can send anything else without asking the browser's leave;
    - a body that is too large.
    """

    def __init__(self, app: ASGIApp, hosts: list[str], api_key: str | None, max_body_bytes: int, policy: str) -> None:
        """policy: the Content-Security-Policy of all answers."""
        self.app, self.max_body_bytes = app, max_body_bytes
        self.hosts = {"localhost", *(host.lower().rstrip(".") for host in hosts)}
        self.api_key = None if api_key is None else api_key.encode()
        self.headers = HEADERS | {"Content-Security-Policy": policy}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        read = 0

        async def receiving() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.max_body_bytes:
                raise self._too_large()
            return message

        try:
            self._check(scope, Headers(scope=scope))
        except RequestError as error:
            await JSONResponse(error.content, error.status)(scope, receive, sending)
            return
        await self.app(scope, receiving, sending)

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Raises RequestError."""
        host = headers.get("host", "")
        if not self._is_known(host):
            raise RequestError(
                f"Host {printable(host, 100)!r} is not a name of this server; use its address or localhost, or start it with "
                "--allowed_hosts NAME",
                status=403,
                code="unknown_host",
            )
        if not scope["path"].startswith("/v1"):  # the page holds nothing secret
            return
        if self.api_key is not None and not self._has_key(headers.get("authorization", "")):
            raise RequestError(
                "this server needs its key: send the header `Authorization: Bearer KEY`",
                status=401,
                code="invalid_api_key",
            )
        if scope["method"] != "POST":
            return
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RequestError(
                f"Content-Type is {printable(kind, 60) or 'missing'}; send JSON with `Content-Type: application/json`",
                status=415,
            )
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self.max_body_bytes:
            raise self._too_large()

    def _is_known(self, host: str) -> bool:
        """Whether a Host header holds an address, or one of the names."""
        name = re.sub(r":\d*$", "", host).lower().rstrip(".")
        try:
            ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
            return True
        except ValueError:
            return name in self.hosts

    def _has_key(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self.api_key or b"")

    def _too_large(self) -> RequestError:
        return RequestError(
            f"the request has more than {self.max_body_bytes:,} bytes, the limit of this server",
            status=413,
            code="too_large",
        )


def content_policy(page: str) -> str:
    """The Content-Security-Policy of the page: its own script and style by their hashes, its own server, nothing else."""

    def hashes(tag: str) -> str:
        parts: list[Any] = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" for part in parts
        )

    rules = {
        "default-src": "'none'",
        "script-src": hashes("script"),
        "style-src": hashes("style"),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())
