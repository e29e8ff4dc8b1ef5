"""`serve`: an HTTP server for one or several runs, with OpenAI's endpoints and a page. README.md is the guide.

launch.py: the verb's work; app.py: the endpoints; guard.py: what is checked before them; schema.py: what a request may hold; models.py:
a run that is served, its queue and its thread; text.py: the text of tokens while they are made; replies.py: the objects of the answers;
page.html: the page.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainer.commands import Verb
from trainer.core.config import WEIGHTS, Precision
from trainer.core.settings import setting


@dataclass
class ServeConfig:
    """`serve`: which runs, where the server listens, and its limits."""

    runs: list[str] = setting((), "RUN[@STEP] of each model; the words before the flags")
    weights: str = setting("evaluation", WEIGHTS)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to compute")
    precision: Precision = setting("auto", "compute type; the weights do not change")
    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0: all of this machine, for others too")
    port: int = setting(8000, "port to listen on; 0: any free one", low=0, high=65535)
    api_key: str | None = setting(
        None, "clients must send this key (Authorization: Bearer KEY); auto: none is asked for"
    )
    allowed_hosts: list[str] = setting(
        (), "further names under which clients may reach the server, besides addresses and localhost (Host header)"
    )
    max_requests: int = setting(
        8, "requests of one model at a time: one is computed, the others wait; more are refused (429)", low=1
    )
    max_body_bytes: int = setting(2**20, "largest request", low=1024)
    max_prompt_tokens: int | None = setting(None, "longest prompt; auto: the model's context, or 32768", low=1)
    max_new_tokens: int = setting(4096, "largest max_tokens of a request", low=1)
    max_texts: int = setting(16, "most texts of a request: its prompts, each n times", low=1)
    max_seconds: float = setting(300.0, "longest computation of a request; then it ends with an error", above=0)


def run(config: ServeConfig) -> None:
    """The verb `serve`."""
    from trainer.commands.serve.launch import serve

    serve(config)


VERB = Verb(
    name="serve",
    help="a server for runs: OpenAI's endpoints and a page to try prompts on",
    config=ServeConfig,
    run=run,
    alone=True,
    words="runs",
    interrupted="stopped",
)
