"""Checkpoints: atomic, verified, retained, and unable to run code."""

import json
import os
import pickle
import shutil

import pytest
import torch

from trainer import checkpoint
from trainer.engine.distributed import World
from trainer.errors import UserError

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


def test_retention(tmp_path):
    for step in range(1, 8):
        save(tmp_path, step, keep=2, every=3)
    assert steps(tmp_path) == [3, 6, 7]


def test_a_save_clears_later_checkpoints_that_were_passed_over(tmp_path):
    """They are damaged (else the run would have gone on from them) and must not push good ones out."""
    for step in (2, 4, 12):
        save(tmp_path, step, keep=9)
    save(tmp_path, 6, keep=2)
    assert steps(tmp_path) == [4, 6]


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


@pytest.mark.parametrize(
    "damage, expected",
    [
        (lambda p: flip_a_bit(p / "__0_0.distcp"), "__0_0.distcp is damaged"),
        (lambda p: (p / "__0_0.distcp").write_bytes(b"short"), "has 5 bytes"),
        (lambda p: (p / "__0_0.distcp").unlink(), "is missing"),
        (lambda p: flip_a_bit(p / ".metadata"), ".metadata is damaged"),
        (lambda p: (p / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda p: (p / "manifest.json").write_text('{"format": 99, "files": {}}'), "has format 99"),
        (lambda p: (p / "manifest.json").write_text('{"format": 1, "files": []}'), "manifest.json cannot be read"),
        (lambda p: (p / "manifest.json").write_text('{"format": 1, "files": {}}'), "manifest.json cannot be read"),
    ],
)
def test_a_damaged_newest_is_named_and_the_one_before_is_used(tmp_path, damage, expected):
    save(tmp_path, 1)
    damage(save(tmp_path, 2))
    said = []
    path, manifest = checkpoint.choose(tmp_path, None, said.append)
    assert manifest["step"] == 1
    assert expected in said[0]
    damage(path)
    with pytest.raises(UserError, match="every checkpoint in .* is damaged"):
        checkpoint.choose(tmp_path, None, said.append)


def test_choosing_a_step(tmp_path):
    assert checkpoint.choose(tmp_path, None, print) is None
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert checkpoint.choose(tmp_path, 1, print)[1]["step"] == 1
    with pytest.raises(UserError, match=r"no checkpoint of step 7 in .* \(there: 1, 2\)"):
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


@pytest.mark.slow
def test_a_full_disk_for_real(tmp_path):
    """A file system of 1 MiB, where this user may mount one."""
    small = tmp_path / "small"
    small.mkdir()
    if os.system(f"mount -t tmpfs -o size=1m none {small} 2>/dev/null"):
        pytest.skip("mounting a small file system needs root")
    try:
        save(small, 1)
        big = {"model.w": torch.zeros(1 << 20)}
        with pytest.raises(UserError, match="step 2 could not be written"):
            checkpoint.save(small, 2, big, {}, WORLD, checkpoint.retention(2, 0))
        assert steps(small) == [1]
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
