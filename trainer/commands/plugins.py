"""Plug-ins: the user's own modules and files, which register models, optimizers or objectives."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from trainer.core.errors import UserError

_IMPORTED: dict[str, ModuleType] = {}


def imported_plugins() -> list[ModuleType]:
    """The plug-ins that this process has imported, in order."""
    return list(_IMPORTED.values())


def import_plugin(given: str) -> ModuleType:
    """Import a plug-in by its module's name, or by the path of its .py file. Raises a one-line UserError if that fails."""
    module = _import(given)
    _IMPORTED[module.__name__] = module
    return module


def _import(given: str) -> ModuleType:
    from models.base import BrokenModel, told_in_one_line

    try:
        if given.endswith(".py") or os.sep in given:
            return _import_file(given)
        # `crescendo`, unlike `python -m trainer`, does not search the current folder. It comes last, so that it hides no module.
        _look_in(Path.cwd())
        with told_in_one_line(given):
            return importlib.import_module(given)
    except BrokenModel as error:
        raise UserError(f"plugin: {error}") from None


def _import_file(given: str) -> ModuleType:
    """Import a file as the module of that name; it can import modules that lie beside it."""
    from models.base import BrokenModel, told_in_one_line

    path = Path(given).expanduser().resolve()
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"plugin: {given}: {'is not a .py file' if path.exists() else 'there is no such file'}")
    name = path.stem
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path):
        return loaded
    if loaded is not None or not name.isidentifier():
        name = "plugin_" + "".join(c if c.isalnum() else "_" for c in name)  # replaces no module of that name
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    _look_in(path.parent)
    sys.modules[name] = module  # dataclasses look up their types there
    try:
        with told_in_one_line(given):
            spec.loader.exec_module(module)
    except BrokenModel:
        del sys.modules[name]
        raise
    return module


def _look_in(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
