"""Checkpoints: atomic, verified, retained, and unable to run code."""

import dataclasses
import errno
import json
import os
import pickle
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
import torch
from torch import nn

from trainer.checkpoint import format as checkpoint
from trainer.checkpoint.saver import Saver
from trainer.core.errors import Damaged, MachineError, UserError
from trainer.core.files import sealed
from trainer.engine.fsdp_engine import FsdpEngine
from trainer.runtime.distributed import World

WORLD = World()


def tensors(value=1.0):
    return {
        "model.w": torch.full((3, 5), value),
        "model.b": torch.full((2,), value, dtype=torch.bfloat16),
        "optimizer.w.step": torch.tensor(value),
        "counts": torch.tensor([1, 2, 3]),
    }


def save(folder, step, value=1.0, keep=2, every=0):
    return checkpoint.save(folder, step, tensors(value), {"tokens": step}, WORLD, checkpoint.retention(keep, every))


def steps(folder):
    return [step for step, _ in checkpoint.found(folder)]


def test_round_trip_keeps_values_types_and_facts(tmp_path):
    path = save(tmp_path, 10, 0.1)
    loaded = checkpoint.load(path, "", WORLD)
    for name, tensor in tensors(0.1).items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert set(checkpoint.load(path, "model.", WORLD)) == {"w", "b"}
    manifest = checkpoint.check(path)
    assert (manifest["step"], manifest["tokens"]) == (10, 10)
    assert (tmp_path / "latest").read_text() == path.name


def test_reading_in_place(tmp_path):
    path = save(tmp_path, 1, 0.1)
    assert checkpoint.stored(path)["model.b"] == (torch.Size([2]), torch.bfloat16)
    assert list(checkpoint.stored(path)) == sorted(tensors())
    weight, wide = nn.Parameter(torch.zeros(5, 3).T), torch.zeros(2)  # not contiguous, a parameter; another type
    checkpoint.read_into(path, {"model.w": weight, "model.b": wide}, WORLD)
    assert torch.equal(weight, tensors(0.1)["model.w"])
    assert torch.equal(wide, tensors(0.1)["model.b"].float())
    names = [
        name for name, tensor in checkpoint.each(path, "model.") if torch.equal(tensor, tensors(0.1)["model." + name])
    ]
    assert names == ["b", "w"]


def test_what_does_not_fit_is_named_and_nothing_read(tmp_path):
    path = save(tmp_path, 1)
    right = torch.zeros(3, 5)
    for name, shape, there in (("model.z", (2,), "missing"), ("model.x", (), "missing"), ("model.b", (3,), r"\[2\]")):
        with pytest.raises(UserError, match=f"{name} is {there} there, but .* by the run's config"):
            checkpoint.read_into(path, {"model.w": right, name: torch.zeros(shape)}, WORLD)
        with pytest.raises(UserError, match=f"{name} is {there} there"):
            checkpoint.check_shapes(path, {"model.w": torch.Size([3, 5]), name: torch.Size(shape)})
    checkpoint.check_shapes(path, {"model.w": torch.Size([3, 5])})
    assert not right.any()
    (path / ".metadata").unlink()
    with pytest.raises(UserError, match=".metadata cannot be read: No such file"):
        checkpoint.stored(path)


@pytest.mark.parametrize(
    "newest, every, kept",
    [(2, 0, [6, 7]), (2, 3, [3, 5, 6, 7]), (1, 3, [3, 6, 7]), (1, 7, [6, 7]), (2, 1, [1, 2, 3, 4, 5, 6, 7])],
)
def test_retention(tmp_path, newest, every, kept):
    """What is kept for good does not count among the newest."""
    for step in range(1, 8):
        save(tmp_path, step, keep=newest, every=every)
    assert steps(tmp_path) == kept


def test_a_save_leaves_later_checkpoints_alone(tmp_path):
    """Those that were found damaged have another name by then; any other is none of this save's business."""
    for step in (2, 4, 12):
        save(tmp_path, step, keep=9)
    save(tmp_path, 6, keep=2)
    assert steps(tmp_path) == [4, 6, 12]


