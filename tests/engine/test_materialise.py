"""What a model's `init_weights` leaves out is refused by name: parameters, buffers and parts of them, whole or in shards."""

import pytest
import torch
import torch.distributed as dist
from conftest import tiny_values
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from models.base import register
from models.materialise import Unset, materialise, refuse_unset, with_storage
from models.presets import Gpt2
from trainer.commands.train import run
from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import build
from trainer.engine import build_engine
from trainer.planning.plan import resolve
from trainer.runs.opening import open_run
from trainer.runtime.distributed import World

CPU = torch.device("cpu")


class Holder(nn.Module):
    """Holds what it is given; `init_weights` sets all but the rows that it is told to leave."""

    def __init__(self, tensors, leave):
        super().__init__()
        self.leave = leave
        for name, tensor in tensors.items():
            if name.startswith("parameter"):
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)

    def init_weights(self, generator):
        for name, tensor in self.state_dict().items():
            tensor[: len(tensor) - self.leave.get(name, 0)] = 1


def made(dtypes, leave):
    with torch.device("meta"):
        return Holder({name: torch.ones(4, 3, dtype=dtype) for name, dtype in dtypes.items()}, leave)


DTYPES = {
    "parameter": torch.float32,
    "rounded": torch.bfloat16,
    "eighth": torch.float8_e4m3fn,
    "mask": torch.bool,
    "ids": torch.int64,
    "small": torch.uint8,
}


def test_all_that_is_set_passes():
    materialise(made(DTYPES, {}), CPU, None)


@pytest.mark.parametrize("name", DTYPES)
def test_what_is_left_out_is_named(name):
    with pytest.raises(Unset, match=f"init_weights does not set {name}: "):
        materialise(made(DTYPES, {name: 4}), CPU, None)


@pytest.mark.parametrize("name", [name for name in DTYPES if name != "small"])  # small integers may be any
def test_so_is_a_part_of_a_tensor(name):
    with pytest.raises(Unset, match=f"init_weights does not set {name}: "):
        materialise(made(DTYPES, {name: 1}), CPU, None)


def test_numbers_that_mean_something_are_set():
    holder = with_storage(made({"mask": torch.float32, "least": torch.int64}, {}), CPU)
    holder.mask.fill_(-torch.inf)
    holder.least.fill_(torch.iinfo(torch.int64).min)
    refuse_unset(holder)


def test_a_tensor_that_is_neither_parameter_nor_buffer_is_named():
    with torch.device("meta"):
        holder = Holder({}, {})
        holder.scale = torch.ones(3)
    with pytest.raises(Unset, match="^scale is neither parameter nor buffer"):
        materialise(holder, CPU, None)


@pytest.mark.parametrize("rank", [0, 1])
def test_of_shards_each_rank_checks_its_own(rank):
    """Rows 3 and 4 are rank 1's."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
    try:
        module = made({"parameter": torch.float32}, {})
        module = fully_shard(module, mesh=dist.init_device_mesh("cpu", (2,)))
        module.init_weights = lambda generator: module.parameter.to_local().fill_(1 if rank == 0 else torch.nan)
        with torch.no_grad():
            if rank == 0:
                materialise(module, CPU, None)
            else:
                with pytest.raises(Unset, match="parameter"):
                    materialise(module, CPU, None)
    finally:
        dist.destroy_process_group()


@register("forgetful")
class Forgetful(Gpt2):
    """A temperature per head that `init_weights` knows nothing of."""

    complete = False

    def __init__(self, config):
        super().__init__(config)
        self.temperature = nn.Parameter(torch.ones(config.n_heads))
        self.register_buffer("table", torch.ones(3), persistent=False)

    def init_weights(self, generator=None):
        super().init_weights(generator)
        if self.complete:
            with torch.no_grad():
                self.temperature.fill_(1)
                self.table.fill_(1)

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        return output._replace(loss=output.loss * self.temperature.mean()) if output.loss is not None else output


def values(dataset, folder, **changes):
    shape = {"name": "forgetful", "d_model": 64, "n_layers": 1, "n_heads": 2}
    return tiny_values(dataset, folder, model=shape, max_steps=1, **changes)


class OtherRank(World):
    """As if there were a second rank, which has found what `found` says."""

    def __init__(self, found):
        super().__init__(0, 1)
        self.found = found

    def gather(self, value):
        return [value, self.found]


def test_an_engine_refuses_it_whichever_rank_has_found_it(monkeypatch):
    plan = resolve(build(RunConfig, values("nowhere", "r")))
    with pytest.raises(UserError, match="^model forgetful: init_weights does not set temperature, table: "):
        build_engine(plan, World())
    monkeypatch.setattr(Forgetful, "complete", True)
    build_engine(plan, World())
    with pytest.raises(UserError, match="^model forgetful: what the other has found"):
        build_engine(plan, OtherRank("what the other has found"))


def test_opening_a_run_refuses_what_neither_checkpoint_nor_init_weights_sets(tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(Forgetful, "complete", True)
    run(values(tiny_dataset, tmp_path / "r"))
    open_run(str(tmp_path / "r"), None, "cpu", "auto")
    monkeypatch.setattr(Forgetful, "complete", False)
    with pytest.raises(UserError, match="^model forgetful: init_weights does not set table: "):
        open_run(str(tmp_path / "r"), None, "cpu", "auto")
