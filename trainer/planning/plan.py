"""`plan`: every number of a run before the run, each with the rule it came from.

`resolve` fills every `None` of a RunConfig; `train` runs on the result and `plan` prints it. Models are only built on
the meta device, so a laptop can plan 3 B parameters.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from models.objective_layers import with_layers
from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import build
from trainer.data.tokenizers import SIZES, get_tokenizer
from trainer.engine.meta import build_meta, flops_per_token, told_of_model
from trainer.optim import schedules
from trainer.planning import dial
from trainer.planning.advice import advice, epochs_of
from trainer.planning.data import choose_packing, choose_tokenizer, note_mix, read_epoch
from trainer.planning.dial import DEFAULT_SCALE
from trainer.planning.expected import DialFile, Expected, choose_dial, expect
from trainer.planning.frozen import Frozen, choose_frozen
from trainer.planning.length import Epoch, choose_length, sequence_lengths, tokens_at_lengths, whole_sequences
from trainer.planning.memory import GIB, MemoryEstimate, ParallelLayout, expected_memory
from trainer.planning.model import check_vocabulary, read_model, with_init_std, with_threshold, written_out
from trainer.planning.mup import check_mup
from trainer.planning.objective import choose_layers, choose_objective
from trainer.planning.resolver import (
    Draft,
    ModelFacts,
    choose_background,
    choose_batch,
    choose_engine,
    choose_hardware,
    choose_microbatch,
    choose_optimiser,
    choose_recipe,
    choose_rest,
    follow_launcher_config,
)
from trainer.planning.roles import check_roles, choose_roles
from trainer.recipes import PlanEntry, recipe_rows
from trainer.runtime.launcher import find_rank_info

SIZE_TOLERANCE = 0.1  # of `parameters`: hlb's sizes come in steps, and narrow models cannot be cut finer


@dataclass(frozen=True)
class Plan:
    """A run with nothing left to infer. Rank 0 makes it and sends it to the other ranks.

    config: RunConfig without `None`s; model_config: the model's Config; entries: every number with its rule
    parameters: total count; non_embedding: without token and position embeddings and head; trained: without frozen ones;
    processes: of the whole run. The counts are of the published model: `model_class` may have `objective_layers` besides.
    """

    config: Any  # a RunConfig; typed Any, since its `None`s are gone
    model_class: Any
    model_config: Any
    entries: tuple[PlanEntry, ...]
    parameters: int
    non_embedding: int
    trained: int
    vocab_size: int  # ids the tokenizer uses; the model's may be padded
    processes: int
    target: Any  # the trainer.runtime.device.Target of every process
    end_of_text: int | None = None  # id that ends a document, if none attends to another
    frozen: dict[str, Frozen] = field(default_factory=dict)  # models that the objective needs and does not train
    # Linear layers that the objective trains with the model: name -> (inputs, outputs).
    objective_layers: dict[str, tuple[int, int]] = field(default_factory=dict)
    epoch: Epoch | None = None  # of the training split, if it exists already
    texts_per_row: int = 1
    bytes_per_token: float | None = None  # of text in the training split of data.path, if it is known
    unreached: list[str] | None = None  # parameters that get no gradient; None: not known
    expected: Expected | None = None  # by the law of losses in the file that `dial` names
    laws: str = ""  # the text of that file, of which a run keeps a copy
    unused_tokenizer: str = ""  # says that data.tokenizer is not that of the data, if so

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs. It finds the model's classes by name: pickle cannot send classes made in a function."""
        return {name: value for name, value in vars(self).items() if name not in ("model_class", "model_config")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        model_class, model_config = written_out(state["config"])
        model_class = with_layers(model_class, state["objective_layers"])
        vars(self).update(state, model_class=model_class, model_config=model_config)

    @property
    def train_tokens(self) -> int | None:
        """Tokens of an epoch, without padding; None if there is no data yet."""
        return None if self.epoch is None else self.epoch.tokens

    @property
    def memory(self) -> int | None:
        """Bytes of one GPU; None: on CPUs."""
        return self.target.memory

    @property
    def sequence_lengths(self) -> list[int]:
        return sequence_lengths(self.config.batch)

    def sequence_length(self, step: int) -> int:
        """Training length at 0-based `step`."""
        batch = self.config.batch
        return schedules.sequence_length(step, batch.sequence_start, batch.sequence_length, batch.sequence_double_every)

    def sequences(self, step: int) -> int:
        """Sequences of 0-based `step` on all devices, before hlb's multiplier."""
        return whole_sequences(self.config.batch, step, self.sequence_length(step))


def resolve(config: RunConfig, dataset: Any = None, world: Any = None, gpu: Any = None) -> Plan:
    """Fill every `None` and `auto` of `config` by a rule. On a resolved config it changes nothing.

    dataset: the DatasetInfo to train on, if it exists already; world: size and local_size of a World or RankInfo, by default
    what the launcher says; gpu: a trainer.runtime.device.Gpu to plan for, by default the device at hand.
    """
    world = world or find_rank_info(os.environ)
    draft = Draft(build(RunConfig, dataclasses.asdict(config)))  # a copy: the caller's stays as given
    draft, unused = choose_tokenizer(draft, dataset)
    draft, model, vocab_size = choose_model(draft, dataset)
    if draft.config.init_from is not None:
        rule = f"its {draft.config.init_weights} weights, model and tokenizer; the rest begins at step 0"
        draft = draft.note("init_from", draft.config.init_from, rule)
    draft = choose_objective(draft, dataset)
    draft = follow_launcher_config(draft, world.size)
    draft, target = choose_hardware(draft, model, gpu)
    draft = choose_recipe(draft)
    check_roles(draft.config.optim, model)
    check_mup(draft.config.optim, model)
    draft = choose_packing(draft, dataset)
    draft, dial_file = choose_dial(draft, model, dataset)
    laws = dial_file if isinstance(dial_file, DialFile) else None
    stored = dataset.sample_length if dataset is not None else config.data.sample_length
    draft = choose_batch(draft, model, stored, laws)
    draft, epoch = read_epoch(draft, dataset)
    draft = note_mix(choose_length(draft, model, epoch), dataset)
    length, documents = draft.config.batch.sequence_length, config.data.separate_documents
    draft, frozen = choose_frozen(draft, vocab_size, dataset)
    draft, layers = choose_layers(draft, model, frozen)
    model_class = with_layers(model.model_class, layers)
    estimate = MemoryEstimate(model_class, model.config, length, documents, draft.config.objective, frozen)
    texts = 1 if dataset is None else dataset.texts_per_row
    draft = choose_engine(draft, model, estimate, world, target, texts * length)
    draft = choose_microbatch(draft, estimate, world.size, target, texts * length)
    draft = choose_background(draft, estimate, world.size, target)
    tokens = sum(tokens_at_lengths(draft.config.batch, draft.config.max_steps).values())
    draft = choose_optimiser(draft, model, laws, tokens)
    draft = choose_roles(draft, model)
    draft = choose_rest(draft, model.meta.max_context, None if dataset is None else dataset.records)
    plan = Plan(
        config=draft.config,
        model_class=model_class,
        model_config=model.config,
        entries=draft.entries,
        parameters=model.parameters,
        non_embedding=model.non_embedding,
        trained=model.trained,
        vocab_size=vocab_size,
        processes=world.size,
        target=target,
        # Each answer of a conversation ends with this id; of chat data the stream says where documents end.
        end_of_text=dataset.tokenizer.eot_id
        if documents and dataset is not None and dataset.records == "text"
        else None,
        frozen=frozen,
        objective_layers=layers,
        epoch=epoch,
        texts_per_row=texts,
        bytes_per_token=bytes_per_token(dataset),
        unreached=estimate.unreached(
            ParallelLayout.of(draft.config, world.size, target), draft.config.engine.activation_checkpointing
        ),
        expected=expect(dial_file, draft, model.non_embedding, epoch),
        laws="" if laws is None else laws.laws.file,
        unused_tokenizer=unused,
    )
    check_noise_scale(plan)
    return plan


def bytes_per_token(dataset: Any) -> float | None:
    train = None if dataset is None else dataset.splits["train"]
    return train.bytes / train.tokens if train is not None and train.bytes and train.tokens else None


def flops_per_byte(plan: Plan) -> int | None:
    """Training FLOPs of one byte of text, at the longest sequence: models of different tokenizers compare by this."""
    if plan.bytes_per_token is None:
        return None
    flops = flops_per_token(plan.model_class, plan.model_config, plan.config.batch.sequence_length)
    return round(flops / plan.bytes_per_token)


def check_noise_scale(plan: Plan) -> None:
    """UserError if log.noise_scale is set, and a step gives a rank fewer than the two sequences that it compares."""
    config = plan.config
    # A step's tokens never become fewer, so of each sequence length the first step has the fewest sequences.
    first = [i * config.batch.sequence_double_every + (i > 0) for i in range(len(plan.sequence_lengths))]
    for step in first if config.log.noise_scale else ():
        if step < config.max_steps and plan.sequences(step) < 2 * plan.processes:
            raise UserError(
                f"log.noise_scale: step {step + 1:,} has {plan.sequences(step)} sequences of {plan.sequence_length(step)} tokens for "
                f"{plan.processes} processes, and it needs two for each; raise batch.tokens_per_step or set it to false"
            )


def choose_model(draft: Draft, dataset: Any) -> tuple[Draft, ModelFacts, int]:
    """The model at model_scale, its fields in the draft, and the ids that the tokenizer uses."""
    from models.base import pad_vocab
    from models.config import check_range
    from models.lora import FIELDS, has_lora

    config: Any = draft.config
    name, model_class, options = read_model(config)
    if dataset is not None:
        vocab_size, source = dataset.tokenizer.vocab_size, f"tokenizer of {config.data.path}"
    else:
        vocab_size, source = (
            _vocab_of(config.data.new_tokenizer, config.data.end_of_text),
            f"tokenizer {config.data.new_tokenizer} (data not prepared yet)",
        )
    padded = pad_vocab(vocab_size)
    if "vocab_size" not in options:
        draft = draft.note("model.vocab_size", padded, f"{vocab_size:,} of {source}, padded to a multiple of 64")
    wanted_vocab = options.get("vocab_size", padded)
    if wanted_vocab < vocab_size:
        raise UserError(f"model.vocab_size: {wanted_vocab} is smaller than the tokenizer's {vocab_size}")

    draft = choose_scale(draft, wanted_vocab)
    config = draft.config
    target = config.parameters or dial.target_parameters(config.model_scale, wanted_vocab)
    choices = {**options, "vocab_size": wanted_vocab}
    with told_of_model(model_class, "it cannot be built on the meta device"):
        try:
            for field in dataclasses.fields(model_class.Config):
                check_range(field, choices.get(field.name))  # before the search for a shape
            model_config: Any = model_class.config_for_scale(config.model_scale, target_parameters=target, **choices)
        except ValueError as error:
            raise UserError(f"model {name}: {error}") from None
    check_vocabulary(model_class, model_config, vocab_size)
    model_config, measured = with_threshold(model_class, model_config, options, dataset, config)
    model_config, narrow = with_init_std(model_class, model_config, options)
    measured = {**measured, **narrow}
    inferred = model_class.inferred(model_config)
    for key, value in dataclasses.asdict(model_config).items():
        meaning = f"; here {inferred[key]:,}" if key in inferred and not value else ""
        if key in options:
            draft = draft.note(f"model.{key}", value, "set" + meaning)
        elif key in measured:
            draft = draft.note(f"model.{key}", value, measured[key])
        elif key in FIELDS:
            draft = draft.note(f"model.{key}", value, "the default of LoRA")
        elif key != "vocab_size":
            draft = draft.note(f"model.{key}", value, f"{name} at model_scale {config.model_scale:g}{meaning}")
    draft = draft.set("", "model", {"name": name, **dataclasses.asdict(model_config)})
    if config.data.separate_documents and not model_class.masks_documents:
        raise UserError(
            f"data.separate_documents: {name} does not mask documents (its masks_documents is false); leave it out"
        )
    facts = ModelFacts.of(name, model_class, model_config)
    size = facts.parameters - (facts.trained if has_lora(draft.config.model) else 0)
    if config.parameters is not None and abs(size / config.parameters - 1) > SIZE_TOLERANCE:
        raise UserError(
            f"parameters: the nearest size of {name} to {config.parameters:,} is {size:,} parameters; "
            "give model_scale, or other fields of model.*"
        )
    return draft, facts, vocab_size


def choose_scale(draft: Draft, vocab_size: int) -> Draft:
    """model_scale, from `parameters` if the config gives it. UserError if both are given and are not the same size."""
    wanted, scale = draft.config.parameters, draft.config.model_scale
    if wanted is None:
        return draft.fill("", "model_scale", DEFAULT_SCALE, "the default")
    solved = dial.scale_for(wanted, vocab_size)
    if scale is None:
        return draft.fill("", "model_scale", solved, f"solved for {wanted:,} parameters")
    targets = [dial.target_parameters(one, vocab_size) for one in (scale, solved)]
    if targets[0] != targets[1]:
        raise UserError(
            f"model_scale: {scale:g} is a size of {targets[0]:,} parameters, `parameters` is {wanted:,}; leave one of them out"
        )
    return draft.fill("", "model_scale", scale, "set")


def _vocab_of(tokenizer: str, end_of_text: str | None) -> int:
    """Vocabulary size of a tokenizer before its dataset is prepared."""
    # The text decides how many characters it has; 128 is about an alphabet, its capitals and punctuation.
    known = {**SIZES, "chars": 128}
    name, _, size = tokenizer.partition(":")
    if name == "train-bpe" and re.fullmatch(r"[0-9]{3,8}", size) and int(size) > 256:
        return int(size)
    if tokenizer in known:
        return known[tokenizer]
    # Reads files on this machine, never the network.
    return get_tokenizer(tokenizer, end_of_text=end_of_text).vocab_size


def recipe_entries(plan: Plan) -> list[PlanEntry]:
    """What the recipe derives beyond the settings: decay and gradient-norm laws, groups, validation shape."""
    return recipe_rows(plan.config, build_meta(plan.model_class, plan.model_config))


def summary(plan: Plan) -> dict[str, Any]:
    """The plan as one flat mapping, for `--json`."""
    config, batch = plan.config, plan.config.batch
    return {
        "model": config.model["name"],
        "model_scale": config.model_scale,
        "params": plan.parameters,
        "params_non_embedding": plan.non_embedding,
        "params_trained": plan.trained,
        "frozen": {name: model.parameters for name, model in plan.frozen.items()},
        "params_objective_layers": sum(inputs * outputs for inputs, outputs in plan.objective_layers.values()),
        **{key: value for key, value in config.model.items() if key != "name"},
        "lr": config.optim.lr,
        "recipe": config.optim.recipe,
        "precision": config.precision,
        "processes": plan.processes,
        "strategy": config.engine.strategy,
        "offload": config.engine.offload,
        "compile": config.engine.compile,
        "state_precision": config.optim.state_precision,
        "activation_checkpointing": config.engine.activation_checkpointing,
        "tokens_per_step": batch.tokens_per_step,
        "tokens_per_microbatch": batch.tokens_per_microbatch,
        "sequence_lengths": plan.sequence_lengths,
        "max_steps": config.max_steps,
        "tokens_at_least": minimum_tokens(plan),
        "padding": None if plan.epoch is None else plan.epoch.padding,
        "epochs_at_least": epochs_of(plan, minimum_tokens(plan)),
        "advice": advice(plan, minimum_tokens(plan)),
        "expected_loss": None if plan.expected is None else dataclasses.asdict(plan.expected),
        "flops_per_token": flops_per_token(plan.model_class, plan.model_config, batch.sequence_length),
        "flops_per_byte": flops_per_byte(plan),
        "memory_bytes": expected_memory(plan),
        "laws": {row.key: row.value for row in recipe_entries(plan)},
        "rules": {entry.key: entry.rule for entry in plan.entries},
    }


def minimum_tokens(plan: Plan) -> int:
    """Tokens of the whole run, without padding, if hlb's multiplier stays at one (exact for a fixed batch and full rows)."""
    places = sum(tokens_at_lengths(plan.config.batch, plan.config.max_steps).values())
    return places if plan.epoch is None else round(places * plan.epoch.filled)


def training_flops(plan: Plan, steps: int) -> int:
    """FLOPs of the first `steps` steps, by the model's own count at each sequence length, for tokens as in `minimum_tokens`."""
    tokens = tokens_at_lengths(plan.config.batch, steps)
    return sum(count * flops_per_token(plan.model_class, plan.model_config, length) for length, count in tokens.items())


def show_number(value: Any) -> str:
    """A value as the plan prints it: thousands separated, floats to six digits."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def render(plan: Plan, more: Sequence[PlanEntry] = ()) -> str:
    """The plan as a table: key, value, rule."""
    facts = summary(plan)
    epochs = facts["epochs_at_least"]
    memory = facts["memory_bytes"]
    parts = ", ".join(f"{key} {size / GIB:.2f}" for key, size in memory.items() if key != "total")
    for outside in ("activations without checkpointing", "in CPU memory"):  # outside the sum; they come last
        parts = parts.replace(f", {outside}", f"; {outside}")
    per_byte = facts["flops_per_byte"]
    of_text = f"at {plan.bytes_per_token:.4g} bytes of text a token" if per_byte else ""
    frozen = f"; {plan.trained:,} are trained, the others frozen" if plan.trained < plan.parameters else ""
    derived = [
        PlanEntry(
            "parameters", plan.parameters, f"counted; {plan.non_embedding:,} without embeddings and head{frozen}"
        ),
        PlanEntry("sequence lengths", " ".join(map(str, plan.sequence_lengths)), "in the order of training"),
        PlanEntry("FLOPs per token", facts["flops_per_token"], "training, at the longest sequence"),
        *([PlanEntry("FLOPs per byte", per_byte, of_text)] if per_byte else []),
        PlanEntry(
            "tokens",
            facts["tokens_at_least"],
            "whole run" + (", at a multiplier of one" if plan.config.batch.dynamic else ""),
        ),
        *([] if epochs is None else [PlanEntry("epochs", epochs, f"tokens / {plan.train_tokens:,} training tokens")]),
        *([] if plan.expected is None else [plan.expected.entry()]),
        PlanEntry("memory, GiB", f"{memory['total'] / GIB:.2f}", f"one device: {parts}"),
    ]
    entries = [*plan.entries, *recipe_entries(plan), *derived, *more]
    keys = max(len(entry.key) for entry in entries)
    values = max(len(show_number(entry.value)) for entry in entries)
    lines = [f"{entry.key:<{keys}}  {show_number(entry.value):>{values}}  {entry.rule}" for entry in entries]
    return "\n".join(lines + [f"note: {line}" for line in facts["advice"]])