def test_unfinished_saves_do_not_count_and_are_cleared(tmp_path):
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000002.tmp")
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000003")
    (tmp_path / "step-00000003" / "manifest.json").unlink()
    assert steps(tmp_path) == [1]
    save(tmp_path, 4)
    assert not list(tmp_path.glob("*.tmp"))


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def rewrite(path, **changes):
    """Change the manifest as somebody would who knows its digest; a value of None removes the key."""
    manifest = {**json.loads((path / "manifest.json").read_text()), **changes}
    kept = {key: value for key, value in manifest.items() if value is not None and key != "digest"}
    (path / "manifest.json").write_text(sealed(kept))


def entries(path):
    return json.loads((path / "manifest.json").read_text())["files"]


DAMAGES = {
    "a bit of the tensors": (lambda p: flip_a_bit(p / "__0_0.distcp"), "__0_0.distcp is damaged"),
    "cut off": (lambda p: (p / "__0_0.distcp").write_bytes(b"short"), "has 5 bytes"),
    "gone": (lambda p: (p / "__0_0.distcp").unlink(), "is missing"),
    "a bit of the metadata": (lambda p: flip_a_bit(p / ".metadata"), ".metadata is damaged"),
    "no JSON": (lambda p: (p / "manifest.json").write_text("{"), "manifest.json: is not valid JSON"),
    "no format": (lambda p: rewrite(p, format=None), "no valid format"),
    "an odd format": (lambda p: rewrite(p, format="2"), "no valid format"),
    "no digest": (
        lambda p: (p / "manifest.json").write_text(json.dumps({"format": 2, "step": 2, "files": entries(p)})),
        "no digest",
    ),
    "another step": (lambda p: rewrite(p, step=7), "is of step 7"),
    "no files": (lambda p: rewrite(p, files={}), "does not list .metadata"),
    "files of another kind": (lambda p: rewrite(p, files=[]), "does not list .metadata"),
    "a file not listed": (lambda p: rewrite(p, files={".metadata": entries(p)[".metadata"]}), "is not listed"),
    "a file elsewhere": (lambda p: rewrite(p, files={**entries(p), "../x": {}}), "is not the name of a file"),
    "a size that is none": (lambda p: rewrite(p, files={**entries(p), "a": {"bytes": "1"}}), "size and hash of a"),
    "one more shard": (lambda p: (p / "__1_0.distcp").write_bytes(b""), "__1_0.distcp is not listed"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_newest_is_named_and_the_one_before_is_used(tmp_path, kind):
    damage, expected = DAMAGES[kind]
    first = save(tmp_path, 1)
    damage(save(tmp_path, 2))
    said = []
    path, manifest = checkpoint.choose(tmp_path, None, said.append)
    assert manifest["step"] == 1
    assert expected in said[0]
    assert steps(tmp_path) == [1, 2], "who only reads changes nothing"
    damage(path)
    with pytest.raises(UserError, match="every checkpoint in .* is damaged"):
        checkpoint.choose(tmp_path, None, said.append)
    assert path == first


def test_what_is_damaged_is_kept_under_another_name(tmp_path, capsys):
    for step in (1, 2):
        save(tmp_path, step)
    flip_a_bit(tmp_path / "step-00000002" / "__0_0.distcp")
    damaged = (tmp_path / "step-00000002" / "__0_0.distcp").read_bytes()
    path, _ = checkpoint.go_on_from(tmp_path, WORLD)
    assert path.name == "step-00000001" == (tmp_path / "latest").read_text()
    assert "step-00000002 is damaged; it is kept as step-00000002.damaged" in capsys.readouterr().err
    save(tmp_path, 2)
    save(tmp_path, 3)
    save(tmp_path, 4)
    assert steps(tmp_path) == [3, 4]
    assert (tmp_path / "step-00000002.damaged" / "__0_0.distcp").read_bytes() == damaged


@pytest.mark.parametrize("name", ["manifest.json", ".metadata", "__0_0.distcp"])
def test_an_error_of_reading_is_no_damage(tmp_path, monkeypatch, name):
    """A network file system may answer the next time: the run must not go back, nor the newer checkpoint be lost."""
    for step in (1, 2):
        save(tmp_path, step)
    opened = Path.open

    def stale(path, *args, **kwargs):
        if path == tmp_path / "step-00000002" / name:
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", stale)
    with pytest.raises(MachineError, match="Stale file handle"):
        checkpoint.choose(tmp_path, None, print)


def test_a_later_format_is_refused_and_not_passed_over(tmp_path):
    save(tmp_path, 1)
    rewrite(save(tmp_path, 2), format=99, crescendo="9.1.0")
    with pytest.raises(
        UserError, match="has format 99, of crescendo-lm 9.1.0; this version reads formats up to 2"
    ) as refusal:
        checkpoint.choose(tmp_path, None, print)
    assert not isinstance(refusal.value, Damaged)


def test_a_manifest_without_a_digest_is_of_the_first_format(tmp_path, capsys):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({"format": 1, "step": 1, "files": manifest["files"]}))
    assert checkpoint.go_on_from(tmp_path, WORLD)[0] == path
    assert "manifests have no digest" in capsys.readouterr().err


def test_odd_names_are_no_checkpoints(tmp_path):
    path = save(tmp_path, 1)
    for name in ("step-\u00b2", "step-", "step-1", "step-0000000\u0661", "step-00000001.damaged"):
        shutil.copytree(path, tmp_path / name)
    assert steps(tmp_path) == [1]


def test_choosing_a_step(tmp_path):
    assert checkpoint.choose(tmp_path, None, print) is None
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert checkpoint.choose(tmp_path, 1, print)[1]["step"] == 1
    with pytest.raises(UserError, match=r"no checkpoint of step 7 in .* \(available: 1, 2\)"):
        checkpoint.choose(tmp_path, 7, print)


@pytest.mark.parametrize("moment", ["dcp.save", "manifest", "rename"])
def test_a_failing_save_leaves_the_last_one(tmp_path, monkeypatch, moment):
    save(tmp_path, 1, 1.0)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if moment == "dcp.save":
        monkeypatch.setattr(checkpoint.dcp, "save", fail)
    elif moment == "manifest":
        monkeypatch.setattr(checkpoint, "write_file", fail)
    else:
        monkeypatch.setattr("pathlib.Path.rename", fail)
    with pytest.raises(
        UserError, match="step 2 could not be written .*No space left.*earlier checkpoints are untouched"
    ):
        save(tmp_path, 2, 2.0)
    monkeypatch.undo()
    assert steps(tmp_path) == [1]
    assert not list(tmp_path.glob("*.tmp"))
    assert torch.equal(checkpoint.load(tmp_path / "step-00000001", "", WORLD)["model.w"], tensors(1.0)["model.w"])


@pytest.fixture
def slow_writes(monkeypatch):
    """Writing waits until the event is set."""
    go, write = threading.Event(), checkpoint.dcp.save

    def wait(*args, **kwargs):
        assert go.wait(20)
        return write(*args, **kwargs)

    monkeypatch.setattr(checkpoint.dcp, "save", wait)
    yield go
    go.set()


def test_an_asynchronous_save_holds_what_was_there(tmp_path, slow_writes):
    saver = Saver(tmp_path, WORLD, checkpoint.retention(2, 0), True)
    live, facts = tensors(1.0), {"state": {"tokens": 1}}
    saver.save(1, live, facts)
    for tensor in live.values():
        tensor.add_(1)  # training goes on
    facts["state"]["tokens"] = 2
    assert not saver.failed
    assert steps(tmp_path) == [] and not (tmp_path / "latest").exists()

    second = threading.Thread(target=saver.save, args=(2, live, facts))
    second.start()
    second.join(0.1)
    assert second.is_alive(), "one save at a time"
    slow_writes.set()
    second.join()
    saver.finish()
    assert steps(tmp_path) == [1, 2]
    for step in (1, 2):
        path = tmp_path / checkpoint.step_name(step)
        read = checkpoint.load(path, "", WORLD)
        assert all(torch.equal(read[name], tensor + (step - 1)) for name, tensor in tensors(1.0).items())
        assert checkpoint.check(path)["state"]["tokens"] == step


@pytest.mark.parametrize("call", ["failed", "save", "finish"])
def test_a_failed_asynchronous_save_is_raised_by_the_next_call(tmp_path, monkeypatch, call):
    saver = Saver(tmp_path, WORLD, checkpoint.retention(2, 0), True)
    saver.save(1, tensors(1.0), {})
    saver.finish()

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.dcp, "save", fail)
    saver.save(2, tensors(2.0), {})
    with pytest.raises(UserError, match="step 2 could not be written .*No space left"):
        while call == "failed" and not saver.failed:
            time.sleep(0.001)
        if call == "save":
            saver.save(3, tensors(3.0), {})
        else:
            saver.finish()
    monkeypatch.undo()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["latest", "step-00000001"]
    saver.finish()  # told once
    saver.save(4, tensors(4.0), {})
    saver.finish()
    assert steps(tmp_path) == [1, 4]


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from trainer.checkpoint import format as checkpoint
from trainer.checkpoint.saver import Saver
from trainer.runtime.distributed import World

