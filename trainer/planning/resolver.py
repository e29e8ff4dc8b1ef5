"""The rules that fill what a RunConfig leaves open, section by section. Each value is noted with the rule it came from.

A rule is a function from a `Draft`, and the facts that it needs, to a new draft. plan.py sets their order.
"""

from __future__ import annotations

import copy
import math
import os
from dataclasses import dataclass, replace
from typing import Any

from models.lora import has_lora
from models.objective_layers import ATTRIBUTE
from trainer.core.errors import UserError
from trainer.engine import refuse_scope
from trainer.engine.meta import build_meta, flops_per_token, told_of_model
from trainer.optim import (
    DEFAULT_RULE,
    OptimizerRule,
    get_rule,
    rules_used,
    schedules,
    settings_of_run,
    trained_parameters,
)
from trainer.planning.lora import check_lora, lora_rate, recipe_of
from trainer.planning.memory import GIB, MemoryEstimate, ParallelLayout
from trainer.planning.run_config import default_run_dir
from trainer.planning.strategy import (
    MemoryOptions,
    StrategySelector,
    background_refusal,
    check_graphs,
    check_shard_size,
    refuse_contradictions,
)
from trainer.recipes import RECIPES, PlanEntry
from trainer.recipes.hlb import device_token_capacity, tokens_per_microbatch
from trainer.recipes.recipe import Default

MOST_PARAMETERS = 10**13
TYPICAL_MFU = 0.2  # of small models, whose runs are so short that compiling may not pay
BACKGROUND_BYTES = 1 << 30  # GPU memory of a second process for CUDA itself


@dataclass(frozen=True)
class Draft:
    """A config on its way to a plan, and the entries so far. A draft never changes: every rule returns a new one."""

    config: Any  # a RunConfig; typed Any, since its `None`s go one by one
    entries: tuple[PlanEntry, ...] = ()

    def note(self, key: str, value: Any, rule: str) -> Draft:
        return replace(self, entries=(*self.entries, PlanEntry(key, value, rule)))

    def set(self, section: str, key: str, value: Any) -> Draft:
        """A draft with a new value of SECTION.KEY. "" is the section of the top-level keys."""
        if not section:
            return replace(self, config=replace(self.config, **{key: value}))
        part = replace(getattr(self.config, section), **{key: value})
        return replace(self, config=replace(self.config, **{section: part}))

    def fill(self, section: str, key: str, value: Any, rule: str) -> Draft:
        """A draft with SECTION.KEY set by a rule, unless the user or the launcher has set it. Notes it in either case."""
        given = getattr(getattr(self.config, section) if section else self.config, key)
        if given not in (None, "auto"):
            value, rule = given, "set"
        name = f"{section}.{key}".lstrip(".")
        draft = self.set(section, key, value)
        return draft if name in {entry.key for entry in self.entries} else draft.note(name, value, rule)


@dataclass(frozen=True)
class ModelFacts:
    """What the rules need of a model. meta: model without storage; non_embedding: parameters without embeddings and head; trained:
    parameters that are not frozen."""

    name: str
    model_class: Any
    config: Any  # the model's own Config
    meta: Any
    parameters: int
    non_embedding: int
    trained: int

    @property
    def has_base(self) -> bool:
        """Whether the settings of the optimizer are those of a base: with model.mup."""
        return self.meta.multipliers() is not None

    @property
    def base_non_embedding(self) -> int:
        """`non_embedding` of the base of model.mup; without it, the model's own."""
        scales = self.meta.multipliers()
        return self.non_embedding if scales is None else round(self.non_embedding / (scales.width**2 * scales.depth))

    @classmethod
    def of(cls, name: str, model_class: Any, config: Any) -> ModelFacts:
        """UserError if the model cannot be built, or its count of parameters is wrong or beyond any machine."""
        with told_of_model(model_class, "it cannot be built on the meta device"):
            parameters = model_class.count_parameters(config)
            if parameters > MOST_PARAMETERS:
                raise UserError(f"model {name}: {parameters:,} parameters are beyond any machine")
            meta = build_meta(model_class, config)
        if hasattr(meta, ATTRIBUTE):
            raise UserError(
                f"model {name}: has an attribute {ATTRIBUTE}, where the layers of an objective are kept; rename it"
            )
        roles = meta.names_by_role()
        sizes = {name: parameter.numel() for name, parameter in meta.named_parameters()}
        if parameters != sum(sizes.values()):
            raise UserError(
                f"model {name}: has {sum(sizes.values()):,} parameters, but its count_parameters says {parameters:,}"
            )
        outside = [name for role in ("embedding", "head") for name in roles.get(role, [])]
        non_embedding = parameters - sum(sizes[name] for name in outside)
        trained = sum(sizes[name] for name in trained_parameters(meta))
        return cls(name, model_class, config, meta, parameters, non_embedding, trained)


