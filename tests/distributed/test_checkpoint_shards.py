"""Checkpoints of several real processes: any number and strategy of writers, any number and strategy of readers; failures."""

import json
import multiprocessing
import os
import resource
import signal
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import PATIENCE
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from trainer.checkpoint import format as checkpoint
from trainer.checkpoint.saver import Saver, share_out
from trainer.core.errors import UserError
from trainer.runtime.distributed import World

pytestmark = pytest.mark.slow

SIZES = (1, 2, 3, 4)
KEEP = checkpoint.retention(2, 0)


def in_processes(work, size: int, folder: Path) -> list[int | None]:
    """Exit codes of work(rank, folder) in `size` processes; None where one was not done in time."""
    context = multiprocessing.get_context("forkserver")  # one process imports what all of them need
    context.set_forkserver_preload(
        ["torch.distributed.fsdp", "torch.distributed.checkpoint", "trainer.checkpoint.saver"]
    )
    processes = [context.Process(target=_process, args=(work, rank, folder)) for rank in range(size)]
    deadline = time.monotonic() + PATIENCE
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0, deadline - time.monotonic()))
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()


def _process(work, rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    try:
        work(rank, folder)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # at once, without waiting for the peers


def join(rank: int, size: int, folder: Path, name: str) -> World:
    """A process group of its own for ranks 0 to size - 1; size 1 makes none, as the trainer does."""
    if size > 1:
        store = dist.FileStore(str(folder / f"store-{name}"), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    return World(rank, size)


def whole() -> dict[str, torch.Tensor]:
    """Shapes that no number of ranks divides, dimensions smaller than the number of ranks, a scalar, several types."""
    draw = torch.Generator().manual_seed(1)
    return {
        "model.embedding": torch.randn(257, 3, generator=draw),
        "model.narrow": torch.randn(2, 7, generator=draw),
        "model.one": torch.randn(1, 5, generator=draw),
        "model.half": torch.randn(5, 3, generator=draw).bfloat16(),
        "model.buffer": torch.randn(13, generator=draw),
        "optimizer.embedding.exp_avg": torch.randn(257, 3, generator=draw),
        "optimizer.embedding.step": torch.tensor(3.0),
        "counts": torch.tensor([1, 2, 2**40]),
        "weight_decay": torch.tensor(0.1),
    }


PLAIN = ("optimizer.embedding.step", "counts", "weight_decay", "model.buffer")  # as engines leave them


def laid_out(kind: str, world: World) -> dict[str, torch.Tensor] | None:
    """The tensors as an engine of that kind holds them; None where it cannot run on so many ranks."""
    tensors = whole()
    if kind == "ddp":
        return tensors
    if kind == "zero":  # each name on one rank alone
        return {name: tensor for i, (name, tensor) in enumerate(tensors.items()) if i % world.size == world.rank}
    if world.size == 1 or (kind == "hsdp" and world.size % 2):
        return None
    if kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, world.size // 2), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (world.size,))
    dim = 1 if kind == "columns" else 0
    for name in sorted(tensors.keys() - PLAIN):  # the same order on all ranks: laying out is collective
        placements = [Replicate(), Shard(dim)] if kind == "hsdp" else [Shard(dim)]
        tensors[name] = distribute_tensor(tensors[name], mesh, placements)
    return tensors


def assert_same(tensors: dict[str, torch.Tensor], path: Path) -> None:
    expected = whole()
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert torch.equal(full, expected[name]), f"{name} from {path}"


KINDS = ("ddp", "zero", "fsdp", "columns", "hsdp")


def write_all_then_read_all(rank: int, folder: Path) -> None:
    for size in SIZES:
        if rank < size:
            world = join(rank, size, folder, f"write-{size}")
            for kind in KINDS:
                tensors = laid_out(kind, world)
                if tensors is not None:
                    checkpoint.save(folder / f"{kind}-{size}", 1, tensors, {"tokens": 7}, world, KEEP)
            world.stop()
    join(rank, 4, folder, "between")
    World(rank, 4).stop()

    paths = sorted(folder.glob("*/step-00000001"))
    assert len(paths) == 4 + 4 + 3 + 3 + 2
    for size in SIZES:
        if rank < size:
            world = join(rank, size, folder, f"read-{size}")
            for path in paths:
                read_all_ways(path, world)
            world.stop()


def read_all_ways(path: Path, world: World) -> None:
    for kind in KINDS:
        tensors = laid_out(kind, world)
        if tensors is not None:
            for tensor in tensors.values():
                (tensor.to_local() if isinstance(tensor, DTensor) else tensor).zero_()
            checkpoint.read_into(path, tensors, world)
            assert_same(tensors, path)
    assert_same(checkpoint.load(path, "", world), path)
    assert_same(dict(checkpoint.each(path, "")), path)
    chosen, manifest = checkpoint.choose(path.parent, None, print, world)
    assert chosen == path and manifest["tokens"] == 7


def test_any_writers_any_readers(tmp_path):
    assert in_processes(write_all_then_read_all, 4, tmp_path) == [0, 0, 0, 0]
    assert len(list((tmp_path / "ddp-4" / "step-00000001").glob("*.distcp"))) == 4, "all ranks share the work"
    for path in tmp_path.glob("*/step-00000001/manifest.json"):
        files = json.loads(path.read_text())["files"]
        assert files.keys() == {file.name for file in path.parent.iterdir()} - {"manifest.json"}, path


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(257, 3)
        self.out = nn.Linear(3, 2)  # on three ranks, the last one has none of it
        self.register_buffer("seen", torch.tensor(4))


def asynchronously(rank: int, folder: Path) -> None:
    world = join(rank, 3, folder, "async")
    torch.manual_seed(0)
    module = Small()
    expected = {f"model.{name}": tensor.clone() for name, tensor in module.state_dict().items()}
    fully_shard(module)
    saver = Saver(folder / "checkpoints", world, KEEP, True)
    facts = {"state": {"step": 1}}
    for step in (1, 2, 3):
        tensors = {f"model.{name}": tensor for name, tensor in module.state_dict().items()}
        saver.save(step, tensors, facts)
        # Training goes on at once: on the same tensors and facts, with collectives on its own group.
        facts["state"]["step"] += 1
        for tensor in tensors.values():
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).add_(1)
        for i in range(50):
            assert world.sum(torch.tensor(i)) == 3 * i
            assert not saver.failed
    saver.finish()
    assert [step for step, _ in checkpoint.found(folder / "checkpoints")] == [2, 3]
    assert (folder / "checkpoints" / "latest").read_text() == "step-00000003"
    for step in (2, 3):
        path = folder / "checkpoints" / checkpoint.step_name(step)
        assert checkpoint.check(path)["state"]["step"] == step
        read = checkpoint.load(path, "", world)
        for name, tensor in expected.items():
            done = tensor.clone()  # not tensor + 2: fp32 additions one by one, as above
            for _ in range(step - 1):
                done += 1
            assert torch.equal(read[name], done), (step, name)
    check_shares(world)
    world.stop()


def check_shares(world: World) -> None:
    """What all hold whole, each rank copies a part of, even by bytes; shards and what it alone holds it copies itself."""
    common = {"a": torch.zeros(100), "b": torch.zeros(60), "c": torch.zeros(40), "d": torch.zeros(90)}
    alone = {f"alone{world.rank}": torch.zeros(1000)}
    shards = {"shards": distribute_tensor(torch.zeros(9), init_device_mesh("cpu", (3,)), [Shard(0)])}
    expected = ({"a"}, {"d"}, {"b", "c"})[world.rank] | {f"alone{world.rank}", "shards"}
    assert share_out(common | alone | shards, world).keys() == expected


def test_asynchronous_saves_hold_what_was_there(tmp_path):
    assert in_processes(asynchronously, 3, tmp_path) == [0, 0, 0]


def failing(rank: int, folder: Path) -> None:
    """Rank 1 cannot write files of more than 100 kB: as where a disk is full, the kernel refuses."""
    for asynchronous in (False, True):
        world = join(rank, 2, folder, f"fail-{asynchronous}")
        saver = Saver(folder / f"checkpoints-{asynchronous}", world, KEEP, asynchronous)
        small = laid_out("fsdp", world)
        saver.save(1, small, {})
        saver.finish()
        large = {"model.w": distribute_tensor(torch.zeros(300_000), init_device_mesh("cpu", (2,)), [Shard(0)])}
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
        with pytest.raises(UserError, match="checkpoint: step 2 could not be written to .*; earlier .* untouched") as e:
            saver.save(2, large, {})
            while asynchronous and not saver.failed:
                time.sleep(0.01)
            saver.finish()
        assert "\n" not in str(e.value)
        (folder / f"said-{asynchronous}-{rank}").write_text(str(e.value))
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        world.gather(None)
        assert sorted(path.name for path in saver.folder.iterdir()) == ["latest", "step-00000001"]
        checkpoint.read_into(saver.folder / "step-00000001", small, world)
        assert_same(small, saver.folder)
        saver.save(3, large, {})  # room was made
        saver.finish()
        assert [step for step, _ in checkpoint.found(saver.folder)] == [1, 3]
        read_errors(saver.folder / "step-00000003", world)
        world.stop()


def read_errors(path: Path, world: World) -> None:
    """What does not fit one rank, or is damaged where one rank reads, is an error on all."""
    tensors = {"model.w": torch.zeros(300_000 + world.rank)}
    with pytest.raises(UserError, match=r"model.w is \[300000\] there, but \[300001\] by"):
        checkpoint.read_into(path, tensors, world)
    with pytest.raises(UserError, match=r"model.v is missing there, but \[2\] by"):
        checkpoint.read_into(path, {"model.v": torch.zeros(2)}, world)
    world.gather(None)
    if world.leader:
        with (path / "__1_0.distcp").open("r+b") as file:
            file.seek(200_000)
            file.write(b"\1")
    world.gather(None)
    said: list[str] = []
    chosen, _ = checkpoint.choose(path.parent, None, said.append, world)
    assert chosen.name == "step-00000001"
    assert "__1_0.distcp is damaged" in said[0]


def test_one_rank_that_cannot_write_fails_on_all(tmp_path):
    assert in_processes(failing, 2, tmp_path) == [0, 0]
    for asynchronous in (False, True):
        said = {path.read_text() for path in tmp_path.glob(f"said-{asynchronous}-*")}
        assert len(said) == 1 and "File too large" in said.pop()


def killed(rank: int, folder: Path) -> None:
    world = join(rank, 2, folder, "killed")
    saver = Saver(folder / "checkpoints", world, KEEP, True)
    tensors = laid_out("fsdp", world)
    saver.save(1, tensors, {})
    saver.finish()
    if rank == 1:
        checkpoint._hash_own_files = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    saver.save(2, tensors, {})
    with pytest.raises(RuntimeError):  # gloo says that the other one is gone
        saver.finish()


def test_a_rank_killed_in_a_save_leaves_the_one_before(tmp_path):
    assert in_processes(killed, 2, tmp_path) == [0, -signal.SIGKILL]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "latest",
        "step-00000001",
        "step-00000002.tmp",
    ]
    path, _ = checkpoint.choose(tmp_path / "checkpoints", None, print)
    assert_same(checkpoint.load(path, "", World()), path)
