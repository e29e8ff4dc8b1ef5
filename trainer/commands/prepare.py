"""`prepare`: turns text into MDS shards."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from trainer.commands import Verb
from trainer.core.config import PrepareConfig

if TYPE_CHECKING:
    from trainer.data.dataset import TokenizerInfo


def run(config: PrepareConfig) -> None:
    """Run the verb. Raises UserError."""
    from trainer.data.prepare import prepare

    prepare(config, teacher=None if config.teacher is None else functools.partial(open_teacher, config))


def open_teacher(config: PrepareConfig, tokenizer: TokenizerInfo) -> Any:
    from trainer.inference.teacher import Teacher

    return Teacher(config, tokenizer)


VERB = Verb(name="prepare", help="text to MDS shards", config=PrepareConfig, run=run, alone=True)
