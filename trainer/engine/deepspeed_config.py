"""What DeepSpeed is told: what our config decides, and below it the settings of a user's own deepspeed.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.errors import UserError

# What a deepspeed.json may not switch on, and what decides it here.
DECIDED = {
    "optimizer": "the optimiser follows from optim.recipe",
    "scheduler": "learning rates follow from optim.recipe",
    "train_batch_size": "the batch is batch.tokens_per_step",
    "fp16": "the number format is `precision`, and fp16 is none of them",
    "amp": "the number format is `precision`",
    "torch_autocast": "the number format is `precision`",
    "activation_checkpointing": "blocks are recomputed by engine.activation_checkpointing",
}
# Where ours and theirs may differ, and what of ours to change then.
OPPOSITES = {
    "zero_optimization.stage": "engine.strategy",
    "zero_optimization.offload_optimizer.device": "engine.offload",
    "gradient_clipping": "optim.clip_norm",
    "bf16.enabled": "precision",
    "train_micro_batch_size_per_gpu": "batch.tokens_per_microbatch",
    "gradient_accumulation_steps": "batch.tokens_per_microbatch",
}


def deepspeed_settings(config: Any) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`. UserError where engine.deepspeed_config contradicts the run's config."""
    ours, path = own_settings(config), config.engine.deepspeed_config
    theirs = read_settings(path) if path else {}
    for key, why in DECIDED.items():
        value = theirs.pop(key, None)
        if value not in (None, "auto", {}) and not (isinstance(value, dict) and value.get("enabled") is False):
            raise UserError(f"engine.deepspeed_config: {path} sets {key}, but {why}; remove it there")
    asked = dict(leaves(theirs))
    for key, value in leaves(ours):
        if asked.get(key, value) not in (value, "auto"):
            raise UserError(
                f"engine.deepspeed_config: {path} says {key} {json.dumps(asked[key])}, but by the run's config it is "
                f"{json.dumps(value)}; change {OPPOSITES[key]}, or remove it there"
            )
    settings = merged(theirs, ours)
    if config.precision == "bf16" and not settings["bf16"]["enabled"]:
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    # DeepSpeed knows few optimisers by name and would rather have its own on a CPU.
    return settings | {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}


def own_settings(config: Any) -> dict[str, Any]:
    """What the run's config decides."""
    stage = int(config.engine.strategy[-1])
    # Stage 0 in DeepSpeed's bf16 has no fp32 masters to speak of (its losses drift): there it is autocast, and we clip.
    bf16 = config.precision == "bf16" and stage > 0
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # the loop forms microbatches, another number of them in each step
        "gradient_accumulation_steps": 1,
        "gradient_clipping": float(config.optim.clip_norm) if stage else 0.0,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
    }
    if stage:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu" if config.engine.offload else "none"}
    if bf16:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def read_settings(path: str) -> dict[str, Any]:
    """The user's deepspeed.json; UserError where it is none."""
    try:
        settings = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"engine.deepspeed_config: cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"engine.deepspeed_config: {path} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"engine.deepspeed_config: {path} holds no JSON object")
    return settings


def leaves(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is no section."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def merged(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Both, section by section; ours wins (it differs only where theirs says "auto")."""
    sections = {k: merged(theirs.get(k) or {}, v) if isinstance(v, dict) else v for k, v in ours.items()}
    return theirs | sections
