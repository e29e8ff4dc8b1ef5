"""`plan`: every number of a run before the run, each with the rule it came from.

`resolve` fills every `None` of a RunConfig; `train` runs on the result and `plan` prints it. Models are only built on
the meta device, so 3 B parameters plan on a laptop.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer import scaling
from trainer.config import RunConfig
from trainer.errors import UserError
from trainer.memory import GIB, build_meta, expected_memory, tokens_that_fit
from trainer.settings import build, coerce


@dataclass
class Row:
    """One number of the plan: its key, its value, and the rule it came from."""

    key: str
    value: Any
    rule: str


@dataclass
class Plan:
    """A run with nothing left to infer.

    config: RunConfig without `None`s; model_config: the model's Config; rows: every number with its rule
    parameters: total count; non_embedding: without token and position embeddings and head
    """

    config: Any  # a RunConfig; not typed so, since its `None`s are gone
    model_class: Any
    model_config: Any
    rows: list[Row]
    parameters: int
    non_embedding: int
    vocab_size: int  # ids the tokenizer uses; the model's may be padded

    @property
    def sequence_lengths(self) -> list[int]:
        batch = self.config.batch
        return scaling.sequence_lengths(batch.sequence_start, batch.sequence_length, batch.sequence_double_every)

    def sequence_length(self, step: int) -> int:
        """Training length at 0-based `step`."""
        batch = self.config.batch
        return scaling.sequence_length(step, batch.sequence_start, batch.sequence_length, batch.sequence_double_every)


def resolve(config: RunConfig, dataset: Any = None) -> Plan:
    """Fill every `None` of `config` by a rule. dataset: the DatasetInfo to train on, where it exists already."""
    config = build(RunConfig, dataclasses.asdict(config))  # a copy: the caller's stays as given
    inference = _Inference(config)
    model_class, model_config, vocab_size = _resolve_model(inference, dataset)
    inference.model(model_class, model_config)
    inference.hardware()
    inference.batch(model_config, dataset)
    inference.optimiser()
    inference.rest()
    return Plan(
        config=config,
        model_class=model_class,
        model_config=model_config,
        rows=inference.rows,
        parameters=inference.parameters,
        non_embedding=inference.non_embedding,
        vocab_size=vocab_size,
    )


def _resolve_model(inference: _Inference, dataset: Any) -> tuple[Any, Any, int]:
    from models.base import get_model, load_models, model_names, pad_vocab

    config: Any = inference.config
    load_models()
    options = dict(config.model)
    name = options.pop("name", "hlb")
    if name not in model_names():
        raise UserError(
            f"model.name: {name!r} is not known (allowed: {', '.join(model_names())}; --plugin MODULE for one of your own)"
        )
    model_class = get_model(name)

    if dataset is not None:
        vocab_size, source = dataset.tokenizer.vocab_size, f"tokenizer of {config.data.path}"
    else:
        vocab_size, source = (
            _vocab_of(config.data.tokenizer),
            f"tokenizer {config.data.tokenizer} (data not prepared yet)",
        )
    padded = pad_vocab(vocab_size)
    if "vocab_size" not in options:
        inference.note("model.vocab_size", padded, f"{vocab_size:,} of {source}, padded to a multiple of 64")
    wanted_vocab = coerce(int, options.get("vocab_size", padded), "model.vocab_size")
    if wanted_vocab < vocab_size:
        raise UserError(f"model.vocab_size: {wanted_vocab} is smaller than the tokenizer's {vocab_size}")

    target = scaling.target_parameters(config.model_scale, wanted_vocab)
    try:
        base = model_class.config_for_scale(config.model_scale, wanted_vocab, target)
        model_config: Any = build(model_class.Config, {**dataclasses.asdict(base), **options}, "model.")
    except ValueError as error:
        raise UserError(f"model {name}: {error}") from None
    for key, value in dataclasses.asdict(model_config).items():
        if key in options:
            inference.note(f"model.{key}", value, "set")
        elif key != "vocab_size":
            inference.note(f"model.{key}", value, f"{name} at model_scale {config.model_scale:g}")
    config.model = {"name": name, **dataclasses.asdict(model_config)}
    return model_class, model_config, vocab_size


def _vocab_of(tokenizer: str) -> int:
    """Vocabulary of a tokenizer that no dataset has been prepared with yet."""
    known = {"gpt2": 50_257, "gpt-neox-20b": 50_277, "bytes": 257}
    name, _, size = tokenizer.partition(":")
    if name == "train-bpe" and size.isdigit():
        return int(size)
    if tokenizer in known:
        return known[tokenizer]
    from trainer.data.tokenizers import get_tokenizer  # files on this machine; no network is asked

    return get_tokenizer(tokenizer).vocab_size


class _Inference:
    """Fills a RunConfig section by section, noting each value with its rule."""

    def __init__(self, config: RunConfig) -> None:
        self.config: Any = config
        self.rows: list[Row] = []
        self.parameters = self.non_embedding = 0

    def note(self, key: str, value: Any, rule: str) -> None:
        self.rows.append(Row(key, value, rule))

    def fill(self, section: str, key: str, value: Any, rule: str) -> Any:
        """Set SECTION.KEY unless the user has; returns what holds."""
        target = getattr(self.config, section) if section else self.config
        if getattr(target, key) is None:
            setattr(target, key, value)
        else:
            rule = "set"
        self.note(f"{section}.{key}".lstrip("."), getattr(target, key), rule)
        return getattr(target, key)

    def model(self, model_class: Any, model_config: Any) -> None:
        self.model_class, self.model_config = model_class, model_config
        self.parameters = model_class.count_parameters(model_config)
        meta = build_meta(model_class, model_config)
        roles = meta.parameter_groups()
        sizes = {name: parameter.numel() for name, parameter in meta.named_parameters()}
        outside = [name for role in ("embedding", "head") for name in roles.get(role, [])]
        self.non_embedding = self.parameters - sum(sizes[name] for name in outside)
        self.tied = meta.tied_embedding()
        self.max_context = meta.max_context

    def hardware(self) -> None:
        from trainer.device import choose_device, choose_precision, memory_bytes

        device = choose_device(self.config.device)
        precision, rule = choose_precision(self.config.precision, device)
        self.config.precision = precision
        self.note("precision", precision, rule)
        self.memory: Any = memory_bytes(device)
        self.fill("batch", "device_token_capacity", *scaling.device_token_capacity(self.memory))

    def batch(self, model_config: Any, dataset: Any) -> None:
        config, batch, scale = self.config, self.config.batch, self.config.model_scale
        recipe = config.optim.recipe
        if recipe == "auto":
            recipe = "hlb" if config.model["name"] == "hlb" else "plain"
            self.note(
                "optim.recipe", recipe, f"the recipe made for {config.model['name']}" if recipe == "hlb" else "AdamW"
            )
        config.optim.recipe = recipe
        hlb = recipe == "hlb"

        stored = dataset.sample_length if dataset is not None else config.data.sample_length
        longest = min(stored, self.max_context or stored)
        rule = "length of the stored samples" if longest == stored else "longest context of the model"
        longest = self.fill("batch", "sequence_length", longest, rule)
        start = self.fill(
            "batch", "sequence_start", min(32, longest) if hlb else longest, "hlb" if hlb else "no growth"
        )
        self.fill("batch", "sequence_double_every", 80 if hlb else 0, "hlb" if hlb else "no growth")
        self._check_lengths(stored, start, longest)

        if hlb:
            tokens = scaling.tokens_per_microbatch(scale)
            rule = "C of the law at model_scale on hlb's own 40 GiB A100 (the batch never depends on the device)"
        else:
            tokens = max(1, round(scaling.plain_tokens_per_step(self.non_embedding) / longest)) * longest
            rule = "2048*160 (N/108M)^(2/3), N without embeddings, in whole sequences"
        self.fill("batch", "tokens_per_step", max(tokens, longest), rule)
        capacity: float = scaling.tokens_per_microbatch(scale, batch.device_token_capacity)
        rule = "floor(G / (1.52174 + 0.482 model_scale^0.87)), G = device_token_capacity"
        fits = tokens_that_fit(self.memory, self.model_class, self.model_config, longest, config.precision)
        if fits < capacity:
            capacity, rule = fits, rule + f"; lowered to what {self.memory / GIB:.0f} GiB hold"
        if capacity < longest:
            capacity, rule = longest, rule + "; raised to one sequence"
        self.fill("batch", "tokens_per_microbatch", capacity, rule)
        self.fill("batch", "dynamic", hlb, "hlb's gradient-norm law" if hlb else "fixed batch")
        for key in ("tokens_per_step", "tokens_per_microbatch"):
            if getattr(batch, key) < longest:
                raise UserError(f"batch.{key}: {getattr(batch, key)} is less than one sequence of {longest} tokens")

    def _check_lengths(self, stored: int, start: int, longest: int) -> None:
        batch = self.config.batch
        if start > longest:
            raise UserError(f"batch.sequence_start: {start} is more than batch.sequence_length, {longest}")
        if self.max_context and longest > self.max_context:
            raise UserError(f"batch.sequence_length: {longest} is more than the model's context of {self.max_context}")
        if longest > stored:
            raise UserError(
                f"batch.sequence_length: {longest} is longer than the stored samples of {stored} tokens; "
                f"prepare the data with --sample_length {longest}"
            )
        for length in scaling.sequence_lengths(start, longest, batch.sequence_double_every):
            if length < 1 or stored % length:
                raise UserError(
                    f"batch.sequence_length: {length} does not divide the stored samples of {stored} tokens"
                )

    def optimiser(self) -> None:
        optim, steps = self.config.optim, self.config.max_steps
        if steps < 1:
            raise UserError(f"max_steps: {steps} is not a positive number of steps")
        hlb = optim.recipe == "hlb"
        if hlb:
            self.fill("optim", "lr", scaling.learning_rate(self.parameters), "2.62 * 9e7 / (ln N)^8.8")
            self.fill("optim", "warmup_steps", 100, "hlb")
            self.fill("optim", "weight_decay", 0.0, "hlb decays by the loss")
        else:
            lr = scaling.plain_learning_rate(max(2, self.non_embedding))
            self.fill("optim", "lr", lr, "0.003239 - 0.0001395 ln N, N without embeddings (arXiv 2001.08361)")
            self.fill("optim", "warmup_steps", max(1, round(0.03 * steps)), "3 % of max_steps")
            self.fill("optim", "weight_decay", 0.1, "plain recipe")
        self.fill("optim", "loss_driven_decay", hlb, "16 b^-loss, b = 0.007 (0.01 ln N)^-4" if hlb else "plain recipe")
        self.fill("optim", "clip_norm", 0.0 if hlb else 1.0, "hlb does not clip" if hlb else "plain recipe")
        if optim.embedding_frequency == "auto":
            optim.embedding_frequency = "global" if hlb and not self.tied else "none"
            rule = "hlb, counted over the whole step" if hlb else "plain recipe"
            self.note(
                "optim.embedding_frequency", optim.embedding_frequency, "head is tied" if hlb and self.tied else rule
            )
        elif optim.embedding_frequency != "none" and self.tied:
            raise UserError(
                "optim.embedding_frequency: this model ties head and embedding, whose gradients cannot be told apart; "
                "set it to none"
            )

    def rest(self) -> None:
        config = self.config
        self.fill("", "run_dir", default_run_dir(config), "runs/MODEL-SCALE")
        every = max(1, config.max_steps // 10)
        self.fill("checkpoint", "every", every, "a tenth of max_steps")
        length = self.fill(
            "evaluation", "sequence_length", config.batch.sequence_length, "the longest training sequence"
        )
        if length > (self.max_context or length):
            raise UserError(
                f"evaluation.sequence_length: {length} is more than the model's context of {self.max_context}"
            )


def default_run_dir(config: RunConfig) -> str:
    """runs/MODEL-SCALE"""
    return str(Path("runs") / f"{config.model.get('name', 'hlb')}-{config.model_scale:g}")


def law_rows(plan: Plan) -> list[Row]:
    """What hlb's recipe derives from N beyond the settings: decay and gradient-norm laws, groups, validation shape."""
    optim, n = plan.config.optim, plan.parameters
    law = scaling.GradNormLaw.of(n)
    batch, steps = scaling.evaluation_shape(scaling.tokens_per_microbatch(plan.config.model_scale))
    rows = []
    if optim.loss_driven_decay:
        rows.append(Row("decay base b", scaling.weight_decay_base(n), "0.007 (0.01 ln N)^-4"))
    if plan.config.batch.dynamic:
        rows.append(Row("grad-norm exponent p", law.exponent, "-0.677 (ln N)^-0.2"))
        rows.append(Row("grad-norm scale K", law.step_scale, "N ln N; target sqrt(N) (K (step + 0.01))^p"))
    if optim.recipe == "hlb":
        rows.append(Row("lr of the position bias", 100 * optim.lr, "100 lr, times 0.995^step"))
        rows.append(Row("lr of norms, biases, embedding", 32 * optim.lr, "32 lr, warm-up, then (steps since)^-0.08"))
        rows.append(Row("lr of the head", 2 * optim.lr, "2 lr, times (step + 1)^-0.2"))
    rows.append(Row("hlb validation", f"{batch} x {steps}", "windows of 1,024 at once x batches, from C"))
    return rows


