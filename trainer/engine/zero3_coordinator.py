"""ZeRO-3's hooks ask a coordinator of DeepSpeed's to gather a module's weights before its forward pass and to release them after it."""

from __future__ import annotations

from typing import Any


class RestingCoordinator:
    """In the coordinator's place while all weights are gathered: nothing to gather, and nothing is released.

    DeepSpeed's own must not see these passes: it remembers in which order weights are used, and what to release after which
    module, for the training that goes on afterwards.
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