def follow_launcher_config(draft: Draft, processes: int) -> Draft:
    """What accelerate's config or a deepspeed.json asks for."""
    from trainer.planning.launcher_config import read_launcher_config, reconcile

    config = copy.deepcopy(draft.config)
    filled = reconcile(config, read_launcher_config(os.environ), processes)
    return Draft(config, draft.entries + tuple(PlanEntry(*entry) for entry in filled))


def choose_hardware(draft: Draft, model: ModelFacts, gpu: Any) -> tuple[Draft, Any]:
    """Precision, and the trainer.runtime.device.Target. gpu: the Gpu to plan for; None: the device at hand."""
    from models.layers.float8 import float8_refusal
    from trainer.runtime.device import Target, choose_device, choose_precision

    config = draft.config
    if gpu is None:
        device = choose_device(config.device)
        no_float8 = float8_refusal(device)
        target = Target.at_hand(device)
        precision, rule = choose_precision(config.precision, device)
        check_kernels(config, model, device, precision)
    else:
        no_float8 = None if gpu.has_fp8 else f"{gpu.name} has no units for fp8"
        target = Target.elsewhere(gpu)
        fastest = "bf16" if gpu.is_ampere else "fp32"
        given = config.precision != "auto"
        precision, rule = (config.precision, "set") if given else (fastest, f"fastest on the {gpu.name}")
    if config.float8 and no_float8 is not None:
        raise UserError(f"float8: {no_float8}; leave it out")
    draft = draft.set("", "precision", precision).note("precision", precision, rule)
    return draft.fill("batch", "device_token_capacity", *device_token_capacity(target.memory)), target


def check_kernels(config: Any, model: ModelFacts, device: Any, precision: str) -> None:
    """UserError where the model names a kernel that cannot train on the device at hand in this precision."""
    import torch

    computing = copy.deepcopy(model.meta).to(torch.float32 if precision == "fp32" else torch.bfloat16)
    try:
        computing.describe_kernels(device, config.data.separate_documents)
    except ValueError as error:
        raise UserError(f"model {model.name}: {error}") from None


def choose_recipe(draft: Draft) -> Draft:
    """The recipe that was made for the model, else plain."""
    check_lora(draft.config)
    if draft.config.optim.recipe != "auto":
        return draft
    name, why = recipe_of(draft.config.model)
    return draft.set("optim", "recipe", name).note("optim.recipe", name, why)


