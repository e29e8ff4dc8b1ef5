"""All settings of a run: name, type, default and help text.

`trainer/core/settings.py` fills these dataclasses from YAML and flags. `None` means "infer it": `trainer/planning/plan.py`
replaces every `None` by a rule and prints the rule. This module does not import torch, so `--help` is fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.core.settings import ALTERNATIVES, coerce, setting

Precision = Literal["auto", "fp32", "bf16", "pure_bf16"]
WEIGHTS = (
    "evaluation: those that the run validates with; ema: the moving average; last-K: the mean of the last K checkpoints"
)
TASKS_HELP = "names of lm-eval tasks that the model answers, such as hellaswag,lambada_openai,blimp (extra lm-eval)"
TASKS_DIR_HELP = "folder with the data of the tasks, see trainer/inference/README.md; auto: lm-eval fetches them"
TASKS_LIMIT_HELP = "most questions of each task; 0: all"
METRICS_HELP = "names of your own metrics, which --plugin FILE.py registers; measured at each evaluation"
Step = Literal["best"] | int | None
STEP = "checkpoint to use: its step, or best: the kept one with the lowest validation loss; auto: the newest good one"
LONGEST = 2**24  # tokens of a sequence: longer than any model needs, and a plan can still compute with it
Schedule = Literal["cosine", "linear", "wsd", "exponential", "power", "inverse_sqrt", "constant", "hlb"]
Strategy = Literal["auto", "single", "ddp", "fsdp", "hsdp", "zero0", "zero1", "zero2", "zero3"]

# Values for keys that are missing in the config.yaml of an older run, which was started before these keys existed.
ABSENT_MEANS: dict[str, Any] = {
    "data.order": "samples",
    "data.packing": "concat",
    "optim.name": "adamw",
    "objective.name": "next_token",
}


@dataclass
class CorpusConfig:
    """The text and how it is tokenised. `prepare` uses these keys, and so does a run that prepares its data on first use."""

    source: str | None = setting(
        None,
        "text file, directory, .jsonl, .ndjson or .json of rows (also .gz, .zst), .parquet, hf://NAME[/CONFIG][:SPLIT], "
        "builtin:python-stdlib, token ids (.bin, .npy), or MDS shards of another program",
    )
    tokenizer: str | None = setting(
        None,
        "gpt2, gpt-neox-20b, bytes, chars, train-bpe:N, a tokenizer.json, or a folder that holds one; auto: gpt2, or that of data that are "
        "there",
    )
    validation_source: str | None = setting(
        None, "source of the validation split; auto: hold out documents of `source`"
    )
    validation_fraction: float = setting(
        0.01, "share of documents held out when there is no validation_source", low=0, high=0.9
    )
    records: Literal["text", "chat", "preference"] = setting(
        "text",
        "what `prepare` reads from a row: text_field; chat: messages, or prompt and completion; preference: prompt, chosen, rejected",
    )
    chat_template: Literal["chat", "plain"] = setting(
        "chat",
        "how chat and preference rows become text; chat: a marker <|user|>, <|assistant|> or <|system|> before each message; plain: "
        "prompt and answer joined as they are",
    )
    text_field: str = setting(
        "text", "field of a row (or column of MDS) that holds the text; a.b means field b inside field a"
    )
    token_dtype: Literal["uint16", "uint32", "int32", "int64"] | None = setting(
        None, "type of stored token ids that nothing states: a .bin without a header (auto: uint16), raw bytes in MDS"
    )
    max_documents: int | None = setting(None, "most documents of each split; the rest of the source is not read", low=1)
    on_bad_row: Literal["stop", "skip"] = setting(
        "stop",
        "for a row that is not JSON, is not UTF-8 or does not hold what `records` says; skip: leave it out and count it",
    )
    document_start: str | None = setting(
        None, "regular expression: a matching line (or row) starts a document; auto: each file or row is a document"
    )
    end_of_text: str | None = setting(
        None, "the tokenizer's token that ends a document; auto: <|endoftext|>, </s>, <eos> or <|end_of_text|>"
    )
    sample_length: int = setting(
        1024, "tokens per stored sample; training sequences cannot be longer", low=1, high=LONGEST
    )

    @property
    def new_tokenizer(self) -> str:
        """The tokenizer of data that are not prepared yet."""
        return self.tokenizer or "gpt2"


@dataclass
class PrepareConfig(CorpusConfig):
    """`prepare`: convert text to MDS shards."""

    out: str | None = setting(None, "folder to write; it must not exist yet")
    workers: int | None = setting(None, "processes that tokenise; auto: one per core", low=1)
    shard_megabytes: int = setting(64, "size of one shard in MiB", low=1)
    teacher: str | None = setting(
        None,
        "RUN[@STEP], folder of a Hugging Face model or hf://ORG/NAME: also store what it predicts, for objective.name distill",
    )
    teacher_top_k: int = setting(
        32, "teacher: how many of the likeliest ids are stored for each token", low=1, high=65_536
    )
    patches: str | None = setting(
        None,
        "RUN[@STEP], folder of a Hugging Face model or hf://ORG/NAME: also store how uncertain it is of each token, for models that cut text "
        "into patches there (model.patching entropy)",
    )
    patch_size: float = setting(
        4.5, "patches: mean size in tokens for which the thresholds are chosen", above=1, high=1e4
    )


@dataclass
class MixConfig:
    """data.mix.NAME: a further dataset, whose rows are mixed with those of data.path."""

    path: str | None = setting(None, "prepared dataset, with the tokenizer of data.path")
    weight: float = setting(1.0, "rows for each row of data.path", low=0)
    weight_start: float = setting(0.0, "with until: the weight at the start", low=0)
    until: int | None = setting(
        None,
        "tokens of the run, padding included, at which the weight is reached, in a straight line; auto: at once",
        low=1,
    )


@dataclass
class DataConfig(CorpusConfig):
    """The prepared dataset that a run reads."""

    path: str | None = setting(None, "prepared dataset: a folder or s3://, gs://, hf://...; made if it is missing")
    cache: str | None = setting(None, "folder for shards of a remote path; auto: in the user's cache folder")
    threads: int = setting(4, "threads that read ahead; they do not change the order", low=1)
    order: Literal["windows", "samples"] = setting(
        "windows",
        "windows: a step takes its windows from as many samples as possible; samples: finish each sample before the next",
    )
    packing: Literal["auto", "concat", "best_fit", "none"] = setting(
        "auto",
        "concat: rows are windows of the text; best_fit: rows of whole documents, then padding; none is one document in each row; auto: "
        "none for chat and preference data, else concat",
    )
    separate_documents: bool = setting(False, "a token attends only to tokens of its own document")
    mix: dict[str, MixConfig] = field(
        default_factory=dict,
        metadata={"help": "data.mix.NAME.KEY, KEY of path, weight, weight_start, until: further datasets"},
    )


@dataclass
class BatchConfig:
    """The number of tokens in a step. No value depends on the number of devices."""

    tokens_per_step: int | None = setting(None, "tokens of a step on all devices (before hlb's multiplier)", low=1)
    tokens_per_microbatch: int | None = setting(None, "most tokens in one forward and backward of a device", low=1)
    device_token_capacity: int | None = setting(
        None, "tokens that fit on the device at model_scale 1 (G in the rule that `plan` prints)", low=1
    )
    sequence_length: int | None = setting(
        None, "longest training sequence; divides data.sample_length", low=1, high=LONGEST
    )
    sequence_start: int | None = setting(
        None, "first sequence length; doubled until sequence_length", low=1, high=LONGEST
    )
    sequence_double_every: int | None = setting(None, "optimiser steps between doublings; 0: never double", low=0)
    ramp_steps: int = setting(0, "optimiser steps in which the batch grows to tokens_per_step; 0: no ramp", low=0)
    ramp_start: int | None = setting(
        None, "tokens of the first step of a ramp; auto: an eighth of tokens_per_step", low=1
    )
    dynamic: bool | None = setting(None, "hlb's rule: multiply the batch so that the gradient norm stays at its target")
    n_max: float = setting(16.0, "upper bound of hlb's batch multiplier n", low=1)


@dataclass
class RoleConfig:
    """optim.roles.ROLE: how the parameters of one role are trained. What is left open is as without the role."""

    name: str | None = setting(None, "their optimizer")
    settings: dict[str, Any] = field(default_factory=dict, metadata={"help": "fields of that optimizer's own Config"})
    lr: float | None = setting(None, "their peak learning rate, whatever optim.lr is", above=0)
    weight_decay: float | None = setting(None, "their weight decay, whatever the loss is", low=0)
    schedule: Schedule | None = setting(None, "their learning rate after the warm-up")


@dataclass
class OptimConfig:
    """The optimiser and its schedules."""

    name: str = setting(
        "adamw",
        "the optimizer: trainer/optim/README.md lists them; torch:NAME for a class of torch.optim; --plugin FILE.py for your own",
    )
    settings: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "optim.settings.FIELD sets a field of the optimizer's own Config"}
    )
    roles: dict[str, RoleConfig] = field(
        default_factory=dict,
        metadata={
            "help": "optim.roles.ROLE.KEY, KEY of name, settings, lr, weight_decay, schedule: for the parameters of one role "
            "(matrix, embedding, head, norm, bias, position, or one of the model's own)"
        },
    )
    recipe: Literal["auto", "hlb", "plain"] = setting(
        "auto", "hlb: four parameter groups and hlb-gpt's schedules; plain: warm-up and cosine"
    )
    lr: float | None = setting(None, "peak learning rate of the matrices", above=0)
    rest_lr: float | None = setting(
        None,
        "optimizers of whole matrices (muon, soap): peak learning rate of the parameters that adamw updates",
        above=0,
    )
    warmup_steps: int | None = setting(None, "steps of linear warm-up", low=0)
    schedule: Schedule | None = setting(
        None, "plain: the learning rate after the warm-up; auto: cosine (the recipe hlb has its own, hlb)"
    )
    final_lr_fraction: float = setting(
        0.1, "plain: cosine, linear, wsd and exponential end at this fraction of the peak", low=0, high=1
    )
    decay_steps: int | None = setting(
        None, "schedule wsd: steps of the decay at the end; auto: a fifth of max_steps", low=0
    )
    decay_power: float = setting(0.5, "schedule power: the learning rate falls as step^-decay_power", low=0, high=2)
    weight_decay: float | None = setting(None, "plain: weight decay of parameters with two or more dimensions", low=0)
    loss_driven_decay: bool | None = setting(None, "hlb: weight decay of the matrices follows the loss")
    clip_norm: float | None = setting(None, "global gradient norm to clip to; 0: off", low=0)
    state_precision: Literal["auto", "fp32", "bf16", "bf16_stochastic"] = setting(
        "auto",
        "number type of the optimizer's state; bf16: half the memory, rounded after each step to nearest; bf16_stochastic: at random, "
        "so that small changes count",
    )
    ema: float = setting(
        0.0,
        "decay of a moving average of the weights, which is evaluated beside them, such as 0.999; 0: none",
        low=0,
        below=1,
    )
    embedding_frequency: Literal["auto", "global", "microbatch", "none"] = setting(
        "auto", "divide embedding gradients by token counts of the step, of a microbatch (the original), or not at all"
    )
    non_finite: Literal["stop", "skip"] = setting("stop", "what to do at a NaN or Inf; it never reaches the weights")
    max_skips: int = setting(10, "`skip`: the most non-finite steps in a row; one more stops the run", low=0)

    @property
    def narrow_state(self) -> bool:
        """Whether `state_precision` asks for bf16."""
        return self.state_precision.startswith("bf16")


@dataclass
class EngineConfig:
    """How the model is distributed over devices, and how it is executed."""

    strategy: Strategy = setting(
        "auto", "single, ddp, fsdp, hsdp (sharded in a group, replicated across groups) or DeepSpeed's zero0 to zero3"
    )
    shard_size: int | None = setting(
        None, "hsdp: number of processes that share one copy of the weights; auto: those of one machine", low=1
    )
    reshard_after_forward: bool = setting(
        True, "fsdp, hsdp: free a block's weights after its forward, gather them again for its backward"
    )
    offload: bool = setting(
        False, "CPU memory holds: weights, gradients, optimiser (fsdp, hsdp); gradients, optimiser (zero1 to zero3)"
    )
    deepspeed_config: str | None = setting(None, "zero0 to zero3: a deepspeed.json with further settings")
    activation_checkpointing: str = setting(
        "auto", "none, full, every-N (every N-th block) or selective (saves products with weights, and attention)"
    )
    compile: bool | None = setting(
        None, "torch.compile each block and the loss; auto: on a GPU, for runs that gain by it"
    )
    background_compile: bool | None = setting(
        None, "train eagerly while a second process compiles; auto: single, on a GPU that holds the eager steps"
    )
    cuda_graphs: bool = setting(
        False, "single, on a GPU: capture a microbatch of each shape and replay it as one launch"
    )
    timeout_minutes: float = setting(30.0, "several processes: end the run after so long without progress", above=0)
    step_timeout_minutes: float = setting(
        5.0, "the same within an optimiser step after the first; the smaller of the two applies", above=0
    )


@dataclass
class EvaluationConfig:
    """Validation during training and in `evaluate`."""

    every: int = setting(50, "optimiser steps between evaluations; 0: only at the end", low=0)
    protocol: Literal["full", "hlb", "both"] = setting(
        "full", "full: every token of the split once, in order; hlb: 150 random windows, seeded; both"
    )
    max_tokens: int = setting(0, "full: stop after about this many tokens during training; 0: the whole split", low=0)
    sequence_length: int | None = setting(
        None, "window length; auto: the longest training sequence", low=1, high=LONGEST
    )
    tasks: list[str] = setting((), TASKS_HELP)
    tasks_every: int = setting(
        0,
        "optimiser steps between evaluations of the tasks, with the validation loss beside them; 0: only at the end",
        low=0,
    )
    tasks_dir: str | None = setting(None, TASKS_DIR_HELP)
    tasks_limit: int = setting(0, TASKS_LIMIT_HELP, low=0)
    metrics: list[str] = setting((), METRICS_HELP)
    metric: Literal["val_loss", "ema_val_loss", "val_objective_loss"] = setting(
        "val_loss",
        "key of metrics.jsonl by which patience and checkpoint.keep_best judge an evaluation, lower is better; ema_val_loss needs "
        "optim.ema, val_objective_loss preference data",
    )
    patience: int = setting(
        0, "end the run after so many evaluations in a row without an improvement of metric; 0: never", low=0
    )
    min_delta: float = setting(0.0, "patience: an improvement is more than this", low=0)


@dataclass
class CheckpointConfig:
    """Which checkpoints are written and kept."""

    every: int | None = setting(
        None, "optimiser steps between checkpoints; auto: a tenth of the run; 0: only at the end", low=0
    )
    keep: int = setting(2, "how many of the newest checkpoints to keep", low=1)
    keep_every: int = setting(0, "also write one at every multiple of this step, and never delete it; 0: none", low=0)
    keep_best: int = setting(
        0, "also write one after each evaluation that is among the best so many, and keep these; 0: none", low=0
    )
    asynchronous: bool = setting(False, "train while a checkpoint is written; needs a copy of it in CPU memory")


@dataclass
class LogConfig:
    """What a run prints and records."""

    every: int = setting(10, "optimiser steps between console rows", low=0)
    console: Literal["auto", "live", "table"] = setting("auto", "auto: live view on a terminal, table elsewhere")
    wandb: Literal["auto", "online", "offline", "disabled"] = setting(
        "disabled", "auto: online if there is a login and a network, else offline"
    )
    wandb_project: str = setting("crescendo", "wandb project")
    tensorboard: bool = setting(False, "also record to TensorBoard, in RUN/tensorboard")
    sample_prompt: str = setting("In 1856, Abraham Lincoln", "prompt of the text samples")
    sample_tokens: int = setting(128, "tokens of a text sample during training; 0: no samples", low=0)
    demo_tokens: int = setting(512, "tokens of the demonstration at the end; 0: none", low=0)
    noise_scale: bool = setting(
        False,
        "estimate the gradient noise scale; a step then has two microbatches or more, one more gradient norm and, on several "
        "processes, one more sum of the gradients over them",
    )


DEFAULT_MODEL = "hlb"
LENGTHS = ALTERNATIVES[1][1:]  # keys that state the length of a run instead of max_steps


def model_name(model: Mapping[str, Any]) -> str:
    """The architecture that the keys of `model` name, or the default."""
    return model.get("name", DEFAULT_MODEL)


@dataclass
class RunConfig:
    """`train` and `plan`: the settings of one run."""

    model_scale: float | None = setting(
        None,
        "size of the model: 1 is 46 M parameters, 148 is 3 B; auto: from `parameters`, else 1",
        above=0,
        high=10_000,
    )
    parameters: int | None = setting(None, "size of the model in parameters, instead of model_scale", low=1)
    model: dict[str, Any] = field(
        default_factory=lambda: {"name": DEFAULT_MODEL},
        metadata={"help": "model.name selects the architecture; model.FIELD overrides one of its fields"},
    )
    objective: dict[str, Any] = field(
        default_factory=lambda: {"name": "next_token"},
        metadata={"help": "objective.name selects the training objective; objective.FIELD sets one of its fields"},
    )
    run_dir: str | None = setting(None, "folder of the run; auto: runs/MODEL-SCALE")
    branch_from: str | None = setting(
        None,
        "RUN@STEP: a new run that begins with the config, weights, optimizer state and data position of that checkpoint",
    )
    init_from: str | None = setting(
        None,
        "RUN[@STEP], folder of a Hugging Face model (GPT-2, Llama, Qwen3), or hf://ORG/NAME: a new run of that model, from step 0, "
        "that begins with its weights",
    )
    init_weights: str = setting("evaluation", f"which weights of the run init_from names; {WEIGHTS}")
    dial: str | None = setting(
        None,
        "laws.yaml of a ladder of this architecture: its laws of learning rate and batch replace the recipe's, and it says which loss to expect",
    )
    seed: int = setting(0, "seed of the weights, the data order and all random numbers", low=0, high=2**62)
    max_steps: int | None = setting(
        None, "optimiser steps; auto: from tokens, tokens_per_parameter or epochs, else 1000", low=1, high=10**9
    )
    tokens: int | None = setting(None, "length of the run in tokens, instead of max_steps", low=1)
    tokens_per_parameter: float | None = setting(
        None,
        "length of the run: tokens / parameters of the model; about 20 are compute-optimal (arXiv 2203.15556)",
        above=0,
    )
    epochs: float | None = setting(None, "length of the run: how often it reads the training split", above=0)
    max_seconds: float | None = setting(
        None, "length of the run: seconds of training on this machine, whose speed `train` measures first", above=0
    )
    precision: Precision = setting(
        "auto", "bf16: bf16 compute, fp32 weights; pure_bf16: everything bf16 (the original)"
    )
    float8: bool = setting(False, "products with the blocks' weights in fp8 (Ada, Hopper, newer; use it with compile)")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to compute")
    deterministic: bool = setting(False, "deterministic kernels only (on a CPU they always are)")
    profile: bool = setting(False, "profile a few steps: a trace and the top operations, in RUN/profile")
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