moment, folder = sys.argv[1], Path(sys.argv[2])
saver = Saver(folder, World(), checkpoint.retention(2, 0), True)
saver.save(1, {"w": torch.ones(9)}, {})
saver.finish()
setattr(checkpoint, moment, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
saver.save(2, {"w": torch.zeros(9)}, {})
saver.finish()
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["_hash_own_files", "_publish", "write_file"])
def test_killed_in_an_asynchronous_save(tmp_path, moment):
    (tmp_path / "script.py").write_text(KILLED)
    assert processes.run(tmp_path / "script.py", moment, tmp_path).codes == [-signal.SIGKILL]
    assert steps(tmp_path) == [1]
    assert (tmp_path / "step-00000002.tmp").is_dir()
    assert (tmp_path / "latest").read_text() == "step-00000001"
    path, _ = checkpoint.choose(tmp_path, None, print)
    assert torch.equal(checkpoint.load(path, "", WORLD)["w"], torch.ones(9))


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["raise SystemExit(3)", "raise RuntimeError('training failed')"])
def test_a_save_under_way_keeps_no_failing_process_alive(tmp_path, ending):
    code = KILLED.split("setattr")[0] + (
        f"import time\ncheckpoint.dcp.save = lambda *args, **kwargs: time.sleep(1000)\nsaver.save(2, {{}}, {{}})\n{ending}"
    )
    (tmp_path / "script.py").write_text(code)
    assert processes.run(tmp_path / "script.py", "", tmp_path).returncode in (1, 3)
    assert steps(tmp_path) == [1]