def summary(plan: Plan) -> dict[str, Any]:
    """The plan as one flat mapping, for `--json`."""
    config, batch = plan.config, plan.config.batch
    model = build_meta(plan.model_class, plan.model_config)
    return {
        "model": config.model["name"],
        "model_scale": config.model_scale,
        "params": plan.parameters,
        "params_non_embedding": plan.non_embedding,
        **{key: value for key, value in config.model.items() if key != "name"},
        "lr": config.optim.lr,
        "recipe": config.optim.recipe,
        "tokens_per_step": batch.tokens_per_step,
        "tokens_per_microbatch": batch.tokens_per_microbatch,
        "sequence_lengths": plan.sequence_lengths,
        "max_steps": config.max_steps,
        "tokens_at_least": minimum_tokens(plan),
        "flops_per_token": model.flops_per_token(batch.sequence_length),
        "memory_bytes": expected_memory(plan.model_class, plan.model_config, plan.config),
        "laws": {row.key: row.value for row in law_rows(plan)},
        "rules": {row.key: row.rule for row in plan.rows},
    }


def minimum_tokens(plan: Plan) -> int:
    """Tokens of the whole run while hlb's multiplier stays at one (exact where the batch is fixed)."""
    batch, total, done = plan.config.batch, 0, 0
    for i, length in enumerate(plan.sequence_lengths):
        last = length == plan.sequence_lengths[-1]
        until = plan.config.max_steps if last else min(plan.config.max_steps, (i + 1) * batch.sequence_double_every + 1)
        total += (until - done) * (batch.tokens_per_step // length * length)
        done = until
    return total


def show_number(value: Any) -> str:
    """A value as the plan prints it: thousands separated, floats to six digits."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def render(plan: Plan) -> str:
    """The plan as a table: key, value, rule."""
    facts = summary(plan)
    memory = facts["memory_bytes"]
    parts = ", ".join(f"{key} {size / GIB:.2f}" for key, size in memory.items() if key != "total")
    derived = [
        Row("parameters", plan.parameters, f"counted; {plan.non_embedding:,} without embeddings and head"),
        Row("sequence lengths", " ".join(map(str, plan.sequence_lengths)), "in the order trained on"),
        Row("FLOPs per token", facts["flops_per_token"], "training, at the longest sequence"),
        Row(
            "tokens",
            facts["tokens_at_least"],
            "whole run" + (", at a multiplier of one" if plan.config.batch.dynamic else ""),
        ),
        Row("memory, GiB", f"{memory['total'] / GIB:.2f}", f"one device: {parts}"),
    ]
    rows = plan.rows + law_rows(plan) + derived
    keys = max(len(row.key) for row in rows)
    values = max(len(show_number(row.value)) for row in rows)
    lines = [f"{row.key:<{keys}}  {show_number(row.value):>{values}}  {row.rule}" for row in rows]
    return "\n".join(lines)


def run(config: RunConfig, as_json: bool = False) -> None:
    """The verb: print the plan to stdout (a table, or one JSON object)."""
    from trainer.data.stream import find_dataset

    plan = resolve(config, find_dataset(config.data))
    text = json.dumps(summary(plan)) if as_json else render(plan)
    sys.stdout.write(text + "\n")
