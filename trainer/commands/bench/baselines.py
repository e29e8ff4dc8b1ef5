"""What the trainer is compared with: bare PyTorch loops around its own model, and around the same shape in `transformers` and
in nanoGPT's form."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from models.base import cross_entropy, get_model
from models.materialise import materialise
from trainer.commands.bench import BenchConfig
from trainer.commands.bench.clock import PhaseClock
from trainer.commands.bench.nanogpt import NanoGpt
from trainer.commands.bench.variants import Candidate
from trainer.core.errors import UserError
from trainer.data.documents import document_numbers
from trainer.data.stream import Split, TrainStream
from trainer.engine.base import autocast, prepare_blocks, prepare_device
from trainer.engine.meta import build_meta
from trainer.planning.memory import expected_memory
from trainer.planning.plan import Plan
from trainer.runtime.distributed import World


class Reader:
    """Reads this rank's rows of each step straight from the stream; every rank has the same number of rows."""

    def __init__(self, plan: Plan, dataset: Any, world: World) -> None:
        config = plan.config
        self.length = config.batch.sequence_length
        self.sequences = -(-(config.batch.tokens_per_step // self.length) // world.size)  # of one rank
        self.first, self.step_tokens = self.sequences * world.rank, self.sequences * self.length * world.size
        self.stream = TrainStream(
            Split(config.data, dataset, "train"), config.seed, config.data.threads, config.data.order
        )
        self.position = 0

    def read(self) -> Tensor:
        """Returns [rows, length + 1] int64 in CPU memory, and starts to read the rows of the next step."""
        rows = self.stream.windows(self.position, self.length, self.first, self.sequences)
        self.position += self.step_tokens
        self.stream.read_ahead(self.position, self.length, self.first, self.sequences)
        return torch.from_numpy(rows)

    def read_tokens(self) -> int:
        """Read a step; returns its number of tokens."""
        return self.read()[:, 1:].numel()


class Baseline(Candidate):
    """The loop everyone writes first: autocast, fused AdamW, clipping, DDP if there are several processes."""

    kind = "baseline"

    def make_model(self) -> Any:
        """The model on the device, with initial weights."""
        raise NotImplementedError

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Sum of the token losses; tokens, targets: [B, T]."""
        raise NotImplementedError

    def build(self) -> None:
        config = self.plan.config
        self.config = config
        prepare_device(self.device, config.deterministic)
        model = self.make_model()
        model = model.to(torch.bfloat16) if config.precision == "pure_bf16" else model
        self.model: Any = DistributedDataParallel(model) if self.world.size > 1 else model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        self.reader = Reader(self.plan, self.dataset, self.world)

    def step(self) -> int:
        rows = self.read()
        parts = rows.split(max(1, self.config.batch.tokens_per_microbatch // self.reader.length))
        for number, part in enumerate(parts, 1):
            self.backward(part, number == len(parts))
        self.update()
        return self.reader.step_tokens

    def read(self) -> Tensor:
        rows = self.reader.read()
        return rows.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else rows

    def backward(self, rows: Tensor, last: bool) -> None:
        quiet = self.world.size > 1 and not last
        with self.model.no_sync() if quiet else contextlib.nullcontext():
            (self.forward(rows) * (self.world.size / self.reader.step_tokens)).backward()

    def forward(self, rows: Tensor) -> Tensor:
        with autocast(self.device, self.config.precision):
            return self.loss(rows[:, :-1], rows[:, 1:])

    def update(self) -> None:
        if self.config.optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def watch(self, clock: PhaseClock) -> None:
        phases = {"read": "data", "forward": "forward", "backward": "backward", "update": "optimiser"}
        for method, phase in phases.items():
            clock.watch(self, method, phase)

    def close(self) -> None:
        if hasattr(self, "reader"):  # missing if `build` failed
            self.reader.stream.close()
        # The last four are the wrappers that `watch` puts over methods.
        for name in ("model", "optimizer", "reader", "read", "forward", "backward", "update"):
            self.__dict__.pop(name, None)
        super().close()

    def needs(self, **otherwise: Any) -> dict[str, int]:
        """otherwise: settings that replace those of the plan's config.engine."""
        config, strategy = self.plan.config, "ddp" if self.world.size > 1 else "single"
        engine = dataclasses.replace(config.engine, **{"strategy": strategy, "offload": False, **otherwise})
        config = dataclasses.replace(config, engine=engine)
        return expected_memory(dataclasses.replace(self.plan, config=config, model_config=self.model_config()))

    def model_config(self) -> Any:
        """The config of `our_model`, and the one that `needs` counts with."""
        return self.plan.model_config

    def our_model(self) -> Any:
        """Our own model on the device, with the initial weights of the run."""
        meta = build_meta(self.plan.model_class, self.model_config())
        return materialise(meta, self.device, torch.Generator().manual_seed(self.config.seed))


class BareLoop(Baseline):
    """Our own model, with the kernels, recomputation and compilation of the first variant."""

    def make_model(self) -> Any:
        model = self.our_model()
        prepare_blocks(model, self.config, self.world.say_from)
        return model

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        documents = document_numbers(tokens, self.plan.end_of_text)
        return self.model(tokens, targets=targets, documents=documents, reduction="sum").loss


class WholeLogits(Baseline):
    """A model that recomputes nothing and holds all logits of a microbatch."""

    def needs(self, **otherwise: Any) -> dict[str, int]:
        needs = super().needs(activation_checkpointing="none", **otherwise)
        logits = self.plan.config.batch.tokens_per_microbatch * self.plan.model_config.vocab_size
        return needs | {"total": needs["total"] + 12 * logits}  # the logits, their fp32 copy, and its gradient


class EagerBaseline(WholeLogits):
    """Our own model in its straightforward form: whole logits, dense attention, nothing compiled or recomputed."""

    def model_config(self) -> Any:
        return self.plan.model_class.with_kernels(self.plan.model_config, "torch")

    def make_model(self) -> Any:
        self.details = {"what": "the same model with whole logits, dense attention, nothing compiled"}
        return self.our_model()

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        documents = document_numbers(tokens, self.plan.end_of_text)
        return cross_entropy(self.model(tokens, documents=documents).logits, targets, "sum")

    def needs(self, **otherwise: Any) -> dict[str, int]:
        return super().needs(compile=False, **otherwise)


class NanoGptBaseline(WholeLogits):
    """Our `gpt2` as nanoGPT writes it, from the same initial weights; compiled as a whole if the first variant is compiled."""

    def make_model(self) -> Any:
        make = partial(build_meta, NanoGpt)
        model = of_same_shape("nanogpt", "gpt2", self.plan.model_config, make, followed={"bias"})
        model.load_state_dict(self.our_model().state_dict(), assign=True)
        self.details = {"what": "a GPT-2 as nanoGPT writes it, with whole logits"}
        if self.config.engine.compile:
            model.compile()
        return model

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.model(tokens, targets)


class TransformersBaseline(Baseline):
    """A model of the same shape from `transformers`, with its own loss and PyTorch's attention; compiled if the first variant is."""

    def make_model(self) -> Any:
        sys.modules.setdefault("torchvision", cast(Any, None))  # if built for another torch, it would break the import
        from transformers.utils import logging

        logging.set_verbosity_error()
        with self.device:
            model = counterpart(self.plan.config.model["name"], self.plan.model_config)
        version, attention = importlib.metadata.version("transformers"), model.config._attn_implementation
        self.details = {"what": f"transformers {version} {type(model).__name__}, attention {attention}"}
        if self.config.engine.activation_checkpointing != "none":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.config.engine.compile:
            model.compile()
        return model.train()

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        # The model shifts the labels itself, so it leaves out the last target of each row.
        return self.model(input_ids=tokens, labels=tokens, use_cache=False).loss * tokens.numel()


def counterpart(name: str, config: Any) -> Any:
    """The `transformers` model that computes the same as our model `name`. Raises ValueError if there is none."""
    make, followed = COUNTERPARTS[name]
    return of_same_shape(f"transformers' {name}", name, config, make, followed)


def of_same_shape(theirs: str, name: str, config: Any, make: Callable[[Any], Any], followed: set[str]) -> Any:
    """`make(config)`, whose name is `theirs` and which supports the fields `followed`, instead of our model `name`.

    ValueError if `config` sets another field that would change what is computed, or if the number of parameters differs.
    """
    defaults = type(config)()
    for field in sorted({field.name for field in dataclasses.fields(config)} - followed - OF_SHAPE - OF_THE_OUTSET):
        if getattr(config, field) != getattr(defaults, field):
            raise ValueError(f"{theirs} has no {field} {getattr(config, field)}")
    model = make(config)
    count, ours = sum(p.numel() for p in model.parameters()), get_model(name).count_parameters(config)
    if count != ours:
        raise ValueError(f"{theirs} of this shape has {count:,} parameters, not {ours:,}")
    return model


def gpt2_counterpart(config: Any) -> Any:
    """The GPT-2 of `transformers` in the shape of our `gpt2`, which also has no dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    if config.mlp not in ACTIVATION_OF:
        raise ValueError(f"transformers' gpt2 has no mlp {config.mlp}")
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_embd=config.d_model,
            n_layer=config.n_layers,
            n_head=config.n_heads,
            n_inner=config.hidden,
            n_positions=config.max_context,
            activation_function=ACTIVATION_OF[config.mlp],
            layer_norm_epsilon=config.norm_eps,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            attn_implementation="sdpa",
        )
    )


def llama_counterpart(config: Any) -> Any:
    """The Llama of `transformers` in the shape of our `llama`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.hidden,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_width,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_theta,
            tie_word_embeddings=config.tied,
            attn_implementation="sdpa",
        )
    )