def test_offloaded_moments_are_stored_and_read_where_they_are():
    """A mesh of another device than theirs, as with engine.offload on a GPU: here one of tensors without storage."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = dist.DeviceMesh("meta", [0, 1], _init_backend=False)
        whole = DTensor.from_local(torch.empty(3, 4, device="meta"), mesh, [Shard(0)], shape=(6, 4), stride=(4, 1))
        moments = torch.ones(3, 4, dtype=torch.bfloat16)
        engine = SimpleNamespace(local={"weight": torch.empty(3, 4)}, _shards={"weight": whole})
        stored = FsdpEngine.as_stored(engine, "weight", moments)
    finally:
        dist.destroy_process_group()
    assert stored.shape == (6, 4) and stored.dtype == torch.bfloat16
    assert stored.to_local().data_ptr() == moments.data_ptr()


@pytest.mark.gpu("training")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_asynchronous_saves_from_a_gpu(tmp_path):
    """Whole tensors and shards: the copies are pinned, used again, and made before what the GPU is told next."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        whole = torch.zeros(4096, 4096, device="cuda")
        shards = distribute_tensor(torch.zeros(4096, 4096, device="cuda"), init_device_mesh("cuda", (1,)), [Shard(0)])
        saver = Saver(tmp_path, WORLD, checkpoint.retention(2, 0), True)
        saver.save(1, {"whole": whole, "shards": shards}, {})
        first = saver._copies["whole"].data_ptr()
        assert saver._copies["whole"].is_pinned() and saver._copies["shards"].to_local().is_pinned()
        whole.add_(1)
        shards.add_(1)
        saver.save(2, {"whole": whole, "shards": shards}, {})
        whole.add_(1)
        shards.add_(1)
        saver.finish()
        assert saver._copies["whole"].data_ptr() == first
        for step in (1, 2):
            path = tmp_path / checkpoint.step_name(step)
            read = {"whole": torch.zeros_like(whole), "shards": torch.zeros_like(shards)}
            checkpoint.read_into(path, read, WORLD)
            assert (read["whole"] == step - 1).all() and (read["shards"].to_local() == step - 1).all()
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_for_real(tmp_path, asynchronous):
    """A file system of 1 MiB, where this user may mount one."""
    small = tmp_path / "small"
    small.mkdir()
    if os.system(f"mount -t tmpfs -o size=1m none {small} 2>/dev/null"):
        pytest.skip("mounting a small file system needs root")
    try:
        save(small, 1)
        big = {"model.w": torch.zeros(1 << 20)}
        saver = Saver(small, WORLD, checkpoint.retention(2, 0), asynchronous)
        with pytest.raises(UserError, match="step 2 could not be written .* No space left on device"):
            saver.save(2, big, {})
            saver.finish()
        assert steps(small) == [1]
        assert not list(small.glob("*.tmp"))
        checkpoint.check(small / "step-00000001")
        save(small, 3)
        assert steps(small) == [1, 3]
    finally:
        os.system(f"umount {small}")


