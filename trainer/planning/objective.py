"""The objective of a run: whether it can train on the data, and what its settings mean with their tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from models.base import with_hidden
from trainer.core.errors import UserError
from trainer.core.text import printable
from trainer.data.dataset import TOKENIZER, DatasetInfo
from trainer.data.stream import local_folder
from trainer.data.tokenizers import Tokenizer
from trainer.engine.meta import stand_ins, told_of_model
from trainer.objectives import build_objective, resolve_objective
from trainer.objectives.base import REGISTRY, Objective, example_batch
from trainer.planning.frozen import Frozen
from trainer.planning.resolver import Draft, ModelFacts
from trainer.runtime.compat import fake_tensors


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


def choose_layers(
    draft: Draft, model: ModelFacts, frozen: Mapping[str, Frozen]
) -> tuple[Draft, dict[str, tuple[int, int]]]:
    """The linear layers that the objective trains with the model: name -> (inputs, outputs). frozen: its frozen models."""
    config = draft.config
    name = config.objective["name"]
    if REGISTRY[name].linear_layers is Objective.linear_layers:
        return draft, {}
    what = f"the objective {name} does not find its layers on tensors without values, as planning does"
    with told_of_model(model.model_class, what), fake_tensors(), torch.no_grad():
        student = model.model_class(model.model_class.without_device_kernels(model.config))
        objective = build_objective(config.objective, stand_ins(frozen))
        tokens = torch.zeros(1, config.batch.sequence_length, dtype=torch.long)  # [B, T]
        layers = objective.linear_layers(with_hidden(student), example_batch(objective, student, tokens))
    for key, (inputs, outputs) in layers.items():
        rule = f"parameters of a layer {inputs:,} -> {outputs:,}, trained with the model and no part of it"
        draft = draft.note(f"objective layer {key}", inputs * outputs, rule)
    return draft, layers


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
