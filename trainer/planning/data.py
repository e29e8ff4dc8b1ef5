"""How a run reads its data: what its rows are made of, and what an epoch of them holds."""

from __future__ import annotations

from typing import Any, NamedTuple

from trainer.core.errors import UserError
from trainer.planning.resolver import Draft


class Epoch(NamedTuple):
    """An epoch of the training split. tokens: without padding; filled: their share of rows x length; padding: share of it in the
    tensors that the model is given."""

    tokens: int
    filled: float
    padding: float


def choose_packing(draft: Draft, dataset: Any) -> Draft:
    """data.packing. dataset: the DatasetInfo; None: not prepared yet. UserError where the data are not fit for what is asked."""
    records = draft.config.data.records if dataset is None else dataset.records
    rule = f"the data are {records}" if dataset is not None else f"the default of {records} (data not prepared yet)"
    draft = draft.fill("data", "packing", "concat" if records == "text" else "none", rule)
    packing = draft.config.data.packing
    if records == "preference" and packing != "none":
        raise UserError(
            f"data.packing: {packing} would tear the pairs of preference data in {draft.config.data.path}; set it to none"
        )
    if records == "chat" and packing == "concat" and draft.config.data.separate_documents:
        raise UserError(
            "data.separate_documents: in rows of packing concat a document ends at an end-of-text id, but so does each answer of a "
            "conversation; set data.packing to none or best_fit"
        )
    return draft


def read_epoch(draft: Draft, dataset: Any) -> tuple[Draft, Epoch | None]:
    """The epoch, and its padding as an entry of the plan. None: the data are not prepared yet."""
    if dataset is None:
        return draft, None
    data, length = draft.config.data, draft.config.batch.sequence_length
    if data.packing == "concat":
        return draft, Epoch(dataset.splits["train"].tokens, 1.0, 0.0)
    from trainer.data.packing import CHUNK, rows_of
    from trainer.data.stream import read_lengths

    rows = rows_of(read_lengths(data, dataset, "train"), data.packing, length, draft.config.seed, dataset.texts_per_row)
    epoch = Epoch(rows.tokens, rows.tokens / (rows.count * length), rows.padding())
    of = f"{rows.count:,} rows of {length} tokens"
    cut = "cut into several"
    if data.packing == "none":
        of = f"{rows.count:,} rows, in batches of {CHUNK} as wide as the longest of them"
        cut = f"cut at {length} tokens, and the rest is left out"
    rule = f"of {of}" + (f"; {rows.longer:,} longer documents are {cut}" if rows.longer else "")
    return draft.note("padding", f"{epoch.padding:.2%}", rule), epoch
