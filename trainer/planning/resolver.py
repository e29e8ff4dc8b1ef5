"""The rules that fill what a RunConfig leaves open, section by section, each value noted with the rule it came from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.engine.meta import build_meta, told_of_model
from trainer.optim import get_rule, rule_config, schedules
from trainer.planning.memory import GIB, MemoryEstimate, ParallelLayout
from trainer.planning.run_config import default_run_dir
from trainer.planning.strategy import (
    MemoryOptions,
    StrategySelector,
    check_graphs,
    check_shard_size,
    refuse_contradictions,
)
from trainer.recipes import hlb as hlb_laws
from trainer.recipes import plain

MOST_PARAMETERS = 10**13


@dataclass
class PlanEntry:
    """One number of the plan: its key, its value, and the rule it came from."""

    key: str
    value: Any
    rule: str


class Resolver:
    """Fills a RunConfig section by section, noting each value with its rule."""

    def __init__(self, config: RunConfig) -> None:
        self.config: Any = config
        self.entries: list[PlanEntry] = []
        self.parameters = self.non_embedding = 0

    def note(self, key: str, value: Any, rule: str) -> None:
        self.entries.append(PlanEntry(key, value, rule))

    def fill(self, section: str, key: str, value: Any, rule: str) -> Any:
        """Set SECTION.KEY unless the user or the launcher has; returns what holds."""
        target = getattr(self.config, section) if section else self.config
        if getattr(target, key) in (None, "auto"):
            setattr(target, key, value)
        else:
            rule = "set"
        held, name = getattr(target, key), f"{section}.{key}".lstrip(".")
        if name not in {entry.key for entry in self.entries}:
            self.note(name, held, rule)
        return held

    def model(self, model_class: Any, model_config: Any) -> None:
        self.model_class, self.model_config = model_class, model_config
        with told_of_model(model_class, "it cannot be built on the meta device"):
            self.parameters = model_class.count_parameters(model_config)
            if self.parameters > MOST_PARAMETERS:
                raise UserError(
                    f"model {self.config.model['name']}: {self.parameters:,} parameters are beyond any machine"
                )
            meta = build_meta(model_class, model_config)
        roles = meta.names_by_role()
        sizes = {name: parameter.numel() for name, parameter in meta.named_parameters()}
        if self.parameters != sum(sizes.values()):
            raise UserError(
                f"model {self.config.model['name']}: has {sum(sizes.values()):,} parameters, but its count_parameters says "
                f"{self.parameters:,}"
            )
        outside = [name for role in ("embedding", "head") for name in roles.get(role, [])]
        self.non_embedding = self.parameters - sum(sizes[name] for name in outside)
        self.meta = meta
        self.tied = meta.tied_embedding()
        self.max_context = meta.max_context

    def launcher(self, world: Any) -> None:
        from trainer.planning.launcher_config import read_launcher_config, reconcile

        for key, value, rule in reconcile(self.config, read_launcher_config(os.environ), world.size):
            self.note(key, value, rule)

    def hardware(self, gpu: Any) -> None:
        """gpu: a trainer.runtime.device.Gpu to plan for; None: the device at hand."""
        from models.layers.float8 import float8_refusal
        from trainer.runtime.device import Target, choose_device, choose_precision

        if gpu is None:
            device = choose_device(self.config.device)
            no_float8 = float8_refusal(device)
            self.target = Target.at_hand(device)
            precision, rule = choose_precision(self.config.precision, device)
            self._check_kernels(device, precision)
        else:
            no_float8 = None if gpu.has_fp8 else f"{gpu.name} has no units for fp8"
            self.target = Target.elsewhere(gpu)
            fastest = "bf16" if gpu.is_ampere else "fp32"
            given = self.config.precision != "auto"
            precision, rule = (self.config.precision, "set") if given else (fastest, f"what the {gpu.name} multiplies")
        if self.config.float8 and no_float8 is not None:
            raise UserError(f"float8: {no_float8}; leave it out")
        self.config.precision = precision
        self.note("precision", precision, rule)
        self.fill("batch", "device_token_capacity", *hlb_laws.device_token_capacity(self.target.memory))

    def _check_kernels(self, device: Any, precision: str) -> None:
        """UserError where the model names a kernel that cannot train on the device at hand in this precision."""
        import torch

        computing = self.meta.to(torch.float32 if precision == "fp32" else torch.bfloat16)
        try:
            computing.describe_kernels(device, self.config.data.separate_documents)
        except ValueError as error:
            raise UserError(f"model {self.config.model['name']}: {error}") from None

    def batch(self, dataset: Any) -> None:
        config, scale = self.config, self.config.model_scale
        recipe = config.optim.recipe
        if recipe == "auto":
            recipe = "hlb" if config.model["name"] == "hlb" else "plain"
            self.note(
                "optim.recipe",
                recipe,
                f"the recipe made for {config.model['name']}" if recipe == "hlb" else "warm-up and cosine",
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
            tokens = hlb_laws.tokens_per_microbatch(scale)
            rule = "C of the law at model_scale on hlb's own 40 GiB A100 (the batch never depends on the device)"
        else:
            tokens = max(1, round(plain.plain_tokens_per_step(self.non_embedding) / longest)) * longest
            rule = "2048*160 (N/108M)^(2/3), N without embeddings, in whole sequences"
        self.fill("batch", "tokens_per_step", max(tokens, longest), rule)
        self.fill("batch", "dynamic", hlb, "hlb's gradient-norm law" if hlb else "fixed batch")

    def engine(self, world: Any, training: bool) -> None:
        """Strategy and activation checkpointing, by what one sequence (or the microbatch that was set) needs.

        training: UserError where the device is too small to train.
        """
        from trainer.engine import activation_checkpointing, compilation

        config, batch, engine = self.config, self.config.batch, self.config.engine
        documents = self.config.data.separate_documents
        self.estimate = MemoryEstimate(self.model_class, self.model_config, batch.sequence_length, documents)
        self.step: float = batch.tokens_per_step * (batch.n_max if batch.dynamic else 1)
        wanted = batch.tokens_per_microbatch or batch.sequence_length
        selector = StrategySelector(self.estimate, config, world, self.target, wanted, self.step)
        decided = engine.strategy != "auto"
        strategy, offload, rule = (engine.strategy, engine.offload, "set") if decided else selector.strategy()
        self.fill("engine", "strategy", strategy, rule)
        if offload and not engine.offload:
            engine.offload = True
            self.note("engine.offload", True, "weights, gradients and optimiser in CPU memory")
        refuse_contradictions(config)
        if engine.strategy == "hsdp":
            shard_size = self.fill("engine", "shard_size", world.local_size, "processes of one machine")
            check_shard_size(shard_size, world.size)
        self.layout = ParallelLayout.of(config, world.size, self.target)
        if engine.activation_checkpointing != "auto":
            activation_checkpointing.parse(engine.activation_checkpointing)
        options, rule = selector.choose_options(self.layout)
        self.fill("engine", "activation_checkpointing", options.checkpointing, rule)
        self._state_precision(options, rule)
        if training:
            selector.refuse_the_impossible(self.layout, options)
        self.fill("engine", "compile", *compilation.choose(engine.strategy, self.target))
        check_graphs(config, self.target, self.model_class.recording_refusal(self.model_config))

    def unreached(self) -> list[str] | None:
        """Parameters that get no gradient, as `engine` has found beside the memory that is needed."""
        return self.estimate.unreached(self.layout, self.config.engine.activation_checkpointing)

    def _state_precision(self, options: MemoryOptions, rule: str) -> None:
        config = self.config
        if config.precision == "pure_bf16":
            if config.optim.state_precision == "fp32":
                raise UserError(
                    "optim.state_precision: fp32, but with precision pure_bf16 moments are bf16 as the weights"
                )
            options, rule = options._replace(narrow=True), "that of the weights"
        elif not options.narrow:
            rule = "that of the weights"
        self.fill("optim", "state_precision", "bf16" if options.narrow else "fp32", rule)
        self.layout = ParallelLayout.of(config, self.layout.processes, self.target)

    def microbatch(self) -> None:
        config, batch = self.config, self.config.batch
        longest, how = batch.sequence_length, config.engine.activation_checkpointing
        capacity: float = hlb_laws.tokens_per_microbatch(config.model_scale, batch.device_token_capacity)
        rule = "floor(G / (1.52174 + 0.482 model_scale^0.87)), G = device_token_capacity"
        memory: Any = self.target.memory
        fits = self.estimate.tokens_that_fit(memory, self.layout, how, self.step > longest * self.layout.processes)
        if fits < capacity:
            capacity, rule = fits, rule + f"; lowered to what {memory / GIB:.0f} GiB hold"
        if capacity < longest:
            capacity, rule = longest, rule + "; raised to one sequence"
        self.fill("batch", "tokens_per_microbatch", capacity, rule)
        for key in ("tokens_per_step", "tokens_per_microbatch"):
            if getattr(batch, key) < longest:
                raise UserError(f"batch.{key}: {getattr(batch, key)} is less than one sequence of {longest} tokens")

    def _check_lengths(self, stored: int, start: int, longest: int) -> None:
        batch = self.config.batch
        if start > longest:
            raise UserError(f"batch.sequence_start: {start} is more than batch.sequence_length, {longest}")
        if self.max_context and longest > self.max_context:
            raise UserError(f"batch.sequence_length: {longest} is more than the model's context of {self.max_context}")
        try:
            self.model_class.check_sizes(self.model_config, longest=longest)
        except ValueError as error:
            raise UserError(f"model.{error}") from None
        if longest > stored:
            raise UserError(
                f"batch.sequence_length: {longest} is longer than the stored samples of {stored} tokens; "
                f"prepare the data with --sample_length {longest}"
            )
        for length in schedules.sequence_lengths(start, longest, batch.sequence_double_every):
            if length < 1 or stored % length:
                raise UserError(
                    f"batch.sequence_length: {length} does not divide the stored samples of {stored} tokens"
                )

    def optimiser(self) -> None:
        optim, steps = self.config.optim, self.config.max_steps
        rule_config(get_rule(optim.name), {}, optim.settings)  # UserError for a name or a key that does not exist
        if steps < 1:
            raise UserError(f"max_steps: {steps} is not a positive number of steps")
        hlb = optim.recipe == "hlb"
        for key, value in self.model_class.optim_defaults.items():
            self.fill("optim", key, value, f"what {self.config.model['name']} is made for")
        if hlb:
            self.fill("optim", "lr", hlb_laws.learning_rate(self.parameters), "2.62 * 9e7 / (ln N)^8.8")
            self.fill("optim", "warmup_steps", 100, "hlb")
            self.fill("optim", "weight_decay", 0.0, "hlb decays by the loss")
        else:
            lr = plain.plain_learning_rate(max(2, self.non_embedding))
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