class Trap:
    def __reduce__(self):
        return (os.system, ("touch pwned",))


def test_metadata_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path, 1)
    (path / ".metadata").write_bytes(pickle.dumps(Trap()))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][".metadata"] = {
        "bytes": (path / ".metadata").stat().st_size,
        "xxh64": checkpoint._hash(path / ".metadata"),
    }
    (path / "manifest.json").write_text(json.dumps(manifest))  # whoever can write the file can write its hash
    with pytest.raises(UserError, match="asks for .*system, which no checkpoint needs"):
        checkpoint.load(path, "", WORLD)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("place", ["../elsewhere.distcp", "/etc/passwd", "."])
def test_metadata_leads_to_no_other_file(tmp_path, place):
    path = save(tmp_path, 1)
    shutil.copy(path / "__0_0.distcp", tmp_path / "elsewhere.distcp")
    metadata = pickle.loads((path / ".metadata").read_bytes())  # noqa: S301 (written here)
    metadata.storage_data = {
        key: dataclasses.replace(entry, relative_path=place) for key, entry in metadata.storage_data.items()
    }
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(Damaged, match="is not the name of a file in this folder"):
        checkpoint.load(path, "", WORLD)


def test_tensors_cannot_run_code(tmp_path, monkeypatch):
    """The shards hold torch.save'd tensors: a pickle in place of one is refused by the weights-only loader."""
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path, 1)
    trap = tmp_path / "trap.pt"
    torch.save(Trap(), trap)
    entry = max((path / "__0_0.distcp").stat().st_size, trap.stat().st_size)
    (path / "__0_0.distcp").write_bytes(trap.read_bytes().ljust(entry, b"\0"))
    with pytest.raises(UserError, match="cannot be read: UnpicklingError: Weights only load failed"):
        checkpoint.load(path, "", WORLD)
    assert not (tmp_path / "pwned").exists()
