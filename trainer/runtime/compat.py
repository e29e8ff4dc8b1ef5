"""All private names of torch and DeepSpeed that the trainer uses, and all changes it makes to them for the whole process.

Private names may move or change between releases. So one table lists each name, the feature that needs it, and the arguments
that the trainer passes. `private` returns the object or raises one clear error. `probe` reports what is wrong with a name, and
a test probes each of them. Checked with torch 2.11.0 and 2.13.0 (all of TORCH) and DeepSpeed 0.19.8 (all of DEEPSPEED). The
private names that the models use are in models/layers/compat.py. A library is imported only when one of its names is needed.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import inspect
import operator
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple

from trainer.core.errors import UserError


class Private(NamedTuple):
    """An undocumented name of a library. needed_for: the feature that needs it; arguments: names of the arguments we pass."""

    module: str
    name: str
    needed_for: str
    arguments: tuple[str, ...] = ()


_PLANS, _COMPILE, _CHECKPOINTING = "the memory estimate", "engine.compile", "engine.activation_checkpointing selective"
_ZERO3 = "engine.strategy zero3"
_ADAMW = ("beta1", "beta2", "weight_decay", "eps", "amsgrad", "maximize", "found_inf")
_FOREACH = (
    "addcmul_",
    "clamp_min_",
    "div",
    "div_",
    "lerp",
    "maximum_",
    "minimum_",
    "mul",
    "reciprocal_",
    "sign",
    "sign_",
    "sqrt",
    "sub",
    "sub_",
)

TORCH = (
    Private("torch._subclasses.fake_tensor", "FakeTensorMode", _PLANS, ("allow_non_fake_inputs",)),
    Private("torch.utils._python_dispatch", "TorchDispatchMode", _PLANS),
    Private("torch.utils._pytree", "tree_leaves", _PLANS, ("tree",)),
    Private("torch.multiprocessing.reductions", "StorageWeakRef", _PLANS, ("storage",)),
    Private("torch._dynamo", "mark_static", _COMPILE, ("t", "index")),
    Private("torch._dynamo", "mark_static_address", "generate --compile", ("t",)),
    Private("torch._dynamo.config", "recompile_limit", _COMPILE),
    Private("torch._dynamo.config", "optimize_ddp", _COMPILE),
    Private("torch._functorch.config", "force_non_lazy_backward_lowering", _COMPILE),
    Private("torch._dynamo.exc", "TorchDynamoException", _COMPILE),
    Private("torch._dynamo", "convert_frame", _COMPILE),
    Private("torch._dynamo.backends.common", "aot_autograd", _PLANS),
    Private("torch._functorch.aot_autograd", "make_boxed_func", _PLANS, ("f",)),
    Private("torch._functorch.partitioners", "min_cut_rematerialization_partition", _PLANS),
    Private("torch._inductor.decomposition", "select_decomp_table", _PLANS),
    Private("torch._dynamo.utils", "counters", "`bench`"),
    Private("torch._dynamo.utils", "calculate_time_spent", "the seconds of compiling"),
    Private(
        "torch.utils._pytree", "tree_map_only", "engine.background_compile", ("type_or_types_or_pred", "func", "tree")
    ),
    Private("torch._higher_order_ops", "inductor_compiled_code", _CHECKPOINTING),
    Private("torch._higher_order_ops.flex_attention", "flex_attention", _CHECKPOINTING),
    Private("torch.distributed.tensor._dtensor_spec", "DTensorSpec", "a checkpoint of fsdp", ("mesh", "placements")),
    Private(
        "torch.distributed.tensor._dtensor_spec", "TensorMeta", "a checkpoint of fsdp", ("shape", "stride", "dtype")
    ),
    Private("torch.distributed.distributed_c10d", "_world", "engine.timeout_minutes"),
    Private("torch.distributed.distributed_c10d", "_set_pg_timeout", "engine.timeout_minutes", ("timeout", "group")),
    Private("torch.cuda.memory", "_record_memory_history", "--profile", ("stacks", "max_entries")),
    Private("torch.cuda.memory", "_dump_snapshot", "--profile", ("filename",)),
    Private("torch.testing._internal.distributed.fake_pg", "FakeStore", "`check`"),
    Private("torch", "_foreach_norm", "the optimiser"),
    Private("torch", "_foreach_add_", "the optimiser"),
    Private("torch", "_foreach_mul_", "the optimiser"),
    Private("torch", "_foreach_copy_", "the optimiser"),
    *(Private("torch", f"_foreach_{name}", "rules of trainer/optim/rules") for name in _FOREACH),
    Private("torch", "_fused_adam_", "optim.name adam", _ADAMW),
    Private("torch", "_fused_adamw_", "optim.state_precision bf16", _ADAMW),
)

DEEPSPEED = (
    Private("deepspeed.comm.torch", "build_shm_op", "engine.strategy zero0 to zero3"),
    Private("deepspeed.runtime.zero.partition_parameters", "ZeroParamStatus", _ZERO3),
    # What ZeRO-3's hooks call on the coordinator: trainer/engine/zero3_coordinator.py stands in for it.
    *(
        Private(
            "deepspeed.runtime.zero.partitioned_param_coordinator", f"PartitionedParameterCoordinator.{name}", _ZERO3
        )
        for name in ("reset_step", "is_record_trace", "trace_prologue", "fetch_sub_module", "release_sub_module")
    ),
)
# Attributes of DeepSpeed's objects: they appear as it runs, so nothing can be asked before.
DEEPSPEED_ATTRIBUTES = {
    "fp32_partitioned_groups_flat": _ZERO3,
    "_lazy_init_hp_params_optimizer_state": "engine.strategy zero1 and zero2",  # of two classes of optimizers
    "_hp_mapping": "engine.strategy zero1 and zero2",  # of parameters
    "grad_position": _ZERO3,
    "get_param_id": _ZERO3,
    "parameter_offload": _ZERO3,
    "param_coordinator": _ZERO3,
    "ds_tensor": _ZERO3,
    "ds_status": _ZERO3,
}

_BY_NAME = {entry.name: entry for entry in (*TORCH, *DEEPSPEED)}


def private(name: str) -> Any:
    """The object with this `name` in the tables. UserError, with the remedy, if the installed library does not have it."""
    entry = _BY_NAME[name]
    try:
        return operator.attrgetter(name)(importlib.import_module(entry.module))
    except (ImportError, AttributeError):
        raise UserError(_refusal(entry, f"has no {entry.module}.{name}")) from None


def deepspeed_attribute(owner: Any, name: str) -> Any:
    """An attribute of an object that DeepSpeed made, from its table. UserError, with the remedy, where the object has no such thing."""
    try:
        return getattr(owner, name)
    except AttributeError:
        entry = Private("deepspeed", name, DEEPSPEED_ATTRIBUTES[name])
        raise UserError(_refusal(entry, f"has no {type(owner).__name__}.{name}")) from None


def probe(entry: Private) -> str:
    """What is wrong with a private name in the installed library; "" if it exists and takes our arguments."""
    try:
        found = private(entry.name)
    except UserError as error:
        return str(error)
    lacking = [argument for argument in entry.arguments if argument not in _arguments(found)]
    return _refusal(entry, f"{entry.name} has no argument {', '.join(lacking)}") if lacking else ""


def _arguments(function: Any) -> set[str]:
    """The names of a function's arguments; for an operator, those of all its schemas."""
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        import torch

        packet = getattr(torch.ops.aten, function.__name__)
        overloads = [getattr(packet, overload) for overload in packet.overloads()]
        return {argument.name for overload in overloads for argument in overload._schema.arguments}


