"""A stand-in for DeepSpeed's coordinator. ZeRO-3's hooks call the coordinator to gather a module's weights before its forward
pass and to release them after it."""

from __future__ import annotations

from typing import Any


class RestingCoordinator:
    """Replaces the coordinator while all weights are gathered. It gathers nothing and releases nothing.

    DeepSpeed's coordinator must not see these passes: it records the order in which weights are used, and which to release after
    which module, and training continues with this record.
    """

    def reset_step(self) -> None:
        pass

    def trace_prologue(self, module: Any) -> None:
        pass

    def is_record_trace(self) -> bool:
        return False

    def fetch_sub_module(self, module: Any, forward: bool) -> None:
        pass

    def release_sub_module(self, module: Any, forward: bool) -> None:
        pass
