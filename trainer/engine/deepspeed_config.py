"""The settings for DeepSpeed: those that our config decides, merged over the user's own deepspeed.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from trainer.core.errors import MachineError, UserError
from trainer.core.files import parse_json, read_small, user_path
from trainer.core.text import printable

DEEPEST = 32  # levels of a deepspeed.json; DeepSpeed's own settings have four
BUCKET = 50_000_000  # number of gradient elements that DeepSpeed sums at a time

# Keys that a deepspeed.json may not switch on, and what decides them here.
DECIDED = {
    "optimizer": "the optimizer is optim.name",
    "scheduler": "learning rates follow from optim.recipe",
    "train_batch_size": "the batch is batch.tokens_per_step",
    "fp16": "the number format is `precision`, which has no fp16",
    "amp": "the number format is `precision`",
    "torch_autocast": "the number format is `precision`",
    "activation_checkpointing": "blocks are recomputed by engine.activation_checkpointing",
    "train_micro_batch_size_per_gpu": "microbatches follow from batch.tokens_per_microbatch, step by step",
    "gradient_accumulation_steps": "microbatches follow from batch.tokens_per_microbatch, step by step",
}
HARMLESS = (("train_micro_batch_size_per_gpu", 1), ("gradient_accumulation_steps", 1))
# DeepSpeed's key -> our key that the user could change instead if the two differ.
OPPOSITES = {
    "zero_optimization.stage": "engine.strategy",
    "zero_optimization.offload_optimizer.device": "engine.offload",
    "gradient_clipping": "optim.clip_norm",
    "bf16.enabled": "precision",
}


def deepspeed_settings(config: Any) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`. UserError if engine.deepspeed_config contradicts the run's config."""
    ours, path = own_settings(config), config.engine.deepspeed_config
    theirs = {} if path is None else read_settings(path)
    for key, why in DECIDED.items():
        value = theirs.pop(key, None)
        off = isinstance(value, dict) and value.get("enabled") is False
        if value not in (None, "auto", {}) and not off and (key, value) not in HARMLESS:
            raise UserError(f"engine.deepspeed_config: {path} sets {key}, but {why}; remove it there")
    for section in ("zero_optimization", "zero_optimization.offload_optimizer", "bf16", "data_types"):
        if not isinstance(nested(theirs, section), (dict, type(None))):
            raise UserError(f'engine.deepspeed_config: {path}: {section} is not a section; write it as {{"...": ...}}')
    asked = dict(leaves(theirs))
    for key, value in leaves(ours):
        if asked.get(key, value) not in (value, "auto"):
            instead = f"change {OPPOSITES[key]}, or " if key in OPPOSITES else ""
            raise UserError(
                f"engine.deepspeed_config: {path} says {key} {json.dumps(asked[key])}, but by the run's config it is "
                f"{json.dumps(value)}; {instead}remove it there"
            )
    settings = merged(theirs, ours)
    # DeepSpeed's default takes 1.9 GiB, even for a small model.
    if settings["zero_optimization"].get("reduce_bucket_size", "auto") == "auto":
        settings["zero_optimization"]["reduce_bucket_size"] = BUCKET
    if settings["zero_optimization"]["stage"] == 0:
        # At stage 0 DeepSpeed's bf16 has no usable fp32 masters (its losses drift), so use autocast. Our engine clips.
        settings |= {"gradient_clipping": 0.0, "bf16": {"enabled": False}}
        if config.precision == "bf16":
            settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return settings | {
        "train_micro_batch_size_per_gpu": 1,  # the training loop forms microbatches, a new number of them in each step
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,  # DeepSpeed's list of tested optimizers is short
        "zero_force_ds_cpu_optimizer": False,  # our optimizers run on CPUs too, without a compiler
    }


def own_settings(config: Any) -> dict[str, Any]:
    """The settings that the run's config decides."""
    stage, bf16 = int(config.engine.strategy[-1]), config.precision == "bf16"
    settings: dict[str, Any] = {
        "gradient_clipping": float(config.optim.clip_norm),
        "gradient_allreduce_op": "mean",  # `DeepSpeedEngine.backward` relies on it
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
    }
    if stage:
        settings["zero_optimization"] |= {
            "offload_optimizer": {"device": "cpu" if config.engine.offload else "none"},
            "compute_grad_norm": True,
            "round_robin_gradients": False,  # else DeepSpeed 0.19 writes a weight that we set to the place of another one
        }
    if stage and bf16:
        settings["bf16"]["check_grad_overflow"] = True  # else a NaN would reach the weights
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def read_settings(path: str) -> dict[str, Any]:
    """The content of the user's deepspeed.json. UserError if it is not valid."""
    file = user_path(path, "engine.deepspeed_config")
    try:
        settings = parse_json(read_small(file), file)
    except MachineError:
        raise
    except UserError as error:
        raise UserError(f"engine.deepspeed_config: {error}") from None
    if depth(settings) > DEEPEST:
        raise UserError(f"engine.deepspeed_config: {printable(file)} has more than {DEEPEST} levels of nesting")
    return settings


def depth(value: Any) -> int:
    """Number of nested levels of objects and lists, counted without recursion."""
    levels, at = 0, [value]
    while at := [item for part in at for item in inside(part)]:
        levels += 1
    return levels


def inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def nested(settings: dict[str, Any], key: str) -> Any:
    """The value of a dotted key; None if the key is missing."""
    value: Any = settings
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def leaves(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is not a section."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def merged(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Both, merged section by section; ours wins (the two differ only where theirs is "auto")."""
    sections = {k: merged(theirs.get(k) or {}, v) if isinstance(v, dict) else v for k, v in ours.items()}
    return theirs | sections