def _refusal(entry: Private, what: str) -> str:
    library = entry.module.split(".", 1)[0]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        library += f" {importlib.metadata.version(library)}"
    return f"{library}: {what}, which {entry.needed_for} needs; install a release that pyproject.toml names"


# -- functions that use private names --------------------------------------------------------------------------------------


def set_option(name: str, value: Any) -> None:
    """Set an option of torch's compiler, for the whole process."""
    private(name)
    setattr(importlib.import_module(_BY_NAME[name].module), name, value)


def fake_tensors(**options: Any) -> Any:
    """A context in which tensors have shapes, devices and types but no values. Autocast works as with real tensors."""
    return private("FakeTensorMode")(**options)


def limit_process_groups(timeout: timedelta) -> None:
    """Set this timeout for every process group of this process, also for groups that libraries have made."""
    for group in private("_world").pg_map:
        private("_set_pg_timeout")(timeout, group)


def as_shard(values: Any, like: Any) -> Any:
    """A DTensor that is sharded like the DTensor `like`, with `values`, of any type and device, as the local shard.

    DTensor.from_local would copy an offloaded shard to a GPU of the mesh.
    """
    from torch.distributed.tensor import DTensor

    meta = private("TensorMeta")(like.shape, like.stride(), values.dtype)
    return DTensor(values, private("DTensorSpec")(like.device_mesh, like.placements, meta), requires_grad=False)


def use_linear(function: Callable[..., Any]) -> None:
    """Replace torch.nn.functional.linear by `function`, for all modules of this process.

    DeepSpeed replaces it by a version that adds the bias in place. Selective activation checkpointing saves the product
    before this addition, so the bias would be added to it twice.
    """
    import torch

    torch.nn.functional.linear = function  # type: ignore[assignment]


def leave_out_shared_memory() -> None:
    """Stop DeepSpeed from building its shared-memory all-reduce, which it uses only on CPUs and only for inference.

    The build needs a compiler and takes minutes. A build that is killed leaves a lock, and every later build waits for it
    without end.
    """
    private("build_shm_op")
    # Import the module by name: the attribute deepspeed.comm.torch is PyTorch.
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None


@contextlib.contextmanager
def pretended_process_group(rank: int, size: int) -> Iterator[None]:
    """A fake process group of `size` ranks without other processes: collectives return at once and compute nothing."""
    import torch.distributed as dist

    dist.init_process_group("fake", store=private("FakeStore")(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()
