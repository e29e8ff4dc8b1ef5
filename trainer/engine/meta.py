"""Models without storage: their shapes, and what is said where one cannot be built."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.core.errors import UserError
from trainer.core.text import printable

KERNEL_FIELDS = ("attention_kernel", "kernels")  # of a model's Config, where a kernel may be named


def build_meta(model_class: Any, model_config: Any) -> Any:
    """The model with shapes but no memory."""
    import torch

    with torch.device("meta"):
        return model_class(model_config)


@contextlib.contextmanager
def told_of_model(model_class: Any, what: str) -> Iterator[None]:
    """Turn whatever a model raises within into one line: its name, `what` cannot be, the cause, and the line of its file."""
    from models.base import get_model, model_names

    try:
        yield
    except UserError:
        raise
    except Exception as error:
        name = next((name for name in model_names() if get_model(name) is model_class), model_class.__name__)
        file = str(getattr(sys.modules.get(model_class.__module__), "__file__", ""))
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        place = f" ({Path(file).name}, line {lines[-1]})" if lines else ""
        cause = printable(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}", 300)
        raise UserError(f"model {name}: {what}: {cause}{place}") from error
