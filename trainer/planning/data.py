"""How a run reads its data: what its rows are made of, and what an epoch of them holds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from trainer.core.config import DataConfig
from trainer.core.errors import UserError
from trainer.core.files import user_path
from trainer.core.text import printable
from trainer.data.tokenizers import SIZES, get_tokenizer
from trainer.planning.length import Epoch, tokens_at_lengths
from trainer.planning.resolver import Draft


def choose_tokenizer(draft: Draft, dataset: Any) -> tuple[Draft, str]:
    """data.tokenizer, and a line if the config names another one than that of the data, which counts. dataset: as in `choose_packing`."""
    data = draft.config.data
    if dataset is None:
        return draft.fill("data", "tokenizer", data.new_tokenizer, "the default (data not prepared yet)"), ""
    own = dataset.tokenizer.name
    if data.tokenizer is None or is_tokenizer(data, dataset):
        return draft.fill("data", "tokenizer", own, f"that of {data.path}"), ""
    line = f"data.tokenizer: {printable(data.tokenizer)}, but {data.path} was prepared with {own}"
    return draft.note("data.tokenizer", own, f"that of {data.path}; {printable(data.tokenizer)} is not used"), line


def is_tokenizer(data: DataConfig, dataset: Any) -> bool:
    """Whether data.tokenizer, which is given, names the tokenizer of a DatasetInfo, perhaps by another name."""
    given, own = data.new_tokenizer, dataset.tokenizer
    if given in (own.name, dataset.arguments.get("tokenizer")):
        return True
    if given in SIZES:  # may have been prepared from a copy of its files
        return own.vocab_size == SIZES[given]
    try:
        if not user_path(given, "data.tokenizer").exists():
            return False
        end = data.end_of_text or dataset.arguments.get("end_of_text")
        return get_tokenizer(given, end_of_text=end).sha256 == own.sha256
    except UserError:
        return False


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
    """The epoch, of data.mix that of all datasets together, and the padding as entries of the plan. None: not prepared yet."""
    data = draft.config.data
    if dataset is None:
        if data.mix:
            raise UserError("data.mix: there are no data at data.path yet; run `python -m trainer prepare` first")
        return draft, None
    draft, epoch = epoch_of(draft, "padding", data, dataset)
    if not data.mix:
        return draft, epoch
    from trainer.data.mixture import further_datasets, proportions

    if draft.config.epochs is not None:
        raise UserError("epochs: each dataset of data.mix has epochs of its own; give tokens or max_steps")
    epochs = [epoch]
    for name, (own, info) in further_datasets(data, dataset).items():
        if data.packing == "concat" and info.sample_length % draft.config.batch.sequence_length:
            raise UserError(
                f"data.mix.{name}.path: batch.sequence_length {draft.config.batch.sequence_length} does not divide the samples of "
                f"{own.path}, which have {info.sample_length} tokens; set another one"
            )
        draft, found = epoch_of(draft, f"padding of data.mix.{name}", own, info)
        epochs.append(found)
    last = proportions(data, draft.config.batch.sequence_length).weights(math.inf)
    filled, padding = (
        sum(weight * values[i] for weight, values in zip(last, epochs, strict=True)) / sum(last) for i in (1, 2)
    )
    return draft, Epoch(sum(found.tokens for found in epochs), filled, padding)


def epoch_of(draft: Draft, key: str, data: Any, info: Any) -> tuple[Draft, Epoch]:
    """The epoch of one dataset, and its padding as the entry `key`. data: its DataConfig."""
    length = draft.config.batch.sequence_length
    if draft.config.data.packing == "concat":
        return draft, Epoch(info.splits["train"].tokens, 1.0, 0.0)
    from trainer.data.packing import CHUNK, rows_of
    from trainer.data.stream import read_lengths

    rows = rows_of(read_lengths(data, info, "train"), data.packing, length, draft.config.seed, info.texts_per_row)
    epoch = Epoch(rows.tokens, rows.tokens / (rows.count * length), rows.padding())
    of = f"{rows.count:,} rows of {length} tokens"
    cut = "cut into several"
    if data.packing == "none":
        of = f"{rows.count:,} rows, in batches of {CHUNK} as wide as the longest of them"
        cut = f"cut at {length} tokens, and the rest is left out"
    rule = f"of {of}" + (f"; {rows.longer:,} longer documents are {cut}" if rows.longer else "")
    return draft.note(key, f"{epoch.padding:.2%}", rule), epoch


def note_mix(draft: Draft, dataset: Any) -> Draft:
    """The share of each dataset of data.mix as entries of the plan. The length of the run is decided."""
    data, batch = draft.config.data, draft.config.batch
    if not data.mix:
        return draft
    from trainer.data.mixture import further_datasets, proportions

    length = batch.sequence_length
    order = proportions(data, length)
    rows = sum(tokens_at_lengths(batch, draft.config.max_steps).values()) // length
    given = order.asked(np.array([float(rows)]))[0]
    infos = [dataset, *(info for _, info in further_datasets(data, dataset).values())]
    weights = [order.weights(row) for row in (0, rows)]
    for number, name in enumerate(["data.path", *(f"data.mix.{name}" for name in data.mix)]):
        first, last = (values[number] / sum(values) for values in weights)
        share = f"{last:.2%}" if first == last else f"{first:.2%} to {last:.2%}"
        tokens = infos[number].splits["train"].tokens
        rule = f"of the rows; {round(given[number] * length):,} places, at {tokens:,} tokens in an epoch"
        draft = draft.note(f"share of {name}", share, rule)
    return draft
