"""`plan`: every number of a run before the run, each with the rule it came from.

`resolve` fills every `None` of a RunConfig; `train` runs on the result and `plan` prints it. Models are only built on
the meta device, so 3 B parameters plan on a laptop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from trainer import scaling
from trainer.advice import advice, epochs_of
from trainer.config import PlanConfig, RunConfig
from trainer.errors import UserError
from trainer.inference import Inference, Row
from trainer.launcher import Place, find_place
from trainer.memory import GIB, build_meta, expected_memory
from trainer.run_config import folder_of, plugins_of
from trainer.settings import build, coerce, coerced
from trainer.text import printable_lines


@dataclass
class Plan:
    """A run with nothing left to infer.

    config: RunConfig without `None`s; model_config: the model's Config; rows: every number with its rule
    parameters: total count; non_embedding: without token and position embeddings and head; processes: of the whole run
    """

    config: Any  # a RunConfig; not typed so, since its `None`s are gone
    model_class: Any
    model_config: Any
    rows: list[Row]
    parameters: int
    non_embedding: int
    vocab_size: int  # ids the tokenizer uses; the model's may be padded
    processes: int
    target: Any  # the trainer.device.Target of every process
    end_of_text: int | None = None  # id that ends a document, where none attends to another
    train_tokens: int | None = None  # of the training split, where it exists already
    unreached: list[str] | None = None  # parameters that get no gradient; None: the measure of memory does not tell

    @property
    def memory(self) -> int | None:
        """Bytes of one GPU; None: on CPUs."""
        return self.target.memory

    @property
    def sequence_lengths(self) -> list[int]:
        batch = self.config.batch
        return scaling.sequence_lengths(batch.sequence_start, batch.sequence_length, batch.sequence_double_every)

    def sequence_length(self, step: int) -> int:
        """Training length at 0-based `step`."""
        batch = self.config.batch
        return scaling.sequence_length(step, batch.sequence_start, batch.sequence_length, batch.sequence_double_every)


def resolve(config: RunConfig, dataset: Any = None, world: Any = None, gpu: Any = None, training: bool = True) -> Plan:
    """Fill every `None` and `auto` of `config` by a rule.

    dataset: the DatasetInfo to train on, where it exists already; world: size and local_size of a World or Place, by default
    what the launcher says; gpu: a trainer.device.Gpu to plan for, by default the device at hand;
    training: whether training must fit the device. On a resolved config it changes nothing.
    """
    config = build(RunConfig, dataclasses.asdict(config))  # a copy: the caller's stays as given
    world = world or find_place(os.environ)
    inference = Inference(config)
    model_class, model_config, vocab_size = _resolve_model(inference, dataset)
    if config.data.separate_documents and not model_class.masks_documents:
        raise UserError(
            f"data.separate_documents: {config.model['name']} does not mask documents (its masks_documents is false); "
            "leave it out"
        )
    inference.model(model_class, model_config)
    inference.launcher(world)
    inference.hardware(gpu)
    inference.batch(dataset)
    inference.engine(world, training)
    inference.microbatch()
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
        processes=world.size,
        target=inference.target,
        end_of_text=dataset.tokenizer.eot_id if dataset is not None and config.data.separate_documents else None,
        train_tokens=dataset.splits["train"].tokens if dataset is not None else None,
        unreached=inference.unreached() if training else None,
    )


def _resolve_model(inference: Inference, dataset: Any) -> tuple[Any, Any, int]:
    from models.base import get_model, load_models, model_names, pad_vocab
    from models.config import check_range

    config: Any = inference.config
    load_models()
    options = dict(config.model)
    name = options.pop("name", "hlb")
    if name not in model_names():
        folder = folder_of(config)
        plugins = " ".join(f"--plugin {module}" for module in plugins_of(folder))
        ways = f"{folder} was started with {plugins}: add that" if plugins else "--plugin MODULE for one of your own"
        near = _nearest_name(str(name), model_names())
        hint = f"; did you mean {near}?" if near else ""
        raise UserError(f"model.name: {name!r} is not known (allowed: {', '.join(model_names())}; {ways}){hint}")
    model_class = get_model(name)

    if dataset is not None:
        vocab_size, source = dataset.tokenizer.vocab_size, f"tokenizer of {config.data.path}"
    else:
        vocab_size, source = (
            _vocab_of(config.data.tokenizer, config.data.end_of_text),
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
        choices = {**coerced(model_class.Config, options, "model."), "vocab_size": wanted_vocab}
        for field in dataclasses.fields(model_class.Config):
            check_range(field, choices.get(field.name))  # before a shape is looked for
        model_config: Any = model_class.config_for_scale(config.model_scale, target_parameters=target, **choices)
    except ValueError as error:
        raise UserError(f"model {name}: {error}") from None
    unpadded = getattr(model_config, "unpadded_vocab", 0)
    if 0 < unpadded < vocab_size:
        raise UserError(f"model.unpadded_vocab: {unpadded} is smaller than the tokenizer's {vocab_size}")
    inferred: dict[str, int] = getattr(model_config, "inferred", dict)()
    for key, value in dataclasses.asdict(model_config).items():
        meaning = f"; here {inferred[key]:,}" if key in inferred and not value else ""
        if key in options:
            inference.note(f"model.{key}", value, "set" + meaning)
        elif key != "vocab_size":
            inference.note(f"model.{key}", value, f"{name} at model_scale {config.model_scale:g}{meaning}")
    config.model = {"name": name, **dataclasses.asdict(model_config)}
    return model_class, model_config, vocab_size


def _nearest_name(name: str, names: list[str]) -> str:
    """The name that is spelt most like `name`, whatever the case and without punctuation; "" where none is near."""

    def plain(text: str) -> str:
        return "".join(c for c in text.casefold() if c.isalnum() or c == "+")

    by_spelling = {plain(known): known for known in names}
    near = difflib.get_close_matches(plain(name), list(by_spelling), 1, 0.6)
    return by_spelling[near[0]] if near else ""


def _vocab_of(tokenizer: str, end_of_text: str | None) -> int:
    """Vocabulary of a tokenizer that no dataset has been prepared with yet."""
    known = {"gpt2": 50_257, "gpt-neox-20b": 50_277, "bytes": 257}
    name, _, size = tokenizer.partition(":")
    if name == "train-bpe" and re.fullmatch(r"[0-9]{3,8}", size) and int(size) > 256:
        return int(size)
    if tokenizer in known:
        return known[tokenizer]
    from trainer.data.tokenizers import get_tokenizer  # files on this machine; no network is asked

    return get_tokenizer(tokenizer, end_of_text=end_of_text).vocab_size


def law_rows(plan: Plan) -> list[Row]:
    """What hlb's recipe derives from N beyond the settings: decay and gradient-norm laws, groups, validation shape."""
    optim, n = plan.config.optim, plan.parameters
    law = scaling.GradNormLaw.of(n)
    rows = []
    if optim.loss_driven_decay:
        rows.append(Row("decay base b", scaling.weight_decay_base(n), "0.007 (0.01 ln N)^-4"))
    if plan.config.batch.dynamic:
        rows.append(Row("grad-norm exponent p", law.exponent, "-0.677 (ln N)^-0.2"))
        rows.append(Row("grad-norm scale K", law.step_scale, "N ln N; target sqrt(N) (K (step + 0.01))^p"))
    if optim.recipe == "hlb":
        rows.append(Row("lr of the position bias", 100 * optim.lr, "100 lr, times 0.995^step"))
        tables = "positions" if getattr(plan.model_config, "tied", False) else "embedding"
        rows.append(Row(f"lr of norms, biases, {tables}", 32 * optim.lr, "32 lr, warm-up, then (steps since)^-0.08"))
        rows.append(Row("lr of the head", 2 * optim.lr, "2 lr, times (step + 1)^-0.2"))
    if plan.config.evaluation.protocol != "full":
        batch, steps = scaling.evaluation_shape(scaling.tokens_per_microbatch(plan.config.model_scale))
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
        "epochs_at_least": epochs_of(plan, minimum_tokens(plan)),
        "advice": advice(plan, minimum_tokens(plan)),
        "flops_per_token": model.flops_per_token(batch.sequence_length),
        "memory_bytes": expected_memory(plan),
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


