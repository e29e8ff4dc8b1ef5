"""TensorBoard. It is optional, and its failures never stop a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.core.errors import UserError
from trainer.runtime.distributed import World

FOLDER = "tensorboard"
EVENTS_IN_MEMORY = 1000  # so that a slow disk does not stop a step


class TensorBoard:
    """The rows and samples of a run as event files in RUN/tensorboard. Only rank 0 makes one.

    A run that goes on adds a file which says from which step on the older ones no longer count: no step is shown twice.
    """

    def __init__(self, wanted: bool, folder: Path, step: int, world: World) -> None:
        """step: the last one whose row is kept."""
        self._writer: Any = None
        self._world = world
        if not wanted:
            return
        with world.decoration("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / FOLDER), purge_step=step + 1, max_queue=EVENTS_IN_MEMORY)

    def write(self, row: dict[str, Any]) -> None:
        """Record the numbers of a row under its step, and its words as text."""
        if self._writer is None:
            return
        with self._world.decoration("tensorboard"):
            for key, value in row.items():
                if isinstance(value, str):
                    self._writer.add_text(key, value, row["step"])
                elif value is not None and key != "step":
                    self._writer.add_scalar(key, value, row["step"])

    def sample(self, text: str, step: int) -> None:
        if self._writer is not None:
            with self._world.decoration("tensorboard"):
                self._writer.add_text("sample", as_markdown(text), step)

    def flush(self) -> None:
        """Before a checkpoint: what a run goes on from has its rows here too."""
        if self._writer is not None:
            with self._world.decoration("tensorboard"):
                self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            with self._world.decoration("tensorboard"):
                self._writer.close()


def as_markdown(text: str) -> str:
    """TensorBoard shows texts as Markdown: indented lines stay as they are."""
    return "\n".join("    " + line for line in text.splitlines())


def check_installed(wanted: bool) -> None:
    """UserError if TensorBoard is wanted and not installed."""
    if not wanted:
        return
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise UserError(
            "log.tensorboard: tensorboard is not installed; `pip install 'crescendo-lm[tensorboard]'` (or `pip install tensorboard`), "
            "or set it to false"
        ) from None
