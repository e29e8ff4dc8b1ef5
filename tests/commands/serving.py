"""A real server in a thread, for tests of `serve`."""

import contextlib
import json
import threading
import time

from conftest import tiny_values

from trainer.commands.serve import ServeConfig
from trainer.commands.train import run
from trainer.core.config import PrepareConfig
from trainer.data.prepare import prepare

TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "red"},
    {"role": "assistant", "content": "[RED]"},
    {"role": "user", "content": "blue"},
    {"role": "assistant", "content": "[BLUE]"},
]


def chat_run(folder):
    """A run of two steps on conversations, with the template `chat`."""
    (folder / "rows.jsonl").write_text(f"{json.dumps({'messages': TURNS})}\n" * 20)
    options = {"tokenizer": "bytes", "workers": 1, "sample_length": 64, "validation_fraction": 0.1}
    prepare(
        PrepareConfig(source=str(folder / "rows.jsonl"), out=str(folder / "data"), records="chat", **options),
        lambda line: None,
    )
    changes = {"objective": {"name": "sft"}, "max_steps": 2, "batch__sequence_start": 64}
    run(tiny_values(folder / "data", folder / "chat", **changes))
    return folder / "chat"


@contextlib.contextmanager
def serving(models, **changes):
    """The address of a server of these models. changes: keys of ServeConfig."""
    from trainer.commands.serve.app import make_app
    from trainer.commands.serve.launch import bind, make_server

    config = ServeConfig(runs=list(models), **changes)
    listener = bind("127.0.0.1", 0)
    server = make_server(make_app(config, models), models, [])
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        for model in models.values():
            model.close()
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


class Gate:
    """Holds the forward passes of a served model, and counts them."""

    def __init__(self, model):
        self.passes, self.permits, self.free = 0, threading.Semaphore(0), False
        self._opened, self._predict = model.opened, model.opened.predict
        model.opened.predict = self._gated

    def _gated(self, *args, **options):
        if not self.free:
            assert self.permits.acquire(timeout=20)
        self.passes += 1
        return self._predict(*args, **options)

    def open(self):
        """From now on nothing is held."""
        self.free = True
        self.permits.release(1000)

    def remove(self):
        self.open()
        self._opened.predict = self._predict
