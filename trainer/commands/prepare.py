"""`prepare`: text to MDS shards."""

from __future__ import annotations

from trainer.core.config import PrepareConfig
from trainer.data.prepare import prepare


def run(config: PrepareConfig) -> None:
    """The verb `prepare`. Raises UserError."""
    prepare(config)
