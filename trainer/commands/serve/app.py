"""The endpoints."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from trainer.commands.serve import ServeConfig
from trainer.commands.serve.guard import Guard, content_policy
from trainer.commands.serve.models import ANY_LENGTH, Job, ServedModel
from trainer.commands.serve.replies import Replies
from trainer.commands.serve.schema import Asked, Chat, Completion, RequestError, parse
from trainer.commands.serve.text import Piece
from trainer.core.errors import UserError
from trainer.core.text import printable
from trainer.data.readers import BadRow
from trainer.inference.decoding import encode_prompt

PAGE = Path(__file__).with_name("page.html")
CLIENT_LEFT = 499  # nobody reads it; the status that nginx logs


def make_app(config: ServeConfig, models: dict[str, ServedModel]) -> FastAPI:
    """The server's application. models: by name."""
    page = PAGE.read_text(encoding="utf-8")
    app = FastAPI(title="Crescendo", docs_url=None, redoc_url=None, openapi_url=None)  # those pages load from elsewhere
    endpoints = Endpoints(config, models)
    created = int(time.time())

    @app.get("/")
    async def show_page() -> Response:
        return HTMLResponse(page)

    @app.get("/v1/models")
    async def list_models() -> Response:
        return JSONResponse({"object": "list", "data": [card(model, created) for model in models.values()]})

    @app.get("/v1/models/{name}")
    async def show_model(name: str) -> Response:
        return JSONResponse(card(endpoints.model(name), created))

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await endpoints.answer(request, Completion)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await endpoints.answer(request, Chat)

    @app.exception_handler(RequestError)
    async def refuse(request: Request, error: RequestError) -> Response:
        return JSONResponse(error.content, error.status)

    @app.exception_handler(HTTPException)
    async def refuse_path(request: Request, error: HTTPException) -> Response:
        where = f"{request.method} {printable(request.url.path, 200)}"
        return await refuse(request, RequestError(f"{where}: {error.detail}", status=error.status_code))

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> Response:  # uvicorn prints the traceback
        return await refuse(request, RequestError("the server failed; see its terminal", status=500, code="failed"))

    app.add_middleware(
        Guard,
        hosts=[config.host, *config.allowed_hosts],
        api_key=config.api_key,
        max_body_bytes=config.max_body_bytes,
        policy=content_policy(page),
    )
    return app


def card(model: ServedModel, created: int) -> dict[str, Any]:
    """The entry of a model. chat: whether it has a chat template; context: tokens that it sees, null: any number."""
    more = {"step": model.opened.step, "context": model.context, "chat": model.conversations is not None}
    return {"id": model.name, "object": "model", "created": created, "owned_by": "crescendo", **more}


