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

    predicts = config.teacher is not None or config.patches is not None
    prepare(config, predictor=functools.partial(open_predictor, config) if predicts else None)


def open_predictor(config: PrepareConfig, tokenizer: TokenizerInfo) -> Any:
    from trainer.inference.patches import EntropyColumn
    from trainer.inference.teacher import Teacher

    return Teacher(config, tokenizer) if config.teacher is not None else EntropyColumn(config, tokenizer)


VERB = Verb(name="prepare", help="text to MDS shards", config=PrepareConfig, run=run, alone=True)
