"""How a run comes to its dataset: from any folder, within bounds, and the same on every rank."""

import errno
import re
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import tiny_values

from trainer.core.config import RunConfig
from trainer.core.errors import MachineError, UserError
from trainer.core.settings import build
from trainer.data import obtain
from trainer.data.obtain import absolute_paths, agree_on_dataset, obtain_dataset, wait_for
from trainer.data.stream import find_dataset
from trainer.runtime.distributed import World


def settled(given, before=None, said=None):
    """What `given` becomes; before: data.path of the run that it goes on with."""
    run = {} if before is None else {"data": {"path": str(before)}}
    values = {"data": {**run.get("data", {}), **given.get("data", {})}}
    return absolute_paths(given, values, run, [].append if said is None else said.append)["data"]["path"]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A current folder without data, beside one with."""
    (tmp_path / "first" / "data").mkdir(parents=True)
    (tmp_path / "second").mkdir()
    monkeypatch.chdir(tmp_path / "second")
    return tmp_path


def test_paths_become_absolute(elsewhere, monkeypatch):
    monkeypatch.chdir(elsewhere / "first")
    given = {"seed": 3, "data": {"path": "data", "cache": "~/shards", "threads": 2}}
    data = {"path": str(elsewhere / "first" / "data"), "cache": str(Path.home() / "shards"), "threads": 2}
    assert absolute_paths(given, given, {}, print) == {"seed": 3, "data": data}
    assert settled({"data": {"path": "s3://bucket/data"}}) == "s3://bucket/data"
    assert absolute_paths({"data": None}, {}, {}, print) == {"data": None}
    with pytest.raises(UserError, match="^data.path: is empty"):
        settled({"data": {"path": ""}})


def test_a_run_goes_on_with_its_data_from_another_folder(elsewhere):
    """A config says `data`; the run has read an absolute path. It must not be prepared again here."""
    said = []
    data = elsewhere / "first" / "data"
    assert settled({"data": {"path": "data"}}, data, said) == str(data)
    assert re.fullmatch(f"data.path: there is nothing at {elsewhere}/second/data; using {data}, .*", said[0])
    assert settled({}, data) == str(data)
    data.rmdir()
    assert settled({"data": {"path": "data"}}, data) == str(elsewhere / "second" / "data")


def test_moved_data_may_be_named(elsewhere):
    shutil.move(elsewhere / "first" / "data", elsewhere / "moved")
    assert settled({"data": {"path": "../moved"}}, elsewhere / "first" / "data") == str(elsewhere / "second/../moved")


def test_an_old_run_with_a_relative_path_says_what_to_do(elsewhere, monkeypatch):
    with pytest.raises(
        UserError, match=f"started with data, and there is no such folder in {elsewhere}/second; continue in"
    ):
        settled({}, "data")
    monkeypatch.chdir(elsewhere / "first")
    assert settled({}, "data") == str(elsewhere / "first" / "data")


# -- waiting for rank 0 ------------------------------------------------------------------------------------------------------

OTHER = World(rank=3, size=4)


def test_a_rank_that_sees_nothing_gives_up_and_names_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    monkeypatch.setattr(obtain, "UNSEEN_SECONDS", 0.3)
    config = build(RunConfig, {"data": {"path": str(tmp_path / "data"), "source": "x.txt"}})
    with pytest.raises(
        MachineError, match=f"rank 3 on node7 has seen nothing at {tmp_path}/data for 0 s, and no sign .*share"
    ):
        obtain_dataset(config, OTHER)


def test_waiting_goes_on_while_rank_0_prepares(tmp_path, monkeypatch):
    """Longer than where nothing is seen, and longer than the limit as long as there is a sign of life."""
    monkeypatch.setattr(obtain, "UNSEEN_SECONDS", 0.3)
    monkeypatch.setattr(obtain, "BEAT_SECONDS", 0.1)
    folder = tmp_path / "deep" / "data"

    def prepare():
        with obtain.beating(obtain.beat_of(folder)):
            time.sleep(1.2)
            folder.mkdir()

    thread = threading.Thread(target=prepare)
    thread.start()
    wait_for(folder, OTHER, 0.6)
    thread.join()
    assert [path.name for path in folder.parent.iterdir()] == ["data"]
    folder.rename(folder.with_name(".data.partial"))
    with pytest.raises(MachineError, match="its preparation makes no progress"):
        wait_for(folder, OTHER, 0.4)


# -- the same for all -----------------------------------------------------------------------------------------------------------


class Two(World):
    """Rank 0 of two, and what the other one sees."""

    def __init__(self, other):
        super().__init__(0, 2, 0, 1)
        self.other, self.said = other, []

    def gather(self, value):
        return [value, (self.other, "node8")]

    def say(self, text):
        self.said.append(text)


def test_all_ranks_see_the_same_dataset_or_none_starts(copy, tmp_path):
    config = build(RunConfig, tiny_values(copy, tmp_path / "r"))
    same = find_dataset(config.data)
    assert agree_on_dataset(config, World()) == same
    world = Two(same.fingerprint)
    assert agree_on_dataset(config, world) == same and world.said == []
    with pytest.raises(
        UserError, match="rank 1 on node8 sees a different dataset at .* than rank 0 on .* .fingerprints 000000000000"
    ):
        agree_on_dataset(config, Two("0" * 64))
    with pytest.raises(MachineError, match=r"no network \(rank 1 on node8\)"):
        agree_on_dataset(config, Two(MachineError("no network")))
    shutil.rmtree(copy)
    with pytest.raises(UserError, match=r"no dataset at .*\(rank 0 on"):
        agree_on_dataset(config, Two(same.fingerprint))
    with pytest.raises(UserError, match="no dataset at [^(]*$"):
        agree_on_dataset(config, World())


def test_an_error_of_the_system_is_told_to_all(monkeypatch):
    def stale(*words):
        raise OSError(errno.ESTALE, "Stale file handle", "/mnt/data")

    monkeypatch.setattr(obtain, "find_dataset", stale)
    with pytest.raises(MachineError, match=r"^data.path: /mnt/data: Stale file handle \(rank 0 on"):
        agree_on_dataset(build(RunConfig, {"data": {"path": "data"}}), Two("0" * 64))


def test_that_counts_have_no_digest_is_said(monkeypatch):
    info = SimpleNamespace(sealed=False, fingerprint="0" * 64)
    monkeypatch.setattr(obtain, "find_dataset", lambda data, say: info)
    monkeypatch.setattr(obtain, "DatasetInfo", SimpleNamespace)
    world = Two("0" * 64)
    agree_on_dataset(build(RunConfig, {"data": {"path": "data"}}), world)
    (line,) = world.said
    assert line.startswith("data.path: data was prepared before datasets had digests")