class Endpoints:
    """Answers requests for texts."""

    def __init__(self, config: ServeConfig, models: dict[str, ServedModel]) -> None:
        self.config, self.models = config, models
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="encoding")  # a long text must not hold up the others

    def model(self, name: str) -> ServedModel:
        if name not in self.models:
            known = ", ".join(self.models)
            raise RequestError(
                f"model: there is no {printable(name, 100)} here (known: {known})", "model", 404, "model_not_found"
            )
        return self.models[name]

    async def answer(self, request: Request, kind: type[Asked]) -> Response:
        """The text or texts of one request, as a whole or as a stream. Raises RequestError."""
        try:
            body = await asyncio.wait_for(request.body(), self.config.max_seconds)
        except asyncio.TimeoutError:
            raise RequestError("the body did not arrive in time", status=408) from None
        except ClientDisconnect:
            return Response(status_code=CLIENT_LEFT)
        asked = parse(kind, body)
        model = self.model(asked.model)
        prompts = await asyncio.get_running_loop().run_in_executor(self._encoding, self._prompts, model, asked)
        job = self._job(model, asked, prompts)
        rows = range(len(job.rows))
        echoed = [self._echo(model, asked, row // asked.n) for row in rows]
        replies = Replies(asked, isinstance(asked, Chat), model.fingerprint, model.spelling, echoed)

        def usage() -> dict[str, int]:
            asked_for = sum(map(len, prompts))
            return {"prompt_tokens": asked_for, "completion_tokens": job.made, "total_tokens": asked_for + job.made}

        model.start(job)
        if asked.stream:
            return Stream(job, events(job, replies, usage))
        answers = await collected(job, request)
        return Response(status_code=CLIENT_LEFT) if answers is None else JSONResponse(replies.whole(answers, usage()))

    def _prompts(self, model: ServedModel, asked: Asked) -> list[list[int]]:
        """The token ids of each prompt. RequestError for one that the model cannot read."""
        if isinstance(asked, Chat):
            prompts = [conversation(model, asked.plain_messages)]
        else:
            assert isinstance(asked, Completion)
            prompts = [encoded(model, prompt) for prompt in asked.prompts]
        limit = self.config.max_prompt_tokens or model.context or ANY_LENGTH
        longest = max(map(len, prompts))
        if longest > limit:
            param = "messages" if isinstance(asked, Chat) else "prompt"
            raise RequestError(
                f"{param}: {longest:,} tokens are more than {model.name} takes ({limit:,}); shorten it",
                param,
                code="context_length_exceeded",
            )
        return prompts

    def _job(self, model: ServedModel, asked: Asked, prompts: list[list[int]]) -> Job:
        config = self.config
        count = len(prompts) * asked.n
        if count > config.max_texts:
            raise RequestError(
                f"n: {count} texts in one request are more than the limit of this server ({config.max_texts})", "n"
            )
        new = asked.new_tokens
        if new is None:  # a chat ends by itself; what is left of the context, but not next to nothing
            left = config.max_new_tokens if model.context is None else max(16, model.context - len(prompts[0]))
            new = min(config.max_new_tokens, left)
        if new > config.max_new_tokens:
            raise RequestError(
                f"max_tokens: {new:,} are more than the limit of this server ({config.max_new_tokens:,})", "max_tokens"
            )
        seed = secrets.randbits(62) if asked.seed is None else asked.seed
        rows = [prompt for prompt in prompts for _ in range(asked.n)]
        return Job(rows, new, asked.stops, asked.alternatives, seed, asked.sampling)

    def _echo(self, model: ServedModel, asked: Asked, number: int) -> str:
        """What stands before the text of an answer: its prompt, if the request wants it back."""
        if not (isinstance(asked, Completion) and asked.echo):
            return ""
        prompt = asked.prompts[number]
        return prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt)


def encoded(model: ServedModel, prompt: str | list[int]) -> list[int]:
    """RequestError if it is no text, or holds ids that the tokenizer lacks."""
    if isinstance(prompt, str):
        try:
            return encode_prompt(model.tokenizer, prompt)
        except UserError as error:
            raise RequestError(str(error), "prompt") from None
    wrong = [token for token in prompt if not 0 <= token < model.tokenizer.vocab_size]
    if wrong:
        raise RequestError(
            f"prompt: token id {wrong[0]} is not between 0 and {model.tokenizer.vocab_size - 1}", "prompt"
        )
    return prompt


def conversation(model: ServedModel, messages: list[dict[str, Any]]) -> list[int]:
    """The token ids of a conversation, in the chat template of the run's data."""
    if model.conversations is None:
        raise RequestError(
            f"{model.name} has no chat template: its data are text; use /v1/completions, or train on rows of messages "
            "(prepare --records chat)",
            "model",
            code="no_chat_template",
        )
    try:
        segments = model.conversations.unanswered(messages, "messages")
        end = [model.tokenizer.eot_id]
        return [i for part in segments for i in model.tokenizer.encode(part.text).tolist() + end * part.closed]
    except UnicodeEncodeError:
        raise RequestError("messages: hold text that is not valid UTF-8", "messages") from None
    except BadRow as error:
        raise RequestError(str(error), "messages") from None


class Stream(StreamingResponse):
    """Server-sent events. The computation ends with the response, also if the client leaves before the first event."""

    def __init__(self, job: Job, content: AsyncIterator[str]) -> None:
        super().__init__(content, media_type="text/event-stream")
        self._job = job

    async def __call__(self, *args: Any) -> None:
        try:
            await super().__call__(*args)
        finally:
            self._job.cancel()


async def events(job: Job, replies: Replies, usage: Callable[[], dict[str, int]]) -> AsyncIterator[str]:
    """The events of a stream. An error is the last one."""
    try:
        for chunk in replies.opening():
            yield event(chunk)
        async for piece in job.pieces():
            yield event(replies.piece(piece))
        if replies.asked.with_usage:
            yield event(replies.usage(usage()))
        yield "data: [DONE]\n\n"
    except RequestError as error:
        yield event(error.content)


def event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def collected(job: Job, request: Request) -> list[list[Piece]] | None:
    """The pieces of each text, once all are there; None if the client leaves before. Raises RequestError."""

    async def collect() -> list[list[Piece]]:
        answers: list[list[Piece]] = [[] for _ in job.rows]
        async for piece in job.pieces():
            answers[piece.row].append(piece)
        return answers

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    collecting, leaving = asyncio.create_task(collect()), asyncio.create_task(leave())
    try:
        await asyncio.wait((collecting, leaving), return_when=asyncio.FIRST_COMPLETED)
        return collecting.result() if collecting.done() else None
    finally:
        collecting.cancel()
        leaving.cancel()
        job.cancel()
