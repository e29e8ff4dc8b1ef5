"""DeepSpeed's ZeRO: stage 0 replicates everything, 1 shards the optimiser, 2 also gradients, 3 also weights.

DeepSpeed keeps its shards as flat vectors. Checkpoints hold whole parameters instead, and one rank writes each of them. So they
are the same as those of the other engines; DeepSpeed's own format is not used.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from models.base import Batch
from models.materialise import ties, with_storage
from trainer.checkpoint.weights import EMA, EMA_UPDATES, MODEL
from trainer.core.errors import UserError
from trainer.engine.base import Engine
from trainer.engine.deepspeed_config import deepspeed_settings
from trainer.engine.matrices import Piece, Update, deal, update_pieces
from trainer.engine.meta import build_meta
from trainer.engine.zero3_coordinator import RestingCoordinator
from trainer.engine.zero3_linear import linear, plain_linear
from trainer.optim import trained_parameters
from trainer.optim.rule import STEP
from trainer.runtime.compat import deepspeed_attribute, leave_out_shared_memory, private, use_linear
from trainer.runtime.device import choose_device
from trainer.runtime.distributed import World


class DeepSpeedEngine(Engine):
    """zero0 to zero3.

    fp32: everything fp32. bf16: at stage 0 autocast, as in ddp; at stages 1 to 3 DeepSpeed's own bf16 (bf16 weights; bf16
    gradients, summed in fp32; fp32 masters and moments).
    """

    _zero: Any = None  # DeepSpeed's engine

    def __init__(self, plan: Any, world: World) -> None:
        # DeepSpeed reads device and rank from these variables; srun and a single process do not set them.
        os.environ.setdefault("DS_ACCELERATOR", choose_device(plan.config.device, world.local_rank).type)
        os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
        with contextlib.redirect_stdout(io.StringIO()):  # else every rank prints its settings
            import deepspeed
            from pydantic import ValidationError

            self._deepspeed = deepspeed
            leave_out_shared_memory()
            deepspeed.utils.logger.setLevel(logging.ERROR)
            self.settings = deepspeed_settings(plan.config)
            self.stage = self.settings["zero_optimization"]["stage"]
            self.lockstep, self.whole_tensors = self.stage == 3, self.stage == 0
            deepspeed.init_distributed()
            try:
                super().__init__(plan, world)
                self._zero, *_ = deepspeed.initialize(
                    model=self.joined, optimizer=self.optimizer, config=self.settings, dist_init_required=False
                )
            except ValidationError as error:
                told = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
                raise UserError(f"engine.deepspeed_config: DeepSpeed rejects {told}") from None
        world.limit_groups()
        assert self._zero.zero_optimization_stage() == self.stage
        use_linear(plain_linear)
        if self.stage:
            self._make_state()
            self._set_initial_weights()
            self.begin_average()

    def parallelize(self, meta: Any) -> Any:
        if self.stage == 0:
            model = self.initialise(meta, self.device)
        elif self.stage < 3:
            model = with_storage(meta, self.device)  # its values are set after the fp32 masters exist
        else:
            # Pass only the settings: DeepSpeed 0.19 turns a dtype given here into bf16 on devices without fp16.
            with self._deepspeed.zero.Init(config_dict_or_path=self.settings):
                model = self.plan.model_class(self.plan.model_config)
        self.prepare_blocks(model)
        self.joined = self.join(model)
        self._parameters: dict[str, Any] = dict(model.named_parameters())
        self.local = trained_parameters(model)
        return model

    def take_matrices(self) -> None:
        """At stages 1 to 3 the flat vectors, which `_make_state` needs, are made later."""
        if self.stage == 0:
            super().take_matrices()

    def _flat_vectors(self) -> list[Any]:
        """The vectors that the optimiser updates: this rank's fp32 pieces of the flattened parameters of each group."""
        if self.stage == 3:
            return deepspeed_attribute(self._zero.optimizer, "fp32_partitioned_groups_flat")
        return [vector for group in self.optimizer.param_groups for vector in group["params"]]

    def masters(self) -> dict[str, Tensor]:
        """At stages 1 to 3 the flat vectors, by their numbers."""
        if self.stage == 0:
            return super().masters()
        return {str(number): vector.detach() for number, vector in enumerate(self._flat_vectors())}

    def begin_average(self) -> None:
        if self.stage == 0 or self._zero is not None:  # the flat vectors exist
            super().begin_average()

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        super().set_weights(weights)
        if self.stage == 0:
            return
        if self.stage == 3:
            self._zero.empty_partition_cache()  # waits for weights that are being gathered, which have the old values
        for name in self.local:
            self._put_computing(name, self._whole_master(name))

    def _make_state(self) -> None:
        """Create all optimiser state before the first step.

        In that step DeepSpeed links state to parameters already after the first group, before the other groups have state.
        State of parameters that are updated whole is no concern of DeepSpeed: it is whole, on the rank that owns the parameter.
        """
        self._pieces = {name: self._piece(name) for name in self.local}
        self._elementwise = self.optimizer.adopt(
            {name: (piece.vector, piece.weight) for name, piece in self._pieces.items()}
        )
        self.optimizer.allocate(self._elementwise)
        sizes = self.world.gather({name: piece.size for name, piece in self._pieces.items()})
        self._sizes = {name: [held[name] for held in sizes] for name in self.local}
        assert all(sum(sizes) == self.shapes[name].numel() for name, sizes in self._sizes.items())
        self._owners = self.owners(list(self.optimizer.whole))
        super().take_matrices()
        if self.stage < 3:
            deepspeed_attribute(self._zero.optimizer, "_lazy_init_hp_params_optimizer_state")()

    def _piece(self, name: str) -> Piece:
        """Where this rank's part of a parameter is."""
        parameter = self.local[name]
        if self.stage < 3:
            [vector] = self.optimizer.group_of[parameter]["params"]
            mapping = deepspeed_attribute(parameter, "_hp_mapping")  # None: all of it is on other ranks
            if mapping is None:
                return Piece(vector, 0, 0)
            address = mapping.get_hp_fragment_address()
            return Piece(vector, address.start, address.numel)
        zero = self._zero.optimizer
        number = deepspeed_attribute(zero, "get_param_id")(parameter)
        place, start, size = deepspeed_attribute(zero, "grad_position")[number]
        rest = self.shapes[name].numel() - size * self.world.rank
        return Piece(self._flat_vectors()[place], start, min(size, max(0, rest)))  # without the padding

    def _set_initial_weights(self) -> None:
        """Set the initial weights in fp32 (DeepSpeed would first round them to bf16).

        They are drawn into shards in CPU memory, then gathered and set one parameter at a time. The gathering runs on the
        devices, whose links are the fastest.
        """
        drawn = fully_shard(
            build_meta(self.plan.model_class, self.plan.model_config),
            mesh=init_device_mesh(self.device.type, (self.world.size,)),
        )
        self.initialise(drawn, torch.device("cpu"))
        for name, shard in drawn.named_parameters():
            self._put_weight(name, shard.detach().to(self.device).full_tensor())
        for name, buffer in drawn.named_buffers():
            self.model.get_buffer(name).copy_(buffer)

    def held(self) -> int:
        return sum(vector.numel() for vector in self._flat_vectors()) if self.stage else super().held()

    def autocast(self) -> Any:
        """At stages 1 to 3 no autocast, because the weights already have the compute type."""
        return super().autocast() if self.stage == 0 else contextlib.nullcontext()

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """A context that at stage 3 gathers all weights once instead of in every pass, if every rank has memory for them."""
        if self.stage < 3 or not self.whole_weights_fit():
            yield
            return
        self._zero.empty_partition_cache()  # also waits for weights that were prefetched for a pass that does not come
        offload = deepspeed_attribute(self._zero.optimizer, "parameter_offload")
        coordinator = deepspeed_attribute(offload, "param_coordinator")
        with self._deepspeed.zero.GatheredParameters(list(self._parameters.values())):
            offload.param_coordinator = RestingCoordinator()
            try:
                yield
            finally:
                offload.param_coordinator = coordinator

    def backward(self, batch: Batch, scale: float | Tensor, sync: bool) -> Tensor:
        self._zero.set_gradient_accumulation_boundary(sync)
        use_linear(linear if self.stage == 3 else plain_linear)
        output = self._zero(self.with_documents(batch))
        self._zero.backward(output.sum * (scale * self.world.size))  # DeepSpeed averages over ranks; we want the sum
        use_linear(plain_linear)
        return self.losses(output)

    def step(self, step: int, loss: Tensor) -> tuple[Tensor, Tensor]:
        if self.stage == 0:
            return super().step(step, loss)
        finite = torch.isfinite(loss).float()
        self.optimizer.prepare(step, finite)
        self._zero.step()  # DeepSpeed computes the norm and clips; it skips the optimiser if the norm is not finite
        self.project()
        norm = torch.as_tensor(self._zero.get_global_grad_norm(), dtype=torch.float32, device=self.device)
        finite = finite * torch.isfinite(norm)
        self.update_average(finite)
        self.optimizer.follow(loss, finite)
        return norm, finite

    def update(self) -> None:
        self._zero.step()

    def update_matrices(self, names: list[str], update: Update) -> dict[str, Tensor]:
        """At stages 1 to 3 `names` are those in the flat vectors that DeepSpeed updates now, the same ones on all ranks."""
        if self.stage == 0:
            return super().update_matrices(names, update)
        pieces = {name: self._pieces[name] for name in names}
        return update_pieces(pieces, self.shapes, self._sizes, update, self._owners)

    def project(self) -> None:
        """At stages 1 to 3: gather one whole parameter at a time in fp32, project it, and set it."""
        if self.stage == 0:
            super().project()
            return
        for name, project in self.model.projections().items():
            whole = self._whole_master(name)
            project(whole)
            self._put_weight(name, whole)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Whole fp32 parameters, and optimiser state in its own type, in CPU memory. Each name is on one rank, dealt by size."""
        if self.stage == 0:
            return super().tensors()
        owners = deal({name: shape.numel() for name, shape in self.shapes.items()}, self.world.size)
        kept: dict[str, Tensor] = {}
        for parameter, name, whole in self._whole_tensors():
            if owners[parameter] == self.world.rank:
                kept[name] = whole.cpu().clone()
        kept |= {f"optimizer.{name}": value.cpu().clone() for name, value in self._own_state().items()}
        if self.world.leader:
            stored = self.model.state_dict(keep_vars=True)
            kept |= {f"model.{name}": buffer for name, buffer in self.model.named_buffers() if name in stored}
            kept["weight_decay"] = self.optimizer.decay
            kept |= {} if self.average is None else {EMA_UPDATES: self.average.updates}
        for name, first in ties(self.model).items():
            kept |= {prefix + name: kept[prefix + first] for prefix in (MODEL, EMA) if prefix + first in kept}
        return kept

    def _own_state(self) -> dict[str, Tensor]:
        """NAME.KEY -> state of the parameters that this rank updates whole."""
        owned = (name for name, rank in self._owners.items() if rank == self.world.rank)
        return {
            f"{name}.{key}": value for name in owned for key, value in self.optimizer.state[self.local[name]].items()
        }

    def _state_of_vectors(self) -> dict[str, Tensor]:
        """The state of a flat vector that is updated number by number; all have the same keys."""
        return self.optimizer.state[self._elementwise[0]] if self._elementwise else {}

    def _whole_tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """(parameter, name of a tensor of it, whole tensor), one at a time, on all ranks together; without `_own_state`."""
        from deepspeed.utils import safe_get_full_optimizer_state

        held = self._state_of_vectors()
        for name in self._frozen():
            yield name, MODEL + name, self._whole_computing(name)
        for name, parameter in self.local.items():
            yield name, MODEL + name, self._whole_master(name)
            for key, value in held.items() if name not in self.optimizer.whole else ():
                if key == STEP:
                    yield name, f"optimizer.{name}.{key}", value  # all parameters have taken the same steps
                    continue
                whole = safe_get_full_optimizer_state(parameter, key)  # always fp32, so convert it back
                yield name, f"optimizer.{name}.{key}", whole.view(self.shapes[name]).to(value.dtype)
        if self.average is not None:
            with self._average_in_masters(self.average.averages):
                for name in self.local:
                    yield name, EMA + name, self._whole_master(name)

    @contextlib.contextmanager
    def _average_in_masters(self, averages: dict[str, Tensor]) -> Iterator[None]:
        """A context in which the masters, whose pieces DeepSpeed can gather and set, hold the moving average."""
        masters = self.masters()
        trained = {name: values.clone() for name, values in masters.items()}
        for name, values in masters.items():
            values.copy_(averages[name])
        try:
            yield
            for name, values in masters.items():
                averages[name].copy_(values)
        finally:
            for name, values in masters.items():
                values.copy_(trained[name])

    def _whole_master(self, name: str) -> Tensor:
        """The whole fp32 value of a parameter. All ranks call this."""
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(self.local[name]).view(self.shapes[name])

    def _frozen(self) -> list[str]:
        """Parameters that are not trained. They have no fp32 master: at stages 1 to 3 in bf16 they are bf16, also in a checkpoint's
        values."""
        return [name for name in self._parameters if name not in self.local]

    def _whole_computing(self, name: str) -> Tensor:
        """The whole value of a weight for computing, in fp32. All ranks call this."""
        parameter = self._parameters[name]
        if self.stage < 3:
            return parameter.detach().float()
        piece = deepspeed_attribute(parameter, "ds_tensor").data
        pieces = [torch.empty_like(piece) for _ in range(self.world.size)]
        dist.all_gather(pieces, piece)
        shape = self.shapes[name]
        return torch.cat(pieces)[: shape.numel()].view(shape).float()

    def load(self, path: Any) -> None:
        if self.stage == 0:
            return super().load(path)
        from trainer.checkpoint.format import check_shapes, each

        average = self.average if self.average_goes_on(path) else None
        expected = {MODEL + name: shape for name, shape in self.shapes.items()}
        trained = {name: self.shapes[name] for name in self.local}
        expected |= {EMA + name: shape for name, shape in trained.items() if average is not None}
        keys = [key for key in self._state_of_vectors() if key != STEP]
        cut = {name: shape for name, shape in trained.items() if name not in self.optimizer.whole}
        expected |= {f"optimizer.{name}.{key}": shape for name, shape in cut.items() for key in keys}
        by_owner = {
            f"{name}.{key}": shape
            for name in self.optimizer.whole
            for key, shape in self.optimizer.whole_state(name).items()
        }
        check_shapes(path, expected | {f"optimizer.{full}": shape for full, shape in by_owner.items()})
        self._put_model(each(path, MODEL))
        own = self._own_state()
        for full, whole in each(path, "optimizer."):
            name, _, key = full.rpartition(".")
            if full in by_owner:
                if full in own:
                    own[full].copy_(whole)
            elif key == STEP:
                for vector in self._elementwise:
                    self.optimizer.state[vector][STEP].copy_(whole)
            else:
                self._put_state(name, key, whole)
        for _, decay in each(path, "weight_decay"):
            self.optimizer.decay.copy_(decay)
        if average is None:
            self.begin_average()
            return
        with self._average_in_masters(average.averages):
            for name, whole in each(path, EMA):
                if name in self.local:
                    self._put_master(name, whole)
        for _, updates in each(path, EMA_UPDATES):
            average.updates.copy_(updates)

    def begin_with(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        if self.stage == 0:
            super().begin_with(weights)
            return
        self._put_model(weights)
        self.begin_average()

    def _put_model(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Set parameters and buffers from (name, whole tensor), which every rank has."""
        for name, whole in weights:
            if name in self._parameters:
                self._put_weight(name, whole)
            elif name not in ties(self.model):
                self.model.get_buffer(name).copy_(whole)

    def _put_weight(self, name: str, whole: Tensor) -> None:
        """Set the fp32 master, if it is trained, and the weight for computing from the whole value, which every rank has."""
        if name in self.local:
            self._put_master(name, whole)
        self._put_computing(name, whole)

    def _put_master(self, name: str, whole: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        parameter = self.local[name]
        if self.stage < 3:
            safe_set_full_fp32_param(parameter, whole)
        else:
            safe_set_local_fp32_param(parameter, self._own_part(parameter, whole))

    def _put_computing(self, name: str, whole: Tensor) -> None:
        parameter = self._parameters[name]
        if self.stage < 3:
            parameter.data.copy_(whole)
            return
        deepspeed_attribute(parameter, "ds_tensor").data.copy_(self._own_part(parameter, whole))
        if deepspeed_attribute(parameter, "ds_status") is private("ZeroParamStatus").AVAILABLE:
            parameter.data.copy_(whole)  # small parameters stay gathered

    def _put_state(self, name: str, key: str, whole: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        parameter = self.local[name]
        if self.stage < 3:
            safe_set_full_optimizer_state(parameter, whole, key)
        else:
            safe_set_local_optimizer_state(parameter, self._own_part(parameter, whole), key)

    def _own_part(self, parameter: Any, whole: Tensor) -> Tensor:
        """This rank's piece of a flattened parameter, padded as DeepSpeed pads it."""
        size = deepspeed_attribute(parameter, "ds_tensor").numel()
        flat = F.pad(whole.flatten(), (0, size * self.world.size - whole.numel()))
        return flat.narrow(0, size * self.world.rank, size)

    def close(self) -> None:
        self._zero.destroy()  # without it some processes abort at exit