def render(plan: Plan, more: Sequence[Row] = ()) -> str:
    """The plan as a table: key, value, rule."""
    facts = summary(plan)
    epochs = facts["epochs_at_least"]
    memory = facts["memory_bytes"]
    parts = ", ".join(f"{key} {size / GIB:.2f}" for key, size in memory.items() if key != "total")
    for outside in ("activations without checkpointing", "in CPU memory"):  # the sum; they stand last
        parts = parts.replace(f", {outside}", f"; {outside}")
    derived = [
        Row("parameters", plan.parameters, f"counted; {plan.non_embedding:,} without embeddings and head"),
        Row("sequence lengths", " ".join(map(str, plan.sequence_lengths)), "in the order trained on"),
        Row("FLOPs per token", facts["flops_per_token"], "training, at the longest sequence"),
        Row(
            "tokens",
            facts["tokens_at_least"],
            "whole run" + (", at a multiplier of one" if plan.config.batch.dynamic else ""),
        ),
        *([] if epochs is None else [Row("epochs", epochs, f"of {plan.train_tokens:,} tokens, in the same way")]),
        Row("memory, GiB", f"{memory['total'] / GIB:.2f}", f"one device: {parts}"),
    ]
    rows = plan.rows + law_rows(plan) + derived + list(more)
    keys = max(len(row.key) for row in rows)
    values = max(len(show_number(row.value)) for row in rows)
    lines = [f"{row.key:<{keys}}  {show_number(row.value):>{values}}  {row.rule}" for row in rows]
    return "\n".join(lines + [f"note: {line}" for line in facts["advice"]])


