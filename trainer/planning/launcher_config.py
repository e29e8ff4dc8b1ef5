"""What `accelerate launch` and its config ask of the engine, merged with the run's own config.

accelerate passes its config on as environment variables (utils/launch.py of accelerate 1.15). It only launches: our own
engines do what its config asks for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.core.text import printable
from trainer.engine.deepspeed_config import leaves, read_settings
from trainer.runtime.launcher import Environment, count, find_rank_info, slurm_task


@dataclass(frozen=True)
class LauncherConfig:
    """What the launcher's own config asks for. None: it says nothing, or only its default."""

    launcher: str
    strategy: str | None = None
    shard_size: int | None = None
    reshard_after_forward: bool | None = None
    offload: bool | None = None
    deepspeed_config: str | None = None
    activation_checkpointing: str | None = None
    compile: bool | None = None
    clip_norm: float | None = None
    mixed_precision: str | None = None


REMEDY = "accelerate sets it from its config's parallelism_config"
SHARDING = {  # FSDP_SHARDING_STRATEGY, by name or by number from 1: (strategy, reshard_after_forward)
    "FULL_SHARD": ("fsdp", None),
    "SHARD_GRAD_OP": ("fsdp", False),
    "NO_SHARD": ("ddp", None),
    "HYBRID_SHARD": ("hsdp", None),
    "HYBRID_SHARD_ZERO2": ("hsdp", False),
}


