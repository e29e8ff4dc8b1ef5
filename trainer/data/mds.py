"""The one door to mosaicml-streaming, which imports torchvision for datasets this project never opens."""

from __future__ import annotations

import sys
import warnings
from types import ModuleType


def import_streaming() -> ModuleType:
    """The `streaming` package, also where torchvision is missing or was built for another torch; prints nothing."""
    if "streaming" not in sys.modules and not _torchvision_works():
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]  # what a failed import leaves behind
        sys.modules["streaming.vision"] = ModuleType("streaming.vision")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import streaming
    return streaming


def _torchvision_works() -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import torchvision  # noqa: F401
        except Exception:  # a mismatched build raises RuntimeError or OSError, not only ImportError
            return False
    return True
