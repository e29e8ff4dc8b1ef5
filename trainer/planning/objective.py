"""The objective of a run: whether it can train on the data, and what its settings mean with their tokenizer."""

from __future__ import annotations

from typing import Any

from trainer.core.errors import UserError
from trainer.core.text import printable
from trainer.data.dataset import TOKENIZER, DatasetInfo
from trainer.data.stream import local_folder
from trainer.data.tokenizers import Tokenizer
from trainer.objectives import build_objective, resolve_objective
from trainer.objectives.base import REGISTRY
from trainer.planning.resolver import Draft


def choose_objective(draft: Draft, dataset: DatasetInfo | None) -> Draft:
    """The objective's settings, in the types of its own Config. dataset: the data; None: not prepared yet. UserError if it cannot
    train on them, or if they lack what it reads."""
    given, data = draft.config.objective, draft.config.data
    resolved = resolve_objective(given)
    name, cls = resolved["name"], REGISTRY[resolved["name"]]
    records = data.records if dataset is None else dataset.records
    if records not in cls.records:
        raise UserError(
            f"objective.name: {name} trains on {' or '.join(cls.records)} data, and {data.path or 'data.records'} is {records}; "
            f"prepare data with --records {cls.records[0]}, or set another objective"
        )
    if records == "chat" and name == "next_token":
        draft = draft.note("objective.name", name, "trains on prompts and answers alike; sft trains on answers alone")
    rules = {key: "set" if key in given else f"the default of {name}" for key in resolved if key != "name"}
    if cls.token_fields and dataset is not None:
        texts = {key: resolved[key] for key in cls.token_fields}
        file = local_folder(data, dataset) / TOKENIZER
        resolved["ids"] = token_ids(texts, Tokenizer.from_file(file, dataset.tokenizer.name, dataset.tokenizer.eot_id))
        rules["ids"] = f"of {', '.join(texts)} and the end of a text, in tokenizer {dataset.tokenizer.name}"
    for key, rule in rules.items():
        draft = draft.note(f"objective.{key}", resolved[key], rule)
    if dataset is not None:
        try:
            build_objective(resolved).check_columns(dataset.columns)
        except ValueError as error:
            raise UserError(f"objective.{error}") from None
    return draft.set("", "objective", resolved)


def token_ids(texts: dict[str, Any], tokenizer: Tokenizer) -> list[int]:
    """The id of each token, then of that which ends documents. texts: by field of the objective. UserError if one is no token of its
    own."""
    ids: list[int] = []
    for key, text in texts.items():
        found = tokenizer.id_of(text)
        if found is None or found in (*ids, tokenizer.eot_id):
            why = "is not one token of" if found is None else "has another meaning in"
            raise UserError(
                f"objective.{key}: {printable(repr(text), 60)} {why} tokenizer {tokenizer.name}; name a token that it has and that no "
                "text holds"
            )
        ids.append(found)
    return [*ids, tokenizer.eot_id]
