"""Crescendo: one model file, one dial, from a laptop to a cluster."""

import importlib.machinery
import os
import sys
from pathlib import Path
from typing import Any

__version__ = "0.3.0"


class _OurModels:
    """Finds the package `models` next to this one. `python -m` looks in the current folder first, which may have another one."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        root = Path(__file__).parent.parent
        return importlib.machinery.PathFinder.find_spec(name, [str(root)]) if name == "models" else None


sys.meta_path.insert(0, _OurModels)  # type: ignore[arg-type]

# Compiled code is kept in the user's cache folder, where a later start finds it: torch's default folder is emptied at boot. Set
# here, because torch chooses its folder as soon as its compiler is imported.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path.home() / ".cache" / "crescendo" / "inductor"))
