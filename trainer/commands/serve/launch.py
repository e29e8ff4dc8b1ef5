"""The work of `serve`: opens the runs, binds the port, and runs the server until a signal ends it."""

from __future__ import annotations

import importlib.util
import socket
import sys
from types import FrameType
from typing import TYPE_CHECKING, Any

from trainer.commands.serve import ServeConfig
from trainer.core.errors import MachineError, UserError
from trainer.core.text import printable

if TYPE_CHECKING:
    from trainer.commands.serve.models import ServedModel

LOCAL = ("127.0.0.1", "localhost", "::1")
SECONDS_TO_STOP = 1  # for answers that clients do not read
CONNECTIONS = 256  # at a time; further ones get status 503


def serve(config: ServeConfig) -> None:
    """Serve the runs until a signal comes. UserError if a run, the address or a package is wrong."""
    check(config)
    listener = bind(config.host, config.port)
    models = open_models(config)
    from trainer.commands.serve.app import make_app

    address = f"http://{bracketed(config.host)}:{listener.getsockname()[1]}"
    try:
        make_server(make_app(config, models), models, ready_lines(config, models, address)).run(sockets=[listener])
    finally:
        for model in models.values():
            model.close()


def check(config: ServeConfig) -> None:
    """UserError for what is missing or empty."""
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"serve: needs the package {missing[0]}; install it with `pip install 'crescendo-lm[serve]'`")
    if not config.runs:
        raise UserError("runs: name the folders of one or more runs, as in `python -m trainer serve runs/NAME`")
    if not config.host.strip():
        raise UserError("host: is empty; give an address, such as 127.0.0.1")
    if config.api_key is not None and not (config.api_key.strip().isascii() and config.api_key.strip()):
        raise UserError("api_key: is empty or not ASCII; give a long random text, or leave it out")


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens. Done before the models are loaded, so that a port in use is known at once. Raises UserError."""
    where = f"{printable(host, 100)}:{port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise UserError(f"host: {where} is not an address of this machine ({printable(error)})") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        raise MachineError(
            f"port: cannot listen on {where} ({printable(error.strerror)}); give another --port (0: any free one)"
        ) from None
    return listener


def open_models(config: ServeConfig) -> dict[str, ServedModel]:
    """The models by name: the run's folder, with @STEP if that was given. Each is loaded once."""
    from trainer.checkpoint.quantized import is_quantized
    from trainer.commands.serve.models import ServedModel
    from trainer.core.files import user_path
    from trainer.planning.run_config import branch_point
    from trainer.runs.opening import open_run

    models: dict[str, ServedModel] = {}
    for text in config.runs:
        folder, step, wanted = user_path(text, "runs"), 0, None
        if not is_quantized(folder):
            folder, step = branch_point(text, "runs")
            wanted = step if "@" in text else None
        name = folder.resolve().name + (f"@{step}" if wanted is not None else "")
        if name in models:
            raise UserError(f"runs: two are named {printable(name)}; a model is named after its folder, so rename one")
        opened = open_run(str(folder), wanted, config.device, config.precision, weights=config.weights)
        models[name] = ServedModel(name, opened, template_of(opened), config.max_requests, config.max_seconds)
    return models


def template_of(opened: Any) -> Any:
    """The chat template of a run's data; None if they are text."""
    from trainer.data.dataset import DatasetInfo
    from trainer.data.records import conversations_of

    info = DatasetInfo.load(opened.folder)
    return None if info.records == "text" else conversations_of(info, str(opened.folder))


def ready_lines(config: ServeConfig, models: dict[str, ServedModel], address: str) -> list[str]:
    """What is printed once the server answers."""
    lines = [f"{address} serves {', '.join(map(printable, models))} (the page: {address}/, OpenAI's API: {address}/v1)"]
    if config.host not in LOCAL and config.api_key is None:
        lines.append(
            f"warning: whoever reaches {printable(config.host, 100)} can use the models without authentication; --api_key KEY asks for a key"
        )
    return [*lines, "Ctrl-C stops it"]


def bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def make_server(app: Any, models: dict[str, ServedModel], lines: list[str]) -> Any:
    """uvicorn's server of `app`. lines: printed to stderr once it answers."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            print(*lines, sep="\n", file=sys.stderr, flush=True)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            for model in models.values():
                model.close()  # their answers end now, and uvicorn waits for answers
            super().handle_exit(sig, frame)

    return Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            ws="none",
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=SECONDS_TO_STOP,
        )
    )