def choose_batch(draft: Draft, model: ModelFacts, stored: int, dial: Any = None) -> Draft:
    """Sequence lengths, and tokens of a step. stored: tokens of a sample in the dataset; dial: the DialFile of the plan, if any.
    UserError for lengths that cannot be, or a law in `dial` that gives no batch."""
    longest = min(stored, model.meta.max_context or stored)
    rule = "length of the stored samples" if longest == stored else "longest context of the model"
    draft = draft.fill("batch", "sequence_length", longest, rule)
    if draft.config.data.packing != "concat" or draft.config.data.mix:
        draft = keep_length(draft)
    defaults = dict(RECIPES[draft.config.optim.recipe].batch_defaults(draft.config, model))
    law = None
    if dial and draft.config.batch.tokens_per_step is None:
        law = dial.tokens_per_step(model.non_embedding, draft.config.batch.sequence_length, draft.config.max_steps)
    if law is not None:
        defaults["tokens_per_step"] = law
    for key, (value, rule) in defaults.items():
        if key == "tokens_per_step":
            value = max(value, draft.config.batch.sequence_length)
        draft = draft.fill("batch", key, value, rule)
    full = draft.config.batch.tokens_per_step
    ramped = draft.fill("batch", "ramp_start", max(1, full // 8), "an eighth of tokens_per_step")
    draft = ramped if ramped.config.batch.ramp_steps else replace(ramped, entries=draft.entries)  # else it is not used
    if draft.config.batch.ramp_start > full:
        raise UserError(f"batch.ramp_start: {draft.config.batch.ramp_start:,} is more than tokens_per_step, {full:,}")
    check_lengths(draft.config.batch, model, stored)
    return draft


def keep_length(draft: Draft) -> Draft:
    """Rows of documents, or of several datasets, have one length from the first step on. UserError if the config asks for growth."""
    data, length = draft.config.data, draft.config.batch.sequence_length
    of = "data.mix" if data.mix else f"data.packing {data.packing}"
    draft = draft.fill("batch", "sequence_start", length, f"rows of {of} do not grow")
    if draft.config.batch.sequence_start != length:
        raise UserError(
            f"batch.sequence_start: {draft.config.batch.sequence_start}, but rows of {of} do not grow to "
            f"batch.sequence_length, {length}; leave it out"
        )
    return draft


def check_lengths(batch: Any, model: ModelFacts, stored: int) -> None:
    """UserError if the lengths of a run do not fit each other, the model or the data."""
    start, longest, max_context = batch.sequence_start, batch.sequence_length, model.meta.max_context
    if start > longest:
        raise UserError(f"batch.sequence_start: {start} is more than batch.sequence_length, {longest}")
    if max_context and longest > max_context:
        raise UserError(f"batch.sequence_length: {longest} is more than the model's context of {max_context}")
    try:
        model.model_class.check_sizes(model.config, longest=longest)
    except ValueError as error:
        raise UserError(f"model.{error}") from None
    if longest > stored:
        raise UserError(
            f"batch.sequence_length: {longest} is longer than the stored samples of {stored} tokens; "
            f"prepare the data with --sample_length {longest}"
        )
    for length in schedules.sequence_lengths(start, longest, batch.sequence_double_every):
        if length < 1 or stored % length:
            raise UserError(f"batch.sequence_length: {length} does not divide the stored samples of {stored} tokens")


def most_tokens_per_step(batch: Any) -> float:
    """Tokens of the largest optimiser step."""
    return batch.tokens_per_step * (batch.n_max if batch.dynamic else 1)


def choose_engine(
    draft: Draft, model: ModelFacts, estimate: MemoryEstimate, world: Any, target: Any, row: int
) -> Draft:
    """Strategy and activation checkpointing, by the memory that one row of `row` tokens (or the microbatch that was set) needs.
    UserError if the device is too small to train."""
    from trainer.engine import activation_checkpointing, compilation

    config = draft.config
    batch, engine = config.batch, config.engine
    wanted = batch.tokens_per_microbatch or row
    selector = StrategySelector(estimate, config, world, target, wanted, most_tokens_per_step(batch))
    decided = engine.strategy != "auto"
    strategy, offload, rule = (engine.strategy, engine.offload, "set") if decided else selector.strategy()
    draft = draft.fill("engine", "strategy", strategy, rule)
    if offload and not engine.offload:
        draft = draft.set("engine", "offload", True)
        draft = draft.note("engine.offload", True, "weights, gradients and optimiser in CPU memory")
    refuse_contradictions(draft.config)
    refuse_scope(draft.config.engine, rules_used(model.meta, draft.config.optim))
    if draft.config.engine.strategy == "hsdp":
        draft = draft.fill("engine", "shard_size", world.local_size, "processes of one machine")
        check_shard_size(draft.config.engine.shard_size, world.size)
    seconds = expected_seconds(draft.config, model, world.size, target)
    draft = draft.fill("engine", "compile", *compilation.choose(draft.config.engine.strategy, target, seconds))
    if engine.activation_checkpointing != "auto":
        activation_checkpointing.parse(engine.activation_checkpointing)
    options, rule = selector.choose_options(ParallelLayout.of(draft.config, world.size, target))
    draft = draft.fill("engine", "activation_checkpointing", options.checkpointing, rule)
    draft = choose_state_precision(draft, options, rule, model)
    selector.refuse_the_impossible(ParallelLayout.of(draft.config, world.size, target), options)
    check_graphs(draft.config, target, model.model_class.recording_refusal(model.config))
    return draft


def expected_seconds(config: Any, model: ModelFacts, processes: int, target: Any) -> float | None:
    """Seconds of the whole run at TYPICAL_MFU of the device's peak; None if the peak is not known."""
    from trainer.runtime.device import peak_of

    peak = peak_of(target.name, config.precision, config.float8)
    if peak is None:
        return None
    flops = flops_per_token(model.model_class, model.config, config.batch.sequence_length)
    return config.max_steps * config.batch.tokens_per_step * flops / (TYPICAL_MFU * peak * processes)


def choose_state_precision(draft: Draft, options: MemoryOptions, rule: str, model: ModelFacts) -> Draft:
    """Type of the optimizer's state. options, rule: how the run is made to fit, and why."""
    if draft.config.precision == "pure_bf16":
        if draft.config.optim.state_precision in ("fp32", "bf16_stochastic"):
            raise UserError(
                f"optim.state_precision: {draft.config.optim.state_precision}, but with pure_bf16 the moments are bf16 like the "
                "weights"
            )
        options, rule = options._replace(narrow=True), "that of the weights"
    elif not options.narrow:
        rule = "that of the weights"
    nearest = options.narrow and draft.config.optim.state_precision != "bf16_stochastic"
    for used in rules_used(model.meta, draft.config.optim) if nearest else ():
        if refusal := used.rule.narrow_refusal():
            raise UserError(
                f"optim.state_precision: {used.name} cannot keep its state in bf16: {refusal}, or bf16_stochastic"
            )
    return draft.fill("optim", "state_precision", "bf16" if options.narrow else "fp32", rule)


def choose_microbatch(draft: Draft, estimate: MemoryEstimate, processes: int, target: Any, row: int) -> Draft:
    """Tokens of one forward and backward pass on one device: those of hlb's law, lowered to what the memory holds. row: tokens of
    one row, at most."""
    config, batch = draft.config, draft.config.batch
    longest, how = batch.sequence_length, config.engine.activation_checkpointing
    capacity: float = tokens_per_microbatch(config.model_scale, batch.device_token_capacity)
    rule = "floor(G / (1.52174 + 0.482 model_scale^0.87)), G = device_token_capacity"
    layout = ParallelLayout.of(config, processes, target)
    fits = estimate.tokens_that_fit(target.memory, layout, how, most_tokens_per_step(batch) > longest * processes)
    if fits < capacity:
        capacity, rule = fits, rule + f"; lowered to what {target.memory / GIB:.0f} GiB hold"
    if capacity < row:
        capacity, rule = row, rule + "; raised to one sequence"
    draft = draft.fill("batch", "tokens_per_microbatch", capacity, rule)
    for key, least in (("tokens_per_step", longest), ("tokens_per_microbatch", row)):
        tokens = getattr(draft.config.batch, key)
        if tokens < least:
            raise UserError(f"batch.{key}: {tokens} is less than one sequence of {least} tokens")
    return draft


def choose_background(draft: Draft, estimate: MemoryEstimate, processes: int, target: Any) -> Draft:
    """Whether to train eagerly while a second process compiles. If that is not possible, the run compiles at its first step, whatever
    the config says: it may be that of a run which goes on with another strategy."""
    config, engine = draft.config, draft.config.engine
    refusal = background_refusal(config)
    if refusal is None and engine.background_compile is None:
        refusal = _background_drawback(config, estimate, processes, target)
    if refusal is None:
        return draft.fill("engine", "background_compile", True, "no step waits for the compiler")
    return draft.set("engine", "background_compile", False).note("engine.background_compile", False, refusal)


def _background_drawback(config: Any, estimate: MemoryEstimate, processes: int, target: Any) -> str | None:
    """Why a second process would do harm on this device; None if it does not."""
    if target.memory is None:
        return "the second process would take the CPU from the first"
    layout = replace(ParallelLayout.of(config, processes, target), compiled=False)
    how = config.engine.activation_checkpointing
    sequences = max(1, config.batch.tokens_per_microbatch // config.batch.sequence_length)
    accumulates = most_tokens_per_step(config.batch) > config.batch.tokens_per_microbatch
    needed = estimate.most_held(layout, how, sequences, accumulates) + estimate.in_one_block(layout, how, sequences)
    if needed + BACKGROUND_BYTES > 0.9 * target.memory:
        return "eager steps and the second process would need more memory than this device has"
    return None


def choose_optimiser(draft: Draft, model: ModelFacts, dial: Any = None, tokens: int = 0) -> Draft:
    """First the laws of `dial`, then the settings that the model is made for, then those of the recipe. dial: the DialFile of the plan,
    if any; tokens: of the run. UserError for settings that cannot be, or a law in `dial` that gives no learning rate."""
    optim = draft.config.optim
    rule = get_rule(optim.name, optim.settings)  # UserError for a name or a key that does not exist
    if draft.config.max_steps < 1:
        raise UserError(f"max_steps: {draft.config.max_steps} is not a positive number of steps")
    defaults = optim_defaults(draft, model)
    adamw = defaults.pop("lr")
    instead = rate_of(rule, optim.name, adamw)
    law = dial and dial.learning_rate(model.non_embedding, draft.config.batch.tokens_per_step, tokens)
    if law and optim.lr is None and not 0 < law.value < math.inf:
        raise dial.unusable("optim.lr", law.value, model.non_embedding)
    instead = law or instead
    draft = draft.fill("optim", "lr", *instead)
    draft = choose_rest_lr(draft, rule, adamw if instead.value != adamw.value else None)
    for key, (value, reason) in defaults.items():
        draft = draft.fill("optim", key, value, reason)
    check_schedule(draft.config.optim, draft.config.optim.schedule)
    draft = follow_run(draft)
    if optim.ema:
        why = "set; average = d average + (1 - d) weights, d = min(ema, (1 + t) / (10 + t)) after t updates"
        draft = draft.note("optim.ema", optim.ema, why)
    return choose_embedding_frequency(draft, model.meta.tied_embedding())


def optim_defaults(draft: Draft, model: ModelFacts) -> dict[str, Default]:
    """By key of `optim`, for AdamW: of the model, then of the recipe."""
    why = f"what {model.name} is made for"
    source = model.model_class.optim_source
    own = {
        key: Default(value, why + f" ({source})" * bool(source))
        for key, value in model.model_class.optim_defaults.items()
    }
    found = {**RECIPES[draft.config.optim.recipe].optim_defaults(draft.config, model), **own}
    return found | {"lr": lora_rate(found["lr"])} if has_lora(draft.config.model) else found


def check_schedule(optim: Any, schedule: str, section: str = "optim") -> None:
    """UserError if the recipe cannot follow the schedule of this section."""
    allowed = RECIPES[optim.recipe].schedules
    if schedule not in allowed:
        raise UserError(
            f"{section}.schedule: the recipe {optim.recipe} cannot follow {schedule} (allowed: {', '.join(sorted(allowed))}); "
            "choose another optim.recipe or schedule"
        )
    if schedule == "exponential" and optim.final_lr_fraction == 0:
        raise UserError("optim.final_lr_fraction: an exponential decay never reaches 0; set it above 0")


def rate_of(rule: OptimizerRule, name: str, adamw: Default) -> Default:
    """The learning rate that the rule takes where AdamW takes `adamw`, with its source."""
    found = rule.default_lr(adamw.value)
    if found is not None:
        rate, source = found
        return Default(rate, f"{source}; AdamW's: {adamw.rule}")
    unknown = "" if name == DEFAULT_RULE else f"; AdamW's, for no rate of {name} is published"
    return Default(adamw.value, adamw.rule + unknown)


def choose_rest_lr(draft: Draft, rule: OptimizerRule, adamw: Default | None) -> Draft:
    """For a rule of whole matrices: optim.rest_lr of what AdamW updates. adamw: its rate, None if the rule takes the same."""
    optim = draft.config.optim
    if rule.scope == "matrix":
        same = Default(optim.lr, f"optim.lr, since updates of {optim.name} have the size of AdamW's")
        return draft.fill("optim", "rest_lr", *(adamw or same))
    if optim.rest_lr is None:
        return draft
    # Not an error: the config of a run whose optim.name is changed has it, and is refused for that.
    why = f"{optim.rest_lr:g} has no effect: {optim.name} updates every parameter, at optim.lr"
    return draft.set("optim", "rest_lr", None).note("optim.rest_lr", "none", why)


def follow_run(draft: Draft) -> Draft:
    """The settings of the optimizer that stand for those of the run."""
    optim, steps = draft.config.optim, draft.config.max_steps
    found = settings_of_run(optim.name, optim.settings, steps, optim.warmup_steps)
    for key, value in found.items():
        source = "max_steps of the first start" if key == "total_steps" else "optim.warmup_steps"
        draft = draft.note(f"optim.settings.{key}", value, source)
    return draft.set("optim", "settings", {**optim.settings, **found})


def choose_embedding_frequency(draft: Draft, tied: bool) -> Draft:
    """tied: whether the head shares the embedding's matrix."""
    optim, key = draft.config.optim, "embedding_frequency"
    if optim.embedding_frequency == "auto":
        value, rule = RECIPES[optim.recipe].embedding_frequency(tied)
        return draft.set("optim", key, value).note(f"optim.{key}", value, rule)
    if optim.embedding_frequency != "none" and tied:
        raise UserError(
            "optim.embedding_frequency: this model ties head and embedding, whose gradients cannot be told apart; "
            "set it to none"
        )
    return draft


def choose_rest(draft: Draft, max_context: int | None, records: str | None) -> Draft:
    """Folder, checkpoints and validation. records: of the dataset; None if there is none yet."""
    draft = draft.fill("", "run_dir", default_run_dir(draft.config), "runs/MODEL-SCALE")
    draft = draft.fill("checkpoint", "every", max(1, draft.config.max_steps // 10), "a tenth of max_steps")
    longest = draft.config.batch.sequence_length
    draft = draft.fill("evaluation", "sequence_length", longest, "the longest training sequence")
    length = draft.config.evaluation.sequence_length
    if max_context is not None and length > max_context:
        raise UserError(f"evaluation.sequence_length: {length} is more than the model's context of {max_context}")
    return choose_patience(draft, records)


def choose_patience(draft: Draft, records: str | None) -> Draft:
    """Check by what evaluations are judged, and tell what early stopping does. records: of the dataset; None if there is none yet."""
    config = draft.config
    evaluation, metric = config.evaluation, config.evaluation.metric
    if metric == "ema_val_loss" and not config.optim.ema:
        raise UserError("evaluation.metric: ema_val_loss is of the moving average; set optim.ema, such as 0.999")
    if metric == "val_objective_loss" and records not in (None, "preference"):
        raise UserError(f"evaluation.metric: only preference data have val_objective_loss, these are {records}")
    if not evaluation.patience:
        return draft
    if not evaluation.every:
        raise UserError("evaluation.patience: nothing is evaluated before the end; set evaluation.every above 0")
    rule = f"evaluations without a lower {metric} end the run; the schedules stay those of {config.max_steps:,} steps"
    return draft.note("evaluation.patience", evaluation.patience, rule)
