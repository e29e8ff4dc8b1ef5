"""Every setting a run can have: its name, type, default and help text, in one place.

`trainer/core/settings.py` fills these dataclasses from YAML and flags. `None` means "infer it": `trainer/planning/plan.py` fills every
`None` by a rule and prints the rule. Nothing here imports torch, so `--help` is instant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.core.settings import coerce, setting

Precision = Literal["auto", "fp32", "bf16", "pure_bf16"]
LONGEST = 2**24  # tokens of a sequence: beyond all models, and what a plan can still reckon with
Strategy = Literal["auto", "single", "ddp", "fsdp", "hsdp", "zero0", "zero1", "zero2", "zero3"]

# What a key means that a run's config.yaml does not have, because the run was started before there was the key.
ABSENT_MEANS: dict[str, Any] = {"data.order": "samples", "optim.name": "adamw", "objective.name": "next_token"}


@dataclass
class CorpusConfig:
    """Which text, and how it becomes tokens; shared by `prepare` and by runs that prepare their data on first use."""

    source: str | None = setting(
        None,
        "text file, directory, .jsonl, .ndjson or .json of rows (also .gz, .zst), .parquet, hf://NAME[/CONFIG][:SPLIT], or "
        "builtin:python-stdlib",
    )
    tokenizer: str = setting(
        "gpt2", "gpt2, gpt-neox-20b, bytes, chars, train-bpe:N, a tokenizer.json, or a folder that holds one"
    )
    validation_source: str | None = setting(
        None, "source of the validation split; auto: documents held out of `source`"
    )
    validation_fraction: float = setting(
        0.01, "share of documents held out when there is no validation_source", low=0, high=0.9
    )
    text_field: str = setting("text", "field that holds the text in rows; a.b is field b of what a holds")
    on_bad_row: Literal["stop", "skip"] = setting(
        "stop", "what to do at a row that is not JSON, not UTF-8 or has no text in text_field; skip: count it"
    )
    document_start: str | None = setting(
        None, "regular expression of lines (or rows) that open a document; auto: each file or row is a document"
    )
    end_of_text: str | None = setting(
        None, "token of the tokenizer that ends documents; auto: <|endoftext|>, </s>, <eos> or <|end_of_text|>"
    )
    sample_length: int = setting(
        1024, "tokens per stored sample: the longest sequence that can be trained on", low=1, high=LONGEST
    )


@dataclass
class PrepareConfig(CorpusConfig):
    """`prepare`: text to MDS shards."""

    out: str | None = setting(None, "folder to write; must not exist")
    workers: int | None = setting(None, "tokenising processes; auto: one per core", low=1)
    shard_megabytes: int = setting(64, "size of one shard in MiB", low=1)


@dataclass
class DataConfig(CorpusConfig):
    """The prepared dataset a run reads."""

    path: str | None = setting(None, "folder or s3://, gs://, hf:// address that `prepare` wrote; prepared if missing")
    cache: str | None = setting(None, "folder for shards of a remote path; auto: under the user's cache folder")
    threads: int = setting(4, "threads that read ahead (never changes the order)", low=1)
    order: Literal["windows", "samples"] = setting(
        "windows",
        "windows: those of a step are of as many texts as there are; samples: each is read to its end first",
    )
    separate_documents: bool = setting(False, "tokens attend only within their own document")


@dataclass
class BatchConfig:
    """How many tokens make a step. All counts are global: they do not change with the number of devices."""

    tokens_per_step: int | None = setting(None, "global tokens of one optimiser step (before hlb's multiplier)", low=1)
    tokens_per_microbatch: int | None = setting(None, "most tokens one device takes in one forward and backward", low=1)
    device_token_capacity: int | None = setting(
        None, "tokens that fit the device at model_scale 1 (G of the law of C)", low=1
    )
    sequence_length: int | None = setting(
        None, "longest training sequence; divides data.sample_length", low=1, high=LONGEST
    )
    sequence_start: int | None = setting(
        None, "first sequence length; doubled until sequence_length", low=1, high=LONGEST
    )
    sequence_double_every: int | None = setting(None, "optimiser steps between doublings; 0: no growth", low=0)
    dynamic: bool | None = setting(None, "hlb's law: multiply the batch to keep the gradient norm on its target")
    n_max: float = setting(16.0, "upper bound of hlb's batch multiplier n", low=1)


@dataclass
class OptimConfig:
    """The optimiser and its schedules."""

    name: str = setting("adamw", "the optimizer; --plugin FILE.py may register another")
    settings: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "optim.settings.FIELD sets a field of the optimizer's own Config"}
    )
    recipe: Literal["auto", "hlb", "plain"] = setting(
        "auto", "hlb: four groups and hlb-gpt's laws; plain: warm-up and cosine"
    )
    lr: float | None = setting(None, "peak learning rate of the matrices", above=0)
    warmup_steps: int | None = setting(None, "steps of linear warm-up", low=0)
    final_lr_fraction: float = setting(0.1, "plain: cosine ends at this share of the peak", low=0, high=1)
    weight_decay: float | None = setting(None, "plain: weight decay of parameters with two or more dimensions", low=0)
    loss_driven_decay: bool | None = setting(None, "hlb: weight decay of the matrices follows the loss")
    clip_norm: float | None = setting(None, "global gradient norm to clip to; 0: off", low=0)
    state_precision: Literal["auto", "fp32", "bf16"] = setting(
        "auto", "numbers that hold the optimizer's state; bf16: half the memory, rounded after each step"
    )
    embedding_frequency: Literal["auto", "global", "microbatch", "none"] = setting(
        "auto", "divide embedding gradients by token counts over the step, over a microbatch (the original), or not"
    )
    non_finite: Literal["stop", "skip"] = setting("stop", "what to do at a NaN or Inf; the weights never see it")
    max_skips: int = setting(10, "non-finite steps in a row after which `skip` stops too", low=0)


@dataclass
class EngineConfig:
    """How the model is spread over devices."""

    strategy: Strategy = setting(
        "auto", "single, ddp, fsdp, hsdp (sharded in a group, copied across groups) or DeepSpeed's zero0 to zero3"
    )
    shard_size: int | None = setting(
        None, "hsdp: processes that share one copy of the weights; auto: those of one machine", low=1
    )
    reshard_after_forward: bool = setting(
        True, "fsdp, hsdp: free a block's weights after its forward and gather them again for its backward"
    )
    offload: bool = setting(
        False, "fsdp, hsdp: weights, gradients and optimiser in CPU memory; zero1 to zero3: gradients and optimiser"
    )
    deepspeed_config: str | None = setting(None, "zero0 to zero3: a deepspeed.json with further settings")
    activation_checkpointing: str = setting(
        "auto", "none, full, every-N (every N-th block) or selective (keeps products with weights and attention)"
    )
    compile: bool | None = setting(None, "torch.compile each block and the loss; auto: on a GPU")
    cuda_graphs: bool = setting(
        False, "single, on a GPU: record a microbatch of each shape and replay it as one launch"
    )
    timeout_minutes: float = setting(30.0, "several processes: without progress for so long the run ends", above=0)
    step_timeout_minutes: float = setting(
        5.0, "the same within an optimiser step, after the first; the smaller of the two counts", above=0
    )


@dataclass
class EvaluationConfig:
    """Validation during training and by `evaluate`."""

    every: int = setting(50, "optimiser steps between evaluations; 0: only at the end", low=0)
    protocol: Literal["full", "hlb", "both"] = setting(
        "full", "full: the split in order, every token once; hlb: 150 random windows, seeded; both"
    )
    max_tokens: int = setting(0, "full: stop after about this many tokens during training; 0: the whole split", low=0)
    sequence_length: int | None = setting(
        None, "window length; auto: the longest training sequence", low=1, high=LONGEST
    )


@dataclass
class CheckpointConfig:
    """What is kept to go on from."""

    every: int | None = setting(
        None, "optimiser steps between checkpoints; auto: a tenth of the run; 0: at the end", low=0
    )
    keep: int = setting(2, "newest checkpoints kept", low=1)
    keep_every: int = setting(0, "also write one at every multiple of this step and keep it for good; 0: none", low=0)
    asynchronous: bool = setting(False, "train on while a checkpoint is written; needs a copy of it in CPU memory")


@dataclass
class LogConfig:
    """What is shown and recorded."""

    every: int = setting(10, "optimiser steps between console rows", low=0)
    console: Literal["auto", "live", "table"] = setting("auto", "live view on a terminal, table elsewhere")
    wandb: Literal["auto", "online", "offline", "disabled"] = setting(
        "disabled", "auto: online where there is a login and network, else offline"
    )
    wandb_project: str = setting("crescendo", "wandb project")
    sample_prompt: str = setting("In 1856, Abraham Lincoln", "prompt of the text samples")
    sample_tokens: int = setting(128, "tokens of a text sample during training; 0: no samples", low=0)
    demo_tokens: int = setting(512, "tokens of the closing demonstration; 0: none", low=0)


DEFAULT_MODEL = "hlb"


def model_name(model: Mapping[str, Any]) -> str:
    """The architecture that the keys of `model` name, or the default."""
    return model.get("name", DEFAULT_MODEL)


@dataclass
class RunConfig:
    """`train` and `plan`: one run."""

    model_scale: float = setting(1.0, "the dial: 1 is 46 M parameters, 148 is 3 B", above=0, high=10_000)
    model: dict[str, Any] = field(
        default_factory=lambda: {"name": DEFAULT_MODEL},
        metadata={"help": "model.name picks the architecture; model.FIELD overrides one of its fields"},
    )
    objective: dict[str, Any] = field(
        default_factory=lambda: {"name": "next_token"},
        metadata={"help": "objective.name picks what is trained on; objective.FIELD sets one of its fields"},
    )
    run_dir: str | None = setting(None, "folder of the run; auto: runs/MODEL-SCALE")
    seed: int = setting(0, "seed of weights, data order and every draw", low=0, high=2**62)
    max_steps: int = setting(1000, "optimiser steps", low=1, high=10**9)
    precision: Precision = setting(
        "auto", "bf16: bf16 compute, fp32 weights; pure_bf16: everything bf16 (the original)"
    )
    float8: bool = setting(False, "multiply by the weights of blocks in fp8 (Ada, Hopper and newer; pays with compile)")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to compute")
    deterministic: bool = setting(False, "deterministic kernels only (on CPU they always are)")
    profile: bool = setting(False, "record a few steps: a trace and the top operations, in RUN/profile")
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        if "name" in self.model:
            self.model = {**self.model, "name": coerce(str, self.model["name"], "model.name")}