ACTIVATION_OF = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu2": "relu2"}  # our mlp -> their activation
# model.name -> (function that makes the counterpart, fields of Config that the counterpart supports).
COUNTERPARTS: dict[str, tuple[Callable[[Any], Any], set[str]]] = {
    "gpt2": (gpt2_counterpart, {"mlp", "norm_eps"}),
    "llama": (llama_counterpart, {"norm_eps", "rope_theta", "tied"}),
}
OF_SHAPE = {"vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "max_context"}
OF_SHAPE |= {"d_hidden", "hidden_ratio", "hidden_multiple"}  # an error in these shows in the number of parameters
OF_THE_OUTSET = {"attention_kernel", "kernels", "init", "init_std", "zero_init"}  # kernels, initial weights: may differ


def baselines(config: BenchConfig, like: Candidate) -> list[Baseline]:
    """The baselines that config.baselines names, with the shape and batch of `like`; by default those that are available."""
    model = like.plan.config.model["name"]
    installed = importlib.util.find_spec("transformers") is not None
    wanted = config.baselines
    if wanted is None:
        wanted = ["bare", "transformers"] if installed and model in COUNTERPARTS else ["bare"]
    if "transformers" in wanted and not installed:
        raise UserError("baselines: transformers is not installed; `pip install transformers`, or use --baselines bare")
    if "transformers" in wanted and model not in COUNTERPARTS:
        raise UserError(
            f"baselines: no counterpart of {model} in transformers is known (only of {', '.join(COUNTERPARTS)}); use --baselines bare"
        )
    if "nanogpt" in wanted and model != "gpt2":
        raise UserError(f"baselines: nanogpt has the shape of gpt2 only, not of {model}; use --baselines bare")
    kinds: dict[str, tuple[str, type[Baseline]]] = {
        "bare": ("bare loop", BareLoop),
        "eager": ("eager", EagerBaseline),
        "nanogpt": ("nanogpt", NanoGptBaseline),
        "transformers": ("transformers", TransformersBaseline),
    }
    found = [kinds[kind] for kind in wanted]
    return [make(name, like.plan, like.dataset, like.world, like.device) for name, make in found]