MFUS = (0.5, 0.2)  # of what such models reach: large ones on one GPU, and small ones or many GPUs


class Time(NamedTuple):
    """What a whole run takes. hours, tokens_per_second, cost: None where they are not known; hours_range: without a bench, from
    the device's peak at MFUS."""

    rule: str
    hours: float | None = None
    tokens_per_second: float | None = None  # of all processes
    cost: float | None = None
    hours_range: tuple[float, float] | None = None

    def row(self) -> Row:
        if self.hours_range is not None:
            return Row("hours", " to ".join(f"{hours:.3g}" for hours in self.hours_range), self.rule)
        return Row("hours", "unknown" if self.hours is None else self.hours, self.rule)


def find_bench(plan: Plan, device: str) -> tuple[Path, dict[str, Any]] | None:
    """The newest bench.json in runs/ that has this model on such a device, and its row of the trainer that is most like the plan.

    Like it in any case: precision, fp8 and length of sequences.
    """
    wanted = dataclasses.asdict(plan.config)
    for path in sorted(Path("runs").glob("bench-*/bench.json"), reverse=True):
        with contextlib.suppress(OSError, ValueError, KeyError):
            report = json.loads(path.read_text(encoding="utf-8"))
            if (report["kind"], report["device"]) != ("train", device):
                continue
            rows = [row for row in report["rows"] if row["kind"] == "trainer" and _same_work(row["config"], wanted)]
            if rows:
                row = max(rows, key=lambda row: _settings_in_common(row["config"], wanted))
                return path, row | {"processes": report["processes"]}
    return None


def _same_work(config: dict[str, Any], other: dict[str, Any]) -> bool:
    what = [(c["model"], c["precision"], c["float8"], c["batch"]["sequence_length"]) for c in (config, other)]
    return what[0] == what[1]


