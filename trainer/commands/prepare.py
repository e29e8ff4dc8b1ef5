"""`prepare`: turns text into MDS shards."""

from __future__ import annotations

from trainer.commands import Verb
from trainer.core.config import PrepareConfig


def run(config: PrepareConfig) -> None:
    """Run the verb. Raises UserError."""
    from trainer.data.prepare import prepare

    prepare(config)


VERB = Verb(name="prepare", help="text to MDS shards", config=PrepareConfig, run=run, alone=True)