def read_launcher_config(environ: Environment) -> LauncherConfig:
    """What `accelerate launch` and its config ask for. UserError for what would change the run but is not supported."""
    if _is_true(environ, "ACCELERATE_USE_MEGATRON_LM"):
        raise _unsupported("distributed_type MEGATRON_LM", "choose FSDP or DEEPSPEED")
    launcher_config: dict[str, Any] = {}
    if _is_true(environ, "ACCELERATE_USE_FSDP"):
        launcher_config |= _fsdp(environ)
    if _is_true(environ, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        launcher_config |= _parallelism(environ)
    if _is_true(environ, "ACCELERATE_USE_DEEPSPEED"):
        launcher_config |= _deepspeed(environ)
    backend = environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend not in ("no", "inductor"):
        raise _unsupported(f"dynamo_backend {backend}", "use inductor or no")
    precision = environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", "bf16"):
        raise _unsupported(f"mixed_precision {precision}", "use bf16 or no")
    return LauncherConfig(
        launcher=_launcher(environ),
        compile=True if backend == "inductor" else None,
        mixed_precision=None if precision == "no" else precision,
        **launcher_config,
    )


def _launcher(environ: Environment) -> str:
    if "ACCELERATE_MIXED_PRECISION" in environ:
        return "accelerate"
    if "TORCHELASTIC_RUN_ID" in environ:
        return "torchrun"
    if "CROSS_SIZE" in environ and "RANK" in environ:
        return "deepspeed"
    return "srun" if slurm_task(environ) is not None else "python"


def _is_true(environ: Environment, name: str) -> bool:
    return environ.get(name, "").lower() in ("1", "true", "yes")


def _unsupported(what: str, remedy: str) -> UserError:
    return UserError(f"accelerate's {what} is not supported; {remedy}")


def _fsdp(environ: Environment) -> dict[str, Any]:
    """Version 1 names strategies, version 2 has a switch for resharding. Other settings are None at accelerate's default."""
    named = environ.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD").upper()
    if named in ("1", "2", "3", "4", "5"):
        named = dict(enumerate(SHARDING, start=1)).get(int(named), named)
    if named not in SHARDING:
        raise _unsupported(f"fsdp_sharding_strategy {printable(named, 60)}", f"use one of {', '.join(SHARDING)}")
    strategy, reshard = SHARDING[named]
    if environ.get("FSDP_VERSION", "1") == "2":
        if named != "FULL_SHARD":
            raise _unsupported(f"fsdp_sharding_strategy {named} with fsdp_version 2", "use fsdp_reshard_after_forward")
        reshard = None if environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true" else False
    if _is_true(environ, "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD"):
        raise _unsupported("fsdp_activation_checkpointing_offload", "set it to false")
    return {
        "strategy": strategy,
        "reshard_after_forward": reshard,
        "offload": _is_true(environ, "FSDP_OFFLOAD_PARAMS") or None,
        "activation_checkpointing": "full" if _is_true(environ, "FSDP_ACTIVATION_CHECKPOINTING") else None,
    }


def _parallelism(environ: Environment) -> dict[str, Any]:
    sizes = {key: count(environ, f"PARALLELISM_CONFIG_{key}", 1, REMEDY) for key in ("TP_SIZE", "CP_SIZE", "SP_SIZE")}
    for key, size in sizes.items():
        if size > 1:
            raise _unsupported(f"parallelism_config_{key.lower()} {size}", "set it to 1")
    copies = count(environ, "PARALLELISM_CONFIG_DP_REPLICATE_SIZE", 1, REMEDY)
    shards = count(environ, "PARALLELISM_CONFIG_DP_SHARD_SIZE", 1, REMEDY)
    if copies == shards == 1:
        return {}
    if copies * shards != find_rank_info(environ).size:
        raise UserError(
            f"accelerate's parallelism_config: dp_replicate_size {copies} times dp_shard_size {shards} is not the "
            "number of processes; set num_processes to their product"
        )
    if copies == 1 or shards == 1:
        return {"strategy": "ddp" if shards == 1 else "fsdp"}
    return {"strategy": "hsdp", "shard_size": shards}


def _deepspeed(environ: Environment) -> dict[str, Any]:
    """`reconcile` reads a deepspeed_config_file. Gradient accumulation is ignored: the batch of a run decides it."""
    path = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    stage = environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    for what in ("OPTIMIZER", "PARAM"):
        device = environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE", "none")
        if device not in ("none", "cpu") or (what == "PARAM" and device == "cpu"):
            raise _unsupported(f"offload_{what.lower()}_device {device}", "use offload_optimizer_device cpu, or none")
    clip = environ.get("ACCELERATE_GRADIENT_CLIPPING", "none")
    return {
        "strategy": f"zero{stage}" if path == "none" else None,
        "deepspeed_config": None if path == "none" else path,
        "offload": environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE") == "cpu" or None,
        "clip_norm": None if clip in ("none", "auto") else float(clip),
    }


def reconcile(config: RunConfig, launcher_config: LauncherConfig, size: int) -> list[tuple[str, Any, str]]:
    """Fill in place what `config` leaves open and the launcher, or a deepspeed.json, asks for.

    Returns (key, value, rule) of each key filled. UserError if the config and the launcher ask for different values, or the
    strategy does not work with `size` processes. If nothing asks for a strategy, it stays "auto".
    """
    filled: list[tuple[str, Any, str]] = []

    def fill(section: str, name: str, value: Any, left_open: Any, source: str) -> None:
        part, key = getattr(config, section), f"{section}.{name}"
        present = getattr(part, name)
        if value is None or present == value:
            return
        if present != left_open:
            raise UserError(f"{key}: {present}, but {source} asks for {value}; change one of them")
        setattr(part, name, value)
        filled.append((key, value, source))

    engine, source = config.engine, "accelerate's config"
    for name, left_open in (
        ("strategy", "auto"), ("shard_size", None), ("reshard_after_forward", True), ("offload", False),
        ("deepspeed_config", None), ("compile", None),
    ):  # fmt: skip
        fill("engine", name, getattr(launcher_config, name), left_open, source)
    if engine.activation_checkpointing in ("auto", "none"):  # accelerate cannot express every-N and selective
        fill("engine", "activation_checkpointing", launcher_config.activation_checkpointing, "auto", source)
    fill("optim", "clip_norm", launcher_config.clip_norm, None, source)
    if launcher_config.mixed_precision and config.precision not in ("auto", launcher_config.mixed_precision):
        raise UserError(
            f"precision: {config.precision}, but accelerate's mixed_precision is {launcher_config.mixed_precision}; "
            "change one of them"
        )
    if engine.deepspeed_config:
        settings = dict(leaves(read_settings(engine.deepspeed_config)))
        stage, clip = settings.get("zero_optimization.stage"), settings.get("gradient_clipping")
        offload = settings.get("zero_optimization.offload_optimizer.device") == "cpu"
        fill("engine", "strategy", None if stage in (None, "auto") else f"zero{stage}", "auto", engine.deepspeed_config)
        fill("engine", "offload", offload or None, False, engine.deepspeed_config)
        fill("optim", "clip_norm", None if clip == "auto" else clip, None, engine.deepspeed_config)
        if engine.strategy == "auto":
            raise UserError(
                f"engine.deepspeed_config: {engine.deepspeed_config} names no zero_optimization.stage; "
                "set engine.strategy to one of zero0 to zero3"
            )
    check_strategy(engine.strategy, size)
    return filled


def check_strategy(strategy: str, size: int) -> None:
    """UserError if `strategy` does not work with `size` processes. fsdp and zeroN also work with one."""
    if strategy == "single" and size > 1:
        raise UserError(f"engine.strategy: single, but {size} processes were started; use ddp or start one process")
    if strategy in ("ddp", "hsdp") and size == 1:
        raise UserError(
            f"engine.strategy: {strategy} needs several processes and one was started; "
            "use `torchrun --nproc_per_node N -m trainer ...` or engine.strategy single"
        )