def _settings_in_common(config: dict[str, Any], other: dict[str, Any]) -> int:
    """How many of the settings that make a step faster or slower."""
    engine = [key for key in config["engine"] if config["engine"][key] == other["engine"].get(key)]
    return len(engine) + (config["batch"]["tokens_per_microbatch"] == other["batch"]["tokens_per_microbatch"])


def expected_time(plan: Plan, device: str, price: float | None) -> Time:
    """Hours of the whole run, and money where a price per hour is given, by the newest bench of this model."""
    found = find_bench(plan, device)
    if found is None:
        return _time_by_peak(plan, device, price)
    path, row = found
    rate = row["tokens_per_second"]["median"] * plan.processes / row["processes"]
    hours = minimum_tokens(plan) / rate / 3600
    rule = "at least: with a multiplier of one; " if plan.config.batch.dynamic else ""
    rule += f"at {rate:,.0f} tokens/s, by {row['name']} of {path}"
    if plan.processes != row["processes"]:
        rule += f" with {row['processes']} process{'es' if row['processes'] > 1 else ''}, as if speed grew with their number"
    cost = None if price is None else hours * price * plan.processes
    if cost is not None:
        rule += f"; {cost:,.2f} at {price:g} an hour and device"
    return Time(rule, round(hours, 3), rate, cost)


def _time_by_peak(plan: Plan, device: str, price: float | None) -> Time:
    """What a run takes at MFUS of the device's peak, where that is known."""
    from trainer.device import peak_of

    rule = f"no bench of this model on {device} in runs/: `python -m trainer bench` makes one"
    peak = peak_of(device, plan.config.precision, plan.config.float8)
    if peak is None:
        return Time(f"{rule}; nor is a peak of FLOP/s known to guess by")
    batch = plan.config.batch
    flops = build_meta(plan.model_class, plan.model_config).flops_per_token(batch.sequence_length)
    least, most = (minimum_tokens(plan) * flops / (peak * plan.processes * mfu) / 3600 for mfu in MFUS)
    guess = f"a guess at {MFUS[0]:.0%} to {MFUS[1]:.0%} of {peak / 1e12:,.0f} TFLOP/s"
    guess += ", with a multiplier of one" if batch.dynamic else ""
    if price is not None:
        costs = [f"{hours * price * plan.processes:,.2f}" for hours in (least, most)]
        guess += f"; {' to '.join(costs)} at {price:g} an hour and device"
    return Time(f"{guess}; {rule}", hours_range=(least, most))


def resolve_for(config: PlanConfig) -> tuple[Plan, str]:
    """The plan for the device and processes that `config` names, and the device's name. UserError for an unknown device."""
    from trainer.data.stream import find_dataset
    from trainer.device import GPUS, choose_device, device_name

    gpu = GPUS.get(config.device)
    if gpu is None and config.device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device: {config.device!r} is not known (allowed: auto, cpu, cuda, {', '.join(GPUS)})")
    size = config.world_size
    world = None if size is None else Place(0, size, 0, min(size, config.processes_per_machine))
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(RunConfig)}
    if gpu is not None:
        values["device"] = "auto"
    plan = resolve(RunConfig(**values), find_dataset(config.data), world, gpu)
    return plan, device_name(choose_device(config.device)) if gpu is None else gpu.name


def run(config: PlanConfig, as_json: bool = False) -> None:
    """The verb: print the plan to stdout (a table, or one JSON object)."""
    plan, device = resolve_for(config)
    time = expected_time(plan, device, config.price)
    if as_json:
        times = {key: value for key, value in time._asdict().items() if key != "rule"}
        text = json.dumps(summary(plan) | times | {"hours_rule": time.rule})
    else:
        text = printable_lines(render(plan, [time.row()]))
    sys.stdout.write(text + "\n")
